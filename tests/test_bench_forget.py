"""Forgetting in a tiny model: recall against a plain loop, and distances against float64."""

import numpy as np
import pytest
from test_bench import cases

from larimar_jax.bench import forget, report, runner, store

RECORDS = cases(6)


@pytest.fixture
def made(tiny):
    return forget.Forget(tiny, RECORDS, [4, 6], 2, 2, data={}, seed=3)


def test_cases_forget_different_facts_and_ask_others(made):
    assert [case.facts for case in made.cases] == [4, 4, 6, 6]
    for size in (4, 6):
        some = [case for case in made.cases if case.facts == size]
        assert len({case.index for case in some}) == 2
        for case in some:
            assert len(set(case.others)) == 2 and case.index not in case.others
            assert max(case.index, *case.others) < size


def test_records_are_those_of_a_plain_loop(tiny, made, tmp_path):
    summary = runner.run(made, tmp_path / "run", quiet=True)
    assert report.sections([report.read(tmp_path / "run")])[0].items
    facts = [(record.prompt, record.target_new) for record in RECORDS]
    unknown = [(prompt, forget.UNKNOWN) for prompt, _ in facts]
    encoded = store.encoded(tiny, [*facts, *unknown])
    for record in runner.read_cases(tmp_path / "run"):
        size, index = record["facts"], record["index"]
        left = [fact for place, fact in enumerate(facts[:size]) if place != index]
        stores = {
            "before": store.Store(encoded, facts[:size]),
            "forgotten": store.Store(encoded, left),
            "replaced": store.Store(encoded, [*left, unknown[index]]),
        }
        for number, one in enumerate([index, *record["others"]]):
            prompt, target = facts[one]
            want = {"never": tiny.judge([prompt], [[target]]).accuracy[0, 0]}
            for moment, filled in stores.items():
                condition = filled.recall([prompt])[0].condition(np.array([0]))
                want[moment] = tiny.judge([prompt], [[target]], condition).accuracy[0, 0]
            got = {
                moment: values[number - 1] if number else values
                for moment, values in record["recall_others" if number else "recall"].items()
            }
            assert got == pytest.approx(want)
        # What is left is the memory that never saw the fact, to what float32 solves to.
        assert record["distance"] < 1e-3 and record["refused"] == 0
        assert 0 <= record["leverage"] <= 1
    for size in ("4", "6"):
        found = summary["results"][size]
        assert found["forgotten"]["before"]["cases"] == 2 and found["refused"] == 0


def test_a_run_that_was_cut_off_goes_on_line_for_line(tiny, made, tmp_path):
    folder = tmp_path / "run"
    runner.run(made, folder, quiet=True)
    whole = (folder / runner.CASES).read_bytes()
    (folder / runner.CASES).write_bytes(whole[: len(whole) * 2 // 3])
    runner.run(forget.Forget(tiny, RECORDS, [4, 6], 2, 2, data={}, seed=3), folder, quiet=True)
    assert (folder / runner.CASES).read_bytes() == whole
