"""Run a task into a folder that survives being killed, in one process or in several.

    settings.json      what decides the numbers; a folder never mixes two of them
    chunks/0.jsonl …   the rows of each chunk of cases, written whole or not at all
    rows.jsonl         all rows, once every chunk is there; then chunks/ is removed
    summary.json       recomputed from rows.jsonl at the end

Chunks are cut at fixed case numbers, so a case is always computed in the same company and the
numbers of a run that was taken up, or was computed in shares, equal those of an uninterrupted one
bit for bit. Share I of N computes every Nth chunk, from the Ith on, on one machine or on many that
see the folder; the process that is done last puts all together.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from larimar_jax.bench import metrics, systems, tables
from larimar_jax.bench import summary as summaries
from larimar_jax.bench.task import Task
from larimar_jax.train.logging import environment
from larimar_jax.weights.model_file import replace_file

SETTINGS, CHUNKS, ROWS, SUMMARY = "settings.json", "chunks", "rows.jsonl", "summary.json"
Record = dict[str, Any]


class DifferentSettings(ValueError):
    """The run folder was started with other settings."""


class BrokenRun(ValueError):
    """The run folder holds something that this run did not write."""


class FolderBusy(ValueError):
    """Another process computes the same share of the run."""


class Share(NamedTuple):
    """Share `index` of `count`, from 0."""

    index: int = 0
    count: int = 1


def share(text: str) -> Share:
    """Return "I/N" as a Share, for argparse; ArgumentTypeError where it is none."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no share: give I/N, such as 0/4 for the first of four processes and 3/4 "
            "for the last"
        )
    return Share(int(match[1]), int(match[2]))


@dataclasses.dataclass(frozen=True)
class Work:
    """A task with its model, its cases and the settings of its folder."""

    task: Task
    systems: systems.Systems | None
    cases: Sequence[Any]
    settings: Record

    def chunks(self) -> list[Sequence[Any]]:
        """Return the cases that are computed together."""
        size = self.task.chunk
        return [self.cases[n : n + size] for n in range(0, len(self.cases), size)]

    def rows(self, cases: Sequence[Any]) -> list[Record]:
        """Return the rows of a chunk of cases, checked.

        Raises:
            RuntimeError: the task yields rows of other cases, or none of a case.
            UnusableScore: a number in a row is not finite; names case, kind and system.
        """
        rows = as_json(list(self.task.evaluate(self.systems, cases)))
        order = {case: place for place, case in enumerate(ids_of(cases))}
        rows.sort(key=lambda row: order.get(row["case"], -1))
        if cases_of(rows) != ids_of(cases):
            raise RuntimeError(
                f"{self.task.name} yielded rows of cases {cases_of(rows)} for cases {ids_of(cases)}: "
                "`evaluate` must yield at least one row of each, and none of another."
            )
        for row in rows:
            for name, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise metrics.UnusableScore(
                        f"case {row['case']}, {row['kind']}, system {row['system']}: {name} is not "
                        "finite. The model's logits overflowed: run it in float32, or check the "
                        "checkpoint it was loaded from."
                    )
        return rows


def cases_of(rows: Sequence[Record]) -> list[Any]:
    """Return the cases of rows, each once where its rows stand together."""
    return [case for case, _ in itertools.groupby(row["case"] for row in rows)]


def ids_of(cases: Sequence[Any]) -> list[Any]:
    """Return the ids of cases, as JSON gives them back."""
    return as_json([case.case_id for case in cases])


def start(task: Task, editor: Any = None) -> Work:
    """Return the work of a task: load its model, unless an editor or a pipeline is handed over."""
    edited = None
    if task.needs_model:
        edited = systems.of_task(task, editor)
    settings = {"benchmark": task.name, "options": task.options(), "data": task.data_settings()}
    if edited is not None:
        settings["model"] = dict(edited.editor.settings)
        if edited.peers is not None:
            settings["editors"] = edited.peers.settings
    return Work(task, edited, task.cases(edited), as_json(settings))


