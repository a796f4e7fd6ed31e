"""Sessions: facts with ids and a history, and a state that survives every bad call."""

import concurrent.futures
import dataclasses
import inspect
import json
import os
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import session_writer

from larimar_jax import decoding, pipeline, scope, session_file
from larimar_jax.memory import finite
from larimar_jax.pipeline import EncodingNotFinite
from larimar_jax.session import Session
from larimar_jax.session_file import Fact, FactRows, Journal, Ledger
from larimar_jax.weights import TextTooLong

FACTS = [(f"Fact {n} is", f"new {n}") for n in range(5)]


@pytest.fixture
def empty(tiny):
    return Session(tiny)


def session_of_ridge(ridge, tiny, monkeypatch):
    """Return an empty session with this λ."""
    editing = dataclasses.replace(tiny.config.editing, session_ridge=ridge)
    monkeypatch.setattr(tiny, "config", dataclasses.replace(tiny.config, editing=editing))
    return Session(tiny)


@pytest.fixture
def smol_rows():
    """Rows of the shipped model's sizes: features behind the encoding, answer codes behind them."""
    draw = np.random.default_rng(0)
    embedding, rows = draw.normal(size=(1, 384)), draw.normal(size=(2, 1, 4096))
    rows[0, :, 1024:] = 0
    rows[1, :, 1024:] = np.sign(rows[1, :, 1024:]) / 16 * (np.arange(3072) < 768)
    return FactRows(*(array.astype(np.float32) for array in (embedding, *rows)))


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
    """Where facts are written; elsewhere rounding moves M by more, as many keys are nearly alike."""
    keys = np.concatenate([rows.key for rows in one._content[1].rows.values()])
    one, two = (finite.read(s._rule, s.model.prepared, s._content[0], keys) for s in (one, two))
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


def test_a_question_is_read_at_the_key_of_the_fact_that_it_matches(written, monkeypatch):
    monkeypatch.setattr(pipeline.Pipeline, "scope_threshold", -1.0)
    recalled = written.recall(["Says of the capital: Japan"])
    (fact,) = (fact for fact in written.list() if fact.id == recalled.facts[0])
    verbatim = written.recall([fact.prompt])
    assert recalled.scores[0] < verbatim.scores[0] == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_array_equal(recalled.readout, verbatim.readout)


def test_another_thing_after_a_mention_is_the_base_models(tiny, written, monkeypatch):
    """The detector compares what is asked, however near the mention is."""
    encoded = []
    encode = tiny.encode
    monkeypatch.setattr(
        tiny, "encode", lambda texts, *a, **o: encoded.extend(texts) or encode(texts, *a, **o)
    )
    written.recall(["Fact 1 is new. The capital of Japan is", "The capital of Japan. Fact 1 is"])
    assert encoded == ["The capital of Japan is", "Fact 1 is"]


@pytest.mark.parametrize(
    "answer",
    ["city", "new true city Japan France 7", "Japan\n\tnew  2 \n", "東京"],
)
def test_an_answer_of_any_length_is_given_whole_with_its_white_space(tiny, monkeypatch, answer):
    """A value holds three tokens; a stop text in the answer does not end it."""
    empty = session_of_ridge(1e-4, tiny, monkeypatch)  # these encodings are all alike
    empty.write("Fact 1 is", "new 1")
    fact = empty.write("The city of Japan is", answer)
    short, whole = empty.ask_all(["Fact 1 is", "The city of Japan is"])
    assert fact.answer == answer.strip() == whole.text.strip() and short.text.strip() == "new 1"
    pieces = []
    assert empty.ask("The city of Japan is", on_text=pieces.append).text == whole.text
    assert "".join(pieces) == whole.text
    empty.forget(fact.id)
    assert empty.ask("The city of Japan is").fact != fact.id


