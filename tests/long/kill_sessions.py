"""Writes to one session's file from many processes, with SIGKILL or without.

    python tests/long/kill_sessions.py --kills 100 --facts 50

First 8 processes and 8 threads write so many facts each to one file. Then writers of another file are
killed at random moments, one after the other. Prints what is there, and ends with an AssertionError
where an acknowledged fact is missing or out of order. Writers have no model (tests/session_writer.py):
about 2 s of CPU time a kill.
"""

import argparse
import concurrent.futures
import contextlib
import io
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import session_writer  # noqa: E402

from larimar_jax.session_file import Journal, Ledger, read  # noqa: E402


def start(path, name, count):
    """Start a process that writes facts NAME 0, NAME 1, …; it prints each number when it is there."""
    line = [sys.executable, str(TESTS / "session_writer.py"), str(path), name, str(count)]
    clean = os.environ | dict(PYTHONPATH=str(TESTS.parent), JAX_PLATFORMS="cpu")
    return subprocess.Popen(line, stdout=subprocess.PIPE, env=clean, text=True)


def require(path, least, most):
    """Raise AssertionError unless a file's facts are in order, and as many as each writer wrote."""
    ledger = read(Journal(path), Ledger("", ""))
    assert [*ledger.facts] == list(range(1, ledger.next_id))
    for name, count in least.items():
        prompts = [f.prompt for f in ledger.facts.values() if f.prompt.rpartition(" ")[0] == name]
        assert prompts == [f"{name} {number}" for number in range(len(prompts))], name
        assert count <= len(prompts) <= most[name], (name, count, len(prompts))
    return ledger


def writers(path, facts):
    """Let 8 processes and 8 threads write to one file."""
    processes = {
        f"process {number}": start(path, f"process {number}", facts) for number in range(8)
    }
    names = [f"thread {number}" for number in range(8)]
    quiet = contextlib.redirect_stdout(io.StringIO())
    with concurrent.futures.ThreadPoolExecutor(8) as pool, quiet:
        list(pool.map(lambda name: session_writer.write(path, name, facts), names))
    assert all(len(process.communicate()[0].split()) == facts for process in processes.values())
    counts = dict.fromkeys([*processes, *names], facts)
    ledger = require(path, counts, counts)
    print(
        f"{len(ledger.facts)} facts of 16 writers, {path.stat().st_size / 1e6:.1f} MB", flush=True
    )


def kills(path, number):
    """Kill so many writers, one at a time, each at a random moment after its first fact."""
    draw, least, torn = random.Random(0), {}, 0
    for kill in range(number):
        process = start(path, f"killed {kill}", 10**6)
        acknowledged = process.stdout.readline()
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        acknowledged += process.communicate()[0]
        # A number without its end was printed after the fact was there.
        least[f"killed {kill}"] = len(acknowledged.split())
        torn += not path.read_bytes().endswith(b"\n")
        require(path, least, {name: count + 1 for name, count in least.items()})
    print(
        f"{number} kills, {torn} in the middle of a line, {sum(least.values())} acknowledged facts there"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--facts", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        writers(Path(folder) / "writers.jsonl", arguments.facts)
        kills(Path(folder) / "killed.jsonl", arguments.kills)


if __name__ == "__main__":
    main()
