"""Sessions: facts with ids and a history, and a state that survives every bad call."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from larimar_jax import pipeline, session, session_file
from larimar_jax.pipeline import EncodingNotFinite
from larimar_jax.session import Session
from larimar_jax.weights.tokenizer import TextTooLong

FACTS = [(f"Fact {n} is", f"new {n}") for n in range(5)]


@pytest.fixture
def written(tiny):
    made = Session(tiny)
    for prompt, answer in FACTS:
        made.write(prompt, answer)
    return made


def state_of(made):
    return [np.asarray(leaf).copy() for leaf in jax.tree.leaves(made._state)]


def same(one, two):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, two, strict=True))


def test_facts_have_ids_and_a_history(written):
    assert [fact.id for fact in written.list()] == [1, 2, 3, 4, 5]
    written.forget(3)
    assert [fact.id for fact in written.list()] == [1, 2, 4, 5]
    events = written.history()
    assert [event.kind for event in events] == ["write"] * 5 + ["forget"]
    assert events[-1].fact.prompt == "Fact 2 is" and events[-1].milliseconds > 0
    assert "forget" in str(events[-1])


def test_forgetting_is_never_having_written(tiny, written):
    written.forget(3)
    other = Session(tiny)
    for prompt, answer in FACTS[:2] + FACTS[3:]:
        other.write(prompt, answer)
    memory, prepared = tiny.memory, tiny.prepared
    one, two = (memory.matrix(prepared, made._state) for made in (written, other))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 * float(np.abs(two).max()))


def test_a_correction_replaces_the_fact(tiny):
    made, once = Session(tiny), Session(tiny)
    made.write("Fact 1 is", "new 1")
    fact = made.write("Fact 1 is", "true 2")
    once.write("Fact 1 is", "true 2")
    assert [(f.id, f.answer) for f in made.list()] == [(fact.id, "true 2")]
    assert [event.kind for event in made.history()] == ["write", "forget", "write"]
    one, two = (tiny.memory.matrix(tiny.prepared, s._state) for s in (made, once))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 * float(np.abs(two).max()))


def test_rephrasings_lead_to_the_fact_and_go_with_it(tiny):
    made = Session(tiny)
    fact = made.write("Fact 1 is", "new 1", rephrasings=["Says of fact 1:", "The fact 1"])
    assert made.ask("Says of fact 1:", max_tokens=2).fact == fact.id
    made.forget(fact.id)
    assert not made.ask("Says of fact 1:", max_tokens=2).in_scope


def test_out_of_scope_is_the_base_model_word_for_word(tiny, written):
    prompt = "The capital of France is"
    answer = written.ask(prompt, max_tokens=6)
    assert not answer.in_scope and answer.fact is None
    assert answer.text == tiny.generate([prompt], max_tokens=6)[0]
    assert set(answer.milliseconds) == {"encode", "read", "decode"}


def test_in_scope_asks_the_memory(tiny, written):
    answer = written.ask("Fact 1 is", max_tokens=4)
    assert answer.in_scope and answer.fact == 2 and answer.score > 0.999
    base = tiny.score(["Fact 1 is"], [("new 1",)])
    assert abs(written.score(["Fact 1 is"], [("new 1",)]) - base).max() > 1e-4
    assert written.ask_all([]) == []


def test_a_saved_session_goes_on_bit_for_bit(tiny, written, tmp_path):
    written.forget(2)
    path = tmp_path / "session.safetensors"
    written.save(path)
    opened = Session.load(path, tiny)
    assert opened.list() == written.list() and opened.history() == written.history()
    assert same(state_of(opened), state_of(written))
    for made in (opened, written):
        made.forget(4)
        assert made.write("Fact 7 is", "new").id == 6
    assert same(state_of(opened), state_of(written))


# Bad input: a clear error, and the state before the call


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda s: s.write("", "x"), session.EmptyFact, "needs a prompt and an answer"),
        (lambda s: s.write("Fact 9 is", "  \n"), session.EmptyFact, "needs a prompt and an answer"),
        (lambda s: s.write("Fact 9 is", "x", [""]), session.EmptyFact, "needs a prompt"),
        (lambda s: s.write("word " * 90, "x"), TextTooLong, "the encoder takes 128"),
        (lambda s: s.forget(77), session.UnknownFact, "never written. Facts in memory: 1, 3, 4, 5"),
        (lambda s: s.forget(2), session.UnknownFact, "forgotten before"),
        (lambda s: s.ask(" "), session.EmptyFact, "empty"),
    ],
)
def test_a_bad_call_says_so_and_changes_nothing(written, call, error, words):
    written.forget(2)
    before, facts, events = state_of(written), written.list(), written.history()
    with pytest.raises(error, match=words):
        call(written)
    assert same(state_of(written), before)
    assert written.list() == facts and written.history() == events


def test_an_encoding_that_is_not_finite_is_named(tiny, monkeypatch):
    made = Session(tiny)
    made.write("Fact 1 is", "new 1")
    before = state_of(made)
    broken = jax.tree.map(lambda leaf: leaf, tiny.state)
    broken["to_latent"]["kernel"][...] = np.full((16, 16), np.nan, np.float32)
    monkeypatch.setattr(tiny, "state", broken)
    with pytest.raises(EncodingNotFinite, match="'Fact 2 is' is not finite"):
        made.write("Fact 2 is", "new 2")
    assert same(state_of(made), before) and len(made.list()) == 1


def test_a_memory_that_float32_can_not_solve_is_kept(tiny):
    made = Session(tiny)
    made.write("Fact 1 is", "new 1")
    before = state_of(made)
    keys = made._keys[1]
    made._keys[1] = dataclasses.replace(keys, key=keys.key * 50)  # not what was written
    with pytest.raises(session.MemoryNotFinite, match="stays as it was"):
        made.forget(1)
    assert same(state_of(made), before) and [fact.id for fact in made.list()] == [1]


def test_a_write_that_float32_can_not_solve_is_refused(tiny, monkeypatch):
    """It was once listed as written while the memory had left it out."""
    monkeypatch.setattr(tiny, "memory", dataclasses.replace(tiny.memory, ridge=0.0))
    made = Session(tiny)
    before = state_of(made)
    with pytest.raises(session.MemoryNotFinite, match="could not write"):
        made.write("Fact 1 is", "new 1")
    assert same(state_of(made), before) and made.list() == [] and made.history() == []


def test_a_fact_of_two_sentences_is_found_by_its_own_words(tiny):
    made = Session(tiny)
    fact = made.write("Fact 1 is new. The capital of Japan is", "city")
    answer = made.ask("Fact 1 is new. The capital of Japan is", max_tokens=2)
    assert answer.fact == fact.id and answer.score == pytest.approx(1.0, abs=1e-4)


def test_one_text_where_a_list_belongs(tiny):
    made = Session(tiny)
    with pytest.raises(TypeError, match="list of texts"):
        made.write("Fact 1 is", "new", "other words")
    with pytest.raises(TypeError, match="list of texts"):
        made.ask_all("Fact 1 is")
    assert made.list() == []


@pytest.mark.parametrize("damage", ["cut", "flip", "garbage"])
def test_a_damaged_file_is_refused(tiny, written, tmp_path, damage):
    path = tmp_path / "session.safetensors"
    written.save(path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[-3] ^= 0xFF
    else:
        content = b"not a session"
    path.write_bytes(bytes(content))
    with pytest.raises(session_file.DamagedSession, match="not a whole session"):
        Session.load(path, tiny)


def test_a_session_of_another_model_is_refused(tiny, written, tmp_path):
    path = tmp_path / "session.safetensors"
    written.save(path)
    other = pipeline.Pipeline(
        tiny.config,
        tiny.model,
        tiny.encoder_tokenizer,
        tiny.decoder_tokenizer,
        source="other",
        fingerprint="other",
    )
    with pytest.raises(session.WrongModel, match="saved under 'tiny'"):
        Session.load(path, other)


def test_a_file_that_is_there_survives_a_save_that_fails(written, tmp_path, monkeypatch):
    path = tmp_path / "session.safetensors"
    written.save(path)
    content = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        written.save(path)
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a shipped name"):
        pipeline.load("nothing-of-that-name")
    path = tmp_path / "model.safetensors"
    path.write_bytes(json.dumps({}).encode())
    with pytest.raises(ValueError, match="damaged"):
        pipeline.load(path)


def test_a_forget_is_certified_and_near_duplicates_are_named(tiny):
    made = Session(tiny)
    made.write("The capital of Atlantis is", "Poseidonis")
    first = made.write("The Eiffel Tower is located in", "Rome")
    again = made.write("The Eiffel Tower is located in", "Oslo")
    notes = [event.note for event in made.history()]
    assert notes[0] == "" and notes[-1] == f"replaces {first}"
    twin = made.write("The Eiffel Tower is located  in ,", "Bern")
    note = made.history()[-1].note
    gone = made.forget(twin.id)
    assert gone.fact == twin and 0 <= gone.distance < 1e-4
    # Another fact's key is nearly this one's, and still explains it, exactly where it was named.
    assert (gone.leverage > 0.5) == (f"that of fact {again.id}" in note)
    alone = made.forget(1)
    assert alone.fact.answer == "Poseidonis" and alone.leverage <= 1
    health = made.health()
    assert health.count == 1 and not health.full and 0 < health.load < 0.1
    assert json.loads(json.dumps(health)) is not None
