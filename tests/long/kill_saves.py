"""Kills one run with SIGKILL at random moments, mostly while it saves, and restores it each time.

    python tests/long/kill_saves.py --kills 100

About 5 s a kill on two cores. Prints one line a kill, and at the end what the kills interrupted, how
many saves a kill lost at most (1: the one that was being written), and steps of work lost. Ends with
an AssertionError where a restore fails, is not bit for bit what was saved, or costs more.
"""

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import kills  # noqa: E402


def show(kill: kills.Kill) -> None:
    print(
        f"{kill.moment:>8}: step {kill.reached} done, save of {kill.saved} had returned, "
        f"went on from {kill.restored}",
        flush=True,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--interval", type=int, default=5, help="steps between saves")
    options.add_argument("--pause", type=float, default=0.04, help="seconds that a step takes")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    settings = (arguments.kills, arguments.seed, arguments.interval, arguments.pause)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        killed = kills.kills(Path(folder) / "run", *settings, show)
    minutes = (time.monotonic() - began) / 60
    moments = collections.Counter(kill.moment for kill in killed)
    saves = collections.Counter((k.saved - k.restored) // arguments.interval for k in killed)
    steps = [kill.reached - kill.restored for kill in killed]
    print(f"{len(killed)} kills of one run of {killed[-1].reached} steps in {minutes:.1f} minutes")
    print("interrupted: " + ", ".join(f"{name} {n}" for name, n in moments.most_common()))
    print("restored: all, bit for bit, each the newest whole checkpoint")
    print("saves lost: " + ", ".join(f"{lost} by {n} kills" for lost, n in sorted(saves.items())))
    print(f"steps of work lost: at most {max(steps)}, mean {sum(steps) / len(steps):.1f}")


if __name__ == "__main__":
    main()
