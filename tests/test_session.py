"""Sessions: facts with ids and a history, and a state that survives every bad call."""

import dataclasses
import json
import os
import sys

import jax
import numpy as np
import pytest

from larimar_jax import decoding, pipeline, session, session_file
from larimar_jax.pipeline import EncodingNotFinite
from larimar_jax.session import Session
from larimar_jax.weights import TextTooLong

FACTS = [(f"Fact {n} is", f"new {n}") for n in range(5)]


@pytest.fixture
def empty(tiny):
    return Session(tiny)


@pytest.fixture
def written(tiny):
    session = Session(tiny)
    for fact in FACTS:
        session.write(*fact)
    return session


def content(session):
    """Everything in a session that a call could change."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(session.state)]
    return leaves, session.list(), session.history()


def assert_same_memory(one, two):
    one, two = (s.model.memory.matrix(s.model.prepared, s.state) for s in (one, two))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 * float(np.abs(two).max()))


def test_facts_have_ids_and_a_history(written):
    assert [fact.id for fact in written.list()] == [1, 2, 3, 4, 5]
    written.forget(3)
    assert [fact.id for fact in written.list()] == [1, 2, 4, 5]
    events = written.history()
    assert [event.kind for event in events] == ["write"] * 5 + ["forget"]
    assert events[-1].fact.prompt == "Fact 2 is" and events[-1].milliseconds > 0
    assert "forget" in str(events[-1])


def test_forgetting_is_never_having_written(empty, written):
    written.forget(3)
    for fact in FACTS[:2] + FACTS[3:]:
        empty.write(*fact)
    assert_same_memory(written, empty)


def test_a_correction_replaces_the_fact(tiny, empty):
    once = Session(tiny)
    once.write("Fact 1 is", "true 2")
    empty.write("Fact 1 is", "new 1")
    fact = empty.write("Fact 1 is", "true 2")
    assert [(f.id, f.answer) for f in empty.list()] == [(fact.id, "true 2")]
    assert [event.kind for event in empty.history()] == ["write", "forget", "write"]
    assert_same_memory(empty, once)


def test_rephrasings_lead_to_the_fact_and_go_with_it(empty):
    fact = empty.write("Fact 1 is", "new 1", rephrasings=["Says of fact 1:", "The fact 1"])
    assert empty.ask("Says of fact 1:", max_tokens=2).fact == fact.id
    empty.forget(fact.id)
    assert not empty.ask("Says of fact 1:", max_tokens=2).in_scope


def test_out_of_scope_is_the_base_model_word_for_word(tiny, written):
    prompt = "The capital of France is"
    answer = written.ask(prompt, max_tokens=6)
    assert not answer.in_scope and answer.fact is None
    assert answer.text == tiny.generate([prompt], max_tokens=6)[0]
    assert set(answer.milliseconds) == {"encode", "read", "decode"}


def test_a_question_in_scope_is_answered_by_the_memory(tiny, written):
    answer = written.ask("Fact 1 is", max_tokens=4)
    assert answer.in_scope and answer.fact == 2 and answer.score > 0.999
    pieces = []
    assert written.ask("Fact 1 is", max_tokens=4, on_text=pieces.append).text == "".join(pieces)
    assert "".join(pieces) == answer.text
    base = tiny.score(["Fact 1 is"], [("new 1",)])
    assert abs(written.score(["Fact 1 is"], [("new 1",)]) - base).max() > 1e-4
    assert written.ask_all([]) == []


def test_a_question_enters_twelve_modules_before_its_first_logits(written, monkeypatch):
    """Of a warm process: what is compiled is not entered again (docs/architecture.md)."""
    files, begin = set(), decoding._begin

    def profile(frame, event, argument):
        if event == "call":
            files.add(frame.f_code.co_filename)

    def first_logits(*arguments):
        sys.setprofile(None)
        return begin(*arguments)

    written.ask("Fact 1 is", max_tokens=2)
    monkeypatch.setattr(decoding, "_begin", first_logits)
    sys.setprofile(profile)
    try:
        assert written.ask("Fact 1 is", max_tokens=2).in_scope
    finally:
        sys.setprofile(None)
    package = os.path.dirname(session.__file__)
    entered = sorted(os.path.relpath(file, package) for file in files if file.startswith(package))
    assert "session.py" in entered and len(entered) <= 12, entered


def test_a_fact_of_two_sentences_is_recognised_by_its_own_words(empty):
    fact = empty.write("Fact 1 is new. The capital of Japan is", "city")
    answer = empty.ask("Fact 1 is new. The capital of Japan is", max_tokens=2)
    assert answer.fact == fact.id and answer.score == pytest.approx(1.0, abs=1e-4)


def test_a_forget_is_certified_and_near_duplicates_are_named(empty):
    empty.write("The capital of Atlantis is", "Poseidonis")
    first = empty.write("The Eiffel Tower is located in", "Rome")
    again = empty.write("The Eiffel Tower is located in", "Oslo")
    notes = [event.note for event in empty.history()]
    assert notes[0] == "" and notes[-1] == f"replaces {first}"
    twin = empty.write("The Eiffel Tower is located  in ,", "Bern")
    note = empty.history()[-1].note
    gone = empty.forget(twin.id)
    assert gone.fact == twin and 0 <= gone.distance < 1e-4
    # Another fact's key is nearly this one's, and still explains it, exactly where it was named.
    assert (gone.leverage > 0.5) == (f"that of fact {again.id}" in note)
    alone = empty.forget(1)
    assert alone.fact.answer == "Poseidonis" and alone.leverage <= 1
    health = empty.health()
    assert health.count == 1 and not health.full and 0 < health.load < 0.1
    assert json.loads(json.dumps(health)) is not None


# Bad input: a clear error, and the state before the call


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda s: s.write("", "x"), session.EmptyFact, "needs a prompt and an answer"),
        (lambda s: s.write("Fact 9 is", "  \n"), session.EmptyFact, "needs a prompt and an answer"),
        (lambda s: s.write("Fact 9 is", "x", [""]), session.EmptyFact, "needs a prompt"),
        (lambda s: s.write("Fact 9 is", "new", "other words"), TypeError, "list of texts"),
        (lambda s: s.write("word " * 90, "x"), TextTooLong, "the encoder takes 128"),
        (lambda s: s.forget(77), session.UnknownFact, "never written. Facts in memory: 1, 3, 4, 5"),
        (lambda s: s.forget(2), session.UnknownFact, "forgotten before"),
        (lambda s: s.ask(" "), session.EmptyFact, "empty"),
        (lambda s: s.ask_all("Fact 1 is"), TypeError, "list of texts"),
    ],
)
def test_a_bad_call_says_so_and_changes_nothing(written, call, error, words):
    written.forget(2)
    before = content(written)
    with pytest.raises(error, match=words):
        call(written)
    assert content(written) == before


def test_an_encoding_that_is_not_finite_is_named(tiny, empty, monkeypatch):
    empty.write("Fact 1 is", "new 1")
    before = content(empty)
    broken = jax.tree.map(lambda leaf: leaf, tiny.state)
    broken["to_latent"]["kernel"][...] = np.full((16, 16), np.nan, np.float32)
    monkeypatch.setattr(tiny, "state", broken)
    with pytest.raises(EncodingNotFinite, match="'Fact 2 is' is not finite"):
        empty.write("Fact 2 is", "new 2")
    assert content(empty) == before


def test_a_memory_that_float32_can_not_solve_is_kept(empty):
    empty.write("Fact 1 is", "new 1")
    before, rows = content(empty), empty._ledger.rows[1]
    empty._ledger.rows[1] = dataclasses.replace(rows, key=rows.key * 50)  # not what was written
    with pytest.raises(session.MemoryNotFinite, match="stays as it was"):
        empty.forget(1)
    assert content(empty) == before


def test_a_write_that_float32_can_not_solve_is_refused(tiny, monkeypatch):
    """It was once listed as written while the memory had left it out."""
    monkeypatch.setattr(tiny, "memory", dataclasses.replace(tiny.memory, ridge=0.0))
    empty = Session(tiny)
    before = content(empty)
    with pytest.raises(session.MemoryNotFinite, match="could not write"):
        empty.write("Fact 1 is", "new 1")
    assert content(empty) == before


# Files


def test_a_saved_session_goes_on_bit_for_bit(tiny, written, tmp_path):
    written.forget(2)
    path = tmp_path / "session.safetensors"
    written.save(path)
    opened = Session.load(path, tiny)
    assert content(opened) == content(written)
    for continued in (opened, written):
        continued.forget(4)
        assert continued.write("Fact 7 is", "new").id == 6
    assert content(opened)[:2] == content(written)[:2]


@pytest.mark.parametrize("damage", ["cut", "lack", "model"])
def test_a_damaged_file_is_refused(tiny, written, tmp_path, damage):
    path = tmp_path / "session.safetensors"
    written.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
        message = "not a whole session"
    elif damage == "lack":
        ledger, arrays = session_file.load(path)
        arrays.pop("memory/factor")
        session_file.save(path, ledger, arrays)
        message = "lacks memory/factor"
    else:
        path, message = pipeline.model_file.locate("smol"), "holds a model and not a session"
    with pytest.raises(session_file.DamagedSession, match=message):
        Session.load(path, tiny)


def test_a_session_of_another_model_is_refused(tiny, written, tmp_path):
    path = tmp_path / "session.safetensors"
    written.save(path)
    towers = (tiny.config, tiny.model, tiny.encoder_tokenizer, tiny.decoder_tokenizer)
    unlike = pipeline.Pipeline(*towers, source="other", fingerprint="other")
    with pytest.raises(session.WrongModel, match="saved under 'tiny'"):
        Session.load(path, unlike)


def test_a_file_that_is_there_survives_a_save_that_fails(written, tmp_path, monkeypatch):
    path = tmp_path / "session.safetensors"
    written.save(path)
    whole = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        written.save(path)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == [path.name]
