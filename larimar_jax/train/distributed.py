"""Several processes as one run: which one this is, and how they end when one of them is lost."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

# Exit code of a process that asks to be run again: EX_TEMPFAIL of sysexits.h. The scripts in launch/
# look for it.
RETRY = 75

# Seconds. A peer that sends no heartbeat for so long is dead, and so is a coordinator that cannot be
# reached for so long at the start. A failing process waits so long for the others to end with it.
HEARTBEAT, START, LEAVE = 100, 300, 20

# What XLA leaves off on GPUs (jaxlib 0.10), by what it is for; flags of other platforms are ignored.
GPU_FLAGS = {
    # Collectives run while products do: ZeRO-3 gathers the next layer's parameters meanwhile.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    # Two layers of a scan have buffers of their own, so that neither waits for the other's.
    "xla_gpu_enable_while_loop_double_buffering": "true",
}

_OPTIONS = ("--coordinator", "--processes", "--process")
_LARIMAR = ("LARIMAR_COORDINATOR", "LARIMAR_PROCESSES", "LARIMAR_PROCESS")
_SLURM = ("LARIMAR_COORDINATOR", "SLURM_NTASKS", "SLURM_PROCID")


def set_gpu_flags(environment: MutableMapping[str, str]) -> None:
    """Add GPU_FLAGS to XLA_FLAGS, before JAX starts; a flag that is there already stays as it is."""
    flags = environment.get("XLA_FLAGS", "")
    new = [f"--{name}={value}" for name, value in GPU_FLAGS.items() if name not in flags]
    environment["XLA_FLAGS"] = " ".join([*flags.split(), *new])


class PlaceError(ValueError):
    """Settings that do not add up to this process' place among all."""


class ProcessPlace(NamedTuple):
    """coordinator: host:port where process 0 listens. count, index: of processes."""

    coordinator: str
    count: int
    index: int


def place(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    environment: Mapping[str, str],
) -> ProcessPlace | None:
    """Return which process this is, from arguments, LARIMAR_* or SLURM; None if it is the only one.

    SLURM provides the number of tasks and the index of this one; where process 0 listens has to be
    set as LARIMAR_COORDINATOR (launch/slurm.sbatch does).

    Raises:
        PlaceError: only a part of the three is set, or they are no numbers that fit.
    """
    values, names = [coordinator, count, index], _OPTIONS
    if values == [None] * 3:
        by_slurm = "SLURM_PROCID" in environment and not environment.keys() & set(_LARIMAR[1:])
        names = _SLURM if by_slurm and environment.get(_SLURM[0]) else _LARIMAR
        values = [environment.get(name) for name in names]
    missing = [name for name, value in zip(names, values, strict=True) if value in (None, "")]
    if len(missing) == len(names):
        tasks = environment.get("SLURM_NTASKS", "1")
        if "SLURM_PROCID" in environment and tasks != "1":
            raise PlaceError(
                f"this is one of SLURM's {tasks} tasks, and LARIMAR_COORDINATOR does not say where "
                "process 0 listens: each task would be a run of its own in one folder. Set it to "
                "HOST:PORT as launch/slurm.sbatch does, or run one task."
            )
        return None
    if missing:
        raise PlaceError(
            f"{', '.join(missing)}: missing. Several processes need all of {', '.join(names)}; one "
            "needs none of them."
        )
    try:
        result = ProcessPlace(str(values[0]), int(values[1]), int(values[2]))
    except ValueError as error:
        raise PlaceError(f"{names[1]} and {names[2]} are numbers, not {values[1:]}") from error
    if not 0 <= result.index < result.count:
        raise PlaceError(
            f"{names[2]} is {result.index} of {result.count}: processes are counted from 0"
        )
    if ":" not in result.coordinator:
        raise PlaceError(f"{names[0]} is {result.coordinator!r}; write it as host:port")
    return result if result.count > 1 else None


def initialise(
    where: ProcessPlace | None, *, heartbeat: int = HEARTBEAT, start: int = START
) -> None:
    """Join the other processes, before anything of JAX is used; with None there are none.

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
        # JAX itself aborts a process that is late, and without a message that helps.
        with Watchdog(start, late):
            jax.distributed.initialize(
                where.coordinator,
                where.count,
                where.index,
                # Under SLURM, JAX would give each task the one GPU of its index on the host.
                cluster_detection_method="deactivate",
                initialization_timeout=start + 60,
                heartbeat_timeout_seconds=heartbeat,
            )
    except RuntimeError as error:
        raise PlaceError(
            f"{who} could not start at {where.coordinator} ({' '.join(str(error).split())[:200]}). "
            "Does another program listen on that port? Take another one."
        ) from error


def leave(code: int) -> None:
    """End the process with `code` in LEAVE seconds at the latest: for one that is failing.

    At exit JAX waits for the other processes, and they wait for this one in a collective. Where all
    fail alike they meet, and each ends by itself with its own code.
    """
    timer = threading.Timer(LEAVE, os._exit, [code])
    timer.daemon = True
    timer.start()


def end(code: int) -> None:
    """Wait for the other processes to end, and end this one with `code` in LEAVE seconds after that.

    A process that is left to run out can hang while it tears down its collectives.
    """
    jax.distributed.shutdown()
    leave(code)


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yield `stopping(step)`: whether SIGTERM has come; never, outside the main thread."""
    if jax.process_count() > 1:
        # One process may receive it before the others, and all must stop after the same step: JAX's
        # coordination service catches the signal itself and agrees on a step.
        yield multihost_utils.reached_preemption_sync_point
        return
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield lambda step: stop.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


class Watchdog:
    """Ends the process when no ping has come for `seconds`; 0 seconds: never.

    A collective whose peer hangs never returns. As a context: `with Watchdog(900) as watchdog`, and
    `watchdog.ping()` after every step. The process ends with RETRY, after `message` and the stacks of
    all its threads on stderr.
    """

    def __init__(self, seconds: float, message: str | None = None):
        self._seconds, self._last, self._done = seconds, time.monotonic(), threading.Event()
        self._message = message or (
            f"no step for {seconds:g} s (train.stall). A peer or the storage hangs; this process ends, "
            "and asks to be run again."
        )

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self.ping()
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def ping(self, allow: float = 0.0) -> None:
        """Report a step as done; what comes next may take `allow` seconds more than a step."""
        self._last = time.monotonic() + allow

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._last > self._seconds:
                sys.stderr.write(f"larimar: {self._message} Where it waits:\n")
                sys.stderr.flush()
                faulthandler.dump_traceback(all_threads=True)
                # Not sys.exit: the hanging call holds the main thread, and would hold the exit too.
                os._exit(RETRY)
