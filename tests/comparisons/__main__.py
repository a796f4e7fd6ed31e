"""The command of all comparisons: `python -m tests.comparisons [training|generation|scoring|all]`."""

import argparse
import importlib.util
import sys

from rich.console import Console

from larimar_jax import config as configs

from . import generation, scoring, timing, training

NAMES = ("training", "generation", "scoring")


def main(argv: list[str] | None = None) -> int:
    """Run what the command line names and print a table of ratios; return 2 where torch is missing."""
    parser = argparse.ArgumentParser("python -m tests.comparisons", description=__doc__)
    parser.add_argument("which", nargs="?", default="all", choices=[*NAMES, "all"])
    parser.add_argument("--repeats", type=int, default=5, help="timings of each side (%(default)s)")
    parser.add_argument("--config", default=training.CONFIG, help="the training step (%(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--decoder", default="smollm2", help="that generates (%(default)s)")
    parser.add_argument("--model", default="smol", help="that scores (%(default)s)")
    parser.add_argument(
        "--data", help="CounterFact's JSON file (default: facts of the world's cities)"
    )
    parser.add_argument("--cases", type=int, default=3, help="that are scored (%(default)s)")
    options = parser.parse_args(argv)
    chosen = NAMES if options.which == "all" else (options.which,)
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing and chosen != ("scoring",):
        needs = f"this needs {' and '.join(missing)}: pip install -e '.[compare]'"
        print(f"{needs}; the comparison `scoring` does not", file=sys.stderr)
        return 2
    ratios: list[timing.Ratio] = []
    if "training" in chosen:
        ratios += training.compare(configs.load(options.config, options.set), options.repeats)
    if "generation" in chosen:
        ratios += generation.compare(options.decoder, options.repeats)
    if "scoring" in chosen:
        ratios += scoring.compare(options.model, options.data, options.cases, options.repeats)
    Console().print(timing.table(ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
