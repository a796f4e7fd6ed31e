"""`larimar train`, `plan`, `sweep`, `report`, `reproduce`: runs, their cost, what came of them.

Everything heavy is imported inside its command, as in cli.py.
"""

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from larimar_jax import options

PACKAGE = Path(__file__).resolve().parent
# What a runtime's message begins with where a peer may be lost.
_STATUS = "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|INTERNAL|UNKNOWN"
# A device's peak and its link, of an A100: dense bfloat16 and NVLink 3, one direction (data sheet).
A100_FLOPS, A100_LINK = 312e12, 300e9


def _run(made: argparse.ArgumentParser) -> None:
    made.add_argument("--config", required=True, metavar="FILE", help="a file with get_config()")
    options.overrides(made, "settings that differ from the file, such as train.steps=200")


def train_options(made: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """The options of `larimar train`."""
    made.description = (
        "Trains a model, or goes on with a run that was stopped. SIGTERM saves and ends with exit "
        "code 75, which asks to be run again; so does a run whose peers have died. Several processes, "
        "on one host or on many, are one run: each is given the same command and its place."
    )
    _run(made)
    made.add_argument("--run", required=True, metavar="DIR", help="folder of the run, seen by all")
    made.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 listens; without it, what LARIMAR_COORDINATOR, LARIMAR_PROCESSES and "
        "LARIMAR_PROCESS say, or SLURM; else one process",
    )
    made.add_argument("--processes", type=int, metavar="N", help="how many there are")
    made.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    made.set_defaults(command=train)


def train(arguments: argparse.Namespace) -> int:
    """larimar train"""
    from larimar_jax import config
    from larimar_jax.train import distributed

    place = (arguments.coordinator, arguments.processes, arguments.process)
    where = distributed.place(*place, os.environ)
    # Before the others are met, who would wait for one that has no config.
    parsed = config.load(arguments.config, arguments.overrides)
    distributed.initialise(where)
    if where is None:
        # While there are no steps to finish: of what is done before them, nothing has to be saved.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(distributed.RETRY))
    from larimar_jax.train import loop

    return outcome(lambda: loop.train(parsed, arguments.run))


def outcome(run: Callable[[], Any]) -> int:
    """The exit code of a run: 0 when it is finished, 75 when it is to be run again.

    That is after SIGTERM, and where a peer was lost: the collective that waits for it fails then, and
    nothing here can be waited for any more, not even at exit. Where this process alone fails, it ends
    with 1 and does not wait for the others either.
    """
    import jax

    from larimar_jax.train import distributed

    try:
        code = 0 if run().finished else distributed.RETRY
        if jax.process_count() > 1:
            distributed.end(code)
        return code
    except Exception as error:
        # What a connection that breaks is reported as; any other error would come again.
        lost = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "NCCL", "Connection")
        if jax.process_count() == 1:
            raise
        # Where a program is called the quick way, a runtime's status comes as a ValueError.
        status = re.match(rf"({_STATUS}): ", str(error)) is not None
        of_jax = isinstance(error, jax.errors.JaxRuntimeError) or type(error) is ValueError and status
        if not (of_jax and any(word in str(error) for word in lost)):
            distributed.leave(1)
            raise
        said = " ".join(str(error).split())[:300]
        print(f"larimar: a peer was lost ({said}); this asks to be run again", file=sys.stderr)
        sys.stderr.flush()
        os._exit(distributed.RETRY)


