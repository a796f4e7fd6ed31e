"""GGUF files: every quantisation, every architecture, and files that lie about themselves."""

import dataclasses
import json
import pathlib
import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import decoders, rotary
from larimar_jax.weights import WeightsError
from larimar_jax.weights.gguf import Gguf
from larimar_jax.weights.safetensors import Safetensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def write(path, tensors, architecture="llama", raw=None, **metadata):
    """A GGUF file of tensors (arrays, or (bytes, kind) pairs) and metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        key = f"{architecture}.{key.replace('__', '.')}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS + K_QUANTS)
def test_every_kind_of_number(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    if kind.name in KINDS:
        data = gguf.quantize(rng.normal(size=(3, 256)).astype(np.float32), kind)
    else:
        data = rng.integers(0, 255, (3, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        # Scales are float16 among the bytes; any of them may be infinite.
        data = data & 0x3B if kind.name != "F16" else data
    want = gguf.dequantize(data, kind)
    path = write(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": (data, kind)})
    source = Gguf(path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert source.shapes() == {name: (3, 256)}
    got = source.read(name)
    assert got.dtype == np.float32 and np.abs(want).max() > 0
    np.testing.assert_array_equal(got, want)


def converted(name):
    """A golden folder as llama.cpp's converter would write it: tensors and metadata."""
    said = json.loads((GOLDEN / name / "config.json").read_text())
    source = Safetensors(GOLDEN / name / "model.safetensors")
    return said, {n: source.read(n) for n in source.shapes()}


def test_gpt2(tmp_path):
    said, tensors = converted("tiny_gpt2")
    parts = {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    top = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    named = {}
    for name, tensor in tensors.items():
        short, _, suffix = name.removeprefix("transformer.").rpartition(".")
        if short.startswith("h."):
            _, layer, part = short.split(".", 2)
            tensor = tensor.T if "c_" in part and tensor.ndim == 2 else tensor
            named[f"blk.{layer}.{parts[part]}.{suffix}"] = np.ascontiguousarray(tensor)
        else:
            named[f"{top[short]}.{suffix}"] = tensor
    path = write(
        tmp_path / "x.gguf",
        named,
        "gpt2",
        embedding_length=said["n_embd"],
        block_count=said["n_layer"],
        feed_forward_length=said.get("n_inner") or 4 * said["n_embd"],
        context_length=said["n_positions"],
        attention__head_count=said["n_head"],
        attention__layer_norm_epsilon=1e-5,
    )
    source = Gguf(path)
    assert set(source.shapes()) == {f"transformer.{n.removeprefix('transformer.')}" for n in tensors}
    for name, tensor in tensors.items():
        name = f"transformer.{name.removeprefix('transformer.')}"
        assert source.shapes()[name] == tensor.shape
        np.testing.assert_array_equal(source.read(name), tensor)
    family = decoders.family("gpt2")
    got, want = family.from_huggingface(source.config()), family.from_huggingface(said)
    assert got == dataclasses.replace(want, norm_eps=got.norm_eps)
    assert got.norm_eps == pytest.approx(want.norm_eps)  # float32 in the file


def llama_like(path, said, tensors, architecture, **more):
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    named = {}
    for name, tensor in tensors.items():
        short, _, suffix = name.removeprefix("model.").rpartition(".")
        if short.startswith("layers."):
            _, layer, part = short.split(".", 2)
            named[f"blk.{layer}.{parts[part]}.{suffix}"] = tensor
        elif short in top:
            named[f"{top[short]}.{suffix}"] = tensor
        else:
            named[name] = tensor
    return write(
        path,
        named,
        architecture,
        embedding_length=said["hidden_size"],
        block_count=said["num_hidden_layers"],
        feed_forward_length=said["intermediate_size"],
        context_length=said["max_position_embeddings"],
        attention__head_count=said["num_attention_heads"],
        attention__head_count_kv=said["num_key_value_heads"],
        attention__key_length=said.get("head_dim")
        or said["hidden_size"] // said["num_attention_heads"],
        attention__layer_norm_rms_epsilon=said["rms_norm_eps"],
        rope__freq_base=float(said["rope_parameters"]["rope_theta"]),
        **more,
    )


def test_qwen2_has_biases_and_rows_in_their_own_order(tmp_path):
    said, tensors = converted("tiny_qwen2")
    rope = said["rope_parameters"]
    path = llama_like(
        tmp_path / "x.gguf",
        said,
        tensors,
        "qwen2",
        rope__scaling__type="yarn",
        rope__scaling__factor=float(rope["factor"]),
        rope__scaling__original_context_length=rope["original_max_position_embeddings"],
        rope__scaling__yarn_beta_fast=float(rope["beta_fast"]),
        rope__scaling__yarn_beta_slow=float(rope["beta_slow"]),
    )
    source = Gguf(path)
    assert set(source.shapes()) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor)
    family = decoders.family("qwen2")
    got, want = family.from_huggingface(source.config()), family.from_huggingface(said)
    assert got.rope_scaling == want.rope_scaling and got.attention_bias == "qkv"
    assert got.kv_heads == want.kv_heads and got.tied_head == want.tied_head


