"""What a session does with its file, without a model: `session_writer.py PATH NAME COUNT`."""

import sys

import numpy as np

from larimar_jax import session_file
from larimar_jax.session_file import Fact, FactRows, Journal, Ledger


def write(path, name, count):
    """Write facts NAME 0, NAME 1, … to a session's file, and print the number of each that is there."""
    file, ledger = Journal(path), Ledger("model", "fingerprint")
    file.begin(session_file.header(ledger))
    rows = FactRows(*np.random.default_rng(0).normal(size=(3, 1, 4096)).astype(np.float32))
    for number in range(count):
        with file.locked():
            ledger = session_file.read(file, ledger)
            fact = Fact(ledger.next_id, f"{name} {number}", "new")
            ledger = ledger.with_fact(fact, rows, 1.0, "")
            session_file.append(file, ledger.history[-1:], ledger.rows)
        print(number, flush=True)


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2], int(sys.argv[3]))