def test_a_prompt_in_other_capitals_is_corrected_where_the_encoder_sees_none(
    tiny, empty, monkeypatch
):
    encode = tiny.encode
    lowered = lambda texts, *a, **o: encode([text.lower() for text in texts], *a, **o)  # noqa: E731
    monkeypatch.setattr(tiny, "encode", lowered)
    empty.write("Fact 1 is", "new 1")
    fact = empty.write("fact 1 IS", "true 2")
    assert empty.list() == [fact] and empty.history()[-1].note == "replaces 1: Fact 1 is new 1"
    answer = empty.ask("Fact 1 is")
    assert (answer.fact, answer.text.strip()) == (fact.id, "true 2")


def test_a_prompt_longer_than_the_towers_take_is_answered_by_its_end(written):
    """The encoder takes 128 tokens, and the decoder 127."""
    filler = "The city is new. " * 40
    assert written.ask(f"{filler}Fact 1 is").fact == 2
    assert written.ask(f"{filler} Fact 1 is", max_tokens=2).text.strip()
    assert not written.ask("Japan " * 200).in_scope


def test_a_prompt_that_is_easily_taken_for_another_is_warned_of(empty):
    empty.write("The city of Japan is", "new")
    with pytest.warns(scope.NearDuplicate, match=r"hard to tell from .* fact 1 \(cosine"):
        fact = empty.write("The  city of Japan is ,", "true")
    assert str(fact) in "2: The city of Japan is , true" and len(empty.list()) == 2


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
    package = os.path.dirname(session_file.__file__)
    entered = sorted(os.path.relpath(file, package) for file in files if file.startswith(package))
    assert "session.py" in entered and len(entered) <= 12, entered


def test_a_fact_of_two_sentences_is_recognised_by_its_own_words(empty):
    fact = empty.write("Fact 1 is new. The capital of Japan is", "city")
    answer = empty.ask("Fact 1 is new. The capital of Japan is", max_tokens=2)
    assert answer.fact == fact.id and answer.score == pytest.approx(1.0, abs=1e-4)


def test_a_forget_is_certified_and_near_duplicates_are_named(empty):
    empty.write("The capital of Atlantis is", "city")
    first = empty.write("The Eiffel Tower is located in", "new")
    again = empty.write("The Eiffel Tower is located in", "true")
    notes = [event.note for event in empty.history()]
    assert notes[0] == "" and notes[-1] == f"replaces {first}"
    twin = empty.write("The Eiffel Tower is located  in ,", "true")
    note, condition = empty.history()[-1].note, empty.health().condition
    gone = empty.forget(twin.id)
    # The rounding of a solve, as memory/diagnostics.py states it.
    assert gone.fact == twin and 0 <= gone.distance < 1e-7 * condition
    # Another fact's key is nearly this one's, and still explains it, as was warned of.
    assert gone.leverage > 0.5 and f"that of fact {again.id}" in note
    alone = empty.forget(1)
    assert alone.fact.answer == "city" and alone.leverage <= 1
    health = empty.health()
    assert health.count == 1 and not health.full and 0 < health.load < 0.1
    assert json.loads(json.dumps(health)) is not None


# Bad input: a clear error, and the state before the call