def plan_options(made: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """The options of `larimar plan`."""
    made.description = (
        "Compiles the real training step for devices that need not be there, and says what each would "
        "hold, send and compute. Weights are not needed where the config gives the towers' sizes."
    )
    _run(made)
    made.add_argument("--devices", type=_count, required=True, metavar="N", help="how many")
    made.add_argument("--memory", default="80GB", metavar="SIZE", help="of each (%(default)s)")
    made.add_argument(
        "--flops",
        type=_rate,
        default=A100_FLOPS,
        metavar="RATE",
        help="FLOP/s that a device reaches (%(default).3g, the peak of an A100 in bfloat16: take what "
        "yours reaches)",
    )
    made.add_argument(
        "--link",
        type=_rate,
        default=A100_LINK,
        metavar="RATE",
        help="bytes/s that a device sends (%(default).3g, NVLink 3)",
    )
    made.add_argument("--json", action="store_true", help="numbers for a program")
    made.set_defaults(command=plan)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def plan(arguments: argparse.Namespace) -> int:
    """larimar plan; exit code 1 where it does not fit."""
    # Before JAX starts: it makes as many devices as it is told then.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={arguments.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    from larimar_jax.train import plan as plans

    memory = plans.parse(arguments.memory)
    config = plans.load(arguments.config, arguments.overrides, arguments.devices)
    print("compiling the step", file=sys.stderr)
    found = plans.plan(config)
    if arguments.json:
        print(json.dumps(plans.numbers(found, memory, arguments.flops, arguments.link), indent=1))
    else:
        print(plans.show(found, memory, arguments.flops, arguments.link))
    if found.fits(memory):
        return 0
    least, best = found.total, "the config as it is"
    for what, changed in plans.changes(config):
        line = " ".join(f"{key}={value}" for key, value in what.items())
        print(f"compiling with {line}", file=sys.stderr)
        found = plans.plan(changed)
        if found.fits(memory):
            print(f"\nit fits ({found.total / 1e9:.2f} GB) with\n  --set {line}")
            return 1
        if found.total < least:
            least, best = found.total, f"--set {line}"
    print(
        f"\nnothing makes it fit ({least / 1e9:.2f} GB at the least, with {best}). Take more "
        "devices, a smaller data.batch, or train less of it (train.frozen, model.lora)."
    )
    return 1


def sweep_options(made: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """The options of `larimar sweep`."""
    made.description = (
        "Measures every memory of a config's grid: each variant is compiled once for a shape, and all "
        "its cells run in that program. Writes cases.jsonl, summary.json and pictures."
    )
    _run(made)
    made.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the run; resumed if it exists"
    )
    made.set_defaults(command=sweep)


def sweep(arguments: argparse.Namespace) -> int:
    """larimar sweep"""
    from larimar_jax import config, schema
    from larimar_jax.bench import pictures, runner
    from larimar_jax.bench import sweep as sweeps

    values = schema.override(config.load_dict(arguments.config), arguments.overrides)
    runner.run(sweeps.Sweep(sweeps.parse(values)), arguments.out)
    for path in pictures.draw(runner.read_cases(arguments.out), arguments.out):
        print(f"drawn: {path}", file=sys.stderr)
    return 0


def report_options(made: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """The options of `larimar report`."""
    made.description = (
        "Makes report.md and report.html of finished benchmark runs: tables beside the paper's numbers, "
        "pictures, the worst and best cases with their texts. Where two runs are of one benchmark, each "
        "later one is compared with the first, case by case, and what differs by more than chance is "
        "marked. The page needs nothing beside it."
    )
    about = "folders of runs that have ended, or folders of such folders"
    made.add_argument("folders", nargs="+", metavar="RUN", help=about)
    made.add_argument("--out", required=True, metavar="DIR", help="where the two files go")
    made.add_argument("--title", default="Larimar: results", help="(%(default)s)")
    made.add_argument(
        "--no-texts",
        dest="texts",
        action="store_false",
        help="leave out cases with their texts, which are the benchmark's data",
    )
    made.set_defaults(command=report)


def report(arguments: argparse.Namespace) -> int:
    """larimar report"""
    from larimar_jax.bench import report as reports
    from larimar_jax.bench import web_page

    runs = [reports.read(run) for given in arguments.folders for run in reports.inside(given)]
    shown = reports.sections(runs, arguments.texts)
    for path in web_page.write(shown, arguments.out, arguments.title):
        print(f"written: {path}", file=sys.stderr)
    return 0


def reproduce_options(made: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """The options of `larimar reproduce`."""
    made.description = (
        "Runs every benchmark that a config names for one model, each in a folder of its own, and makes "
        "the report of all. What is finished is not run again."
    )
    _run(made)
    made.add_argument("--out", required=True, metavar="DIR", help="the folders, and the report")
    made.set_defaults(command=reproduce)


def reproduce(arguments: argparse.Namespace) -> int:
    """larimar reproduce"""
    from larimar_jax import config, schema
    from larimar_jax.bench import reproduce as reproduces

    values = schema.override(config.load_dict(arguments.config), arguments.overrides)
    for path in reproduces.run(reproduces.parse(values), arguments.out):
        print(f"written: {path}", file=sys.stderr)
    return 0


# name: (what it does, an example, its options), for cli.py.
COMMANDS = {
    "train": (
        "train a model, or go on with a run that was stopped",
        "larimar train --config=configs/tiny.py --run runs/tiny --set train.steps=200",
        train_options,
    ),
    "plan": (
        "say whether a run will fit its devices, and how long it will take",
        "larimar plan --config=configs/larimar_6b.py --devices 8 --memory 80GB",
        plan_options,
    ),
    "sweep": (
        "measure every memory over a grid of settings, sizes and noise",
        "larimar sweep --config=configs/sweep_memory.py --out runs/sweep",
        sweep_options,
    ),
    "report": (
        "make a report of finished benchmark runs, and compare them",
        "larimar report runs/counterfact runs/batch --out runs/report",
        report_options,
    ),
    "reproduce": (
        "run all the benchmarks of a config, and make their report",
        "larimar reproduce --config=configs/bench_paper.py --out runs/paper "
        "--set data.counterfact=FILE data.zsre=FILE",
        reproduce_options,
    ),
}
