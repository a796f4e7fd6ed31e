"""Kills one run with SIGKILL at random moments, mostly while it saves, and restores it each time.

    python tests/long/kill_saves.py --kills 100

About 5 s a kill on two cores. Prints one line a kill, and at the end what the kills interrupted, how
many saves a kill lost at most (1: the one that was being written), and steps of work lost. Ends with
an AssertionError where a restore fails, is not bit for bit what was saved, or costs more.

The child trains nothing: the state of step n is a function of n, so that a restore can be checked bit
for bit. It is as asynchronous as a real run: the steps go on while a checkpoint is written.

The promise, of the last `save` that had returned before the kill, of step s, with saves every
`interval` steps: the restored step is s or s - interval, so that at most the checkpoint that was being
written is lost, and none that was whole. In steps of work: at most an interval since s, and one
interval more where s was still being written.
"""

import argparse
import collections
import dataclasses
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
WIDTH, ARRAYS = 96, 4


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill. Steps: the last one done, the last whose `save` had returned, the one restored."""

    reached: int
    saved: int
    restored: int
    moment: str  # starting, saving (a checkpoint was part-written), deleting an old one, or between
    whole: tuple[int, ...]  # the checkpoints that were left whole


class Child:
    """The run, as a process that reports on a pipe what it does."""

    def __init__(self, run: Path, interval: int, pause: float):
        line = [sys.executable, __file__, "--child", str(run)]
        line += ["--interval", str(interval), "--pause", str(pause)]
        clean = dict(JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), XLA_FLAGS="")
        self.restored: int | None = None
        self.reached = self.saved = self.saves = 0
        self._error = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            line, env=os.environ | clean, stdout=subprocess.PIPE, stderr=self._error, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            if not line.endswith("\n"):
                break  # Cut off by the kill: as if it had not been reported.
            what, step = line.split()
            if what == "restored":
                self.restored = self.reached = self.saved = int(step)
            elif what == "step":
                self.reached = int(step)
            elif what == "saved":
                self.saved, self.saves = int(step), self.saves + 1

    def until(self, ready, seconds: float = 120) -> None:
        """Wait for `ready()`; AssertionError where the child ends or hangs first."""
        end = time.monotonic() + seconds
        while not ready():
            if not self.alive() or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"the run ended or hangs by itself:\n{self.stderr()}")
            time.sleep(0.001)

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL; what it had reported by then has been read when this returns."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def stderr(self) -> str:
        self._error.seek(0)
        return self._error.read().decode(errors="replace")[-3000:]


def kills(run: Path, count: int, seed: int, interval: int, pause: float):
    """Kill one run `count` times at random moments; return them, each judged by the next start.

    AssertionError where a restore fails, is of another state than was saved, or costs more than
    is promised above.
    """
    draw, judged, pending = random.Random(seed), [], []
    period, startup = 0.3, 3.0  # seconds between saves, and of a start; measured as it goes
    while True:
        began = time.monotonic()
        child = Child(run, interval, pause)
        if pending and len(judged) + len(pending) < count and draw.random() < 0.1:
            # While it starts: Orbax tidies up, the restore reads.
            time.sleep(draw.uniform(0.3, 1.1) * startup)
            child.kill()
        else:
            child.until(lambda: child.restored is not None)  # noqa: B023
            startup = time.monotonic() - began
        if child.restored is not None:
            for kill in pending:
                kill = dataclasses.replace(kill, restored=child.restored)
                _judge(kill, interval, child.stderr())
                judged.append(kill)
                print(
                    f"{kill.moment:>8}: step {kill.reached} done, save of {kill.saved} had returned, "
                    f"went on from {kill.restored}",
                    flush=True,
                )
            pending = []
            if len(judged) == count:
                child.kill()
                return judged
        if child.alive():
            first, started = draw.randint(1, 3), time.monotonic()
            child.until(lambda: child.saves >= first)  # noqa: B023
            period = (period + (time.monotonic() - started) / first) / 2
            time.sleep(draw.uniform(0, period))
            child.kill()
        if child.restored is None:
            # It had done no step; the next start is judged by what the kill before this one left.
            pending.append(dataclasses.replace(pending[-1], moment="starting"))
        else:
            pending.append(Kill(child.reached, child.saved, -1, *_left(run)))


def _left(run: Path) -> tuple[str, tuple[int, ...]]:
    """(what the kill interrupted, the checkpoints that are whole), by what lies in the folder."""
    inside = list(run.iterdir())
    steps = sorted(int(folder.name) for folder in inside if folder.name.isdigit())
    # Each item has a file that is written last.
    items = {step: len(list((run / str(step)).glob("*/commit_success.txt"))) for step in steps}
    whole = tuple(step for step in steps if items[step] == 4)
    if any("tmp" in folder.name for folder in inside):
        return "saving", whole
    return "deleting" if len(whole) < len(steps) else "between", whole


def _judge(kill: Kill, interval: int, stderr: str) -> None:
    assert "DAMAGED" not in stderr, f"a kill left a damaged checkpoint: {kill}\n{stderr}"
    assert kill.saved - interval <= kill.restored, f"more than one save lost: {kill}"
    assert kill.restored == max(kill.whole, default=0), f"not the newest whole one: {kill}"


def child(run: str, interval: int, pause: float) -> None:
    """Resumes from the newest checkpoint, checks it, and saves every `interval` steps."""
    import grain
    import jax

    from larimar_jax.train.checkpoint import Checkpoints
    from larimar_jax.train.step import TrainState

    def report(what: str, step: int) -> None:
        os.write(1, f"{what} {step}\n".encode())

    def state(step: int) -> TrainState:
        draw = np.random.default_rng(step)
        names = ["memory/prior_memory", *(f"decoder/{i}/kernel" for i in range(ARRAYS))]
        params, moments = (
            {n: draw.normal(size=(WIDTH, WIDTH)).astype(np.float32) for n in names} for _ in "ab"
        )
        return TrainState(np.int32(step), params, moments, {}, np.float32(step))

    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    numbers = grain.MapDataset.range(1000).seed(1).shuffle().repeat().batch(4)
    batches = iter(numbers.to_iter_dataset())
    checkpoints = Checkpoints(run, 2, "reconstruction")
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), state(0))
    step, restored = 0, checkpoints.restore(like, batches)
    if restored is not None:
        step = int(restored[0].step)
        jax.tree.map(np.testing.assert_array_equal, restored[0], state(step))
        assert restored[1]["note"] == {"of": step}
        fresh = iter(numbers.to_iter_dataset())
        fresh.set_state(batches.get_state())
        np.testing.assert_array_equal(next(fresh), numbers[step])
    report("restored", step)
    while True:
        np.testing.assert_array_equal(next(batches), numbers[step])
        time.sleep(pause)
        step += 1
        report("step", step)
        if step % interval == 0:
            # Better and worse ones by turns, so that old ones stay and go in all orders.
            score = {"reconstruction": float(np.random.default_rng(step).normal())}
            placed = jax.device_put(state(step), where)
            checkpoints.save(step, placed, batches, {"note": {"of": step}}, score)
            report("saved", step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--interval", type=int, default=5, help="steps between saves")
    parser.add_argument("--pause", type=float, default=0.04, help="seconds that a step takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.interval, options.pause)
    settings, began = (options.seed, options.interval, options.pause), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        killed = kills(Path(folder) / "run", options.kills, *settings)
    minutes = (time.monotonic() - began) / 60
    moments = collections.Counter(kill.moment for kill in killed)
    saves = collections.Counter((k.saved - k.restored) // options.interval for k in killed)
    steps = [kill.reached - kill.restored for kill in killed]
    print(f"{len(killed)} kills of one run of {killed[-1].reached} steps in {minutes:.1f} minutes")
    print("interrupted: " + ", ".join(f"{name} {n}" for name, n in moments.most_common()))
    print("restored: all, bit for bit, each the newest whole checkpoint")
    print("saves lost: " + ", ".join(f"{lost} by {n} kills" for lost, n in sorted(saves.items())))
    print(f"steps of work lost: at most {max(steps)}, mean {sum(steps) / len(steps):.1f}")


if __name__ == "__main__":
    main()
