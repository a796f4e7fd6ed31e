"""Run a task into a folder that survives being killed.

    settings.json   what decides the numbers; a folder never mixes two of them
    rows.jsonl      one line a row, appended and flushed chunk by chunk
    summary.json    recomputed from rows.jsonl at the end, replaced atomically

A killed run is taken up where its file ends: a line that was cut off is dropped, finished lines
stay. Chunks are cut at fixed case numbers, so a case is always computed in the same company and
resumed numbers equal uninterrupted ones bit for bit.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import itertools
import json
import math
import os
import platform
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from larimar_jax.bench import metrics, systems, tables
from larimar_jax.bench import summary as summaries
from larimar_jax.bench.task import Task, add_arguments, from_arguments  # noqa: F401

SETTINGS, ROWS, SUMMARY = "settings.json", "rows.jsonl", "summary.json"
Record = dict[str, Any]


class DifferentSettings(ValueError):
    """The run folder was started with other settings."""


class BrokenRun(ValueError):
    """The run folder holds something that this run did not write."""


class FolderBusy(ValueError):
    """Another process is writing the run folder."""


@dataclasses.dataclass
class Work:
    """A task with its model, its cases and the settings of its folder."""

    task: Task
    systems: systems.Systems | None
    cases: Sequence[Any]
    settings: dict[str, Any]

    @property
    def case_ids(self) -> list[Any]:
        return [as_json(case.case_id) for case in self.cases]

    def rows(self, cases: Sequence[Any]) -> list[Record]:
        """Return the rows of a chunk of cases, checked.

        Raises:
            RuntimeError: the task yields rows of other cases, or in another order.
            UnusableScore: a number in a row is not finite; names case, kind and system.
        """
        rows = [as_json(row) for row in self.task.evaluate(self.systems, cases)]
        yielded = [case for case, _ in itertools.groupby(row["case"] for row in rows)]
        wanted = [as_json(case.case_id) for case in cases]
        if yielded != wanted:
            raise RuntimeError(
                f"{self.task.name} yielded rows of cases {yielded} for cases {wanted}: `evaluate` "
                "must yield rows case by case, in order, and at least one of each."
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


def start(task: Task, editor: Any = None) -> Work:
    """Return the work of a task: loads its model, unless an editor or a pipeline is handed over."""
    edited = None
    if task.needs_model:
        edited = systems.of_task(task) if editor is None else systems.Systems(editor)
    settings = {"benchmark": task.name, "options": task.options(), "data": task.data_settings()}
    if edited is not None:
        settings["model"] = dict(edited.editor.settings)
    return Work(task, edited, task.cases(edited), as_json(settings))


def run(
    task: Task, folder: str | Path, *, editor: Any = None, quiet: bool = False
) -> dict[str, Any]:
    """Run a task to its end, or take it up, and return its summary.

    Args:
        folder: made where it is missing; an earlier run with the same settings is resumed.
        editor: an `Editor` or a `Pipeline` in the place of the model that the task names.
        quiet: no progress bar and no table.
    Raises:
        DifferentSettings: the folder's run differs in its settings; names each difference.
        BrokenRun: `rows.jsonl` is damaged before its last line, or is of other cases.
        FolderBusy: another process holds the folder.
    """
    return finish(start(task, editor), Path(folder), quiet=quiet)


def finish(work: Work, folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Compute what the folder lacks, and write and show the summary; raises as `run`."""
    console, began = Console(stderr=True, quiet=quiet), time.perf_counter()
    done = complete(work, folder, console)
    rows = read_rows(folder)
    summary = _end(work, len(rows), began, done) | {
        "results": summaries.summarise(work.task, rows),
        "settings": work.settings,
    }
    if done == len(work.cases) and (folder / SUMMARY).is_file():
        # Of a run that was finished, the machine and the time are those of then.
        before = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        summary |= {name: before[name] for name in ("environment", "run")}
    replace(folder / SUMMARY, json.dumps(as_json(summary), indent=2) + "\n")
    if not quiet:
        for item in tables.shown(work.task, summary):
            Console().print(item)
        console.print(f"written: {folder / SUMMARY}")
    return summary


def _end(work: Work, rows: int, began: float, done: int) -> dict[str, Any]:
    """What every summary.json holds, which is written when all rows are there."""
    return {
        "benchmark": work.task.name,
        "cases": len(work.cases),
        "rows": rows,
        "environment": environment(),
        "run": {"seconds": round(time.perf_counter() - began, 1), "resumed_at_case": done},
    }