# As users have it, whose calls no type checker sees.
unchecked = inspect.unwrap(Session.write)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda s: s.write("", "x"), session_file.EmptyFact, "needs a prompt and an answer"),
        (lambda s: s.write("Fact 9 is", "  \n"), session_file.EmptyFact, "needs a prompt and an"),
        (lambda s: s.write("Fact 9 is", "x", [""]), session_file.EmptyFact, "needs a prompt"),
        (lambda s: s.write("Fact 9 is", "new", "other words"), TypeError, "list of texts"),
        (lambda s: s.write("word " * 90, "x"), TextTooLong, "the encoder takes 128"),
        (lambda s: s.write("Fact 9 is", "word " * 90), TextTooLong, "and the encoder takes 128"),
        (lambda s: s.forget(77), session_file.UnknownFact, "never written. .*: 1, 3, 4, 5"),
        (lambda s: s.forget(2), session_file.UnknownFact, "forgotten before"),
        (lambda s: s.ask(" "), session_file.EmptyFact, "empty"),
        (lambda s: s.ask_all("Fact 1 is"), TypeError, "list of texts"),
        (lambda s: unchecked(s, "The pin is", 1234), TypeError, "answer is the int 1234 .* '1234'"),
        (lambda s: unchecked(s, "Fact 9 is", "new", [7]), TypeError, "a rephrasing is the int 7"),
        (lambda s: s.write("caf\udce9 is", "new"), session_file.NotUnicode, "are not UTF-8"),
        (lambda s: s.ask("caf\udce9 is"), session_file.NotUnicode, "are not UTF-8"),
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
    before, rows = content(empty), empty._content[1].rows[1]
    empty._content[1].rows[1] = dataclasses.replace(rows, key=rows.key * 50)  # not what was written
    with pytest.raises(finite.MemoryNotFinite, match="stays as it was"):
        empty.forget(1)
    assert content(empty) == before


def test_a_fact_that_would_not_be_given_back_is_refused(empty):
    empty.write("Fact 1 is", "new 1", rephrasings=["Says of fact 1:"])
    before = content(empty)
    with pytest.raises(finite.NotKept, match="would not give back .*nothing is written"):
        empty.write("Says of fact 1:", "true 2")
    assert content(empty) == before


def test_a_write_reads_back_what_it_may_have_moved_too_far(empty, monkeypatch):
    """And no more: of each fact it is known how far it may yet move, never more than is so."""
    counts, read_back = [], finite.read_back

    def counted(*arguments):
        counts.append(len(arguments[3]))
        return read_back(*arguments)

    monkeypatch.setattr(finite, "read_back", counted)
    code = empty.model.config.editing.answer_code
    for fact in FACTS:
        empty.write(*fact)
        memory, ledger = empty._content
        rows = session_file.join([*ledger.rows.values()])
        content = memory, rows.key, rows.value, (code.positions, code.width)
        _, left = read_back(*empty._rls, *content)
        assert (np.array([empty._room[fact.id] for fact in empty.list()]) <= left + 1e-4).all()
    assert counts[:2] == [1, 1] and 1 < counts[3] < 4
    empty.forget(3)
    empty.write(*FACTS[2])
    assert counts[-1] == len(FACTS)


def test_a_journal_taken_in_change_by_change_gives_the_same_memory_to_the_bit(tiny, tmp_path):
    """And so the same certificates."""
    own, other = (Session(tiny, tmp_path / "facts.jsonl") for _ in range(2))

    calls = [(own.write, *fact) for fact in FACTS[:4]]
    for call, *arguments in [*calls, (other.forget, 2), (own.write, FACTS[3][0], "true 2")]:
        call(*arguments)
        for session in (own, other):
            with session.together():  # takes in the change
                pass
    for one, two in zip(*(jax.tree.leaves(s._content[0]) for s in (own, other)), strict=True):
        np.testing.assert_array_equal(one, two)
    copy = Session(tiny, shutil.copy(tmp_path / "facts.jsonl", tmp_path / "copy.jsonl"))
    copy._content = other._content
    assert copy.forget(3) == own.forget(3)


def test_a_write_that_float32_can_not_solve_is_refused(tiny, monkeypatch):
    """It was once listed as written while the memory had left it out."""
    empty = session_of_ridge(0.0, tiny, monkeypatch)
    before = content(empty)
    with pytest.raises(finite.MemoryNotFinite, match="could not write"):
        empty.write("Fact 1 is", "new 1")
    assert content(empty) == before


# Files


def test_a_saved_session_goes_on(tiny, written, tmp_path):
    written.forget(2)
    path = tmp_path / "session.jsonl"
    written.save(path)
    opened = Session.load(path, tiny)
    assert content(opened)[1:] == content(written)[1:]
    assert content(opened) == content(Session.load(path, tiny))
    assert_same_memory(opened, written)
    for continued in (opened, written):
        continued.forget(4)
        assert continued.write("Fact 7 is", "new").id == 6
    assert_same_memory(opened, written)
    # What was loaded is in the file as soon as it is written, without another save.
    assert Session.load(path, tiny).list() == opened.list() == written.list()


