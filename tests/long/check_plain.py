"""Compares CounterFact and ZsRE, as `larimar bench` measures them, with a plain loop in float64.

    python tests/long/check_plain.py --counterfact FILE --zsre FILE --cases 50

Both modes; the benchmarks run in the file's order and shuffled in chunks of another size. S and M of
every case, the tables of all cases, and accuracies have to agree to 1e-5. ℓ in nats, which they are made
of, is shown too: float32 leaves 1e-5 to 2e-5 of it after thirty layers, whoever adds up in what order.
2 cores, 50 cases: about 20 minutes.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from plain import SYSTEMS, Plain, scores  # noqa: E402

from larimar_jax.bench import counterfact, zsre  # noqa: E402
from larimar_jax.bench.editor import LarimarEditor  # noqa: E402
from larimar_jax.data import edit_records  # noqa: E402
from larimar_jax.pipeline import load  # noqa: E402

TOLERANCE = 1e-5


def run(made, cases, chunk):
    """The records of a benchmark, in chunks, by case."""
    parts = [made.run(cases[start : start + chunk]) for start in range(0, len(cases), chunk)]
    return {record["case_id"]: record for part in parts for record in part}


def apart(found, wanted):
    """The largest difference of two tables {system: {kind: numbers}}, relative above 1."""
    most = 0.0
    for system in SYSTEMS:
        for kind, numbers in wanted[system].items():
            a, b = np.float64(found[system][kind]), np.float64(numbers)
            if b.size:
                most = max(most, float(np.max(np.abs(a - b) / np.maximum(1.0, np.abs(b)))))
    return most


def of_cases(table):
    """S and M of a case, from its ℓ: {system: {kind: numbers}}."""
    found = {}
    for system in SYSTEMS:
        own = scores([table], system)
        found[system] = {
            kind: [value / 100 for value in own[kind].values()]
            for kind, pairs in table[system].items()
            if pairs
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counterfact", required=True)
    parser.add_argument("--zsre", required=True)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--model", default="smol")
    told = parser.parse_args()
    model = load(told.model)
    plain, editor, worst = Plain(model), LarimarEditor(model), 0.0
    for name, bench, data, field in (
        ("counterfact", counterfact.CounterFact, edit_records.load, "loss"),
        ("zsre", zsre.ZsRE, edit_records.load, "accuracy"),
    ):
        cases = data(getattr(told, name), told.cases)
        shuffled = random.Random(0).sample(cases, len(cases))
        for mode in ("rome", "released"):
            wanted = {case.case_id: getattr(plain, name)(case, mode) for case in cases}
            for order, chunk in ((cases, 25), (shuffled, 7)):
                found = run(bench(editor, order, data={}, chunk=chunk, mode=mode), order, chunk)
                values = max(apart(found[case][field], wanted[case]) for case in wanted)
                cases_apart, tables = values, 0.0
                if name == "counterfact":
                    made = {case: of_cases(found[case][field]) for case in wanted}
                    cases_apart = max(apart(made[c], of_cases(wanted[c])) for c in wanted)
                    results = counterfact.summarise([found[case] for case in wanted])
                    for system in SYSTEMS:
                        own = scores(list(wanted.values()), system)
                        pairs = [(results[system]["score"]["mean"], own["score"])]
                        for kind in ("edit", "paraphrase", "neighbourhood"):
                            pairs += [
                                (results[system][kind][n]["mean"], own[kind][n]) for n in ("S", "M")
                            ]
                        tables = max(tables, *(abs(a - b) / 100 for a, b in pairs))
                print(
                    f"{name}, {mode}, chunks of {chunk}: {field} {values:.1e}, cases {cases_apart:.1e}, "
                    f"tables {tables:.1e}",
                    flush=True,
                )
                worst = max(worst, cases_apart, tables)
    assert worst <= TOLERANCE, f"they differ by {worst:.1e}"
    print(f"{told.cases} cases, and nothing differs by more than {worst:.1e}")


if __name__ == "__main__":
    main()
