"""Kills one run with SIGKILL at random moments, most of them while it saves, and restores it each time.

    python tests/long/kill_saves.py --kills 100

About 5 s a kill on two cores: 100 kills take 6 to 8 minutes. Prints one line a kill, and at the end what
the kills interrupted, how many checkpoints that were whole were lost (0), how many saves a kill lost
at most (1: the one that was being written), and steps of work lost. Ends with an AssertionError where a
restore fails, is not bit for bit what was saved, or costs more.
"""

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import kills  # noqa: E402


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--interval", type=int, default=5, help="steps between saves")
    options.add_argument("--pause", type=float, default=0.04, help="seconds that a step takes")
    options.add_argument("--seed", type=int, default=0)
    said = options.parse_args()
    begun = time.monotonic()

    def say(kill: kills.Kill) -> None:
        print(
            f"{kill.moment:>8}: step {kill.reached} done, save of {kill.saved} had returned, "
            f"went on from {kill.restored}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        found = kills.kills(
            Path(folder) / "run", said.kills, said.seed, said.interval, said.pause, say
        )
    minutes = (time.monotonic() - begun) / 60
    moments = collections.Counter(kill.moment for kill in found)
    saves = collections.Counter((kill.saved - kill.restored) // said.interval for kill in found)
    steps = [kill.reached - kill.restored for kill in found]
    over = sum(lost > said.interval for lost in steps)
    print(f"{len(found)} kills of one run of {found[-1].reached} steps in {minutes:.1f} minutes")
    print("interrupted: " + ", ".join(f"{name} {n}" for name, n in moments.most_common()))
    print(f"restored: {len(found)} of {len(found)}, bit for bit, each the newest whole checkpoint")
    print("saves lost: " + ", ".join(f"{n} by {kills} kills" for n, kills in sorted(saves.items())))
    print(
        f"steps of work lost, at a save every {said.interval}: at most {max(steps)}, "
        f"mean {sum(steps) / len(steps):.1f}; more than one interval in {over} kills"
    )


if __name__ == "__main__":
    main()
