"""A benchmark in several processes, each with its share of the cases: on one machine or on many.

Share I of N computes every Nth chunk, from the Ith on, in a folder of its own inside the run's. Chunks
are those of the whole run, so every case is scored in the same company. The share that is done last puts
all lines together, in the order of the cases, and the result is that of one process.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from larimar_jax.bench import runner


@dataclasses.dataclass(frozen=True)
class Share:
    """Share `index` of `count`, from 0."""

    index: int
    count: int

    @property
    def folder(self) -> str:
        return f"share-{self.index}-of-{self.count}"


def share(text: str) -> Share:
    """"`I/N` as a Share, for argparse.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no share: say I/N, such as 0/4 for the first of four processes and 3/4 for "
            "the last"
        )
    return Share(int(found[1]), int(found[2]))


@dataclasses.dataclass(frozen=True)
class _Part:
    """An experiment with a share of the cases of another."""

    name: str
    settings: Mapping[str, Any]
    cases: Sequence[Any]
    chunk: int
    run: Callable[[Sequence[Any]], list[runner.Record]]


def _part(experiment: runner.Experiment, one: Share) -> _Part:
    size = experiment.chunk
    starts = range(one.index * size, len(experiment.cases), one.count * size)
    cases = [case for start in starts for case in experiment.cases[start : start + size]]
    settings = {**experiment.settings, "share": [one.index, one.count]}
    return _Part(experiment.name, settings, cases, size, experiment.run)


def run(
    experiment: runner.Experiment, folder: str | Path, one: Share, *, quiet: bool = False
) -> dict[str, Any] | None:
    """Runs a share to its end, or takes it up; the summary of all where all shares are done, else None.

    Raises:
        DifferentSettings, BrokenRun: as `runner.run`, of any share. FolderBusy: of this share's folder.
    """
    folder, console = Path(folder), Console(stderr=True, quiet=quiet)
    runner.complete(_part(experiment, one), folder / one.folder, console)
    lines: list[bytes] = []
    parts, waiting = [], []
    # Every share looks for the others after its own end, so the last one finds them all.
    for index in range(one.count):
        other = Share(index, one.count)
        part = _part(experiment, other)
        parts.append(part)
        path = folder / other.folder / runner.CASES
        found = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if found:  # by another process, which may have been given something else
            runner.claim(path.parent / runner.SETTINGS, runner.settings_of(part), fresh=False)
        if len(found) > len(part.cases):
            raise runner.BrokenRun(
                f"{path} has {len(found)} lines, and there are {len(part.cases)} cases in this share: "
                "lines were added. Remove the share's folder and run it again."
            )
        if len(found) < len(part.cases) or not all(line.endswith(b"\n") for line in found):
            waiting.append(other.folder)
        lines += found
    if waiting:
        console.print(f"{one.folder} is done; the result comes when these are: {', '.join(waiting)}")
        return None
    order = {case.case_id: number for number, case in enumerate(experiment.cases)}
    places = [order[case.case_id] for part in parts for case in part.cases]
    whole = b"".join(line for _, line in sorted(zip(places, lines, strict=True)))
    try:
        with runner.only_writer(folder / runner.CASES) as file:
            fresh = os.fstat(file.fileno()).st_size == 0
            runner.claim(folder / runner.SETTINGS, runner.settings_of(experiment), fresh=fresh)
            file.seek(0)
            # Another share may have put them together and be reading them now. What a kill cuts off
            # here is what `run` drops, and it goes on from there.
            if file.read() != whole:
                file.truncate(0)
                file.write(whole)
        return runner.run(experiment, folder, quiet=quiet)
    except runner.FolderBusy:
        console.print(f"{one.folder} is done; another share puts the result together")
        return None
