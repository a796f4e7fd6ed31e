"""Other wordings of a prompt, found in the records of a benchmark."""

import dataclasses
import string

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
    wordings = Paraphrases(RECORDS)
    others = ("Fay, a native", "Fay's tongue is", "The talk of Fay is in")
    assert wordings.of(record("Fay speaks", subject="Fay")) == others
    assert wordings.of(RECORDS[3]) == ("Dan hails from",)
    # What a record asks is not what it writes, and distractors are nobody's wording.
    assert wordings.unseen(RECORDS[0]) == ("The talk of Ann is in",)
    assert wordings.unseen(RECORDS[1]) == ("Bob's tongue is", "The talk of Bob is in")
    assert wordings.of(RECORDS[4]) == () and wordings.of(record("Ann has")) == ()


WORDS = st.lists(st.sampled_from(string.ascii_lowercase[:6]), min_size=1, max_size=2)


@settings(max_examples=60)
@drawn(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=12))
def test_wordings_are_a_relation_of_equals(pairs):
    """Whoever is a wording of a prompt has that prompt among its own wordings, and no one is twice."""
    records = [record(f"Ann {' '.join(a)}", f"Ann {' '.join(b)}") for a, b in pairs]
    wordings = Paraphrases(records)
    for one in records:
        mine = wordings.of(one)
        assert len(set(mine)) == len(mine) and one.prompt not in mine
        for other in mine:
            assert set(wordings.of(record(other))) == {*mine, one.prompt} - {other}
        assert not {*one.paraphrases} & {*wordings.unseen(one)}


def test_what_is_written_in_more_wordings_is_what_a_session_writes(tiny, tmp_path):
    """Several records have the same words for other subjects; the last has none to share."""
    wordings = ("{} is", "Says of {}:", "The city {}")
    shared = [
        dataclasses.replace(
            case,
            prompt=wordings[n].format(case.subject),
            paraphrases=(wordings[(n + 1) % 3].format(case.subject),),
        )
        for n, case in enumerate(cases(3))
    ]
    alone = dataclasses.replace(cases(4)[3], prompt="Much like Fact 3:", paraphrases=())
    task = CounterFact(data=saved([*shared, alone], tmp_path / "f.json"), rephrasings=2)
    extra = task.other_wordings(task.records, 2)
    assert extra == [("The city Fact 0",), ("Fact 1 is",), ("Says of Fact 2:",), ()]
    same = tiny.with_memory(Session(tiny)._rule, tiny.prepared)
    losses = values(rows(task, same), "loss_true", kind="edit")
    for case, more in zip(task.records, extra, strict=True):
        session = Session(tiny)
        session.write(case.prompt, case.target_new, more)
        loss = float(session.score([case.prompt], [[case.target_true]])[0, 0])
        assert losses[case.case_id]["larimar"][0] == pytest.approx(loss, rel=2e-4)
    with pytest.raises(ValueError, match="--rephrasings must be at least 0, not -1"):
        dataclasses.replace(task, rephrasings=-1)
