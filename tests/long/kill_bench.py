"""Kills a benchmark at random moments until it is through, and compares it with one that was not killed.

    python tests/long/kill_bench.py --kills 10 --out runs/kills -- counterfact --data FILE --limit 60

What follows the dashes goes to `larimar bench`. Both runs are made under --out; the lines of rows.jsonl
have to be the same, byte for byte. 2 cores, 60 cases: about 5 minutes.
"""

import argparse
import random
import shutil
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
    options = parser.parse_args()
    whole, killed = options.out / "whole", options.out / "killed"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begin = time.monotonic()
    subprocess.run(command(options.bench, whole), check=True, **quiet)
    taken = time.monotonic() - begin
    wanted = (whole / "rows.jsonl").read_bytes()
    draw, done = random.Random(options.seed), 0
    while done < options.kills:
        process = subprocess.Popen(command(options.bench, killed), **quiet)
        try:
            process.wait(draw.uniform(0.1, 1.0) * taken)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            chunks = len(list((killed / "chunks").glob("*.jsonl")))
            print(f"kill {done}: {chunks} chunks are there", flush=True)
        else:
            assert process.returncode == 0, f"exit code {process.returncode}"
            assert (killed / "rows.jsonl").read_bytes() == wanted, "the lines differ"
            print("through before it was killed, with the same lines: begun again", flush=True)
            shutil.rmtree(killed)
    subprocess.run(command(options.bench, killed), check=True, **quiet)
    assert (killed / "rows.jsonl").read_bytes() == wanted, "the lines differ"
    print(f"{options.kills} kills, and every line is the same")


if __name__ == "__main__":
    main()
