"""Towers out as Hugging Face folders, and in again bit for bit."""

import json

import jax
import numpy as np
import pytest
import released
from flax import nnx

from larimar_jax import convert, pipeline, weights
from larimar_jax.weights import export
from larimar_jax.weights.huggingface import Folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return released.bases(tmp_path_factory.mktemp("bases"))


def same_tower(one, two):
    assert one.config == two.config
    first, second = (nnx.to_pure_dict(nnx.state(module, nnx.Param)) for module in (one, two))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def same_tokenizer(one, two):
    assert (one.bos, one.eos, one.pad) == (two.bos, two.eos, two.pad)
    texts = ["the capital of France is", "Fact 1 is new"]
    np.testing.assert_array_equal(one.encode(texts).ids, two.encode(texts).ids)
    assert one.vocab_size == two.vocab_size


def check_towers(loaded, folder):
    for name, load in (("encoder", weights.load_encoder), ("decoder", weights.load_decoder)):
        module, tokenizer = load(str(folder / name))
        same_tower(module, getattr(loaded.model, name))
        same_tokenizer(tokenizer, getattr(loaded, f"{name}_tokenizer"))


@pytest.mark.parametrize("number", [0, 4])
def test_exported_towers_come_back_bit_for_bit(number, tmp_path, bases):
    released.converted(number, tmp_path / "model", bases)
    convert.to_huggingface(tmp_path / "model", tmp_path / "towers")
    check_towers(pipeline.load(tmp_path / "model"), tmp_path / "towers")


def test_so_do_a_sentence_encoder_and_a_trained_vocabulary(monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(pipeline, "load", lambda source: tiny)
    convert.to_huggingface("tiny", tmp_path / "towers")
    check_towers(tiny, tmp_path / "towers")
    said = json.loads((tmp_path / "towers" / "encoder" / "modules.json").read_text())
    assert [module["path"] for module in said] == ["", "1_Pooling", "2_Normalize"]


def test_large_models_are_cut_into_parts(tmp_path):
    arrays = {f"t{i}": np.full((4, 5), i, np.float32) for i in range(5)}
    arrays["large"] = np.zeros(100, np.float32)
    export.write_tensors(tmp_path, iter(arrays.items()), limit=200)
    parts = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert parts == [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert not list(tmp_path.glob("*.part"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    source = Folder(tmp_path).tensors()
    assert source.shapes().keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(source.read(name), array)


def test_a_failing_export_leaves_nothing(monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(pipeline, "load", lambda source: tiny)
    monkeypatch.setattr(export, "write_decoder", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.to_huggingface("tiny", tmp_path / "towers")
    assert list(tmp_path.iterdir()) == []
