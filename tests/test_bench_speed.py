"""The wall clock benchmarks: every side is timed, after a first call that compiles."""

import time

import numpy as np
import pytest
from known_editor import cases, saved

from larimar_jax.bench import memory_speed, report, runner, speed


def test_every_side_is_timed_after_its_first_call(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "BESIDE", 3)
    cleared, written, write = [], [], speed.Session.write

    def slow_at_first(session, *fact):
        # Stands for compiling: clearing what is compiled would cost the other tests theirs.
        time.sleep(0.0 if written else 0.5)
        written.append(fact)
        return write(session, *fact)

    monkeypatch.setattr(speed.jax, "clear_caches", lambda: cleared.append(True))
    monkeypatch.setattr(speed.Session, "write", slow_at_first)
    task = speed.Speed(data=saved(cases(4), tmp_path / "x.json"), scored=2, repeats=3)
    summary = runner.run(task, tmp_path / "run", editor=tiny, quiet=True)
    run = report.read(tmp_path / "run")
    assert report.sections([run] * 2)[0].items and cleared == [True]
    sides = [row["system"] for row in run.rows]
    assert sides == ["write", "ask", "base", "forget", "batched"] * 3
    entries = {entry["system"]: entry for entry in summary["results"]}
    for name, entry in entries.items():
        seconds = [row["seconds"] for row in run.rows if row["system"] == name]
        assert min(seconds) > 0
        assert entry["seconds"]["mean"] == pytest.approx(1e3 * np.median(seconds))
        assert "note" not in entry["seconds"]
    first, later = (entries["write"][name]["mean"] for name in ("first_seconds", "seconds"))
    assert first >= 0.5 > later / 1e3
    rate = entries["batched"]["cases_per_second"]["mean"]
    assert rate == pytest.approx(2e3 / entries["batched"]["seconds"]["mean"])
    with pytest.raises(ValueError, match="has 4 records, and 9 are needed"):
        speed.Speed(data=str(tmp_path / "x.json"), scored=9).cases(None)


def test_every_ratio_of_the_memory_is_of_two_sides_in_one_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_speed, "TURN", 0.0)
    task = memory_speed.MemorySpeed(slots=18, latent=20, facts=24, scan=130, tenants=2, repeats=2)
    summary = runner.run(task, tmp_path, quiet=True)
    rows = runner.read_rows(tmp_path)
    names = [name for name, *_ in memory_speed.RATIOS]
    assert [row["kind"] for row in rows] == [*names, memory_speed.LONG_STREAM] * 2
    for row in rows:
        if row["kind"] in names:
            assert row["ratio"] == pytest.approx(row["plain"] / row["here"])
    rate = summary["results"][-1]["facts_per_second"]["mean"]
    rates = [130 / row["here"] for row in rows if "ratio" not in row]
    assert rate == pytest.approx(np.median(rates))
    assert (task.name, summary["benchmark"]) == ("memory", "memory")


def test_tenants_side_by_side_and_in_a_loop_get_the_same_answers():
    task = memory_speed.MemorySpeed(slots=18, latent=20, facts=2, scan=2, tenants=3)
    together = task._compiled["tenants"]()
    for loop in ("loop", "plain loop"):
        np.testing.assert_allclose(together, task._compiled[loop](), rtol=1e-5, atol=1e-6)
