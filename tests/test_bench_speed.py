"""The wall clock benchmark: both ways of scoring give the same numbers, and every side is timed."""

import time

import numpy as np
import pytest
from test_bench import cases

from larimar_jax.bench import one_by_one, report, runner, speed, systems
from larimar_jax.bench.counterfact import CounterFact
from larimar_jax.bench.editor import LarimarEditor


def test_every_side_is_timed_and_both_ways_of_scoring_agree(tiny, tmp_path, monkeypatch):
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
        sides = {*speed.SESSION, "batched", "single", "single_four_systems"}
        assert set(record["seconds"]) == sides
        assert min(record["seconds"].values()) > 0 and record["apart"] < 1e-4
        assert record["seconds"]["single_four_systems"] < record["seconds"]["single"]
        assert record["first_seconds"] == records[0]["first_seconds"]
    results = summary["results"]
    assert results["ratio"] == pytest.approx(
        results["cases_per_second"]["batched"] / results["cases_per_second"]["single"]
    )
    assert 0 < results["ratio_four_systems"] < results["ratio"]
    waited, scored, note = speed.tables(summary)
    first = records[0]["first_seconds"]
    assert cleared == [True] and first["write"] >= 0.5 > results["seconds"]["write"]
    assert set(results["compiling"]) == set(first) == sides - {"single_four_systems"}
    for name, value in results["compiling"].items():
        assert value == max(0.0, first[name] - results["seconds"][name])
    assert waited.row_count == 4 and scored.row_count == 3 and "nats at the most" in note


def test_the_plain_loop_calls_the_decoder_for_each_system_prompt_and_candidate(tiny, monkeypatch):
    some, asked = cases(2), []
    plain = one_by_one.loss

    def counted(model, prompt, target, condition=None):
        asked.append((prompt, target, condition is None))
        return plain(model, prompt, target, condition)

    monkeypatch.setattr(one_by_one, "loss", counted)
    found, seconds = one_by_one.counterfact(tiny, some)
    prompts = [p for c in some for p in (c.prompt, *c.paraphrases, *c.neighbourhood)]
    assert len(asked) == len(systems.SYSTEMS) * 2 * len(prompts)
    assert set(seconds) == set(systems.SYSTEMS)
    wanted = CounterFact(LarimarEditor(tiny), some, data={}).run(some)
    for mine, theirs in zip(found, wanted, strict=True):
        for system in systems.SYSTEMS:
            for kind, pairs in theirs["loss"][system].items():
                np.testing.assert_allclose(mine[system][kind], pairs, rtol=2e-5, atol=1e-6)