def test_a_real_llama_3_head_is_recognised(tmp_path):
    said, tensors = converted("tiny_llama")
    rule = rotary.RopeScaling("llama3", 8.0, 8192, 1.0, 4.0, 1.0)
    divisors = rotary.frequencies(128, 500000.0) / rotary.frequencies(128, 500000.0, rule)
    said = {**said, "head_dim": 128, "rope_parameters": {"rope_theta": 500000.0}}
    path = tmp_path / "x.gguf"
    llama_like(path, said, {**tensors, "rope_freqs.weight": divisors}, "llama")
    source = Gguf(path)
    assert rotary.from_huggingface(source.config()) == (500000.0, rule)
    assert "rope_freqs.weight" not in source.shapes()  # no parameter
    other = divisors * np.linspace(1, 1.1, 64, dtype=np.float32)
    llama_like(path, said, {**tensors, "rope_freqs.weight": other}, "llama")
    with pytest.raises(WeightsError, match="a rule that is not known"):
        Gguf(path).config()


def test_other_architectures_are_named(tmp_path):
    path = write(tmp_path / "x.gguf", {"a": np.zeros(4, np.float32)}, "gemma")
    with pytest.raises(WeightsError, match="'gemma' model; GGUF files of llama, qwen2, gpt2"):
        Gguf(path)
    path = write(tmp_path / "y.gguf", {"a": np.zeros(4, np.float32)}, expert_count=8)
    with pytest.raises(WeightsError, match="mixture of experts"):
        Gguf(path).config()
    path = write(tmp_path / "z.gguf", {"a": np.zeros(4, np.float32)})
    with pytest.raises(WeightsError, match="does not say its"):
        Gguf(path).config()


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
        (header(version=1), "version 1"),
        (header(version=3 << 24), "big-endian"),
        (header(tensors=[GOOD, GOOD]), "'a' is there twice"),
        (header(metadata=[("k", 0, b"1"), ("k", 0, b"1")]), "'k' is there twice"),
        (header(tensors=[("a", (4,), 99, 0)]), "of kind 99"),
        (header(tensors=[("a", (4,), 0, 1 << 40)]), "ends after the file"),
        (header(tensors=[("a", (1 << 40, 1 << 40), 0, 0)]), "ends after the file"),
        (header(tensors=[("a", (0,), 0, 0)]), "of shape"),
        (header(tensors=[("a", (33,), 8, 0)]), "in blocks of 32"),
        (header(tensors=[("a", (1,) * 9, 0, 0)]), "9 axes"),
        (header(tensors=[GOOD, ("b", (4,), 0, 8)]), "tensors a and b overlap"),
        (header(counts=(1 << 60, 1)), "more than it has room for"),
        (header(counts=(0, 1 << 60)), "more than it has room for"),
        (header(metadata=[("k", 8, struct.pack("<Q", 1 << 62))]), "ends after the file"),
        (header(metadata=[("k", 9, struct.pack("<IQ", 8, 1 << 60))]), "more than it has room"),
        (header(metadata=[("k", 9, struct.pack("<IQ", 4, 1 << 60))]), "more than it has room"),
        (header(metadata=[("k", 9, struct.pack("<IQ", 9, 1) * 50)]), "nested too deep"),
        (header(metadata=[("k", 77, b"")]), "a value of type 77"),
        (header(metadata=[("general.alignment", 4, struct.pack("<I", 0))]), "alignment of 0"),
        (header(metadata=[("k", 8, struct.pack("<Q", 1) + b"\xff")]), "no UTF-8"),
    ],
)
def test_files_that_lie(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        Gguf(path)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_file_cut_anywhere(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    whole = write(folder / "x.gguf", {"a": np.ones(4, np.float32)}, block_count=2).read_bytes()
    # What follows the last tensor is padding.
    end = whole.rindex(np.ones(4, np.float32).tobytes()) + 16
    path = folder / "y.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, end - 1))])
    with pytest.raises(WeightsError, match="cannot be read as GGUF"):
        Gguf(path)


def test_a_good_file_by_hand(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(tensors=[GOOD, ("b", (4,), 0, 16)]))
    assert Gguf(path).shapes() == {"a": (4,), "b": (4,)}
    np.testing.assert_array_equal(Gguf(path).read("a"), np.zeros(4))
