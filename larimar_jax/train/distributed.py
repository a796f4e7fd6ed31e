"""Several processes as one run: who they are, and how they end when one of them is lost."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax

# What a process ends with that wants to be run again: EX_TEMPFAIL of sysexits.h. The scripts in
# launch/ look for it.
RETRY = 75

# Seconds. A peer that does not beat for so long is dead, and so is a coordinator that cannot be
# reached for so long at the start. One that fails waits so long for the others to end with it.
HEARTBEAT, START, LEAVE = 100, 300, 20

_OURS = ("LARIMAR_COORDINATOR", "LARIMAR_PROCESSES", "LARIMAR_PROCESS")


class PlaceError(ValueError):
    """What says which process this is does not add up."""


class Place(NamedTuple):
    """coordinator: host:port where process 0 listens. count, index: of processes."""

    coordinator: str
    count: int
    index: int


def place(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    environment: Mapping[str, str],
) -> Place | None:
    """Which process this is: from arguments, LARIMAR_* or SLURM's variables; None if it is the only one.

    SLURM says how many tasks there are and which this is; where process 0 listens has to be said,
    as LARIMAR_COORDINATOR (launch/slurm.sbatch does).

    Raises:
        PlaceError: some of the three are said and not all, or they are no numbers that fit.
    """
    said = [coordinator, count, index]
    origin = ("--coordinator", "--processes", "--process")
    if all(value is None for value in said):
        said, origin = [environment.get(name) for name in _OURS], _OURS
        if said[0] and said[1] is None and said[2] is None and "SLURM_PROCID" in environment:
            slurm = ("SLURM_NTASKS", "SLURM_PROCID")
            said[1:], origin = [environment.get(name) for name in slurm], (_OURS[0], *slurm)
    if all(value in (None, "") for value in said):
        tasks = environment.get("SLURM_NTASKS", "1")
        if "SLURM_PROCID" in environment and tasks != "1":
            raise PlaceError(
                f"this is one of SLURM's {tasks} tasks, and LARIMAR_COORDINATOR does not say where "
                "process 0 listens: each task would be a run of its own in one folder. Set it to "
                "HOST:PORT as launch/slurm.sbatch does, or run one task."
            )
        return None
    missing = [name for name, value in zip(origin, said, strict=True) if value in (None, "")]
    if missing:
        raise PlaceError(
            f"{', '.join(missing)}: missing. Several processes need all of {', '.join(origin)}; one "
            "needs none of them."
        )
    try:
        found = Place(str(said[0]), int(said[1]), int(said[2]))
    except ValueError as error:
        raise PlaceError(f"{origin[1]} and {origin[2]} are numbers, not {said[1:]}") from error
    if not 0 <= found.index < found.count:
        raise PlaceError(
            f"{origin[2]} is {found.index} of {found.count}: processes are counted from 0"
        )
    if ":" not in found.coordinator:
        raise PlaceError(f"{origin[0]} is {found.coordinator!r}; write it as host:port")
    return found if found.count > 1 else None


def initialise(where: Place | None, *, heartbeat: int = HEARTBEAT, start: int = START) -> None:
    """Joins the other processes; with None there are none. Before anything of JAX is used.

    JAX's coordination service ends every process when one of them has not been heard of for
    `heartbeat` seconds. Where the others do not come within `start` seconds, this process ends with
    RETRY: they may when all are started again.

    Raises:
        PlaceError: process 0 cannot listen there.
    """
    if where is None:
        return
    who = f"process {where.index} of {where.count}"
    late = (
        f"{who} has not met all others at {where.coordinator} within {start} s. Are they all running, "
        "is process 0 on that host, is the port open between the hosts, and does every process have "
        "the same coordinator and count?"
    )
    try:
        # JAX itself aborts the process when it is late, and not with a word that helps.
        with Watchdog(start, late):
            jax.distributed.initialize(
                where.coordinator,
                where.count,
                where.index,
                initialization_timeout=start + 60,
                heartbeat_timeout_seconds=heartbeat,
            )
    except RuntimeError as error:
        raise PlaceError(
            f"{who} could not start at {where.coordinator} ({' '.join(str(error).split())[:200]}). "
            "Does another program listen on that port? Take another one."
        ) from error


def leave(code: int) -> None:
    """Ends the process with `code` in LEAVE seconds at the latest: for one that is failing.

    At exit JAX waits for the other processes, and they wait for this one in a collective. Where all
    fail alike they meet, and each ends by itself with its own code.
    """
    ending = threading.Timer(LEAVE, os._exit, [code])
    ending.daemon = True
    ending.start()


def end(code: int) -> None:
    """Waits for the other processes to end, and ends this one with `code` in LEAVE seconds after that.

    Where a process is let run out by itself, tearing down its collectives has once been seen to hang.
    """
    jax.distributed.shutdown()
    leave(code)


class Watchdog:
    """Ends the process when no beat has come for `seconds`; a collective whose peer hangs never returns.

    As a context: `with Watchdog(900) as dog`, and `dog.beat()` after every step. 0 seconds: never.
    The process ends with RETRY, after `said` and the stacks of all its threads on stderr.
    """

    def __init__(self, seconds: float, said: str | None = None):
        self._seconds, self._beaten, self._done = seconds, time.monotonic(), threading.Event()
        self._said = said or (
            f"no step for {seconds:g} s (train.stall). A peer or the storage hangs; this process ends, "
            "and asks to be run again."
        )

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self.beat()
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def beat(self, allow: float = 0.0) -> None:
        """A step is done; what comes next may take `allow` seconds more than a step."""
        self._beaten = time.monotonic() + allow

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._beaten > self._seconds:
                sys.stderr.write(f"larimar: {self._said} Where it waits:\n")
                sys.stderr.flush()
                faulthandler.dump_traceback(all_threads=True)
                # Not sys.exit: what hangs holds the main thread, and would hold the exit too.
                os._exit(RETRY)
