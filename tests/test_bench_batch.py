"""Batch editing of a tiny model: what is in one memory, and what a plain loop finds there."""

import labelled
import numpy as np
import pytest
from test_bench import cases

from larimar_jax.bench import batch, report, runner, store
from larimar_jax.session import Session

RECORDS = cases(5)


@pytest.fixture
def made(tiny):
    return batch.Batch(tiny, RECORDS, [1, 5], data={}, chunk=3)


def test_a_store_is_the_session_with_the_same_facts(tiny):
    facts = [(record.prompt, record.target_new) for record in RECORDS]
    queries = [*(prompt for prompt, _ in facts), "Says something else"]
    full = store.Store(store.encoded(tiny, facts, queries), facts)
    session = Session(tiny)
    for prompt, answer in facts:
        session.write(prompt, answer)
    targets = [("new 1", "true 0")] * len(queries)
    recall, nearest = full.recall(queries)
    assert nearest[:5] == list(range(5)) and recall.in_scope[:5].all()
    rows = np.flatnonzero(recall.in_scope)
    got = tiny.score([queries[r] for r in rows], [targets[r] for r in rows], recall.condition(rows))
    # ℓ near 0 is what is left of two numbers of about 20.
    np.testing.assert_allclose(got, session.score(queries, targets)[rows], rtol=1e-3, atol=1e-4)
    left = full.without([1, 3])
    assert [fact for fact, _ in left.facts] == [facts[i][0] for i in (0, 2, 4)]
    assert int(left.state.count) == 3 and int(left.state.refused) == 0
    again = store.Store(left._encoded, left.facts)
    np.testing.assert_allclose(left.state.solution, again.state.solution, atol=2e-3)


def test_records_equal_one_fact_at_a_time(tiny, made, tmp_path):
    summary = runner.run(made, tmp_path / "run", quiet=True)
    assert report.sections([report.read(tmp_path / "run")] * 2)[0].items
    names = batch.CONTROLS | batch.SYSTEMS
    assert labelled.check(batch, summary) == list(names.values())
    records = runner.read_cases(tmp_path / "run")
    assert [sorted(record["memory"]) for record in records] == [["1", "5"], *[["5"]] * 4]
    facts = [(record.prompt, record.target_new) for record in RECORDS]
    encoded = store.encoded(tiny, facts)
    for record, case in zip(records, RECORDS, strict=True):
        pair = [(case.target_new, case.target_true)]
        own = f"{case.prompt} {case.target_new}. {case.prompt}"
        want = {
            "base": tiny.score([case.prompt], pair),
            "zero": tiny.score([case.prompt], pair, tiny.zero(1)),
            "prompt": tiny.score([own], pair),
        }
        assert set(record["loss"]) == set(want)
        for system, values in want.items():
            np.testing.assert_allclose(record["loss"][system], values[0], rtol=1e-4)
        for size, found in record["memory"].items():
            full = store.Store(encoded, facts[: int(size)])
            condition = full.recall([case.prompt])[0].condition(np.array([0]))
            want = {
                "lookup": tiny.score([own], pair),
                "larimar": tiny.score([case.prompt], pair, condition),
            }
            assert found["in_scope"] and found["nearest"] == record["case_id"]
            for system, values in want.items():
                np.testing.assert_allclose(found["loss"][system], values[0], rtol=1e-4)
    for size in (1, 5):
        rows = records[:size]
        new, true = np.array([r["memory"][str(size)]["loss"]["larimar"] for r in rows]).T
        found = summary["results"][str(size)]["larimar"]["S"]
        assert found["mean"] == pytest.approx(100 * np.mean(new < true))
        new, true = np.array([r["loss"]["base"] for r in rows]).T
        assert summary["results"][str(size)]["base"]["S"]["mean"] == pytest.approx(
            100 * np.mean(new < true)
        )


def test_the_untouched_model_reads_a_text_once(tiny, made, monkeypatch):
    """A lookup that finds the fact itself is the fact in the prompt, at whatever N."""
    scored, score = [], tiny.score

    def counting(prompts, targets, condition=None):
        scored.append((len(prompts), condition is None))
        return score(prompts, targets, condition)

    monkeypatch.setattr(tiny, "score", counting)
    made.run(made.cases[:3])
    assert scored == [(2 * 3, True), (3, False), (1, False), (3, False)]


def loss_records(successes):
    """Records of N = 4 in which a system succeeds or fails as is told, and controls that do not."""
    fail, hold = [2.0, 1.0], [1.0, 2.0]

    def loss(n):
        return {name: hold if found[n] else fail for name, found in successes.items()}

    return [
        {
            "case_id": n,
            "loss": dict.fromkeys(batch.CONTROLS, fail),
            "memory": {"4": {"nearest": n, "loss": loss(n)}},
        }
        for n in range(4)
    ]


@pytest.mark.parametrize(
    ("ours", "difference", "noted"),
    [([1, 1, 1, 0], 25, False), ([1, 1, 0, 0], 0, True), ([0] * 4, -50, True)],
)
def test_a_row_says_where_the_memory_does_not_beat_the_lookup(tiny, ours, difference, noted):
    made = batch.Batch(tiny, cases(4), [4], data={})
    results = made.summarise(loss_records({"larimar": ours, "lookup": [0, 1, 1, 0]}))
    found = results["4"]["larimar"]
    assert found["versus_lookup"]["mean"] == difference
    assert ("note" in found) is noted and "note" not in results["4"]["lookup"]
    (table,) = batch.tables({"results": results})
    (row,) = report.grid(table).rows
    assert ["does not beat\nthe lookup" in cell for cell in row] == [False] * 5 + [noted]


def test_out_of_scope_memory_and_lookup_are_the_base_model(tiny, monkeypatch):
    """To the last bit, whatever is nearest."""
    monkeypatch.setattr(type(tiny), "scope_threshold", 2.0)
    made = batch.Batch(tiny, RECORDS, [5], data={}, chunk=5)
    for record in made.run(made.cases):
        found = record["memory"]["5"]
        assert not found["in_scope"]
        assert found["loss"]["larimar"] == found["loss"]["lookup"] == record["loss"]["base"]


def test_a_run_that_was_cut_off_goes_on_line_for_line(tiny, made, tmp_path):
    folder = tmp_path / "run"
    runner.run(made, folder, quiet=True)
    whole = (folder / runner.CASES).read_bytes()
    (folder / runner.CASES).write_bytes(whole[: len(whole) * 2 // 3])
    runner.run(batch.Batch(tiny, RECORDS, [1, 5], data={}, chunk=3), folder, quiet=True)
    assert (folder / runner.CASES).read_bytes() == whole