def complete(work: Work, folder: Path, console: Console, *, mark: bool = False) -> int:
    """Compute the cases that a folder does not have, and return how many it had; raises as `run`.

    Args:
        mark: write a summary.json without results, which says that all rows are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with only_writer(folder / ROWS) as file:
        fresh = os.fstat(file.fileno()).st_size == 0
        claim(folder / SETTINGS, work.settings, fresh=fresh)
        rows, done = _resume(file, work)
        if done:
            console.print(f"resuming {folder}: {done} of {len(work.cases)} cases are there")
        if done < len(work.cases):
            rows = _fill(work, file, rows, done, console)
    if mark:
        mark_end(work, folder, len(rows), began, done)
    return done


def mark_end(work: Work, folder: Path, rows: int, began: float, done: int) -> None:
    """Write a summary.json without results: it says that all rows are there."""
    text = json.dumps(_end(work, rows, began, done), indent=2) + "\n"
    replace(folder / SUMMARY, text)


def read_rows(folder: str | Path) -> list[Record]:
    """Return the complete rows of a run folder, in order; a cut-off last line is left out."""
    path = Path(folder) / ROWS
    return [row for row, _ in _lines(path.read_bytes(), path)]


def environment() -> dict[str, Any]:
    """Return what numbers are computed on: Python, platform, devices, and versions that matter."""
    versions = {}
    for name in ("larimar-jax", "jax", "jaxlib", "flax", "numpy", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "cores": os.cpu_count(),
        "versions": versions,
    }


# Appending


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[IO[bytes]]:
    """Open `path` for reading and appending, locked until this process ends, even if killed."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderBusy(
                f"another process is writing {path}. Wait for it to end, or give this run another "
                "--out folder."
            ) from error
        yield file


def _fill(work: Work, file: IO[bytes], rows: list[Record], done: int, console: Console) -> list[Record]:
    total, chunk = len(work.cases), work.task.chunk
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(work.task.name, total=total, completed=done)
        first = done - done % chunk
        # A chunk that was cut off is computed whole again, for the same numbers, but only its
        # missing lines are appended.
        ids = {as_json(case.case_id) for case in work.cases[first : first + chunk]}
        written = sum(row["case"] in ids for row in rows)
        for begin in range(first, total, chunk):
            cases = work.cases[begin : begin + chunk]
            computed = work.rows(cases)[written:]
            lines = [json.dumps(row, allow_nan=False) + "\n" for row in computed]
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            rows.extend(computed)
            written = 0
            progress.update(bar, completed=begin + len(cases))
    return rows


# Resuming


def claim(path: Path, settings: Mapping[str, Any], fresh: bool) -> None:
    """Write the folder's settings, or check that they are this run's."""
    if not path.exists():
        if not fresh:
            raise BrokenRun(
                f"{path.parent} holds {ROWS} but no {SETTINGS}, so what it was run with is "
                "unknown. Give another --out folder, or remove this one."
            )
        replace(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BrokenRun(
            f"{path} is not valid JSON ({error}). Give another --out folder, or remove this one."
        ) from error
    if differences := _differences(before, settings):
        raise DifferentSettings(
            f"{path.parent} holds a run with other settings, which would mix two experiments:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nGive another --out folder, or remove this one."
        )


def _differences(before: Any, now: Any, trail: str = "") -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        lines = []
        for name in sorted({*before, *now}):
            inner = f"{trail}.{name}" if trail else name
            if name not in before or name not in now:
                side = "there but not now" if name in before else "now but not there"
                lines.append(f"{inner}: {json.dumps(before.get(name, now.get(name)))} {side}")
            else:
                lines += _differences(before[name], now[name], inner)
        return lines
    return [] if before == now else [f"{trail}: {json.dumps(before)} there, {json.dumps(now)} now"]


def _resume(file: IO[bytes], work: Work) -> tuple[list[Record], int]:
    """Cut off an unfinished last line; return the rows and how many cases are known to be whole."""
    file.seek(0)
    path = Path(file.name)
    lines = list(_lines(file.read(), path))
    rows, wanted = [row for row, _ in lines], work.case_ids
    cases = [case for case, _ in itertools.groupby(row["case"] for row in rows)]
    if cases != wanted[: len(cases)]:
        place = next(
            (n for n, (a, b) in enumerate(zip(cases, wanted, strict=False)) if a != b), len(wanted)
        )
        line = next(n for n, row in enumerate(rows, 1) if row["case"] == cases[place])
        raise BrokenRun(
            f"{path}, line {line}: case {cases[place]} does not belong there. Lines were "
            "added, removed or reordered; remove the file to start again."
        )
    file.truncate(lines[-1][1] if lines else 0)
    file.seek(0, os.SEEK_END)
    if len(cases) == len(wanted) and rows_at_end(path.parent) == len(rows):
        return rows, len(cases)
    # The last case may lack rows.
    return rows, max(0, len(cases) - 1)


def rows_at_end(folder: Path) -> int | None:
    """Return how many rows a finished folder has; None of a folder that is not finished."""
    path = folder / SUMMARY
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else None


def _lines(raw: bytes, path: Path) -> Iterator[tuple[Record, int]]:
    """Each complete row and where its line ends. Only the last line may be damaged."""
    lines, end = raw.splitlines(keepends=True), 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not line.endswith(b"\n") or "case" not in row:
                raise ValueError("incomplete")
        except (ValueError, TypeError) as error:
            if number == len(lines):
                return
            raise BrokenRun(
                f"{path}, line {number} is damaged ({error}), and it is not the last one, so no "
                "kill cut it off. Remove it and what follows to compute those cases again."
            ) from error
        end += len(line)
        yield row, end


# JSON


def replace(path: Path, text: str) -> None:
    """Write a file that is either the former one or the new one, never half of it."""
    # Of a name that nobody else has: shares on several machines may have the same process number.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def as_json(value: Any) -> Any:
    """Return `value` as JSON gives it back: NumPy scalars become numbers, tuples lists."""

    def convert(item: Any) -> Any:
        if hasattr(item, "tolist"):
            return item.tolist()
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"a row may hold only JSON values, not {type(item).__name__}: {item!r}")

    return json.loads(json.dumps(value, default=convert))
