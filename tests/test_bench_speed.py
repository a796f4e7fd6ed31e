"""The wall clock benchmark: every side is timed."""

import time

import pytest
from test_bench import cases

from larimar_jax.bench import report, runner, speed


def test_every_side_is_timed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_BESIDE", 3)
    cleared, written, write = [], [], speed.Session.write

    def slow_at_first(session, *fact):
        # Stands for compiling: clearing what is compiled would cost the other tests theirs.
        time.sleep(0.0 if written else 0.5)
        written.append(fact)
        return write(session, *fact)

    monkeypatch.setattr(speed.jax, "clear_caches", lambda: cleared.append(True))
    monkeypatch.setattr(speed.Session, "write", slow_at_first)
    made = speed.Speed(tiny, cases(4), 2, 2, data={})
    summary = runner.run(made, tmp_path / "run", quiet=True)
    assert report.sections([report.read(tmp_path / "run")] * 2)[0].items
    records = runner.read_cases(tmp_path / "run")
    assert [record["case_id"] for record in records] == [0, 1]
    for record in records:
        sides = {*speed.SESSION, "batched"}
        assert set(record["seconds"]) == sides
        assert min(record["seconds"].values()) > 0
        assert record["first_seconds"] == records[0]["first_seconds"]
    results = summary["results"]
    assert results["cases_per_second"] == pytest.approx(2 / results["seconds"]["batched"])
    waited, scored = speed.tables(summary)
    first = records[0]["first_seconds"]
    assert cleared == [True] and first["write"] >= 0.5 > results["seconds"]["write"]
    assert set(results["compiling"]) == set(first) == sides
    for name, value in results["compiling"].items():
        assert value == max(0.0, first[name] - results["seconds"][name])
    assert waited.row_count == 4 and scored.row_count == 1
