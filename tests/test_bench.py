"""The runner under kills and cuts, and CounterFact on a model whose answers are known."""

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from rich.console import Console

from larimar_jax import bench
from larimar_jax.bench import counterfact, editor, given, metrics, runner, systems
from larimar_jax.data import edit_records as data
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.data.record_fields import MalformedRecord
from larimar_jax.weights.tokenizer import TextTooLong


def fraction(*parts) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class KnownEditor:
    """An editor whose base LM scores by hash, whose memory halves the loss of what was written."""

    settings = {"name": "known"}

    def written(self, prompt, answer):
        return f"{prompt} {answer}."

    def recall(self, facts, queries, wordings=(), told=False):
        scores = np.asarray([fraction("scope", q) for row in queries for q in row], np.float32)
        flat = [fact for fact, row in zip(facts, queries, strict=True) for _ in row]
        return editor.Recall(
            scope_score=scores,
            in_scope=scores > 0.4,
            condition=lambda rows: [flat[row] for row in rows],
        )

    def zero(self, rows):
        return [("", "")] * rows

    def score(self, prompts, candidates, condition):
        losses = [[fraction(p, t) for t in row] for p, row in zip(prompts, candidates, strict=True)]
        if condition is not None:
            rows = zip(losses, condition, candidates, strict=True)
            losses = [
                [loss / (1 + (answer == t)) for loss, t in zip(row, targets, strict=True)]
                for row, (_, answer), targets in rows
            ]
        return np.asarray(losses, np.float32).reshape(-1, 2)

    def accuracy(self, prompts, targets, condition):
        found = [fraction(p, t) for p, t in zip(prompts, targets, strict=True)]
        if condition is not None:
            rows = zip(found, condition, targets, strict=True)
            found = [1.0 if answer == target else share for share, (_, answer), target in rows]
        return np.asarray(found, np.float32)

    def pieces(self, target):
        words = target.split()
        return [" ".join(words[:end]) for end in range(1, len(words) + 1)]

    def hits(self, prompts, targets, places, condition):
        rows = zip(prompts, targets, places, condition or [("", "")] * len(prompts), strict=True)
        return np.asarray(
            [answer == t or fraction(p, t, k) > 0.5 for p, t, k, (_, answer) in rows], np.float32
        )

    def generate(self, prompts, condition, tokens):
        answers = [("", "")] * len(prompts) if condition is None else condition
        return [
            f" {answer or prompt[-4:]} and"[: 2 * tokens]
            for prompt, (_, answer) in zip(prompts, answers, strict=True)
        ]


def cases(count):
    """Cases with differing numbers of prompts."""
    return [
        EditRecord(
            case_id=3 * n + 1,
            prompt=f"Fact {n} is",
            subject=f"Fact {n}",
            target_new=f"new {n}",
            target_true=f"true {n}",
            paraphrases=tuple(f"Says {k} of fact {n}:" for k in range(n % 3)),
            neighbourhood=tuple(f"Neighbour {k} of {n} is" for k in range(1 + n % 2)),
            neighbourhood_targets=(f"true {n}",) * (1 + n % 2),
        )
        for n in range(count)
    ]


def experiment(count=11, chunk=4, **data):
    return counterfact.CounterFact(KnownEditor(), cases(count), data=data, chunk=chunk)


@pytest.fixture
def finished(tmp_path):
    """An uninterrupted run."""
    folder = tmp_path / "whole"
    summary = runner.run(experiment(), folder, quiet=True)
    return folder, summary


def test_benchmarks_are_found_by_their_file_and_unknown_names_list_them():
    assert "counterfact" in bench.benchmarks()
    assert not {"runner", "metrics", "editor"} & set(bench.benchmarks())
    with pytest.raises(ValueError, match=r"unknown benchmark 'contrafact'; known: .*counterfact"):
        bench.benchmark("contrafact")
    parser = argparse.ArgumentParser()
    bench.benchmark("counterfact").arguments(parser)
    assert parser.parse_args(["--data", "x", "--limit", "2"]).limit == 2


