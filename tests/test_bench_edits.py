"""Benchmarks of single edits against plain loops: a float64 one, and one over known answers."""

import dataclasses

import numpy as np
import pytest
from known_editor import KnownEditor, cases, fraction, knowedit, rows, saved, values
from plain import SYSTEMS, Plain

from larimar_jax.bench import queries, runner
from larimar_jax.bench.counterfact import CounterFact
from larimar_jax.bench.editor import LarimarEditor
from larimar_jax.bench.free_generation import FreeGeneration
from larimar_jax.bench.metrics import magnitude, success
from larimar_jax.bench.zsre import ZsRE
from larimar_jax.weights.tokenizer import TextTooLong

MODES = ("rome", "released")


def records(count=6):
    """Records whose paraphrases have a distractor sentence, and one whose answers begin alike."""
    some = [
        dataclasses.replace(case, paraphrases=tuple(f"It is so. {p}" for p in case.paraphrases))
        for case in cases(count)
    ]
    some[1] = dataclasses.replace(some[1], target_new="new 1 2", target_true="new 1")
    return some


@pytest.mark.parametrize("mode", MODES)
def test_counterfact_is_that_of_a_plain_loop_in_float64(tiny, tmp_path, mode):
    task = CounterFact(data=saved(records(), tmp_path / "f.json"), chunk=4, mode=mode)
    plain, decided, wanted = Plain(tiny), set(), {}
    for row in rows(task, tiny):
        record = next(r for r in task.records if r.case_id == row["case"])
        key = (row["case"], row["prompt"])
        if key not in wanted:
            assert mode == "rome" or "It is so" not in row["prompt"]
            pair, fact = (row["new"], row["true"]), (record.prompt, record.target_new)
            wanted[key] = plain.counterfact(row["kind"], row["prompt"], pair, fact, mode)
        losses = wanted[key][row["system"]]
        # An answer that has all the probability has a loss of rounding.
        measured = [row["loss_new"], row["loss_true"]]
        np.testing.assert_allclose(measured, losses, rtol=2e-5, atol=1e-6)
        assert row["S"] == success(row["kind"], *losses)
        assert row["M"] == pytest.approx(magnitude(row["kind"], *losses), abs=1e-5)
        decided.add((row["kind"], row.get("in_scope")))
        # Untouched LM, z = 0, a lookup and memory are four different things.
        apart = [wanted[key][name][0] for name in ("base", "zero", "prompt", "open")]
        assert min(abs(a - b) for n, a in enumerate(apart) for b in apart[:n]) > 1e-5
    assert {("edit", 1.0), ("neighbourhood", 0.0)} <= decided


@pytest.mark.parametrize("mode", MODES)
def test_zsre_is_that_of_a_plain_loop_in_float64(tiny, tmp_path, mode):
    task = ZsRE(data=knowedit(records(), tmp_path / "f.json"), chunk=4, mode=mode)
    plain, wanted = Plain(tiny), {}
    for row in rows(task, tiny):
        record = task.records[row["case"]]
        key = (row["case"], row["prompt"])
        if key not in wanted:
            fact = (record.prompt, record.target_new)
            wanted[key] = plain.zsre(row["prompt"], row["target"], fact, mode)
        assert row["accuracy"] == pytest.approx(wanted[key][row["system"]], rel=1e-6)
    assert {row["system"] for row in rows(task, tiny, 1)} == set(SYSTEMS)


def test_what_verbatim_lookup_forces_ties_with_nothing_but_itself(tiny, tmp_path):
    """Forced alike, two targets tie, and a tie fails; else the new one has all the probability."""
    same = dataclasses.replace(cases(1)[0], target_true="new 0")
    task = CounterFact(data=saved([same], tmp_path / "f.json"))
    (edit,) = values(rows(task, tiny), "S", kind="edit")[1]["verbatim"]
    assert edit == 0.0
    task = CounterFact(data=saved(cases(1), tmp_path / "g.json"))
    for metric in "SM":
        (value,) = values(rows(task, tiny), metric, kind="edit")[1]["verbatim"]
        assert value == pytest.approx(1.0)
    task = FreeGeneration(data=task.data, tokens=1)
    (text,) = values(rows(task, tiny), "text", kind="edit")[1]["verbatim"]
    ids = tiny.decoder_tokenizer.following("new 0")
    assert text == tiny.decoder_tokenizer.decode(ids[:1]) and len(ids) > 1


def test_a_text_that_the_encoder_does_not_take_is_named(tiny):
    with pytest.raises(TextTooLong, match="word word"):
        LarimarEditor(tiny).recall([("word " * 90, "x")], [["short"]])


