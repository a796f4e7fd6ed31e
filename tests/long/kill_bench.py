"""Kills a benchmark at random moments until it is through, and compares it with one that was not killed.

    python tests/long/kill_bench.py --kills 10 --out runs/kills -- counterfact --data FILE --limit 60

What follows the dashes goes to `larimar bench`. Both runs are made under --out; the lines of cases.jsonl
have to be the same, byte for byte. 2 cores, 60 cases: about 5 minutes.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path


def command(bench, out):
    return [sys.executable, "-m", "larimar_jax.cli", "bench", *bench, "--out", str(out)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("bench", nargs="+")
    told = parser.parse_args()
    whole, killed = told.out / "whole", told.out / "killed"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begin = time.monotonic()
    subprocess.run(command(told.bench, whole), check=True, **quiet)
    taken = time.monotonic() - begin
    wanted = (whole / "cases.jsonl").read_bytes()
    draw, done = random.Random(told.seed), 0
    while done < told.kills:
        process = subprocess.Popen(command(told.bench, killed), **quiet)
        try:
            process.wait(draw.uniform(0.1, 1.0) * taken)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            path = killed / "cases.jsonl"
            lines = path.read_bytes().count(b"\n") if path.exists() else 0
            print(
                f"kill {done}: {lines} of {wanted.count(bytes([10]))} lines are there", flush=True
            )
        else:
            assert process.returncode == 0, f"exit code {process.returncode}"
            assert (killed / "cases.jsonl").read_bytes() == wanted, "the lines differ"
            print("through before it was killed, with the same lines: begun again", flush=True)
            for path in killed.iterdir():
                path.unlink()
    subprocess.run(command(told.bench, killed), check=True, **quiet)
    assert (killed / "cases.jsonl").read_bytes() == wanted, "the lines differ"
    print(f"{told.kills} kills, and every line is the same")


if __name__ == "__main__":
    main()
