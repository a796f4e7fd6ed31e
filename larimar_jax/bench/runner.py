"""Runs a benchmark into a folder that survives being killed.

    settings.json   what decides the numbers; a folder never mixes two of them
    cases.jsonl     one line a case, appended and flushed chunk by chunk
    summary.json    recomputed from cases.jsonl at the end, replaced atomically

A killed run is taken up where its file ends: a line that was cut off is dropped, finished lines
stay. Chunks are cut at fixed case numbers, so a case is always scored in the same company and
resumed numbers equal uninterrupted ones bit for bit.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from larimar_jax.bench import given

SETTINGS, CASES, SUMMARY = "settings.json", "cases.jsonl", "summary.json"
Record = dict[str, Any]


@runtime_checkable
class Work(Protocol):
    """Cases, and how they are computed."""

    name: str
    settings: Mapping[str, Any]
    """Everything that decides the numbers, as JSON: data, model, seed, sizes."""
    cases: Sequence[Any]
    """In a fixed order; each with a `case_id` of its own."""
    chunk: int
    """How many cases are computed together."""

    def run(self, cases: Sequence[Any]) -> list[Record]:
        """One JSON record a case, in order, each with its `case_id`."""


@runtime_checkable
class Experiment(Work, Protocol):
    """What one benchmark file hands to the runner."""

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """The result, as JSON, from records as read back from the file."""

    def tables(self, summary: Mapping[str, Any]) -> Sequence[Table | str]:
        """The result for people, from what summary.json holds: tables, and notes between them."""


class DifferentSettings(ValueError):
    """The run folder was started with other settings."""


class BrokenRun(ValueError):
    """The run folder holds something that this run did not write."""


class FolderBusy(ValueError):
    """Another process is writing the run folder."""


def run(experiment: Experiment, folder: str | Path, *, quiet: bool = False) -> dict[str, Any]:
    """Runs `experiment` to its end, or takes it up, and returns its summary.

    Args:
        folder: made where it is missing; an earlier run with the same settings is resumed.
        quiet: no progress bar and no table.
    Raises:
        DifferentSettings: the folder's run differs in its settings; names each difference.
        BrokenRun: `cases.jsonl` is damaged before its last line, or is of other cases.
        FolderBusy: another process holds the folder.
    """
    folder, console = Path(folder), Console(stderr=True, quiet=quiet)
    started = time.perf_counter()
    done = complete(experiment, folder, console)
    settings, records = settings_of(experiment), read_cases(folder)
    summary = {
        "benchmark": experiment.name,
        "cases": len(records),
        "results": experiment.summarise(records),
        "settings": settings,
        "environment": environment(),
        "run": {"seconds": round(time.perf_counter() - started, 1), "resumed_at_case": done},
    }
    if done == len(experiment.cases) and (folder / SUMMARY).is_file():
        # Of a run that was finished, the machine and the time are those of then.
        before = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        summary |= {name: before[name] for name in ("environment", "run")}
    _replace(folder / SUMMARY, json.dumps(_plain(summary), indent=2) + "\n")
    if not quiet:
        for shown in (*experiment.tables(summary), *given.notes(settings)):
            Console().print(shown)
        console.print(f"written: {folder / SUMMARY}")
    return summary


def complete(experiment: Work, folder: Path, console: Console) -> int:
    """Computes the cases that `folder` does not have, and returns how many it had; raises as `run`."""
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / CASES) as file:
        fresh = os.fstat(file.fileno()).st_size == 0
        claim(folder / SETTINGS, settings_of(experiment), fresh=fresh)
        done = _resume(file, [case.case_id for case in experiment.cases])
        if done:
            console.print(f"resuming {folder}: {done} of {len(experiment.cases)} cases are there")
        _fill(experiment, file, done, console)
    return done


def settings_of(experiment: Work) -> dict[str, Any]:
    """What a run's settings.json holds."""
    return _plain({"benchmark": experiment.name, **experiment.settings})