def test_a_session_of_a_fact_is_kilobytes(tmp_path, smol_rows):
    path = tmp_path / "session.jsonl"
    ledger = Ledger("m", "f").with_fact(Fact(1, "Fact 1 is", "new"), smol_rows, 1.0, "")
    session_file.rewrite(Journal(path), ledger)
    assert path.stat().st_size <= 20_000
    again = session_file.read(Journal(path), Ledger("", ""))
    for name, array in vars(again.rows[1]).items():
        np.testing.assert_array_equal(array, getattr(smol_rows, name))


def test_sessions_of_one_file_take_in_what_the_other_wrote(tiny, tmp_path):
    path = tmp_path / "session.jsonl"
    first, second = Session(tiny, path), Session(tiny, path)
    assert [first.write("Fact 1 is", "new 1").id, second.write("Fact 2 is", "new 2").id] == [1, 2]
    assert first.write("Fact 2 is", "true").id == 3  # a correction of the other's
    second.forget(1)
    assert [fact.id for fact in second.list()] == [3]
    second.purge()
    assert first.write("Fact 4 is", "new 4").id == 4
    assert first.list() == Session(tiny, path).list() and len(first.list()) == 2
    assert_same_memory(first, Session(tiny, path))


def test_threads_lose_nothing(tiny, tmp_path):
    """Some share a session, some have their own on the same file."""
    path = tmp_path / "session.jsonl"
    shared = Session(tiny, path)
    sessions = [shared, shared, Session(tiny, path), Session(tiny, path)]
    shared.write("Fact 0 is", "new")  # compiles

    def edit(number):
        for count in range(4):
            sessions[number].write(f"Fact {number} {count} is", "new")
            assert sessions[number].ask(f"Fact {number} {count} is", max_tokens=1).in_scope

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(edit, range(4)))
    facts = Session(tiny, path).list()
    assert [fact.id for fact in facts] == list(range(1, 18))
    for number in range(4):
        own = [fact.prompt for fact in facts if fact.prompt.startswith(f"Fact {number} ")][-4:]
        assert own == [f"Fact {number} {count} is" for count in range(4)]


@pytest.mark.parametrize("in_file", [True, False], ids=["in a file", "in memory"])
def test_what_is_purged_leaves_no_trace(tiny, tmp_path, in_file):
    path = tmp_path / "session.jsonl"
    opened = Session(tiny, path if in_file else None)
    opened.write("The capital of France is", "Japan7")
    secret = opened.write("The capital of France is", "city7", ["Says the capital:"])
    opened.write("Fact 1 is", "new")
    other = opened.write("Fact 1 is", "true")
    opened.forget(secret.id)
    with pytest.raises(session_file.UnknownFact, match="3 to purge: it is in no history|in memory"):
        opened.purge(other.id)
    opened.purge(secret.id)
    assert [str(event.fact) for event in opened.history()][0] == "3: Fact 1 is new"
    with pytest.raises(session_file.UnknownFact, match="it was never written"):
        opened.forget(secret.id)
    opened.save(path)
    for text in ("Japan7", "city7", "France", "Says"):
        assert text.encode() not in path.read_bytes()
    assert b"Fact 1 is" in path.read_bytes() and b"replaces 3" in path.read_bytes()
    opened.purge()
    assert [event.fact for event in opened.history()] == [other]
    opened.save(path)
    assert b"replaces" not in path.read_bytes()
    assert Session.load(path, tiny).write("Fact 2 is", "new").id == 5
    assert [name.name for name in tmp_path.iterdir()] == [path.name]