def run(
    task: Task,
    folder: str | Path,
    part: Share | None = None,
    *,
    editor: Any = None,
    quiet: bool = False,
) -> Record | None:
    """Run a task to its end, or take it up, and return its summary; None while other shares
    compute.

    Args:
        folder: made where it is missing; an earlier run with the same settings is resumed.
        part: the share of this process; None for all.
        editor: a `LarimarEditor` or a `Pipeline` in the place of the model that the task names.
        quiet: no progress bar and no table.
    Raises:
        DifferentSettings: the folder's run differs in its settings; names each difference.
        BrokenRun: a file of the folder is damaged, or is of other cases.
        FolderBusy: another process computes the same share.
    """
    folder, console = Path(folder), Console(stderr=True, quiet=quiet)
    began, work = time.perf_counter(), start(task, editor)
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, work.settings)
    finished, done = (folder / ROWS).exists(), len(work.cases)
    if not finished:
        done = _compute(work, folder, part or Share(), console)
        if missing := _merge(work, folder):
            console.print(f"done; the result comes when other shares computed {missing} chunks")
            return None
    rows = read_rows(folder)
    if cases_of(rows) != ids_of(work.cases):
        raise BrokenRun(
            f"{folder / ROWS} is not of this run's {len(work.cases)} cases: lines were added, removed "
            "or reordered. Remove the file to start again."
        )
    summary = {
        "benchmark": task.name,
        "cases": len(work.cases),
        "results": summaries.summarise(task, rows),
        "settings": work.settings,
        "environment": environment(),
        "run": {"seconds": round(time.perf_counter() - began, 1), "resumed_at_case": done},
    }
    if finished and (folder / SUMMARY).is_file():
        # Of a run that was finished, the machine and the time are those of then.
        before = _json(folder / SUMMARY)
        summary |= {name: before[name] for name in ("environment", "run")}
    replace_file(folder / SUMMARY, json.dumps(as_json(summary), indent=2) + "\n")
    if not quiet:
        for item in tables.shown(task, summary):
            Console().print(item)
        console.print(f"written: {folder / SUMMARY}")
    return summary


def read_rows(folder: str | Path) -> list[Record]:
    """Return the rows of a finished run, in order; BrokenRun where a line is no JSON."""
    return _rows(Path(folder) / ROWS)


# Chunks


def _compute(work: Work, folder: Path, part: Share, console: Console) -> int:
    """Compute the chunks of a share that the folder lacks; return how many cases it had."""
    chunks, done = work.chunks(), 0
    own = list(enumerate(chunks))[part.index :: part.count]
    with _locked(folder / CHUNKS / f"share-{part.index}-of-{part.count}.lock"):
        missing = []
        for number, cases in own:
            path = folder / CHUNKS / f"{number}.jsonl"
            if not path.exists():
                missing.append((path, cases))
            elif cases_of(_rows(path)) != ids_of(cases):
                raise BrokenRun(
                    f"{path} is of other cases than those of this run: lines were added, removed or "
                    "reordered. Remove it to compute them again."
                )
            else:
                done += len(cases)
        if done:
            total = sum(len(cases) for _, cases in own)
            console.print(f"resuming {folder}: {done} of {total} cases are there")
        for path, cases in track(missing, work.task.name, console=console, disable=console.quiet):
            rows = work.rows(cases)
            replace_file(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    return done


def _merge(work: Work, folder: Path) -> int:
    """Put all chunks together, and return how many are missing."""
    with _locked(folder / SETTINGS, wait=True):
        paths = [folder / CHUNKS / f"{number}.jsonl" for number in range(len(work.chunks()))]
        if not (folder / ROWS).exists():
            if missing := sum(not path.exists() for path in paths):
                return missing
            replace_file(folder / ROWS, "".join(path.read_text("utf-8") for path in paths))
        shutil.rmtree(folder / CHUNKS, ignore_errors=True)
    return 0


@contextlib.contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Lock a file until the block or the process ends, even if killed."""
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise FolderBusy(
                f"another process is writing {path.parent}. Wait for it to end, or give this run "
                "another --out folder."
            ) from error
        yield


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the folder's settings, or check that they are this run's; raises as `run`."""
    path = folder / SETTINGS
    if not path.exists():
        if (folder / CHUNKS).exists() or (folder / ROWS).exists():
            raise BrokenRun(
                f"{folder} holds rows but no {SETTINGS}, so what it was run with is unknown. Give "
                "another --out folder, or remove this one."
            )
        replace_file(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if differences := list(_differences(_json(path), settings)):
        raise DifferentSettings(
            f"{folder} holds a run with other settings, which would mix two experiments:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nGive another --out folder, or remove this one."
        )


def _differences(before: Any, now: Any, trail: str = "") -> Iterator[str]:
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        if before != now:
            yield f"{trail}: {json.dumps(before)} there, {json.dumps(now)} now"
        return
    for name in sorted({*before, *now}):
        inner = f"{trail}.{name}" if trail else name
        if name in before and name in now:
            yield from _differences(before[name], now[name], inner)
        else:
            side = "there but not now" if name in before else "now but not there"
            yield f"{inner}: {json.dumps(before.get(name, now.get(name)))} {side}"


# JSON


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BrokenRun(
            f"{path} is not valid JSON ({error}). Give another --out folder, or remove this one."
        ) from error


def _rows(path: Path) -> list[Record]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise BrokenRun(
                f"{path}, line {number} is damaged ({error}), which no kill does: files are written "
                "whole. Remove the file to compute its cases again."
            ) from error
    return rows


def as_json(value: Any) -> Any:
    """Return `value` as JSON gives it back: NumPy scalars become numbers, tuples lists."""

    def convert(item: Any) -> Any:
        if hasattr(item, "tolist"):
            return item.tolist()
        raise TypeError(f"a row may hold only JSON values, not {type(item).__name__}: {item!r}")

    return json.loads(json.dumps(value, default=convert))
