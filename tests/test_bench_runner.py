"""Runs under kills, cuts and shares, and what a run refuses."""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from known_editor import KnownEditor, cases, rows, saved

from larimar_jax import bench, cli
from larimar_jax.bench import metrics, runner, summary
from larimar_jax.bench.counterfact import CounterFact
from larimar_jax.bench.runner import Share
from larimar_jax.bench.task import add_arguments, build
from larimar_jax.data.edit_records import MalformedRecord


@pytest.fixture
def task(tmp_path):
    """CounterFact over eleven records, in chunks of four."""
    return CounterFact(data=saved(cases(11), tmp_path / "facts.json"), chunk=4)


def run(task, folder, part=None, **options):
    return runner.run(task, folder, part, editor=KnownEditor(), quiet=True, **options)


def lines(folder):
    return (folder / runner.ROWS).read_bytes()


class Interrupted(Exception):
    """Stands for a kill."""


def interrupted(monkeypatch, task, folder, chunks, part=None):
    """Run a task until so many chunks are computed."""
    evaluate, computed = CounterFact.evaluate, []

    def limited(self, systems, chunk):
        if len(computed) == chunks:
            raise Interrupted
        computed.append([case.case_id for case in chunk])
        return evaluate(self, systems, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(CounterFact, "evaluate", limited)
        with pytest.raises(Interrupted):
            run(task, folder, part)
    return computed


def test_benchmarks_are_known_by_their_name():
    assert bench.tasks()["counterfact"] is CounterFact
    assert not {"runner", "metrics", "editor", "task"} & set(bench.tasks())


def test_options_are_the_fields_of_a_task(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser, CounterFact)
    line = "--data x --limit 2 --set editing.ridge=1 --set editing.a=2 b=3 --skip-bad"
    task = build(CounterFact, vars(parser.parse_args(line.split())))
    assert (task.data, task.limit, task.mode, task.skip_bad) == ("x", 2, "rome", True)
    assert task.overrides == ("editing.ridge=1", "editing.a=2", "b=3") and task.chunk == 25
    for wrong in ("--limit 2", "--data x --mode other", "--data x --limit y"):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong.split())
    parser.print_help()
    assert "cases computed together (25)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="--chunk must be at least 1, not 0"):
        CounterFact(data="x", chunk=0)