def test_records_hold_all_that_the_summary_says(finished):
    folder, summary = finished
    records = runner.read_cases(folder)
    assert [record["case_id"] for record in records] == [case.case_id for case in cases(11)]
    assert json.loads((folder / runner.SUMMARY).read_text()) == summary
    again = json.loads(json.dumps(counterfact.summarise(records)))
    assert summary["results"] == again
    assert set(again) == {*systems.SYSTEMS, "in_scope", "wordings"}
    assert summary["environment"]["versions"]["jax"]
    assert summary["settings"]["mode"] == "rome" and summary["cases"] == 11


def test_systems_are_what_their_names_say(finished):
    known = KnownEditor()
    for record in runner.read_cases(finished[0]):
        loss = record["loss"]
        for kind in metrics.KINDS:
            for row, prompt in enumerate(record["prompts"][kind]):
                pair = [record["target_new"], record["target_true"]]
                base = known.score([prompt], [pair], None)[0].tolist()
                supported = f"{record['written'][:-1]}. {prompt}"
                fact = known.score([supported], [pair], None)[0].tolist()
                inside = record["in_scope"][kind][row]
                assert inside == (fraction("scope", prompt) > 0.4)
                assert loss["base"][kind][row] == loss["zero"][kind][row] == base
                assert loss["prompt"][kind][row] == fact
                assert loss["lookup"][kind][row] == (fact if inside else base)
                expected = [base[0] / 2, base[1]] if inside else base
                assert loss["larimar"][kind][row] == pytest.approx(expected, rel=1e-6)
                read = [base[0] / 2, base[1]]
                assert loss["open"][kind][row] == pytest.approx(read, rel=1e-6)


def test_released_decides_by_each_candidate_and_falls_back_to_zero():
    """Against a plain loop over cases, prompts and candidates."""
    known, some = KnownEditor(), cases(5)
    some = [dataclasses.replace(c, paraphrases=tuple(f"Off. {p}" for p in c.paraphrases)) for c in some]
    made = counterfact.CounterFact(known, some, data={}, chunk=2, mode="released")
    assert made.settings["mode"] == "released"
    decided = set()
    for case, record in zip(some, made.run(some), strict=True):
        pair, fact = (case.target_new, case.target_true), (case.prompt, case.target_new)
        written = known.written(*fact)
        for kind in metrics.KINDS:
            for row, prompt in enumerate(record["prompts"][kind]):
                assert "Off" not in prompt
                wanted = {name: [] for name in systems.SYSTEMS}
                for column, answer in enumerate(pair):

                    def loss(text, condition=None, answer=answer):
                        return float(known.score([text], [[answer] * 2], condition)[0, 0])

                    inside = fraction("scope", f"{prompt} {answer}") > 0.4
                    assert record["in_scope"][kind][row][column] == inside
                    decided.add((kind, inside))
                    base, zero = loss(prompt), loss(prompt, known.zero(1))
                    supported, read = loss(f"{written[:-1]}. {prompt}"), loss(prompt, [fact])
                    wanted["base"].append(base)
                    wanted["zero"].append(zero)
                    wanted["prompt"].append(supported)
                    wanted["lookup"].append(supported if inside else base)
                    wanted["larimar"].append(read if inside else zero)
                    wanted["open"].append(read)
                for name, losses in wanted.items():
                    assert record["loss"][name][kind][row] == pytest.approx(losses, rel=1e-6)
    assert len(decided) == 6
    assert counterfact.summarise(made.run(some))["in_scope"]["edit"]["cases"] == 5


