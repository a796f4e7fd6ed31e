"""Streaming tensors into modules: strictness is in test_weights.py; here where they go and back."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from larimar_jax import decoders, encoders, weights
from larimar_jax.train import sharding
from larimar_jax.weights import fill
from larimar_jax.weights.safetensors import Safetensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDERS = sorted(path.name for path in GOLDEN.glob("tiny_*"))


def abstract(name):
    said = json.loads((GOLDEN / name / "config.json").read_text())
    family = (encoders if "bert" in name else decoders).family(said["model_type"])
    config = family.CONFIG.from_huggingface(said)
    return family, nnx.eval_shape(lambda: family(config, rngs=nnx.Rngs(0)))


def source(name):
    return Safetensors(GOLDEN / name / "model.safetensors")


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_written_is_what_was_read(name):
    family, skeleton = abstract(name)
    file = source(name)
    model = fill.fill(skeleton, family.hf_keys, file)
    written = dict(fill.to_source(model, family.hf_keys))
    read = {n: file.read(n) for n in file.shapes()}
    # A prefix that some files leave out is written; ids of positions and masks are not.
    for known in ("bert.", "transformer."):
        read = {known + n if known + n in written else n: t for n, t in read.items()}
    assert written.keys() <= read.keys()
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor, read[key])


@pytest.mark.parametrize("name", FOLDERS)
def test_sizes_are_written_as_they_were_read(name):
    family, skeleton = abstract(name)
    said = skeleton.config.to_huggingface()
    again = family.CONFIG.from_huggingface(json.loads(json.dumps(said)))
    # How an encoder pools is not a size, and not in config.json.
    assert again == skeleton.config


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_tensors_stream_onto_a_mesh(shape):
    family, skeleton = abstract("tiny_llama")
    mesh = sharding.make_mesh(shape)
    whole = fill.fill(skeleton, family.hf_keys, source("tiny_llama"))
    table = [(pattern, P(*axes), bool(more)) for pattern, axes, *more in family.sharding_rules]
    shapes = {"/".join(map(str, p)): a for p, a in nnx.to_flat_state(nnx.state(skeleton))}
    places = sharding.shardings(mesh, shapes, table)

    def place(name, _):
        return places[name]

    parted = fill.fill(skeleton, family.hf_keys, source("tiny_llama"), where=place)
    split = 0
    for (path, one), (_, other) in zip(
        nnx.to_flat_state(nnx.state(whole)), nnx.to_flat_state(nnx.state(parted)), strict=True
    ):
        name = "/".join(map(str, path))
        assert other[...].sharding.is_equivalent_to(place(name, one.shape), len(one.shape))
        split += not other[...].sharding.is_fully_replicated
        np.testing.assert_array_equal(one[...], other[...])
    assert bool(split) == (shape != (8, 1, 1))


def test_a_process_reads_only_the_layers_that_its_devices_hold():
    """Layers split over devices: the first half's devices alone ask for the first half's tensors."""
    family, skeleton = abstract("tiny_llama")
    depth = skeleton.config.depth
    mesh = jax.make_mesh((depth,), ("x",), (AxisType.Auto,), devices=jax.devices()[:depth])

    class Counted(Safetensors):
        names: list[str] = []

        def read(self, name):
            self.names.append(name)
            return super().read(name)

    def place(name, shape):
        spec = P("x") if name.startswith("layers") else P()
        return NamedSharding(mesh, spec)

    file = Counted(GOLDEN / "tiny_llama" / "model.safetensors")
    model = fill.fill(skeleton, family.hf_keys, file, where=place)
    assert sorted(file.names) == sorted(file.shapes())  # once each, however many devices
    assert model.layers.gate.kernel[...].sharding.spec == P("x")


def test_parameters_are_kept_in_the_dtype_asked_for():
    wide, _ = weights.load_encoder("minilm")
    narrow, _ = weights.load_encoder("minilm", dtype="bfloat16", param_dtype="bfloat16")
    for (path, one), (_, other) in zip(
        nnx.to_flat_state(nnx.state(wide)), nnx.to_flat_state(nnx.state(narrow)), strict=True
    ):
        assert other.dtype == jnp.bfloat16, path
        np.testing.assert_array_equal(one[...].astype(jnp.bfloat16), other[...])
    tokens = jnp.ones((1, 8), jnp.int32)
    pooled = [tower(tokens, tokens > 0) for tower in (wide, narrow)]
    assert float(pooled[0][0] @ pooled[1][0]) > 0.999


def test_special_tokens_lengthen_the_vocabulary():
    """§2: rows appended at the end, the mean of the others; a table of other shape is an error."""
    family, skeleton = abstract("tiny_gpt2")
    said = json.loads((GOLDEN / "tiny_gpt2" / "config.json").read_text())
    config = family.CONFIG.from_huggingface({**said, "vocab_size": said["vocab_size"] + 3})
    longer = nnx.eval_shape(lambda: family(config, rngs=nnx.Rngs(0)))
    before = fill.fill(skeleton, family.hf_keys, source("tiny_gpt2")).embeddings
    after = fill.fill(longer, family.hf_keys, source("tiny_gpt2"), more_rows=3).embeddings
    np.testing.assert_array_equal(after[:-3], before)
    np.testing.assert_allclose(after[-3:], np.tile(before.mean(0), (3, 1)), rtol=1e-5, atol=1e-7)
    with pytest.raises(weights.WeightsError, match="misshapen: .*wte.weight"):
        fill.fill(longer, family.hf_keys, source("tiny_gpt2"), more_rows=2)


@pytest.mark.parametrize(
    ("template", "name", "layer"),
    [
        ("[bert.]encoder.{layer}.LayerNorm.(weight|gamma)", "encoder.12.LayerNorm.gamma", "12"),
        ("[bert.]encoder.{layer}.LayerNorm.(weight|gamma)", "bert.encoder.0.LayerNorm.weight", "0"),
        ("cls.*", "cls.predictions.bias", None),
    ],
)
def test_templates_of_names(template, name, layer):
    match = fill.pattern(template).fullmatch(name)
    assert match and match.groupdict().get("layer") == layer
    assert not fill.pattern(template).fullmatch(name + "x" if "*" not in template else "x" + name)
    assert not fill.pattern(template).fullmatch(name.replace(".", "_", 1))


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
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=True
    )
    before, after, size = json.loads(done.stdout.splitlines()[-1])
    assert size == 134_515_008 * 4
    assert after - before <= 1.5 * size, (after - before) / size


class Stub:
    """A source of one tensor."""

    path = "x.safetensors"

    def __init__(self, name, value):
        self.name, self.value = name, value

    def shapes(self):
        return {self.name: self.value if isinstance(self.value, tuple) else self.value.shape}

    def read(self, name):
        return self.value


@pytest.mark.parametrize("shape", [(1,) * 65, (0, 1 << 63), (1 << 62, 1 << 62), (1 << 80,)])
def test_a_shape_that_numpy_lacks_is_one_of_the_misfits(shape):
    family, skeleton = abstract("tiny_gpt2")
    with pytest.raises(weights.WeightsError, match="misshapen: transformer.wpe.weight gives"):
        fill.fill(skeleton, family.hf_keys, Stub("transformer.wpe.weight", shape))


def test_a_layer_of_too_many_digits_is_no_layer():
    name = f"transformer.h.{'1' * 5000}.ln_1.weight"
    family, skeleton = abstract("tiny_gpt2")
    with pytest.raises(weights.WeightsError, match="unused: transformer.h.1111"):
        fill.fill(skeleton, family.hf_keys, Stub(name, (32,)))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.float32([1.0, 7e4]), "float16", "70000.0, which float16 cannot"),
        (np.float64([1.0, -1e39]), "float32", "which float32 cannot"),
        (np.float32([1.0, np.nan]), "float32", "not finite"),
        (np.float32([1.0, 6e4]), "float16", None),
    ],
)
def test_numbers_stay_finite_in_the_dtype_that_they_are_kept_in(value, dtype, message):
    norm = functools.partial(nnx.LayerNorm, 2, use_bias=False, param_dtype=dtype)
    module = nnx.eval_shape(lambda: norm(rngs=nnx.Rngs(0)))
    keys = [("a", "scale", "copy")]
    if message is None:
        kept = fill.fill(module, keys, Stub("a", value)).scale
        np.testing.assert_array_equal(kept, value.astype(dtype))
        return
    with pytest.raises(weights.WeightsError, match=message):
        fill.fill(module, keys, Stub("a", value))
