"""Tokenised pieces on disk: whole or not there, and found damaged when they are."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from larimar_jax.data import store
from larimar_jax.weights import Tokenizer

TEXTS = ["the cat", "the mat and the dog", "zebra quickly jumped over lazy foxes again", "a dog"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog ran after the cat"] * 3, 280)


def _recipe(**changes) -> store.Recipe:
    recipe = store.Recipe("corpus", "training", "sentence", "e", "d", 24, 16)
    return dataclasses.replace(recipe, **changes)


def _made(folder, tokenizer, texts=TEXTS, **options) -> store.Store:
    framed = tokenizer.framed()
    return store.open_or_make(_recipe(), texts, framed, tokenizer, folder=folder, **options)


def test_pieces_are_framed_and_too_long_ones_dropped(tmp_path, tokenizer):
    made = _made(tmp_path, tokenizer)
    assert (len(made), made.dropped) == (3, 1)
    assert made.texts([2, 0]) == ["a dog", "the cat"]
    batch = made.gather(np.array([[0, 1]]))
    assert batch["encoder_tokens"].shape == (1, 2, 24) and batch["decoder_mask"].shape == (1, 2, 16)
    for row, text in enumerate(TEXTS[:2]):
        ids = tokenizer.ids(text)
        tokens, mask = batch["decoder_tokens"][0, row], batch["decoder_mask"][0, row]
        assert tokens[mask].tolist() == [tokenizer.bos, *ids, tokenizer.eos]
        assert (tokens[len(ids) + 2 :] == tokenizer.pad).all()
        seen = batch["encoder_tokens"][0, row][batch["encoder_mask"][0, row]].tolist()
        assert seen == [tokenizer.bos, *ids, tokenizer.eos]


def test_a_store_is_made_once_and_shards_do_not_show(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 2)
    monkeypatch.setattr(store, "BLOCK", 3)
    made = _made(tmp_path, tokenizer, [f"the cat {i}" for i in range(5)])
    assert len(made.manifest["shards"]) == 3
    rows = np.array([[4, 0], [2, 1]])
    again = _made(tmp_path, tokenizer, iter(lambda: pytest.fail("it is made again"), None))
    copy = pickle.loads(pickle.dumps(again))
    for other in (again, copy):
        for name, array in made.gather(rows).items():
            np.testing.assert_array_equal(array, other.gather(rows)[name])
    assert _recipe().name != _recipe(encoder_tokens=25).name != _recipe(corpus="other").name


def test_what_was_cut_off_is_not_there(tmp_path, tokenizer):
    def cut():
        yield from TEXTS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _made(tmp_path, tokenizer, cut())
    assert not list(tmp_path.iterdir())
    assert len(_made(tmp_path, tokenizer)) == 3


def _damage(made, how):
    shard = next(made.folder.glob("*.array_record"))
    if how == "shorter":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif how == "gone":
        shard.unlink()
    elif how == "flipped":
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 1
        shard.write_bytes(content)
    else:
        (made.folder / store.MANIFEST).write_text(how)


@pytest.mark.parametrize("how", ["shorter", "gone", "flipped", "", "[]", json.dumps({"format": "x"})])
def test_damage_is_named(tmp_path, tokenizer, how):
    made = _made(tmp_path, tokenizer)
    _damage(made, how)
    with pytest.raises(store.StoreError, match="Delete the folder"):
        store.Store(made.folder, tokenizer, verify=True)


def test_a_process_waits_for_the_one_that_writes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "PATIENCE", 0.3)
    with pytest.raises(store.StoreError, match="LARIMAR_CACHE"):
        _made(tmp_path, tokenizer, writes=False)
    _made(tmp_path, tokenizer)
    assert len(_made(tmp_path, tokenizer, writes=False)) == 3


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LARIMAR_CACHE", str(tmp_path))
    assert store.cache() == tmp_path