def test_malformed_records_are_left_out_and_counted_where_that_is_asked_for(tmp_path, capsys):
    good = dict(
        case_id=1, prompt="A is", subject="A", target_new="x", ground_truth="y",
        rephrase_prompt="A was", locality_prompt="B is", locality_ground_truth="y",
    )
    records = [good, {**good, "subject": 3}, None, {**good, "case_id": 2}]
    lines = ["{" if record is None else json.dumps(record) for record in records]
    (tmp_path / "facts.jsonl").write_text("\n\n".join(lines))
    parser = argparse.ArgumentParser()
    given.options(parser, "records")
    told = ["--data", str(tmp_path / "facts.jsonl")]
    with pytest.raises(MalformedRecord, match=r"record 1 \(line 3\): field 'subject'"):
        given.read(parser.parse_args(told), data.load, None)
    args = parser.parse_args([*told, "--skip-bad"])
    records, found = given.read(args, data.load, None)
    assert [record.case_id for record in records] == [1, 2]
    assert [r.case_id for r in given.read(args, data.load, 2)[0]] == [1, 2]  # of those that are right
    assert "record 2 (line 5): not valid JSON" in found["skipped"][1]
    assert "2 malformed records" in capsys.readouterr().err
    summary = runner.run(experiment(3, **found), tmp_path / "run")
    assert "2 malformed records of facts.jsonl were left out" in capsys.readouterr().out
    assert len(summary["settings"]["data"]["skipped"]) == 2
    (tmp_path / "facts.jsonl").write_text("{")
    with pytest.raises(MalformedRecord, match="no record that can be read; of the first: .*line 1"):
        given.read(args, data.load, None)


@pytest.mark.parametrize("kept", [0, 1, 7, 0.31, 0.5, 0.77, 0.999])
def test_a_cut_file_is_taken_up_and_gives_the_same_lines(finished, tmp_path, kept):
    folder, summary = finished
    whole = (folder / runner.CASES).read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / runner.SETTINGS).write_bytes((folder / runner.SETTINGS).read_bytes())
    size = kept if isinstance(kept, int) else int(kept * len(whole))
    (cut / runner.CASES).write_bytes(whole[:size])
    resumed = runner.run(experiment(), cut, quiet=True)
    assert (cut / runner.CASES).read_bytes() == whole
    assert resumed["results"] == summary["results"]
    assert resumed["run"]["resumed_at_case"] == whole[:size].count(b"\n")


def test_finished_cases_are_not_computed_again(finished):
    again = experiment()
    again.run = lambda cases: pytest.fail("a finished case was computed again")
    assert runner.run(again, finished[0], quiet=True)["results"] == finished[1]["results"]


