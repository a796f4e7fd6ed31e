"""Folders laid out as on Hugging Face."""

import dataclasses
import json
import pathlib
import shutil
import struct

import numpy as np
import pytest
import safetensors.numpy

from larimar_jax import decoders, weights
from larimar_jax.weights import WeightsError, folder
from larimar_jax.weights.safetensors import Safetensors

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def tiny_folder(tmp_path):
    """A tiny GPT-2 with a tokenizer, as fetched from the hub."""
    path = tmp_path / "tiny"
    path.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "tiny_gpt2" / file, path)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "tokenizers" / "gpt2" / file, path)
    said = json.loads((path / "config.json").read_text())
    source = Safetensors(path / "model.safetensors")
    table = source.read("transformer.wte.weight")
    rows = json.loads((path / "vocab.json").read_text())
    tensors = {n: source.read(n) for n in source.shapes()}
    tensors["transformer.wte.weight"] = np.resize(table, (len(rows), table.shape[1]))
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(said | {"vocab_size": len(rows)}))
    return path


def test_a_gpt2_gets_its_special_tokens(tiny_folder):
    model, tokenizer = weights.load_decoder(str(tiny_folder))
    size = len(json.loads((tiny_folder / "vocab.json").read_text()))
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (size, size + 1, size + 2)
    assert model.config.vocab_size == model.embeddings.shape[0] == size + 3
    assert weights.load_tokenizer(str(tiny_folder)).hash == tokenizer.hash


def test_more_tokens_than_rows_is_an_error_elsewhere(tmp_path):
    shutil.copytree(GOLDEN / "tiny_llama", tmp_path, dirs_exist_ok=True)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "tokenizers" / "gpt2" / file, tmp_path)
    with pytest.raises(WeightsError, match="the tokenizer has ids up to 399 and the embedding table"):
        weights.load_decoder(str(tmp_path))


@pytest.mark.parametrize(("rows", "fits"), [(0, True), (-1, False)])
def test_only_tokens_of_ours_become_new_rows(tiny_folder, rows, fits):
    path = tiny_folder / "model.safetensors"
    source = Safetensors(path)
    tensors = {n: source.read(n) for n in source.shapes()}
    size = len(tensors["transformer.wte.weight"]) + rows
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:size]
    safetensors.numpy.save_file(tensors, path)
    said = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(said | {"vocab_size": size}))
    if fits:
        assert weights.load_decoder(str(tiny_folder))[0].config.vocab_size == size + 3
        return
    with pytest.raises(WeightsError, match="of different models"):
        weights.load_decoder(str(tiny_folder))


def test_a_table_needs_a_row_for_the_largest_id(tiny_folder):
    rows = json.loads((tiny_folder / "vocab.json").read_text())
    rows[max(rows, key=rows.get)] = 900  # and none between
    (tiny_folder / "vocab.json").write_text(json.dumps(rows))
    assert folder.tokenizer(tiny_folder).vocab_size == 901
    with pytest.raises(WeightsError, match="has ids up to 900"):
        weights.load_decoder(str(tiny_folder))


def test_a_file_of_a_folder_is_no_model(tiny_folder):
    for call in (weights.load_decoder, weights.load_tokenizer):
        with pytest.raises(WeightsError, match="give the folder"):
            call(str(tiny_folder / "model.safetensors"))