def test_a_damaged_file_is_refused(tiny, written, tmp_path):
    path = tmp_path / "session.jsonl"
    written.save(path)
    path.write_bytes(path.read_bytes().replace(b"Fact 3", b"Fact 8", 1))
    with pytest.raises(session_file.DamagedSession, match="a line, .* is not as it was written"):
        Session.load(path, tiny)
    for no_session in (pipeline.model_file.locate("smol"), __file__):
        with pytest.raises(session_file.DamagedSession, match="is no session"):
            Session(tiny, no_session)
    with pytest.raises(IsADirectoryError, match="a session is a file, such as"):
        Session(tiny, tmp_path)
    with pytest.raises(IsADirectoryError, match="a session is a file, such as"):
        written.save(tmp_path)


def test_a_session_of_another_model_is_refused(tiny, written, tmp_path):
    path = tmp_path / "session.jsonl"
    written.save(path)
    towers = (tiny.config, tiny.model, tiny.encoder_tokenizer, tiny.decoder_tokenizer)
    unlike = pipeline.Pipeline(*towers, source="other", fingerprint="other")
    with pytest.raises(session_file.WrongModel, match="saved under 'tiny'"):
        Session.load(path, unlike)


def test_a_file_that_is_there_survives_a_save_that_fails(written, tmp_path, monkeypatch):
    path = tmp_path / "session.jsonl"
    written.save(path)
    whole = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(session_file.SaveFailed, match="disk full.*bytes were to go there"):
        written.save(path)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_disk_that_is_full_leaves_session_and_file_as_they_were(tiny, tmp_path):
    path = tmp_path / "session.jsonl"
    opened = Session(tiny, path)
    opened.write("Fact 1 is", "new 1")
    before, whole = content(opened), path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 99, limits[1]))
    try:
        with pytest.raises(session_file.SaveFailed, match="could not be written"):
            opened.write("Fact 2 is", "new 2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(opened) == before and path.read_bytes() == whole
    assert opened.write("Fact 2 is", "new 2").id == 2
    assert Session.load(path, tiny).list() == opened.list()


def writer(path, name, count):
    line = [sys.executable, session_writer.__file__, str(path), name, str(count)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True)


def test_processes_lose_nothing_and_a_kill_nothing_acknowledged(tmp_path):
    path = tmp_path / "session.jsonl"
    names = ["a", "b"]
    processes = {name: writer(path, name, 25) for name in names}
    processes["killed"] = killed = writer(path, "killed", 100_000)
    acknowledged = [killed.stdout.readline() for _ in range(30)]
    killed.kill()
    acknowledged += killed.stdout.read().splitlines()
    assert [processes[name].wait() for name in names] == [0, 0]
    ledger = session_file.read(Journal(path), Ledger("", ""))
    assert [*ledger.facts] == list(range(1, ledger.next_id))
    for name, least in dict(a=25, b=25, killed=len(acknowledged)).items():
        prompts = [fact.prompt for fact in ledger.facts.values() if fact.prompt.split()[0] == name]
        assert prompts == [f"{name} {number}" for number in range(len(prompts))]
        assert least <= len(prompts) <= least + (name == "killed")


@pytest.mark.parametrize("end", [b"", b'{"crc": "0', b"half a line", b"\0" * 4096])
def test_a_line_that_was_cut_short_is_overwritten(tmp_path, end):
    path = tmp_path / "session.jsonl"
    session_writer.write(path, "a", 2)
    path.write_bytes(path.read_bytes() + end)
    assert len(session_file.read(Journal(path), Ledger("", "")).facts) == 2
    session_writer.write(path, "b", 1)
    assert len(session_file.read(Journal(path), Ledger("", "")).facts) == 3


def test_a_file_without_its_first_line_is_begun_anew(tiny, tmp_path):
    path = tmp_path / "session.jsonl"
    for start in (b"", b'{"crc'):
        path.write_bytes(start)
        with pytest.raises(FileNotFoundError, match="which is empty"):
            Session.load(path, tiny)
        assert Session(tiny, path).write("Fact 1 is", "new").id == 1