def read_cases(folder: str | Path) -> list[Record]:
    """The complete records of a run folder, in order; a cut-off last line is left out."""
    path = Path(folder) / CASES
    return [record for record, _ in _records(path.read_bytes(), path)]


def environment() -> dict[str, Any]:
    """What the numbers were computed on: Python, platform, devices, and versions that matter."""
    import jax  # Takes a second; importing the runner should not.

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
    """`path` open for reading and appending, locked until this process ends, even if killed."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderBusy(
                f"another process is writing {path}. Wait for it to end, or give this run another "
                "--out folder."
            ) from error
        yield file


def _fill(experiment: Work, file: IO[bytes], done: int, console: Console) -> None:
    total, chunk = len(experiment.cases), experiment.chunk
    first = done - done % chunk if done < total else total
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(experiment.name, total=total, completed=done)
        for start in range(first, total, chunk):
            cases = experiment.cases[start : start + chunk]
            records = experiment.run(cases)
            made, wanted = [r["case_id"] for r in records], [c.case_id for c in cases]
            if made != wanted:
                raise RuntimeError(
                    f"{experiment.name} returned records of cases {made} for cases {wanted}: "
                    "`run` must give one record a case, in order."
                )
            # A chunk that was cut off is computed whole again, for the same numbers, but only its
            # missing lines are appended.
            fresh = records[max(0, done - start) :]
            lines = [json.dumps(_plain(record), allow_nan=False) + "\n" for record in fresh]
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            progress.update(task, completed=start + len(cases))


# Resuming


def claim(path: Path, settings: Mapping[str, Any], fresh: bool) -> None:
    """Writes the folder's settings, or checks that they are this run's."""
    if not path.exists():
        if not fresh:
            raise BrokenRun(
                f"{path.parent} holds {CASES} but no {SETTINGS}, so what it was run with is "
                "unknown. Give another --out folder, or remove this one."
            )
        _replace(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BrokenRun(
            f"{path} is not valid JSON ({error}). Give another --out folder, or remove this one."
        ) from error
    differences = _differences(before, settings)
    if differences:
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


def _resume(file: IO[bytes], case_ids: Sequence[Any]) -> int:
    """Cuts off an unfinished last line and returns how many cases are done."""
    file.seek(0)
    path = Path(file.name)
    records = list(_records(file.read(), path))
    found = [record["case_id"] for record, _ in records]
    if found != list(case_ids[: len(found)]):
        number = next(
            (n for n, (a, b) in enumerate(zip(found, case_ids, strict=False)) if a != b),
            len(case_ids),
        )
        raise BrokenRun(
            f"{path}, line {number + 1}: case {found[number]} does not belong there. Lines were "
            "added, removed or reordered; remove the file to start again."
        )
    file.truncate(records[-1][1] if records else 0)
    file.seek(0, os.SEEK_END)
    return len(records)


def _records(raw: bytes, path: Path) -> Iterator[tuple[Record, int]]:
    """Each complete record and where its line ends. Only the last line may be damaged."""
    lines, end = raw.splitlines(keepends=True), 0
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not line.endswith(b"\n") or "case_id" not in record:
                raise ValueError("incomplete")
        except (ValueError, TypeError) as error:
            if number == len(lines):
                return
            raise BrokenRun(
                f"{path}, line {number} is damaged ({error}), and it is not the last one, so no "
                "kill cut it off. Remove it and what follows to compute those cases again."
            ) from error
        end += len(line)
        yield record, end


# JSON


def _replace(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the new one, never half of it."""
    # Of a name that nobody else has: shares on several machines may have the same process number.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back: NumPy scalars become numbers, tuples lists, paths strings."""

    def convert(item: Any) -> Any:
        if hasattr(item, "tolist"):
            return item.tolist()
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"a record may hold only JSON values, not {type(item).__name__}: {item!r}")

    return json.loads(json.dumps(value, default=convert))
