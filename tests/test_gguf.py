"""GGUF files: every quantisation, every architecture, and metadata that no model has."""

import dataclasses
import json
import os
import pathlib

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
    assert set(source.shapes()) == {
        f"transformer.{n.removeprefix('transformer.')}" for n in tensors
    }
    for name, tensor in tensors.items():
        name = f"transformer.{name.removeprefix('transformer.')}"
        assert source.shapes()[name] == tensor.shape
        np.testing.assert_array_equal(source.read(name), tensor)
    family = decoders.family("gpt2")
    got, want = family.CONFIG.from_huggingface(source.config()), family.CONFIG.from_huggingface(said)
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
    got, want = family.CONFIG.from_huggingface(source.config()), family.CONFIG.from_huggingface(said)
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


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_bytes_changed_anywhere_are_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("changed")
    whole = bytearray(small(folder / "x.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 129))] = data.draw(st.integers(0, 255))
    path = folder / "y.gguf"
    path.write_bytes(whole)
    try:
        source = Gguf(path)
        shapes = source.shapes()
        assert {name: source.read(name).shape for name in shapes} == shapes
        source.config()
    except WeightsError as error:
        assert str(path) in str(error)


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
    given = {"token_embd.weight": ones, "blk.0.attn_q.weight": ones, **(tensors or {})}
    return write(path, given, **{**SIZES, **changed})


def test_nothing_of_a_file_stays_mapped(tmp_path):
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells")
    source = Gguf(small(tmp_path / "x.gguf"))
    table = source.read("model.embed_tokens.weight")
    assert table.shape == (8, 8) and "x.gguf" not in maps.read_text()


def test_a_file_cut_after_it_was_opened(tmp_path):
    source = Gguf(small(tmp_path / "x.gguf"))
    os.truncate(tmp_path / "x.gguf", 600)
    with pytest.raises(WeightsError, match="shorter than when it was opened"):
        source.read("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(attention__head_count="2"), "head_count is '2'"),
        (dict(attention__head_count=2.0), "head_count is '2.0'"),
        (dict(context_length="long"), "context_length is 'long'"),
        (dict(attention__layer_norm_rms_epsilon=float("nan")), "epsilon is 'nan'"),
        (dict(rope__freq_base=float("inf")), "freq_base is 'inf'"),
        (dict(rope__freq_base=0.0), "freq_base of 0.0"),
        (dict(rope__dimension_count=2), "turns 2 of the 4 numbers"),
        (dict(rope__scaling__type="longrope"), "by 'longrope'; none, linear, yarn"),
        (dict(rope__scaling__type="linear"), "linear rope.scaling.factor is missing or 0"),
        (dict(rope__scaling__type="yarn", rope__scaling__factor=0.0), "is missing or 0"),
        (dict(rope__scaling__attn_factor=0.5), "sets rope.scaling.attn_factor"),
        (dict(rope__scaling__type=3), "scaling.type is '3'"),
    ],
)
def test_metadata_that_no_model_has(tmp_path, changed, message):
    path = small(tmp_path / "x.gguf", **changed)
    with pytest.raises(WeightsError, match=message):
        Gguf(path).config()


def test_linear_scaling_in_its_newer_and_older_form(tmp_path):
    rule = rotary.RopeScaling("linear", 4.0, 64, 0.0, 0.0, 1.0)
    newer = dict(rope__scaling__type="linear", rope__scaling__factor=4.0)
    for changed in (newer, dict(rope__scaling__factor=4.0), dict(rope__scale_linear=4.0)):
        said = Gguf(small(tmp_path / "x.gguf", **changed)).config()
        assert rotary.from_huggingface(said) == (10000.0, rule)
    for changed in (dict(rope__scaling__type="none"), dict(rope__scale_linear=1.0), {}):
        plain = Gguf(small(tmp_path / "x.gguf", **changed)).config()
        assert rotary.from_huggingface(plain) == (10000.0, None)


@pytest.mark.parametrize(
    ("divisors", "changed"),
    [
        ([1.0, 1.0], dict(attention__key_length=1 << 31)),
        ([1.0, 1.0], dict(rope__scaling__type="linear", rope__scaling__factor=4.0)),
        ([1.0, 1.0, 1.0], {}),
        ([1.0, 0.5], {}),
        ([1.0, float("nan")], {}),
    ],
)
def test_divisors_by_another_rule(tmp_path, divisors, changed):
    more = {"rope_freqs.weight": np.asarray(divisors, np.float32)}
    path = small(tmp_path / "x.gguf", more, **changed)
    with pytest.raises(WeightsError, match="by a rule that is not known"):
        Gguf(path).config()


def test_biases_of_llama_are_permuted_with_their_rows(tmp_path):
    said, tensors = converted("tiny_llama_biased")

    def interleaved(name, tensor):
        heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
        pairs = tensor.reshape(said[heads], 2, -1, *tensor.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(tensor.shape))

    turned = {n: interleaved(n, t) if "q_" in n or "k_" in n else t for n, t in tensors.items()}
    source = Gguf(llama_like(tmp_path / "x.gguf", said, turned, "llama"))
    assert set(source.shapes()) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor)
    family = decoders.family("llama")
    got, want = family.CONFIG.from_huggingface(source.config()), family.CONFIG.from_huggingface(said)
    assert (
        (got.attention_bias, got.mlp_bias) == (want.attention_bias, want.mlp_bias) == ("all", True)
    )


@pytest.mark.parametrize(
    ("head", "tied"), [("equal", True), ("Q4_0", True), ("other", False), ("Q8_0 of other", False)]
)
def test_the_head_of_gpt2_repeats_its_embedding(tmp_path, head, tied):
    rng = np.random.default_rng(0)
    rows, other = rng.normal(size=(2, 1500, 32)).astype(np.float32)
    numbers = other if "other" in head else rows
    if head[0] == "Q":
        kind = gguf.GGMLQuantizationType[head[:4]]
        numbers = (gguf.quantize(numbers, kind), kind)
    path = write(
        tmp_path / "x.gguf",
        {"token_embd.weight": rows, "output.weight": numbers},
        "gpt2",
        embedding_length=32,
        block_count=1,
        feed_forward_length=64,
        context_length=64,
        attention__head_count=2,
        attention__layer_norm_epsilon=1e-5,
    )
    said = Gguf(path).config()
    assert said["tie_word_embeddings"] is tied
    if not tied:
        with pytest.raises(ValueError, match="tie_word_embeddings is False"):
            decoders.family("gpt2").CONFIG.from_huggingface(said)
