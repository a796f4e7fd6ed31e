"""The wall clock benchmark: both ways of scoring give the same numbers, and every side is timed."""

import pytest
from test_bench import cases

from larimar_jax.bench import report, runner, speed


def test_every_side_is_timed_and_both_ways_of_scoring_agree(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_BESIDE", 3)
    made = speed.Speed(tiny, cases(4), 2, 2, data={})
    summary = runner.run(made, tmp_path / "run", quiet=True)
    assert report.sections([report.read(tmp_path / "run")])[0].items
    records = runner.read_cases(tmp_path / "run")
    assert [record["case_id"] for record in records] == [0, 1]
    for record in records:
        assert set(record["seconds"]) == {*speed.SESSION, "batched", "single"}
        assert min(record["seconds"].values()) > 0 and record["apart"] < 1e-3
    results = summary["results"]
    assert results["ratio"] == pytest.approx(
        results["cases_per_second"]["batched"] / results["cases_per_second"]["single"]
    )
    waited, scored, note = speed.tables(summary)
    assert waited.row_count == 4 and scored.row_count == 3 and "nats at the most" in note