def test_a_folder_holds_settings_rows_and_a_summary_of_them(task, tmp_path):
    result = run(task, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        runner.ROWS, runner.SETTINGS, runner.SUMMARY
    ]  # fmt: skip
    assert json.loads((tmp_path / "run" / runner.SUMMARY).read_text()) == result
    measured = runner.read_rows(tmp_path / "run")
    assert runner.cases_of(measured) == [case.case_id for case in cases(11)]
    assert result["results"] == runner.as_json(summary.summarise(task, measured))
    settings = result["settings"]
    assert settings["options"] == {"chunk": 4, "limit": None, "rephrasings": 0, "mode": "rome"}
    assert settings["data"]["name"] == "facts.json" and len(settings["data"]["sha256"]) == 64
    assert settings["model"] == {"name": "known"} and result["cases"] == 11
    assert result["environment"]["packages"]["jax"] and result["run"]["resumed_at_case"] == 0


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_a_stopped_run_goes_on_and_gives_the_same_rows(task, tmp_path, monkeypatch, chunks):
    run(task, tmp_path / "whole")
    interrupted(monkeypatch, task, tmp_path / "cut", chunks)
    result = run(task, tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert result["run"]["resumed_at_case"] == 4 * chunks


def test_a_finished_run_is_only_read_and_keeps_the_time_that_it_took(task, tmp_path, monkeypatch):
    first = run(task, tmp_path / "run")
    path = tmp_path / "run" / runner.SUMMARY
    took = {"seconds": 123.4, "resumed_at_case": 0}
    path.write_text(json.dumps(first | {"run": took, "results": []}))
    monkeypatch.setattr(CounterFact, "evaluate", lambda *_: pytest.fail("a case is computed again"))
    again = run(task, tmp_path / "run")
    assert again["run"] == took and again["results"] == first["results"]


def test_a_killed_process_is_taken_up_and_a_running_one_is_left_alone(task, tmp_path):
    folder = tmp_path / "killed"
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path[:0] = {[os.path.dirname(__file__), os.getcwd()]!r}
        import known_editor
        from larimar_jax.bench import runner
        from larimar_jax.bench.counterfact import CounterFact
        evaluate = CounterFact.evaluate
        CounterFact.evaluate = lambda *arguments: (time.sleep(0.5), evaluate(*arguments))[1]
        task = CounterFact(data={task.data!r}, chunk=4)
        runner.run(task, {str(folder)!r}, editor=known_editor.KnownEditor(), quiet=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not (folder / runner.CHUNKS / "0.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(runner.FolderBusy, match="another process"):
        run(task, folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / runner.ROWS).exists()
    run(task, folder)
    run(task, tmp_path / "whole")
    assert lines(folder) == lines(tmp_path / "whole")


def test_chunks_of_one_equal_chunks_of_many(task):
    single = rows(dataclasses.replace(task, chunk=1), KnownEditor())
    assert single == rows(task, KnownEditor())


def test_other_settings_are_refused_and_each_difference_is_named(task, tmp_path):
    run(task, tmp_path / "run")
    before = lines(tmp_path / "run")
    other = CounterFact(data=saved(cases(10), tmp_path / "other.json"), chunk=5, limit=3)
    with pytest.raises(runner.DifferentSettings) as refused:
        run(other, tmp_path / "run")
    for words in ("options.chunk: 4 there, 5 now", "options.limit: null there, 3 now", "sha256"):
        assert words in str(refused.value)
    assert lines(tmp_path / "run") == before


def test_damage_that_no_kill_does_is_an_error(task, tmp_path, monkeypatch):
    interrupted(monkeypatch, task, tmp_path / "cut", 2)
    chunks = tmp_path / "cut" / runner.CHUNKS
    shutil.copy(chunks / "1.jsonl", chunks / "0.jsonl")
    with pytest.raises(runner.BrokenRun, match="0.jsonl is of other cases"):
        run(task, tmp_path / "cut")
    (chunks / "0.jsonl").write_text('{"case": 1}\n{broken}\n')
    with pytest.raises(runner.BrokenRun, match="0.jsonl, line 2 is damaged"):
        run(task, tmp_path / "cut")
    run(task, folder := tmp_path / "run")
    whole = lines(folder).splitlines(keepends=True)
    (folder / runner.ROWS).write_bytes(b"".join(whole[::-1]))
    with pytest.raises(runner.BrokenRun, match="lines were added, removed or reordered"):
        run(task, folder)
    (folder / runner.SETTINGS).write_text("{")
    with pytest.raises(runner.BrokenRun, match="settings.json is not valid JSON"):
        run(task, folder)
    (folder / runner.SETTINGS).unlink()
    with pytest.raises(runner.BrokenRun, match="no settings.json"):
        run(task, folder)


def test_a_broken_model_stops_the_run_and_writes_no_row(task, tmp_path, monkeypatch):
    def broken(self, prompts, candidates, condition):
        return np.full((len(prompts), 2), np.nan, np.float32)

    monkeypatch.setattr(KnownEditor, "score", broken)
    with pytest.raises(metrics.UnusableScore, match="case 1, edit, system base: .*not finite"):
        run(task, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.jsonl"))


def test_a_task_that_leaves_a_case_out_is_an_error(task, monkeypatch):
    monkeypatch.setattr(CounterFact, "evaluate", lambda *_: iter([{"case": 7}]))
    with pytest.raises(RuntimeError, match=r"rows of cases \[7\] for cases \[1, 4, 7, 10\]"):
        rows(task, KnownEditor())


def test_malformed_records_are_left_out_and_counted_on_request(tmp_path, capsys):
    saved(cases(3), path := tmp_path / "facts.json")
    records = [json.dumps(record) for record in json.loads(path.read_text())]
    path.write_text("\n\n".join([records[0], records[1].replace('"Fact 1"', "3"), "{", records[2]]))
    with pytest.raises(MalformedRecord, match=r"record 1 \(line 3\): field 'subject'"):
        rows(CounterFact(data=str(path)), KnownEditor())
    task = CounterFact(data=str(path), skip_bad=True)
    result = runner.run(task, tmp_path / "run", editor=KnownEditor())
    shown = capsys.readouterr()
    assert "record 2 (line 5): not valid JSON" in result["settings"]["data"]["skipped"][1]
    assert "2 malformed records" in shown.err and result["cases"] == 2
    assert "2 malformed records of facts.json were left out" in shown.out
    assert len(CounterFact(data=str(path), skip_bad=True, limit=2).records) == 2


# Shares


@pytest.mark.parametrize(("count", "size"), [(2, 11), (3, 11), (5, 11), (4, 3)])
def test_shares_make_the_result_of_one_process(task, tmp_path, count, size):
    task = dataclasses.replace(task, limit=size)
    whole = run(task, tmp_path / "whole")
    parts = [run(task, tmp_path / "run", Share(n, count)) for n in reversed(range(count))]
    needed = min(count, -(-size // 4))
    assert parts[: needed - 1] == [None] * (needed - 1) or count > needed
    assert parts[-1]["results"] == whole["results"]
    assert parts[-1]["settings"] == whole["settings"]
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_no_case_is_computed_twice_and_a_share_goes_on_where_it_was(task, tmp_path, monkeypatch):
    task = dataclasses.replace(task, chunk=2)
    ids = [case.case_id for case in cases(11)]
    first = interrupted(monkeypatch, task, tmp_path / "run", 2, Share(1, 2))
    assert first == [ids[2:4], ids[6:8]]
    assert run(task, tmp_path / "run", Share(0, 2)) is None  # a chunk is missing
    computed, evaluate = [], CounterFact.evaluate
    counting = lambda *args: (computed.extend(args[2]), evaluate(*args))[1]  # noqa: E731
    monkeypatch.setattr(CounterFact, "evaluate", counting)
    assert run(task, tmp_path / "run", Share(1, 2))["cases"] == 11
    assert [case.case_id for case in computed] == ids[10:]


@pytest.mark.parametrize("attempt", range(3))
def test_shares_that_end_together_make_one_result(task, tmp_path, attempt):
    task = dataclasses.replace(task, chunk=1)
    whole, results = run(task, tmp_path / "whole"), []

    def compute(n):
        results.append(run(dataclasses.replace(task), tmp_path / "run", Share(n, 4)))

    threads = [threading.Thread(target=compute, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and any(results)
    assert all(each is None or each["results"] == whole["results"] for each in results)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "a/b", "0/0"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no share: give I/N"):
        runner.share(text)
    assert runner.share("3/4") == Share(3, 4)
    with pytest.raises(SystemExit):
        cli.main(["bench", "counterfact", "--data", "x", "--out", "y", "--share", text])
