"""Compare CounterFact and ZsRE, as `larimar bench` measures them, with a plain loop in float64.

    python tests/long/check_plain.py --counterfact FILE --zsre FILE --cases 50

Both modes, in chunks of two sizes. S, M and accuracy of every row have to agree to 1e-5. ℓ in nats, of
which S and M are made, is shown too: float32 leaves 1e-5 to 2e-5 of it after thirty layers, in whatever
order sums are taken. 2 cores, 50 cases: about 20 minutes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from known_editor import rows  # noqa: E402
from plain import Plain  # noqa: E402

from larimar_jax.bench.counterfact import CounterFact  # noqa: E402
from larimar_jax.bench.metrics import magnitude, success  # noqa: E402
from larimar_jax.bench.zsre import ZsRE  # noqa: E402
from larimar_jax.pipeline import load  # noqa: E402

TOLERANCE = 1e-5


def differences(row, wanted):
    """{what: the difference to the plain loop, relative above 1}."""
    value = wanted[row["system"]]
    if "accuracy" in row:
        return {"accuracy": abs(row["accuracy"] - value)}
    losses = zip((row["loss_new"], row["loss_true"]), value, strict=True)
    return {
        "loss": max(abs(a - b) / max(1.0, abs(b)) for a, b in losses),
        "S": abs(row["S"] - success(row["kind"], *value)),
        "M": abs(row["M"] - magnitude(row["kind"], *value)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counterfact", required=True)
    parser.add_argument("--zsre", required=True)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--model", default="smol")
    options = parser.parse_args()
    model, worst = load(options.model), 0.0
    plain = Plain(model)
    for kind, data in ((CounterFact, options.counterfact), (ZsRE, options.zsre)):
        for mode in ("rome", "released"):
            known, apart = {}, {}
            for chunk in (25, 7):
                task = kind(data=data, limit=options.cases, mode=mode, chunk=chunk)
                facts = {r.case_id: (r.prompt, r.target_new) for r in task.records}
                for row in rows(task, model):
                    fact, prompt = facts[row["case"]], row["prompt"]
                    key = (row["case"], row["kind"], prompt)
                    if key not in known and kind is CounterFact:
                        pair = (row["new"], row["true"])
                        known[key] = plain.counterfact(row["kind"], prompt, pair, fact, mode)
                    elif key not in known:
                        known[key] = plain.zsre(prompt, row["target"], fact, mode)
                    for name, value in differences(row, known[key]).items():
                        apart[name] = max(apart.get(name, 0.0), value)
            print(
                f"{kind.name}, {mode}:", {name: f"{v:.1e}" for name, v in apart.items()}, flush=True
            )
            worst = max(worst, *(value for name, value in apart.items() if name != "loss"))
    assert worst <= TOLERANCE, f"they differ by {worst:.1e}"
    print(f"{options.cases} cases, and nothing differs by more than {worst:.1e}")


if __name__ == "__main__":
    main()
