"""Tokenised pieces on disk: whole or not there, and damage is named."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from larimar_jax.config import DataConfig
from larimar_jax.data import pieces
from larimar_jax.data.corpus import Corpus, Document
from larimar_jax.weights import Tokenizer

TEXTS = ["the cat", "the mat and the dog", "zebra quickly jumped over lazy foxes again", "a dog"]
CONFIG = DataConfig(unit="sentence", encoder_tokens=24, decoder_tokens=16)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog ran after the cat"] * 3, 280)


def corpus(texts=TEXTS, identity="corpus") -> Corpus:
    """A corpus whose documents are all on the training side."""
    titles = [title for n in range(9000) if not Document(title := f"t{n}", "").held_out]
    return Corpus(identity, lambda: map(Document, titles, texts))


def tokenized(folder, tokenizer, source=None, config=CONFIG):
    source = corpus() if source is None else source
    return pieces.tokenize(source, False, config, tokenizer.framed(), tokenizer, folder=folder)


def test_pieces_are_framed_and_too_long_ones_dropped(tmp_path, tokenizer):
    stored = tokenized(tmp_path, tokenizer)
    assert (len(stored), stored.dropped) == (3, 1)
    assert stored.texts([2, 0]) == stored.texts(np.array([2, 0])) == ["a dog", "the cat"]
    batch = stored.gather(np.array([[0, 1]]))
    assert batch["encoder_tokens"].shape == (1, 2, 24) and batch["decoder_mask"].shape == (1, 2, 16)
    for row, text in enumerate(TEXTS[:2]):
        ids = tokenizer.ids(text)
        tokens, mask = batch["decoder_tokens"][0, row], batch["decoder_mask"][0, row]
        assert tokens[mask].tolist() == [tokenizer.bos, *ids, tokenizer.eos]
        assert (tokens[len(ids) + 2 :] == tokenizer.pad).all()
        encoder_ids = batch["encoder_tokens"][0, row][batch["encoder_mask"][0, row]].tolist()
        assert encoder_ids == [tokenizer.bos, *ids, tokenizer.eos]


def test_pieces_are_made_once_under_all_that_decides_them(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 3)
    stored = tokenized(tmp_path, tokenizer, corpus([f"the cat {i}" for i in range(5)]))
    rows = np.array([[4, 0], [2, 1]])
    unread = Corpus("corpus", lambda: pytest.fail("the corpus is read again"))
    again = tokenized(tmp_path, tokenizer, unread)
    for copy in (again, pickle.loads(pickle.dumps(again))):
        for name, array in stored.gather(rows).items():
            np.testing.assert_array_equal(array, copy.gather(rows)[name])
    longer = dataclasses.replace(CONFIG, encoder_tokens=25)
    for other in ({"config": longer}, {"source": corpus(identity="other")}):
        assert len(tokenized(tmp_path, tokenizer, **other)) == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_what_was_cut_off_is_not_there(tmp_path, tokenizer):
    def documents():
        yield from corpus().documents()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenized(tmp_path, tokenizer, Corpus("corpus", documents))
    assert len(tokenized(tmp_path, tokenizer)) == 3


def test_an_error_of_the_corpus_comes_as_it_is(tmp_path, tokenizer):
    def documents():
        raise ValueError("line 7: not UTF-8")
        yield

    with pytest.raises(ValueError, match="line 7: not UTF-8"):
        tokenized(tmp_path, tokenizer, Corpus("corpus", documents))


def test_damage_and_a_full_disk_are_named(tmp_path, tokenizer, monkeypatch):
    tokenized(tmp_path, tokenizer)
    (table,) = tmp_path.rglob("*.arrow")
    table.write_bytes(table.read_bytes()[:20])
    with pytest.raises(pieces.PiecesError, match="damaged.*Delete the folder"):
        tokenized(tmp_path, tokenizer)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "encode", full)
    with pytest.raises(pieces.PiecesError, match="Set LARIMAR_CACHE"):
        tokenized(tmp_path / "full", tokenizer)


_CHILD = """
import sys, time
from larimar_jax.config import DataConfig
from larimar_jax.data import pieces
from larimar_jax.data.corpus import Corpus, Document
from larimar_jax.weights import Tokenizer
folder, file, pause = sys.argv[1:]
tokenizer = Tokenizer.from_json(open(file).read())
titles = [t for t in (f"t{n}" for n in range(9000)) if not Document(t, "").held_out][:5000]
def documents():
    for n, title in enumerate(titles):
        time.sleep(float(pause) * (n > 2500))
        yield Document(title, f"the cat {n}")
import pathlib
config = DataConfig(unit="sentence", encoder_tokens=24, decoder_tokens=16)
corpus, place = Corpus("c", documents), pathlib.Path(folder)
print(len(pieces.tokenize(corpus, False, config, tokenizer, tokenizer, folder=place)))
"""  # fmt: skip


def test_processes_that_are_killed_or_meet_leave_whole_pieces(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())

    def child(pause):
        places = [str(tmp_path / name) for name in ("pieces", "tokenizer.json")]
        command = [sys.executable, "-c", _CHILD, *places, str(pause)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)

    slow = child(0.1)
    try:
        ends = time.monotonic() + 60
        while not list((tmp_path / "pieces").rglob("*.arrow")) and time.monotonic() < ends:
            time.sleep(0.05)
        slow.send_signal(signal.SIGKILL)
        slow.wait()
        both = [child(0), child(0)]
        assert [process.communicate(timeout=60)[0].strip() for process in both] == ["5000", "5000"]
    finally:
        slow.kill()