# Free generation


def test_continuations_are_those_of_a_plain_loop(tmp_path):
    task = FreeGeneration(data=saved(cases(11), tmp_path / "f.json"), chunk=4)
    result = runner.run(task, tmp_path / "run", editor=KnownEditor(), quiet=True)
    for row in runner.read_rows(tmp_path / "run"):
        prompt, inside = row["prompt"], fraction("scope", row["prompt"]) > 0.4
        untouched, read = f" {prompt[-4:]} and", f" {row['new']} and"
        wanted = dict.fromkeys(("base", "zero", "prompt", "lookup"), untouched)
        wanted |= {"open": read, "larimar": read if inside else untouched}
        wanted["verbatim"] = f" {row['new']}" if inside else untouched
        assert row["text"] == wanted[row["system"]]
    entries = {(entry["system"], entry["kind"]): entry for entry in result["results"]}
    assert entries["open", "paraphrase"]["begins"]["mean"] == 100
    assert entries["open", "paraphrase"]["contains"]["cases"] == 7  # that have a paraphrase
    assert entries["base", "edit"]["contains"]["mean"] == 0
    share = entries["larimar", "edit"]["in_scope"]["mean"]
    assert entries["larimar", "edit"]["contains"]["mean"] == share and 0 < share < 100
    assert "verbatim lookup" in entries["larimar", "edit"]["contains"]["note"]


@pytest.mark.parametrize(
    ("text", "contains", "begins"),
    [
        (" New York and", 1, 1),
        ("\n New  York", 1, 1),
        (" the city of New York", 1, 0),
        (" new york", 0, 0),
        ("", 0, 0),
    ],
)
def test_an_answer_counts_where_it_stands(tmp_path, monkeypatch, text, contains, begins):
    case = dataclasses.replace(cases(1)[0], target_new="New  York")
    task = FreeGeneration(data=saved([case], tmp_path / "f.json"))
    monkeypatch.setattr(KnownEditor, "generate", lambda self, prompts, *_: [text] * len(prompts))
    row = rows(task, KnownEditor())[0]
    assert (row["contains"], row["begins"]) == (contains, begins)
    with pytest.raises(ValueError, match="--tokens must be at least 1, not 0"):
        FreeGeneration(data="x", tokens=0)


# What all controls share


def test_facts_stand_in_front_as_one_sentence_or_not_at_all():
    texts = queries.in_front(["Rome is old", "Oslo is cold.", None], ["A", "B", "C"])
    assert texts == ["Rome is old. A", "Oslo is cold. B", "C"]


def test_every_text_is_measured_once_for_each_of_its_targets():
    calls = []

    def measure(prompts, targets, condition):
        calls.append((list(zip(prompts, targets, strict=True)), condition))
        return np.asarray([[len(prompt), len("".join(target))] for prompt, target in calls[-1][0]])

    class NoFact(KnownEditor):
        def zero(self, rows):
            return rows

    facts, near = ["x", "y", None], [("x", "1"), None, ("z", "2")]
    columns = [{"prompt": prompt} for prompt in ("a", "bb", "a")]
    inside = np.asarray([True, True, False])
    three = queries.Queries(NoFact(), columns, facts, near, np.ones(3), inside, lambda rows: rows)
    targets, memo = [["one", "two"], ["one"], ["one", "two"]], {}
    table = three.measure(measure, targets, lambda answer, target: [0, 0], memo=memo)
    (base, none), (zero, count), (through, read) = calls
    # Of nine texts: plain prompts, one of them twice, facts in front, and the nearest in front.
    texts = ["a", "bb", "x. a", "y. bb", "x 1. a"]
    assert [text for text, _ in base] == texts and none is None
    assert len(zero) == count == 2 and len(through) == len(read) == 3
    assert table["lookup"].tolist() == [[6, 6], [2, 3], [1, 6]]
    assert table["verbatim"].tolist() == [[0, 0], [2, 3], [1, 6]]
    assert table["larimar"].tolist() == [[1, 6], [2, 3], [1, 6]]
    three.measure(measure, targets, lambda *_: [0, 0], ("base", "zero", "lookup"), memo)
    assert len(calls) == 3
    # Without `open`, what is out of scope is not decoded through the memory.
    three.measure(measure, targets, lambda *_: [0, 0], ("larimar",), memo)
    assert [text for text, _ in calls[3][0]] == ["a", "bb"] and calls[3][1].tolist() == [0, 1]
