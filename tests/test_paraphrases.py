"""Other wordings of a prompt, found in the records of a benchmark."""

import string

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from known_editor import cases, rows, saved, values

from larimar_jax.bench.counterfact import CounterFact
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.data.paraphrases import Paraphrases
from larimar_jax.session import Session


def record(prompt, *paraphrases, subject="Ann", case_id=0):
    return EditRecord(case_id, prompt, subject, "new", "true", paraphrases, (), ())


RECORDS = [
    record("Ann speaks", "Ann, a native", "Rain fell. Ann's tongue is"),
    record("Bob speaks", "Bob, a native", subject="Bob"),
    record("The talk of Cy is in", "In an essay\nCy, a native", subject="Cy"),
    record("Dan was born in", "Dan hails from", subject="Dan"),
    record("It speaks", "It sings", subject="Eve"),
]


def test_wordings_of_others_are_a_records_own_the_nearest_first():
    found = Paraphrases(RECORDS)
    others = ("Fay, a native", "Fay's tongue is", "The talk of Fay is in")
    assert found.of(record("Fay speaks", subject="Fay")) == others
    assert found.of(RECORDS[3]) == ("Dan hails from",)
    # What a record asks is not what it writes, and distractors are nobody's wording.
    assert found.unseen(RECORDS[0]) == ("The talk of Ann is in",)
    assert found.unseen(RECORDS[1]) == ("Bob's tongue is", "The talk of Bob is in")
    assert found.of(RECORDS[4]) == () and found.of(record("Ann has")) == ()


WORDS = st.lists(st.sampled_from(string.ascii_lowercase[:6]), min_size=1, max_size=2)


@settings(max_examples=60, deadline=None)
@drawn(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=12))
def test_wordings_are_a_relation_of_equals(pairs):
    """Whoever is a wording of a prompt has that prompt among its own wordings, and no one is twice."""
    records = [record(f"Ann {' '.join(a)}", f"Ann {' '.join(b)}") for a, b in pairs]
    found = Paraphrases(records)
    for one in records:
        mine = found.of(one)
        assert len(set(mine)) == len(mine) and one.prompt not in mine
        for other in mine:
            assert set(found.of(record(other))) == {*mine, one.prompt} - {other}
        assert not {*one.paraphrases} & {*found.unseen(one)}


def test_what_is_written_in_more_wordings_is_what_a_session_writes(tiny, tmp_path, monkeypatch):
    """Each case's own number of wordings, beside each other in one batch."""
    wordings = [("That fact 0 was",), (), ("Of fact 2:", "Fact 2, it is said, is")]
    task = CounterFact(data=saved(cases(3), tmp_path / "facts.json"))
    alone = values(rows(task, tiny), "loss_true", kind="edit")
    monkeypatch.setattr(CounterFact, "other_wordings", lambda *_: wordings)
    together = values(rows(task, tiny), "loss_true", kind="edit")
    for case, more in zip(task.records, wordings, strict=True):
        session = Session(tiny)
        session.write(case.prompt, case.target_new, more)
        loss = float(session.score([case.prompt], [[case.target_true]])[0, 0])
        mine, single = together[case.case_id], alone[case.case_id]
        assert mine["larimar"][0] == pytest.approx(loss, rel=2e-4)
        assert (single["open"][0] == pytest.approx(loss, rel=1e-5)) == (not more)
        np.testing.assert_allclose(mine["base"], single["base"], rtol=2e-5)
