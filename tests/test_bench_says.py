"""Free generation after an edit, on a model whose answers are known and on a tiny one."""

import argparse
import json

import numpy as np
import pytest
from rich.console import Console
from test_bench import KnownEditor, cases, fraction

from larimar_jax import bench
from larimar_jax.bench import editor, headline, report, runner, says, systems


@pytest.fixture
def finished(tmp_path):
    made = says.Says(KnownEditor(), cases(11), data={}, chunk=4)
    return runner.run(made, tmp_path / "run", quiet=True), runner.read_cases(tmp_path / "run")


def test_records_are_those_of_a_plain_loop(finished):
    summary, records = finished
    for case, record in zip(cases(11), records, strict=True):
        asked = {"edit": [case.prompt], "paraphrase": list(case.paraphrases)}
        assert record["prompts"] == asked
        for kind, prompts in asked.items():
            for row, prompt in enumerate(prompts):
                text = {name: found[kind][row] for name, found in record["text"].items()}
                untouched, read = f" {prompt[-4:]} and", f" {case.target_new} and"
                inside = fraction("scope", prompt) > 0.4
                assert record["in_scope"][kind][row] == inside
                assert text["base"] == text["zero"] == text["lookup"] == untouched
                assert text["open"] == read
                assert text["larimar"] == (read if inside else untouched)
    share = 100 * np.mean([record["in_scope"]["edit"][0] for record in records])
    assert summary["results"]["larimar"]["edit"]["said"]["mean"] == pytest.approx(share)
    assert 0 < share < 100
    assert summary["results"]["open"]["paraphrase"]["at_once"]["mean"] == 100
    assert summary["results"]["open"]["paraphrase"]["said"]["cases"] == 7  # that have a paraphrase
    assert summary["results"]["base"]["edit"]["said"]["mean"] == 0


def test_a_memory_says_where_it_does_not_beat_the_lookup(finished):
    _, records = finished
    text = {name: {"edit": [" new"], "paraphrase": []} for name in systems.SYSTEMS}
    text |= {"lookup": {"edit": [" the new"], "paraphrase": []}, "open": text["base"]}
    results = says.Says.summarise(None, [{"target_new": "new", "text": text}])
    for name in systems.MEMORY_SYSTEMS:  # both say it, and the lookup not at once
        row = results[name]["edit"]
        assert row["said"]["note"] == "does not beat the lookup" and "note" not in row["at_once"]
        assert row["at_once"]["versus_lookup"]["mean"] == 100
    assert not any("note" in row for row in results["prompt"]["edit"].values())
    summary = {"results": results, "settings": {"tokens": 2}, "cases": 1}
    rows = {row[0]: row[1:] for row in report.grid(says.tables(summary)[0]).rows}
    first, _ = says.headlines(summary)
    assert first.label == "edit: new answer in 2 tokens" and "note" in first.values["larimar"]
    assert {name: row["mean"] for name, row in first.values.items()} == {
        name: results[name]["edit"]["said"]["mean"] for name in headline.SHOWN
    }
    assert ["\n" in cell for cell in rows["Larimar with scope"]] == [True, False, False, False]
    results = says.Says.summarise(None, records)
    for kind in says.KINDS:
        ours, theirs = (results[name][kind]["said"]["mean"] for name in ("open", "lookup"))
        versus = results["open"][kind]["said"]["versus_lookup"]
        assert versus["mean"] == pytest.approx(ours - theirs)


@pytest.mark.parametrize(
    ("text", "said", "at_once"),
    [
        (" New York and", True, True),
        ("\n New  York", True, True),
        (" the city of New York", True, False),
        (" new york", False, False),
        ("", False, False),
    ],
)
def test_an_answer_is_said_where_it_stands_in_the_text(text, said, at_once):
    record = {"target_new": "New York", "text": {"larimar": {"edit": [text]}}}
    found = says._measure(record, "larimar", "edit")
    assert found == {"said": [said], "at_once": [at_once]}


def test_people_see_a_table_and_texts(finished):
    summary, records = finished
    console = Console(width=200)
    with console.capture() as captured:
        for shown in says.tables(json.loads(json.dumps(summary))):
            console.print(shown)
    assert all(label in captured.get() for label in systems.SYSTEMS.values())
    assert says.texts(records[1])[0] == "written: Fact 1 is new 1."
    assert len(says.texts(records[1])) == 3
    assert says.values(records[0]).keys() == {f"{s}, edit" for s in systems.SYSTEMS.values()}


def test_the_tiny_model_says_what_was_written_and_the_command_reads_its_options(tiny):
    made = says.Says(editor.LarimarEditor(tiny), cases(2), data={}, tokens=2)
    for record in made.run(cases(2)):
        assert record["in_scope"]["edit"] == [True]
        text = {name: found["edit"][0] for name, found in record["text"].items()}
        prompt = record["prompts"]["edit"]
        assert [text["base"]] == made.editor.generate(prompt, None, 2)
        assert text["larimar"] == text["open"]
    with pytest.raises(ValueError, match="--tokens must be at least 1, not 0"):
        says.Says(KnownEditor(), cases(1), data={}, tokens=0)
    parser = argparse.ArgumentParser()
    bench.benchmark("says").arguments(parser)
    assert parser.parse_args(["--data", "x"]).tokens == 10