def test_steps_that_are_not_computed_are_an_error(tmp_path):
    shutil.copytree(GOLDEN / "tiny_bert_mean", tmp_path, dirs_exist_ok=True)
    assert folder.pooling(tmp_path) == {"pooling": "mean", "normalize": True}
    steps = json.loads((tmp_path / "modules.json").read_text())
    steps.insert(2, {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(WeightsError, match="has steps Dense, which are not computed"):
        folder.pooling(tmp_path)


def test_weights_are_looked_for_in_order(tiny_folder):
    (tiny_folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert isinstance(folder.tensors(tiny_folder), Safetensors)
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no torch file"):
        folder.tensors(tiny_folder)
    (tiny_folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of model.safetensors, .*pytorch_model.bin"):
        folder.tensors(tiny_folder)


def test_a_folder_with_torch_files(tiny_folder):
    shutil.copy(GOLDEN / "torch" / "plain.bin", tiny_folder / "pytorch_model.bin")
    (tiny_folder / "model.safetensors").unlink()
    assert "transposed" in folder.tensors(tiny_folder).shapes()
    with pytest.raises(WeightsError, match="unused: whole.*\n(.*\n)*.*missing: word.embedding"):
        weights.load_decoder(str(tiny_folder))


@pytest.mark.parametrize(
    "change",
    [
        dict(n_embd="32"),
        dict(n_embd=-32),
        dict(n_embd=0),
        dict(n_head=0),
        dict(n_layer=1 << 40),
        dict(n_layer=2.5),
        dict(n_layer=None),
        dict(n_positions=[64]),
        dict(vocab_size={}),
        dict(layer_norm_epsilon="small"),
        dict(activation_function="relu"),
        dict(model_type=7),
        dict(model_type="mamba"),
    ],
)
def test_settings_that_no_model_has(tiny_folder, change):
    said = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(said | change))
    with pytest.raises(WeightsError):
        weights.load_decoder(str(tiny_folder))


@pytest.mark.parametrize(("theta", "said"), [(1e8, True), (1e15, False), (np.nan, False)])
def test_a_number_with_a_point_may_be_larger_than_a_size(theta, said):
    config = json.loads((GOLDEN / "tiny_llama" / "config.json").read_text())
    sizes = decoders.family("llama").CONFIG.from_huggingface(config)
    sizes = dataclasses.replace(sizes, rope_theta=theta)
    if said:
        folder.check_sizes("x", sizes)
        return
    with pytest.raises(WeightsError, match="rope_theta = "):
        folder.check_sizes("x", sizes)


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "mistral", "qwen2"])
def test_a_family_says_which_setting_is_missing(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    shutil.copy(GOLDEN / "tiny_gpt2" / "model.safetensors", tmp_path)
    with pytest.raises(WeightsError, match="does not say its '"):
        weights.load_decoder(str(tmp_path))
    assert kind in decoders.registry.by_model_type(decoders.__name__)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "a list where settings belong"),
        ("config.json", "{", "is not JSON"),
        ("config.json", "[" * 100000, "is not JSON"),
        ("config.json", "{}", "model_type"),
        ("tokenizer_config.json", "3", "a int where settings belong"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token of its tokenizer is 3"),
        ("special_tokens_map.json", '{"eos_token": {"content": []}}', "eos_token"),
        ("special_tokens_map.json", '{"eos_token": "<nowhere>"}', "no eos token <nowhere>"),
        ("tokenizer.json", "{}", "cannot be read as a tokenizer"),
        ("1_Pooling/config.json", '{"pooling_mode_cls_token": true}', "pools by"),
        ("1_Pooling/config.json", "null", None),
    ],
)
def test_files_that_say_something_else(tiny_folder, file, content, message):
    (tiny_folder / "1_Pooling").mkdir()
    (tiny_folder / file).write_text(content)
    if message is None:
        weights.load_decoder(str(tiny_folder))
        return
    with pytest.raises(WeightsError, match=message):
        weights.load_decoder(str(tiny_folder))


def table(**tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


ROW = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes"),
        (struct.pack("<Q", 1 << 60), "a header of"),
        (struct.pack("<Q", 8) + b"nonsense", "cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "no table"),
        (table(a=ROW | {"data_offsets": [0, 160]}), "cannot be read"),
        (table(a=ROW, b=ROW), "cannot be read"),
        (table(a=ROW | {"shape": [1 << 40, 1 << 40]}), "cannot be read"),
        (table(a=ROW | {"shape": [-4]}), "cannot be read"),
        (table(a=ROW | {"dtype": "F33"}), "cannot be read"),
        (table(a=3), "does not describe"),
        (
            struct.pack("<Q", 132)
            + (json.dumps({"a": ROW})[:-1] + ", " + json.dumps({"a": ROW})[1:]).encode().ljust(132)
            + bytes(16),
            "duplicate keys: a",
        ),
    ],
)
def test_safetensors_that_lie(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        Safetensors(path)


def test_kinds_of_numbers_that_are_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    size = {"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}
    path.write_bytes(table(a=size))
    with pytest.raises(WeightsError, match=r"a \(F8_E4M3\).*unquantised"):
        Safetensors(path)
