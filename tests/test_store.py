"""Tokenised pieces on disk: whole or not there, and found damaged when they are."""

import dataclasses
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time

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
    assert made.texts([2, 0]) == made.texts(np.array([2, 0])) == ["a dog", "the cat"]
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


def test_two_runs_that_make_the_same_do_not_meet(tmp_path, tokenizer):
    def crowded():
        yield from TEXTS[:2]
        assert len(_made(tmp_path, tokenizer)) == 3  # The other run is quicker.
        yield from TEXTS[2:]

    assert _made(tmp_path, tokenizer, crowded()).texts([0, 1, 2]) == [*TEXTS[:2], TEXTS[3]]
    assert len(list(tmp_path.iterdir())) == 1


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


def test_a_record_that_rotted_is_found_when_it_is_read(tmp_path, tokenizer):
    made = _made(tmp_path, tokenizer, [f"the cat {i}" for i in range(3000)])
    shard = made.folder / "pieces-00000.array_record"
    content = bytearray(shard.read_bytes())
    for place in range(len(content) // 3, len(content) // 2, 50):
        content[place] ^= 255
    shard.write_bytes(content)
    opened = store.Store(made.folder, tokenizer)
    with pytest.raises(store.StoreError, match="pieces-00000.array_record is not what was written"):
        opened.gather(np.arange(len(opened))[None])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.pop("recipe"), "recipe"),
        (lambda found: found["recipe"].pop("unit"), "unit"),
        (lambda found: found.update(pieces=4), "do not add up"),
        (lambda found: found["recipe"].update(corpus="other"), "made from something else"),
        (
            lambda found: (
                found.update(pieces=4),
                found["shards"]["pieces-00000.array_record"].update(pieces=4),
            ),
            "hold 3 pieces, not 4",
        ),
    ],
)
def test_a_manifest_that_lies_is_found_out(tmp_path, tokenizer, change, said):
    path = _made(tmp_path, tokenizer).folder / store.MANIFEST
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(store.StoreError, match=rf"(?s){said}.*Delete the folder"):
        _made(tmp_path, tokenizer)


def test_a_folder_without_a_manifest_is_said_before_the_work(tmp_path, tokenizer):
    (_made(tmp_path, tokenizer).folder / store.MANIFEST).unlink()
    with pytest.raises(store.StoreError, match="has no manifest.json"):
        _made(tmp_path, tokenizer, iter(lambda: pytest.fail("it is made again"), None))


def test_a_corpus_without_pieces_makes_an_empty_store(tmp_path, tokenizer):
    for _ in range(2):
        made = _made(tmp_path, tokenizer, ["zebra quickly jumped over lazy foxes again"])
        assert (len(made), made.dropped, made.texts([])) == (0, 1, [])
    with pytest.raises(IndexError, match="has 0 pieces"):
        made.texts([0])


# Makes the store of a recipe in argv[1]; "slow" never ends, "full" has no room for it.
_CHILD = """
import resource, signal, sys, time
from larimar_jax.data import store
from larimar_jax.weights import Tokenizer

folder, tokenizer, how = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer)
store.SHARD = 2000

def texts():
    for i in range(5000):
        yield f"the cat {i}"
    while how == "slow":
        time.sleep(0.1)

if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
recipe = store.Recipe("corpus", "training", "sentence", "e", "d", 24, 16)
try:
    made = store.open_or_make(recipe, texts(), tokenizer, tokenizer, folder=store.Path(folder))
    print(len(made))
except store.StoreError as error:
    print(error)
"""


def test_killed_crowded_and_full(tmp_path, tokenizer):
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))

    def child(folder, how):
        command = [sys.executable, "-c", _CHILD, str(folder), str(tmp_path / "tokenizer.json"), how]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    stores = tmp_path / "stores"
    slow, full = child(stores, "slow"), child(tmp_path / "full", "full")
    try:
        ends = time.monotonic() + 60
        while not list(stores.glob("*.part/pieces-00001*")) and time.monotonic() < ends:
            time.sleep(0.05)
        slow.send_signal(signal.SIGKILL)
        slow.wait()
        (part,) = stores.iterdir()  # Half a store, and nothing under the store's own name.
        assert part.suffix == ".part" and not (part / store.MANIFEST).exists()
        said = full.communicate(timeout=60)[0]
        assert "Set LARIMAR_CACHE" in said and not list((tmp_path / "full").iterdir())
        both = [child(stores, "whole") for _ in range(2)]
        assert [one.communicate(timeout=60)[0].strip() for one in both] == ["5000", "5000"]
    finally:
        for one in (slow, full):
            one.kill()
    (whole,) = (place for place in stores.iterdir() if place != part)
    assert len(store.Store(whole, tokenizer, verify=True)) == 5000
    shutil.rmtree(part)


def test_a_process_waits_for_the_one_that_writes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "PATIENCE", 0.3)
    with pytest.raises(store.StoreError, match="LARIMAR_CACHE"):
        _made(tmp_path, tokenizer, writes=False)
    _made(tmp_path, tokenizer)
    assert len(_made(tmp_path, tokenizer, writes=False)) == 3
