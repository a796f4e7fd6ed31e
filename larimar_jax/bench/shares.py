"""A benchmark in several processes, each with its share of the cases: on one machine or on many.

Share I of N computes every Nth chunk, from the Ith on, in a folder of its own inside the run's.
Chunks are those of the whole run, so every case is computed in the same company. The share that is
done last puts all lines together, in the order of the cases, and the result is that of one process.
"""

import argparse
import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from larimar_jax.bench import runner
from larimar_jax.bench.task import Task


@dataclasses.dataclass(frozen=True)
class Share:
    """Share `index` of `count`, from 0."""

    index: int
    count: int

    @property
    def folder(self) -> str:
        return f"share-{self.index}-of-{self.count}"


def share(text: str) -> Share:
    """Return "I/N" as a Share, for argparse.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no share: give I/N, such as 0/4 for the first of four processes and 3/4 "
            "for the last"
        )
    return Share(int(match[1]), int(match[2]))


def _part(whole: runner.Work, part: Share) -> runner.Work:
    size = whole.task.chunk
    starts = range(part.index * size, len(whole.cases), part.count * size)
    cases = [case for start in starts for case in whole.cases[start : start + size]]
    settings = whole.settings | {"share": [part.index, part.count]}
    return dataclasses.replace(whole, cases=cases, settings=settings)


def run(
    task: Task, folder: str | Path, part: Share, *, editor: Any = None, quiet: bool = False
) -> dict[str, Any] | None:
    """Run a share to its end, or take it up; return the summary of all where all shares are done.

    Raises:
        DifferentSettings, BrokenRun: as `runner.run`, of any share. FolderBusy: of this share.
    """
    folder, console = Path(folder), Console(stderr=True, quiet=quiet)
    began = time.perf_counter()
    whole = runner.start(task, editor)
    runner.complete(_part(whole, part), folder / part.folder, console, mark=True)
    lines: list[tuple[int, bytes]] = []
    waiting = []
    order = {case: number for number, case in enumerate(whole.case_ids)}
    # Every share looks for the others after its own end, so the last one finds them all.
    for index in range(part.count):
        each = Share(index, part.count)
        path = folder / each.folder / runner.ROWS
        if path.exists() and path.stat().st_size:
            # By another process, which may have had other options.
            settings = _part(whole, each).settings
            runner.claim(path.parent / runner.SETTINGS, settings, fresh=False)
        expected = runner.rows_at_end(path.parent)
        if expected is None:
            waiting.append(each.folder)
            continue
        rows = runner.read_rows(path.parent)
        if len(rows) > expected:
            raise runner.BrokenRun(
                f"{path} has {len(rows)} lines, and its share ended with {expected}: lines were "
                "added. Remove the share's folder and run it again."
            )
        if len(rows) < expected:
            waiting.append(each.folder)
        raw = path.read_bytes().splitlines(keepends=True)
        lines += zip((order[row["case"]] for row in rows), raw, strict=False)
    if waiting:
        console.print(
            f"{part.folder} is done; the result comes when these are: {', '.join(waiting)}"
        )
        return None
    text = b"".join(line for _, line in sorted(lines, key=lambda pair: pair[0]))
    try:
        with runner.only_writer(folder / runner.ROWS) as file:
            fresh = os.fstat(file.fileno()).st_size == 0
            runner.claim(folder / runner.SETTINGS, whole.settings, fresh=fresh)
            file.seek(0)
            # Another share may have put them together and be reading them now. What a kill cuts off
            # here is what `finish` drops, and it goes on from there.
            if file.read() != text:
                file.truncate(0)
                file.write(text)
                file.flush()
            runner.mark_end(whole, folder, len(lines), began, len(whole.cases))
        return runner.finish(whole, folder, quiet=quiet)
    except runner.FolderBusy:
        console.print(f"{part.folder} is done; another share puts the result together")
        return None
