"""Many benchmarks of one model from one config, and their report.

The config says the model, the data files by name, and the runs: each a benchmark with the name of its
data and the options of its command line. Every run has a folder of its own and is taken up where it
was stopped; a run that is finished is only read.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from larimar_jax import bench, schema
from larimar_jax.bench import report, runner, systems, web_page

REPORT = "report"


@dataclasses.dataclass(frozen=True)
class One:
    """A run. bench: its benchmark. data: the name of its data file, "" for a benchmark without one.
    options: of its command line, without the dashes; a list for several values, True for an option
    without one."""

    bench: str
    data: str
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """model: by name or path. data: files by name. runs: by the name of their folder."""

    name: str
    model: str
    data: Mapping[str, str]
    runs: Mapping[str, One]


def parse(values: Mapping[str, Any]) -> Plan:
    """A plan from its nested dict.

    Raises:
        ConfigError: naming at once each unknown key, benchmark and option, and each data file that is
            not given.
    """
    problems: list[str] = []
    plan = schema.read(Plan, values, "", problems, {})
    runs, data = values.get("runs"), values.get("data")
    for name, each in (runs if isinstance(runs, Mapping) else {}).items():
        one = schema.read(One, each, f"runs.{name}", problems, {})
        if one is None:
            continue
        if one.bench not in bench.benchmarks():
            known = ", ".join(bench.benchmarks())
            problems.append(f"runs.{name}.bench: no benchmark {one.bench!r}; known: {known}")
            continue
        if one.data and not data.get(one.data):
            problems.append(
                f"data.{one.data}: runs.{name} needs this file; give it with --set data.{one.data}=FILE"
            )
        try:
            _arguments(one, "model", "file")
        except ValueError as error:
            problems.append(f"runs.{name}.options: {error}")
    schema.refuse(problems)
    return plan


def run(plan: Plan, folder: str | Path, *, quiet: bool = False) -> list[Path]:
    """Runs all that is not finished, and writes the report of all; returns its files."""
    loaded: tuple[Any, Any] = (None, None)
    # What empties the caches of compiled programs comes last: the others share theirs.
    order = sorted(plan.runs, key=lambda name: plan.runs[name].bench == "speed")
    for name in order:
        one = plan.runs[name]
        arguments = _arguments(one, plan.model, plan.data.get(one.data, ""))
        if "overrides" in arguments:
            if loaded[1] is None or loaded[0] != arguments.overrides:
                loaded = arguments.overrides, systems.model(arguments)
            arguments.loaded = loaded[1]
        experiment = bench.benchmark(one.bench).experiment(arguments)
        runner.run(experiment, Path(folder) / name, quiet=quiet)
    runs = [report.read(Path(folder) / name) for name in plan.runs]
    return web_page.write(report.sections(runs), Path(folder) / REPORT, f"{plan.name}: {plan.model}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _arguments(one: One, model: str, data: str) -> argparse.Namespace:
    """The command line of a run, parsed by its benchmark.

    Raises:
        ValueError: an option that the benchmark does not have, or a value that it does not take.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    bench.benchmark(one.bench).arguments(parser)
    known = {action.dest for action in parser._actions}
    told = {**one.options, **({"data": data} if one.data else {})}
    told |= {"model": model} if "model" in known else {}
    words = []
    for name, value in told.items():
        values = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, bool):  # an option without a value
            values = []
        if value is not False:
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return parser.parse_args(words)