def test_a_killed_process_is_taken_up(finished, tmp_path):
    folder = tmp_path / "killed"
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path[:0] = {[os.path.dirname(__file__), os.getcwd()]!r}
        import test_bench
        from larimar_jax.bench import runner
        slow = test_bench.experiment()
        run = slow.run
        slow.run = lambda cases: (time.sleep(0.5), run(cases))[1]
        runner.run(slow, {str(folder)!r}, quiet=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    path = folder / runner.CASES
    while not (path.exists() and path.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(runner.FolderBusy, match="another process"):
        runner.run(experiment(), folder, quiet=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 <= len(runner.read_cases(folder)) < 11
    runner.run(experiment(), folder, quiet=True)
    assert path.read_bytes() == (finished[0] / runner.CASES).read_bytes()


def test_other_settings_are_refused_and_named(finished):
    folder, _ = finished
    before = (folder / runner.CASES).read_bytes()
    with pytest.raises(runner.DifferentSettings) as caught:
        runner.run(experiment(chunk=5, limit=3), folder, quiet=True)
    assert "chunk: 4 there, 5 now" in str(caught.value)
    assert "data.limit: 3 now but not there" in str(caught.value)
    assert (folder / runner.CASES).read_bytes() == before


def test_damage_that_no_kill_makes_is_an_error(finished):
    folder, _ = finished
    path = folder / runner.CASES
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{broken}\n", *lines[2:]]))
    with pytest.raises(runner.BrokenRun, match="line 2 is damaged"):
        runner.run(experiment(), folder, quiet=True)
    path.write_bytes(b"".join([lines[1], *lines[2:]]))
    with pytest.raises(runner.BrokenRun, match="line 1: case 4 does not belong"):
        runner.run(experiment(), folder, quiet=True)
    path.write_bytes(b"".join(lines))
    (folder / runner.SETTINGS).unlink()
    with pytest.raises(runner.BrokenRun, match="no settings.json"):
        runner.run(experiment(), folder, quiet=True)


def test_a_broken_model_stops_the_run_and_writes_no_line(tmp_path):
    broken = experiment()
    broken.editor.score = lambda prompts, targets, condition: np.full((len(prompts), 2), np.nan)
    with pytest.raises(metrics.UnusableScore, match="case 1, edit"):
        runner.run(broken, tmp_path, quiet=True)
    assert (tmp_path / runner.CASES).read_bytes() == b""


def test_chunks_of_one_equal_chunks_of_many(finished):
    single = [record for case in cases(11) for record in experiment(chunk=1).run([case])]
    assert json.loads(json.dumps(single)) == runner.read_cases(finished[0])


def test_a_memory_that_does_not_beat_the_lookup_says_so_in_that_row(finished):
    records = runner.read_cases(finished[0])
    for record in records:
        record["loss"]["larimar"]["edit"] = record["loss"]["lookup"]["edit"]
        record["loss"]["larimar"]["paraphrase"] = [
            [0.1, 1.0] for _ in record["loss"]["lookup"]["paraphrase"]
        ]
        record["loss"]["lookup"]["paraphrase"] = [
            [1.0, 0.1] for _ in record["loss"]["lookup"]["paraphrase"]
        ]
    results = counterfact.summarise(records)
    rows = results["larimar"]
    assert rows["edit"]["note"] == "does not beat the lookup"
    assert rows["edit"]["versus_lookup"]["mean"] == 0.0
    assert "note" not in rows["paraphrase"]
    assert rows["paraphrase"]["versus_lookup"]["mean"] == 100.0
    assert "note" not in results["base"]["edit"]
    console = Console(width=140, record=True, quiet=False, file=open(os.devnull, "w"))
    console.print(counterfact.table(results, "title"))
    text = console.export_text()
    assert "does not beat" in text
    assert all(label.split()[-1] in text for label in systems.SYSTEMS.values())


# A real model, tiny and random


@pytest.fixture
def larimar(tiny):
    """The benchmark's view of a tiny random model."""
    return editor.LarimarEditor(tiny)


def test_a_batch_of_cases_equals_one_by_one(larimar):
    """A case's memory holds its own fact only, whatever stands in the memories beside it."""
    many = counterfact.CounterFact(larimar, cases(3), data={}, chunk=3)
    batched = many.run(many.cases)
    for case, record in zip(many.cases, batched, strict=True):
        (alone,) = many.run([case])
        for kind in metrics.KINDS:
            ours, theirs = record["scope_score"][kind], alone["scope_score"][kind]
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert alone["prompts"] == record["prompts"]
        for system in systems.SYSTEMS:
            for kind in metrics.KINDS:
                ours, theirs = record["loss"][system][kind], alone["loss"][system][kind]
                np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_the_tiny_models_memory_is_read_where_it_is_in_scope_only(larimar):
    for record in counterfact.CounterFact(larimar, cases(3), data={}).run(cases(3)):
        loss = record["loss"]
        assert record["in_scope"]["edit"] == [True]
        assert not any(record["in_scope"]["neighbourhood"])
        assert loss["larimar"]["neighbourhood"] == loss["base"]["neighbourhood"]
        # Memory, z = 0 and the untouched LM are three different things.
        values = [loss[system]["edit"][0] for system in ("base", "zero", "larimar", "lookup")]
        gaps = [abs(a[0] - b[0]) for i, a in enumerate(values) for b in values[:i]]
        assert min(gaps) > 1e-5


def test_a_text_that_the_encoder_does_not_take_is_named(larimar):
    with pytest.raises(TextTooLong, match="word word"):
        larimar.recall([("word " * 90, "x")], [["short"]])


def test_a_finished_run_keeps_the_time_that_it_took(tmp_path):
    made = counterfact.CounterFact(KnownEditor(), cases(4), data={"name": "x"})
    runner.run(made, tmp_path / "run", quiet=True)
    path = tmp_path / "run" / runner.SUMMARY
    first = json.loads(path.read_text()) | {"run": {"seconds": 123.4, "resumed_at_case": 0}}
    path.write_text(json.dumps(first))
    assert runner.run(made, tmp_path / "run", quiet=True)["run"] == first["run"]
