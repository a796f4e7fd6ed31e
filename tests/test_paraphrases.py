"""Other wordings of a prompt, found in the records of a benchmark."""

import argparse
import dataclasses
import string

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from test_bench import KnownEditor, cases

from larimar_jax.bench import counterfact, given
from larimar_jax.bench.editor import LarimarEditor
from larimar_jax.data import edit_records as data
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


def test_counterfact_writes_as_many_wordings_as_it_is_told(tmp_path):
    found = Paraphrases(RECORDS)
    wordings = [found.unseen(one)[:1] for one in RECORDS[:2]]
    some = [dataclasses.replace(record, case_id=n) for n, record in enumerate(RECORDS[:2])]
    told = []

    class Watched(KnownEditor):
        def recall(self, facts, queries, wordings=(), **options):
            told.append((facts, wordings))
            return super().recall(facts, queries, wordings, **options)

    made = counterfact.CounterFact(Watched(), some, data={}, wordings=wordings)
    records = made.run(some)
    assert told == [([("Ann speaks", "new"), ("Bob speaks", "new")], wordings)]
    assert [r["wordings"] for r in records] == [["The talk of Ann is in"], ["Bob's tongue is"]]
    summary = {"settings": made.settings, "cases": 2, "results": counterfact.summarise(records)}
    assert "in 1.00 more wordings" in counterfact.tables(summary)[0].title
    assert made.settings["rephrasings"] == 1


def test_what_is_written_in_more_wordings_is_what_a_session_writes(tiny):
    """Each case's own number of wordings, beside each other in one batch."""
    wordings = [["That fact 0 was"], [], ["Of fact 2:", "Fact 2, it is said, is"]]
    some = cases(3)
    made = counterfact.CounterFact(LarimarEditor(tiny), some, data={}, wordings=wordings)
    for case, more, found in zip(some, wordings, made.run(some), strict=True):
        session = Session(tiny)
        session.write(case.prompt, case.target_new, more)
        targets = [[case.target_new, case.target_true]] * len(found["prompts"]["edit"])
        told = session.score(found["prompts"]["edit"], targets)
        assert found["loss"]["larimar"]["edit"][0] == pytest.approx(told[0].tolist(), rel=2e-4)
        (alone,) = counterfact.CounterFact(LarimarEditor(tiny), [case], data={}).run([case])
        same = alone["loss"]["open"]["edit"][0] == pytest.approx(told[0].tolist(), rel=1e-5)
        assert same == (not more)
        for kind in ("edit", "neighbourhood"):
            mine, theirs = found["loss"]["base"][kind], alone["loss"]["base"][kind]
            np.testing.assert_allclose(mine, theirs, rtol=2e-5)


def test_a_number_of_wordings_below_zero_is_refused():
    args = argparse.Namespace(data="none", skip_bad=False)
    with pytest.raises(ValueError, match="--rephrasings must be at least 0, not -1"):
        given.wordings(args, data.load, [], -1)
