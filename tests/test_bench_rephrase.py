"""Unseen wordings of facts under several keys, on a tiny model against a loop of one question each."""

import argparse
import json

import jax.numpy as jnp
import known_recall
import labelled
import numpy as np
import pytest
from rich.console import Console

from larimar_jax import bench
from larimar_jax.bench import rephrase, report, runner
from larimar_jax.data.edit_records import EditRecord

# Between the likenesses of these prompts.
THRESHOLD = 0.9926
TOWNS = ["Rome", "Oslo", "Cairo", "Lima"]


def records(count):
    return [
        EditRecord(
            case_id=n,
            prompt=f"City {n} of",
            subject=f"City {n}",
            target_new=TOWNS[n % 4],
            target_true="Japan",
            paraphrases=(f"The land of city {n}:",),
            neighbourhood=(),
            neighbourhood_targets=(),
        )
        for n in range(count)
    ]


def wordings(count):
    return [(f"Of city {n}:", f"City {n} is in")[: 2 - n % 2] for n in range(count)]


def experiment(tiny, cells=((3, 2), (1, 1)), **more):
    options = dict(cells=cells, asked=4, data={}, chunk=3) | more
    return rephrase.Rephrase(tiny, records(6), wordings(6), **options)


def test_recall_is_that_of_every_question_alone_in_a_memory_of_its_facts(tiny, monkeypatch):
    known_recall.install(monkeypatch, threshold=THRESHOLD)
    made = experiment(tiny)
    found = [r for start in range(0, 7, 3) for r in made.run(made.cases[start : start + 3])]
    assert [r["cell"] for r in found] == ["3x2"] * 3 + ["1x1"] * 4
    assert {r["in_scope"] for r in found} == {r["found_own"] for r in found} == {True, False}
    latent = {}
    for case, record in zip(made.cases, found, strict=True):
        told = [
            (prompt, made.records[index].target_new)
            for index in case.together
            for prompt in (made.records[index].prompt, *wordings(6)[index])[: case.wordings]
        ]
        asked, target = made.records[case.index].paraphrases[0], made.records[case.index].target_new
        assert (record["prompt"], record["target"]) == (asked, target)
        prompts = [prompt for prompt, _ in told]
        keys = tiny.encode(prompts).latent
        values = tiny.encode([" ".join(fact) for fact in told], [a for _, a in told]).latent
        query, first = tiny.encode([asked]).latent, keys[:: case.wordings]
        for name in rephrase.KEYS:
            model = tiny if name == "own" else rephrase.keyed(tiny, name, first)
            empty = model.memory.empty(model.prepared)
            state = model.memory.write(model.prepared, empty, jnp.asarray(keys), jnp.asarray(values))
            read = model.memory.read(model.prepared, state, jnp.asarray(query)).latent
            judged = tiny.judge([asked], [[target]], tiny.condition(np.asarray(read)))
            assert record["recall"][name] == pytest.approx(float(judged.accuracy[0, 0]))
            latent[name] = np.asarray(read)
        assert not np.allclose(latent["pinv"], latent["own"])
        inside = record["in_scope"]
        # The fact that is nearest is not always the one that is asked for.
        known, query_too = tiny.encode(prompts).embedding, tiny.encode([asked]).embedding[0]
        cosines = known @ query_too / np.linalg.norm(known, axis=1) / np.linalg.norm(query_too)
        near = " ".join(told[int(np.argmax(cosines))])
        assert inside == (cosines.max() >= THRESHOLD)
        assert record["nearest"] == (near if inside else None)
        controls = {
            "base": (asked, None),
            "zero": (asked, tiny.zero(1)),
            "prompt": (f"{made.records[case.index].prompt} {target}. {asked}", None),
            "lookup": (f"{near}. {asked}" if inside else asked, None),
        }
        for name, (text, condition) in controls.items():
            judged = tiny.judge([text], [[target]], condition)
            assert record["recall"][name] == pytest.approx(float(judged.accuracy[0, 0]))
        assert record["recall"]["larimar"] == record["recall"]["own" if inside else "base"]
    # No two of a row's numbers are alike but where nothing is let through.
    for record in found:
        shares = {round(share, 5) for share in record["recall"].values()}
        assert len(shares) > 4 or record["cell"] == "1x1"
    assert len(found[0]["written"]) == 2 and len(found[3]["written"]) == 1


