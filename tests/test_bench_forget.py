"""Forgetting in a tiny model: recall against a plain loop, and distances against float64."""

import known_recall
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


def test_records_are_those_of_a_plain_loop(tiny, made, tmp_path, monkeypatch):
    known_recall.install(monkeypatch, threshold=2.0)  # forgetting is none of the scope's
    summary = runner.run(made, tmp_path / "run", quiet=True)
    assert report.sections([report.read(tmp_path / "run")] * 2)[0].items
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
        assert record["nearest"]["before"] == " ".join(facts[index])
        assert record["nearest"]["replaced"] == " ".join(unknown[index])
        assert record["nearest"]["forgotten"] in [" ".join(fact) for fact in left]
        for number, one in enumerate([index, *record["others"]]):
            prompt, target = facts[one]

            def recalled(text, condition=None, target=target):
                return float(tiny.judge([text], [[target]], condition).accuracy[0, 0])

            fixed = {
                "base": recalled(prompt),
                "zero": recalled(prompt, tiny.zero(1)),
                "prompt": recalled(f"{prompt} {target}. {prompt}"),
            }
            want = {name: dict.fromkeys(stores, value) for name, value in fixed.items()}
            want |= {"lookup": {}, "open": {}}
            for moment, filled in stores.items():
                found, (near,) = filled.recall([prompt])
                want["open"][moment] = recalled(prompt, found.condition(np.array([0])))
                want["lookup"][moment] = recalled(f"{filled.texts[near]}. {prompt}")
            got = {
                name: {at: values[number - 1] if number else values for at, values in row.items()}
                for name, row in record["recall_others" if number else "recall"].items()
            }
            assert got.keys() == want.keys()
            for name in want:
                assert got[name] == pytest.approx(want[name])
            assert len({value for row in got.values() for value in row.values()}) >= 5
        # What is left is the memory that never saw the fact, to what float32 solves to.
        assert record["distance"] < 1e-3 and record["refused"] == 0
        assert 0 <= record["leverage"] <= 1
    for size in ("4", "6"):
        found = summary["results"][size]
        assert found["forgotten"]["open"]["before"]["cases"] == 2 and found["refused"] == 0


def test_a_store_of_one_fact_has_nothing_to_look_up_once_it_is_forgotten(tiny, monkeypatch):
    known_recall.install(monkeypatch, threshold=2.0)
    made = forget.Forget(tiny, RECORDS, [1], 1, 0, data={})
    (case,) = made.cases
    assert case.index == 0 and case.others == ()
    (record,) = made.run([case])
    assert record["nearest"]["forgotten"] is None
    assert record["recall"]["lookup"]["forgotten"] == record["recall"]["base"]["forgotten"]
    assert record["recall"]["lookup"]["before"] == record["recall"]["prompt"]["before"]


def test_to_forget_better_than_the_lookup_is_to_recall_less(tiny):
    def at(before, forgotten, replaced):
        return {"before": before, "forgotten": forgotten, "replaced": replaced}

    same = dict.fromkeys(forget.CONSTANT, at(0.5, 0.5, 0.5))
    one = same | {"lookup": at(0.5, 0.5, 0.25), "open": at(1.0, 0.25, 0.25)}
    kept = same | {"lookup": at([0.5], [0.5], [0.5]), "open": at([1.0], [0.75], [0.25])}
    measured = dict(facts=4, distance=1e-4, certificate=2e-4, leverage=0.5, refused=0)
    made = forget.Forget(tiny, RECORDS, [4], 1, 1, data={})
    results = made.summarise([{"recall": one, "recall_others": kept, **measured}])
    for side, differences, notes in (
        ("forgotten", [50, 25, 0], [False, False, True]),
        ("others", [50, 25, -25], [False, False, True]),
    ):
        rows = [results["4"][side]["open"][moment] for moment in forget.MOMENTS]
        assert [row["versus_lookup"]["mean"] for row in rows] == differences
        assert ["note" in row for row in rows] == notes
    table = report.grid(forget.tables({"results": results})[0])
    assert len(table.rows) == 10 and [row[0] for row in table.rows[:5]] == list(forget.SYSTEMS.values())
    noted = [n for n, row in enumerate(table.rows) if "does not beat" in row[5]]
    assert noted == [4, 9]


def test_a_run_that_was_cut_off_goes_on_line_for_line(tiny, made, tmp_path):
    folder = tmp_path / "run"
    runner.run(made, folder, quiet=True)
    whole = (folder / runner.CASES).read_bytes()
    (folder / runner.CASES).write_bytes(whole[: len(whole) * 2 // 3])
    runner.run(forget.Forget(tiny, RECORDS, [4, 6], 2, 2, data={}, seed=3), folder, quiet=True)
    assert (folder / runner.CASES).read_bytes() == whole
