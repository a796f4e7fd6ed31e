"""GGUF files: every quantisation, every architecture, metadata that no model has, headers that lie."""

import dataclasses
import json
import math
import os
import pathlib
import struct

import gguf
import numpy as np
import pytest

from larimar_jax import decoders, rotary, weights
from larimar_jax.weights import Tokenizer, WeightsError
from larimar_jax.weights.gguf import NAMES, Gguf
from larimar_jax.weights.safetensors_files import Safetensors
from larimar_jax.weights.torch_checkpoint import TorchCheckpoint

GOLDEN = pathlib.Path(__file__).parent / "golden"
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def write(path, tensors, architecture="llama", tokenizer=None, **metadata):
    """A GGUF file of tensors (arrays, or (bytes, kind) pairs), metadata and a tokenizer."""
    writer = gguf.GGUFWriter(path, architecture)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        add[type(value)](f"{architecture}.{key.replace('__', '.')}", value)
    if tokenizer is not None:
        vocabulary = tokenizer.backend.get_vocab()
        merges = json.loads(tokenizer.backend.to_str())["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
        writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SIZES = dict(
    embedding_length=8,
    block_count=1,
    feed_forward_length=8,
    context_length=64,
    attention__head_count=2,
    attention__layer_norm_rms_epsilon=1e-5,
)


def small(path, tensors=None, **changed):
    """A Llama of one matrix, with a head of four numbers."""
    ones = np.ones((8, 8), np.float32)
    tensors = {"token_embd.weight": ones, "blk.0.attn_q.weight": ones, **(tensors or {})}
    return write(path, tensors, **{**SIZES, **changed})


def golden(name):
    """The configuration, its sizes and the tensors of a golden folder."""
    source = Safetensors(GOLDEN / name / "model.safetensors")
    config = json.loads((GOLDEN / name / "config.json").read_text())
    sizes = decoders.family(config["model_type"]).CONFIG.from_huggingface(config)
    # GPT-2's files leave out a prefix that ours have.
    prefix = "transformer." if "wte.weight" in source.shapes() else ""
    return sizes, {prefix + n: source.read(n) for n in source.shapes()}


def renamed(tensors, architecture):
    """Tensors under llama.cpp's names."""
    names = {theirs: own for own, (theirs, _) in NAMES[architecture].items()}
    result = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        layer = next((part for part in stem.split(".") if part.isdigit()), "")
        own = names.get(stem.replace(f".{layer}.", ".{layer}.", 1) if layer else stem, stem)
        result[own.replace("{layer}", layer) + "." + suffix] = tensor
    return result


def as_gguf(path, sizes, tensors, architecture, **more):
    """A file of a golden folder as llama.cpp writes it, with metadata that differ."""
    metadata = dict(
        embedding_length=sizes.width,
        block_count=sizes.depth,
        feed_forward_length=sizes.mlp,
        context_length=sizes.max_length,
        attention__head_count=sizes.heads,
    )
    if architecture == "gpt2":
        metadata |= dict(attention__layer_norm_epsilon=sizes.norm_eps)
        tensors = {n: t.T if "c_" in n and t.ndim == 2 else t for n, t in tensors.items()}
    else:
        metadata |= dict(
            attention__head_count_kv=sizes.kv_heads,
            attention__key_length=sizes.head_size,
            attention__layer_norm_rms_epsilon=sizes.norm_eps,
            rope__freq_base=sizes.rope_theta,
        )
        if (scaling := sizes.rope_scaling) is not None:
            metadata |= dict(
                rope__scaling__type=scaling.kind,
                rope__scaling__factor=scaling.factor,
                rope__scaling__original_context_length=scaling.original_length,
                rope__scaling__yarn_beta_fast=scaling.fast,
                rope__scaling__yarn_beta_slow=scaling.slow,
            )
    if architecture == "llama":
        tensors = {name: interleaved(sizes, name, tensor) for name, tensor in tensors.items()}
    return write(path, renamed(tensors, architecture), architecture, **metadata | more)


def interleaved(sizes, name, tensor):
    """llama.cpp's order of query and key rows, which `Gguf` undoes."""
    if not ("q_proj" in name or "k_proj" in name):
        return tensor
    heads = sizes.heads if "q_proj" in name else sizes.kv_heads
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def same_tensors(source, tensors):
    assert source.shapes() == {name: tensor.shape for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor)


@pytest.mark.parametrize("kind", KINDS + K_QUANTS)
def test_every_kind_of_number(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    if kind.name in KINDS:
        data = gguf.quantize(rng.normal(size=(3, 256)).astype(np.float32), kind)
    else:
        data = rng.integers(0, 255, (3, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        data = data & 0x3B  # scales are float16 among the bytes; any of them may be infinite
    want = gguf.dequantize(data, kind)
    source = Gguf(write(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": (data, kind)}))
    name = "model.layers.0.mlp.up_proj.weight"
    assert source.shapes() == {name: (3, 256)}
    assert source.read(name).dtype == np.float32 and np.abs(want).max() > 0
    np.testing.assert_array_equal(source.read(name), want)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("gpt2", "tiny_gpt2"), ("llama", "tiny_llama_biased"), ("qwen2", "tiny_qwen2")],
)
def test_tensors_and_sizes_are_those_of_the_folder(tmp_path, architecture, name):
    """Rows of query and key, and their biases, are permuted for Llama alone."""
    want, tensors = golden(name)
    source = Gguf(as_gguf(tmp_path / "x.gguf", want, tensors, architecture))
    same_tensors(source, tensors)
    sizes = decoders.family(architecture).CONFIG.from_huggingface(source.config())
    assert sizes == dataclasses.replace(want, norm_eps=sizes.norm_eps)
    assert sizes.norm_eps == pytest.approx(want.norm_eps)  # float32 in the file


def test_a_llama_with_its_tokenizer_is_the_model_of_its_folder(tmp_path):
    want, tensors = golden("tiny_llama")
    tokenizer = Tokenizer.train(["a few words of text to learn from, a few words"], 300)
    more = [(0, tokenizer.vocab_size - want.vocab_size), (0, 0)]
    longer = ("model.embed_tokens.weight", "lm_head.weight")
    tensors = {n: np.pad(t, more) if n in longer else t for n, t in tensors.items()}
    path = as_gguf(tmp_path / "x.gguf", want, tensors, "llama", tokenizer=tokenizer)
    model, loaded = weights.load_decoder(str(path))
    assert model.config == dataclasses.replace(
        want, norm_eps=model.config.norm_eps, vocab_size=tokenizer.vocab_size
    )
    same_tensors(Gguf(path), tensors)
    assert loaded.decode(loaded.ids("a few 123")) == "a few 123"
    assert len(loaded.ids("123")) == 3  # digits stand alone
    for key, field in gguf.GGUFReader(path).fields.items():
        assert key.startswith("GGUF.") or Gguf(path).metadata[key] == field.contents()


def test_a_real_llama_3_head_is_recognised(tmp_path):
    sizes, tensors = golden("tiny_llama")
    rule = rotary.RopeScaling("llama3", 8.0, 8192, 1.0, 4.0, 1.0)
    divisors = rotary.frequencies(128, 500000.0) / rotary.frequencies(128, 500000.0, rule)
    path, real = tmp_path / "x.gguf", dict(attention__key_length=128, rope__freq_base=500000.0)

    def with_divisors(divisors):
        changed = {**tensors, "rope_freqs.weight": divisors}
        return Gguf(as_gguf(path, sizes, changed, "llama", **real))

    source = with_divisors(divisors)
    assert rotary.from_huggingface(source.config()) == (500000.0, rule)
    assert "rope_freqs.weight" not in source.shapes()  # no parameter
    with pytest.raises(WeightsError, match="a rule that is not known"):
        with_divisors(divisors * np.linspace(1, 1.1, 64, dtype=np.float32)).config()


@pytest.mark.parametrize(
    ("head", "tied"),
    [
        ("equal", True),
        ("Q4_0", True),
        ("other", False),
        ("Q8_0 of other", False),
        ("nearly equal", False),  # and of one kind: no quantisation explains the difference
    ],
)
def test_the_head_of_gpt2_repeats_its_embedding(tmp_path, head, tied):
    rows, other = np.random.default_rng(0).normal(size=(2, 1500, 32)).astype(np.float32)
    numbers = other if "other" in head else rows + 0.1 * other if "nearly" in head else rows
    if head[0] == "Q":
        kind = gguf.GGMLQuantizationType[head[:4]]
        numbers = (gguf.quantize(numbers, kind), kind)
    tensors = {"token_embd.weight": rows, "output.weight": numbers}
    epsilon = dict(attention__layer_norm_epsilon=1e-5)
    config = Gguf(write(tmp_path / "x.gguf", tensors, "gpt2", **(SIZES | epsilon))).config()
    assert config["tie_word_embeddings"] is tied
    if not tied:
        with pytest.raises(ValueError, match="tie_word_embeddings is False"):
            decoders.family("gpt2").CONFIG.from_huggingface(config)


def test_other_architectures_are_named(tmp_path):
    tensors = {"a": np.zeros(4, np.float32)}
    with pytest.raises(WeightsError, match="'gemma' model; GGUF files of llama, qwen2, gpt2"):
        Gguf(write(tmp_path / "x.gguf", tensors, "gemma"))
    with pytest.raises(WeightsError, match="mixture of experts"):
        Gguf(write(tmp_path / "y.gguf", tensors, expert_count=8)).config()
    with pytest.raises(WeightsError, match="does not say its"):
        Gguf(write(tmp_path / "z.gguf", tensors)).config()


def test_a_part_of_a_model_and_a_pointer_to_it_are_named(tmp_path):
    path = tmp_path / "x-00001-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        step()
    with pytest.raises(WeightsError, match="one of the 3 parts of a model: join them with"):
        Gguf(path)
    for name, opened in (("x.gguf", Gguf), ("x.safetensors", Safetensors), ("x", TorchCheckpoint)):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(WeightsError, match="git lfs pull"):
            opened(tmp_path / name)


ONES = {"rope_freqs.weight": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(attention__head_count="2"), "head_count is '2'"),
        (dict(attention__head_count=2.0), "head_count is '2.0'"),
        (dict(context_length="long"), "context_length is 'long'"),
        (dict(attention__layer_norm_rms_epsilon=math.nan), "epsilon is 'nan'"),
        (dict(rope__freq_base=math.inf), "freq_base is 'inf'"),
        (dict(rope__freq_base=0.0), "freq_base of 0.0"),
        (dict(rope__dimension_count=2), "turns 2 of the 4 numbers"),
        (dict(rope__scaling__type="longrope"), "by 'longrope'; none, linear, yarn"),
        (dict(rope__scaling__type="linear"), "linear rope.scaling.factor is missing or 0"),
        (dict(rope__scaling__type="yarn", rope__scaling__factor=0.0), "is missing or 0"),
        (dict(rope__scaling__attn_factor=0.5), "sets rope.scaling.attn_factor"),
        (dict(rope__scaling__type=3), "scaling.type is '3'"),
        (dict(tensors=ONES, attention__key_length=1 << 31), "by a rule that is not known"),
        (dict(tensors=ONES, rope__scale_linear=4.0), "by a rule that is not known"),
        *(
            (dict(tensors={"rope_freqs.weight": np.float32(odd)}), "by a rule that is not known")
            for odd in ([1, 1, 1], [1, 0.5], [1, math.nan])
        ),
    ],
)
def test_metadata_that_no_model_has(tmp_path, changed, message):
    with pytest.raises(WeightsError, match=message):
        Gguf(small(tmp_path / "x.gguf", **changed)).config()


def test_linear_scaling_in_its_newer_and_older_form(tmp_path):
    rule = rotary.RopeScaling("linear", 4.0, 64, 0.0, 0.0, 1.0)
    newer = dict(rope__scaling__type="linear", rope__scaling__factor=4.0)
    for changed in (newer, dict(rope__scaling__factor=4.0), dict(rope__scale_linear=4.0)):
        config = Gguf(small(tmp_path / "x.gguf", **changed)).config()
        assert rotary.from_huggingface(config) == (10000.0, rule)
    for changed in (dict(rope__scaling__type="none"), dict(rope__scale_linear=1.0), {}):
        plain = Gguf(small(tmp_path / "x.gguf", **changed)).config()
        assert rotary.from_huggingface(plain) == (10000.0, None)


def test_nothing_of_a_file_stays_mapped_and_a_later_cut_is_noticed(tmp_path):
    source = Gguf(small(tmp_path / "x.gguf"))
    assert source.read("model.embed_tokens.weight").shape == (8, 8)
    maps = pathlib.Path("/proc/self/maps")
    assert not maps.exists() or "x.gguf" not in maps.read_text()
    os.truncate(tmp_path / "x.gguf", 600)
    with pytest.raises(WeightsError, match="shorter than when it was opened"):
        source.read("model.layers.0.self_attn.q_proj.weight")


def header(version=3, tensors=(), metadata=(), counts=None):
    """A file written by hand: metadata (name, type, bytes), tensors (name, shape, kind, offset)."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    count = counts or (len(tensors), len(metadata) + 1)
    out = b"GGUF" + struct.pack("<IQQ", version, *count)
    out += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    for name, kind, raw in metadata:
        out += text(name) + struct.pack("<I", kind) + raw
    for name, shape, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out + bytes(-len(out) % 32) + bytes(256)


GOOD = ("a", (4,), 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as GGUF"),
        (b"PK\x03\x04" + bytes(100), "does not begin with 'GGUF'"),
        (header(version=1), "version 1"),
        (header(version=3 << 24), "big-endian"),
        (header(tensors=[GOOD, GOOD]), "'a' is there twice"),
        (header(metadata=[("k", 0, b"1"), ("k", 0, b"1")]), "'k' is there twice"),
        (header(tensors=[("a", (4,), 99, 0)]), "of kind 99.*Take an F16"),
        (header(tensors=[("a", (4,), 0, 1 << 40)]), "ends after the file"),
        (header(tensors=[("a", (1 << 40, 1 << 40), 0, 0)]), "ends after the file"),
        (header(tensors=[("a", (0,), 0, 0)]), "of shape"),
        (header(tensors=[("a", (33,), 8, 0)]), "in blocks of 32"),
        (header(tensors=[("a", (1,) * 9, 0, 0)]), "9 axes"),
        (header(tensors=[("a", (9,), 0, 0), ("b", (4,), 0, 32)]), "tensors a and b overlap"),
        (header(tensors=[GOOD, ("b", (4,), 0, 16)]), "b begins at 16, no multiple of 32"),
        (header(counts=(1 << 60, 1)), "more than it has room for"),
        (header(counts=(0, 1 << 60)), "more than it has room for"),
        (header(metadata=[("k", 8, struct.pack("<Q", 1 << 62))]), "ends after the file"),
        (header(metadata=[("k", 9, struct.pack("<IQ", 8, 1 << 60))]), "more than it has room"),
        (header(metadata=[("k", 9, struct.pack("<IQ", 4, 1 << 60))]), "more than it has room"),
        (header(metadata=[("k", 9, struct.pack("<IQ", 9, 1) * 50)]), "nested too deep"),
        (header(metadata=[("k", 77, b"")]), "a value of type 77"),
        (header(metadata=[("general.alignment", 4, struct.pack("<I", 0))]), "alignment of 0"),
        (header(metadata=[("k", 8, struct.pack("<Q", 1) + b"\xff")]), "can't decode byte 0xff"),
    ],
)
def test_files_that_lie(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        Gguf(tmp_path / "x.gguf")
    with pytest.raises(FileNotFoundError, match="nowhere.gguf"):
        Gguf(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize(
    ("key", "kind", "value", "message"),
    [
        ("k", 8, struct.pack("<Q", 3 << 30), "longer than that of any model"),
        ("k", 9, struct.pack("<IQ", 0, 1 << 30), "more than the header of any model has"),
        ("k", 9, struct.pack("<IQ", 8, 1 << 28), "more than the header of any model has"),
        ("k", 9, struct.pack("<IQ", 9, 1 << 28), "more than the header of any model has"),
        ("general.architecture", 9, struct.pack("<IQ", 0, 0), "there twice"),
    ],
)
def test_counts_that_a_large_file_has_room_for(tmp_path, key, kind, value, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(metadata=[(key, kind, value)]))
    os.truncate(path, 4 << 30)  # a hole, which takes no room
    with pytest.raises(WeightsError, match=message):
        Gguf(path)


def test_a_good_file_by_hand(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(tensors=[GOOD, ("b", (4,), 0, 32)], metadata=[("k", 4, b"1234")]))
    assert Gguf(path).shapes() == {"a": (4,), "b": (4,)}
    np.testing.assert_array_equal(Gguf(path).read("a"), np.zeros(4))