def test_keys_over_known_prompts_are_what_the_equations_say(tiny):
    """One-hot for α → 0, and the coordinates in the prompts."""
    known = tiny.encode(["City 1 of", "City 2 of", "Rain"]).latent
    weights = {}
    for kind in ("gaussian", "pinv"):
        model = rephrase.keyed(tiny, kind, known)
        weights[kind] = np.asarray(model.memory.address(model.prepared, jnp.asarray(known)))
        np.testing.assert_allclose(weights[kind], np.eye(3), atol=2e-4)
        assert model.memory.slots == 3 and tiny.memory.slots != 3
        assert model.graph is tiny.graph
    with pytest.raises(ValueError, match="holds 5 numbers a text"):
        rephrase.keyed(tiny, "pinv", np.zeros((3, 5), np.float32))


def test_a_run_resumes_line_for_line_and_people_see_its_table(tiny, tmp_path):
    summary = runner.run(experiment(tiny), tmp_path / "whole", quiet=True)
    lines = (tmp_path / "whole" / runner.CASES).read_bytes()
    runner.run(experiment(tiny), tmp_path / "cut", quiet=True)
    (tmp_path / "cut" / runner.CASES).write_bytes(lines[: len(lines) // 2])
    runner.run(experiment(tiny), tmp_path / "cut", quiet=True)
    assert (tmp_path / "cut" / runner.CASES).read_bytes() == lines
    assert summary["results"]["1x1"]["own"]["cases"] == 4
    console = Console(width=200)
    with console.capture() as captured:
        for shown in rephrase.tables(json.loads(json.dumps(summary))):
            console.print(shown)
    assert all(label.split()[0] in captured.get() for label in rephrase.SYSTEMS.values())
    record = runner.read_cases(tmp_path / "whole")[0]
    assert labelled.check(rephrase, summary) == list(rephrase.SYSTEMS.values())
    assert rephrase.texts(record)[0].startswith("written: City")
    assert set(rephrase.values(record)) == {f"{s}, 3x2" for s in rephrase.SYSTEMS.values()}


def test_keys_that_do_not_beat_the_lookup_say_so(tiny):
    rows = [
        dict.fromkeys(rephrase.SYSTEMS, 0.5) | {"own": 1.0, "pinv": own} for own in (0.5, 0.25, 0.75)
    ]
    made = experiment(tiny)
    results = made.summarise([{"cell": "3x2", "recall": row} for row in rows])
    notes = {name for name, found in results["3x2"].items() if "note" in found}
    assert notes == {"larimar", "pinv", "gaussian"}
    assert results["3x2"]["own"]["versus_lookup"]["mean"] == 50
    (table,) = rephrase.tables({"results": results})
    (line,) = rephrase.headlines({"results": results})
    assert line.label == "unseen wordings, 3 facts x 2" and line.values["larimar"]["mean"] == 50
    (row,) = report.grid(table).rows
    assert sum("does not beat\nthe lookup" in cell for cell in row) == 3


def test_cells_are_read_and_checked(tiny):
    assert rephrase.cell("20x10") == (20, 10)
    for wrong in ("20", "x3", "0x2", "ax2", "2x"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not as 20x10"):
            rephrase.cell(wrong)
    with pytest.raises(ValueError, match="3 records have 3 wordings .* 4x3 writes 4"):
        experiment(tiny, cells=[(4, 3)])
    parser = argparse.ArgumentParser()
    bench.benchmark("rephrase").arguments(parser)
    told = parser.parse_args(["--data", "x", "--cells", "2x3", "1x1"])
    assert told.cells == [(2, 3), (1, 1)] and told.asked == 200
