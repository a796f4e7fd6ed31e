"""Many benchmarks of one model from one config, and their report.

The config names the model, the data files, and the runs: each a benchmark with its data and the options
that differ from its defaults. Every run has a folder of its own and is taken up where it was stopped; a
run that is finished is only read.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from larimar_jax import bench, pipeline, schema
from larimar_jax.bench import report, runner, web_page
from larimar_jax.bench.task import Task

REPORT = "report"


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run. data: the name of its data file, "" for a benchmark without one. options: fields of its
    task. note: what the report says of it."""

    bench: str
    data: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """model: by name or path. data: files by name. runs: by the name of their folder. note: what the
    report begins with."""

    name: str
    model: str
    data: Mapping[str, str]
    runs: Mapping[str, PlannedRun]
    note: str = ""


def parse(values: Mapping[str, Any]) -> tuple[Reproduction, dict[str, Task]]:
    """Return the plan of a nested dict, and the task of every run.

    Raises:
        ConfigError: naming at once each unknown key, benchmark and option, and each data file that is
            missing.
    """
    problems: list[str] = []
    plan = schema.read(Reproduction, values, "", problems, {})
    tasks: dict[str, Task] = {}
    runs, files = values.get("runs"), values.get("data")
    known = {name: task for name, task in bench.tasks().items() if task.listed}
    for name, section in (runs if isinstance(runs, Mapping) else {}).items():
        planned = schema.read(PlannedRun, section, f"runs.{name}", [], {})
        if planned is None:  # its offences are those of the plan
            continue
        if planned.bench not in known:
            hint = schema.suggestion(planned.bench, known)
            problems.append(f"runs.{name}.bench: no benchmark {planned.bench!r}; {hint}")
            continue
        file = files.get(planned.data) if isinstance(files, Mapping) else None
        if planned.data and not file:
            problems.append(
                f"data.{planned.data}: runs.{name} needs this file; give it with "
                f"--set data.{planned.data}=FILE"
            )
        task = known[planned.bench]
        options = dict(planned.options)
        options |= {"data": file or "-"} if planned.data else {}
        options |= {"model": values.get("model")} if task.needs_model else {}
        tasks[name] = schema.read(task, options, f"runs.{name}.options", problems, {})
    schema.refuse(problems)
    return plan, tasks


def run(
    values: Mapping[str, Any], folder: str | Path, *, texts: bool = True, quiet: bool = False
) -> list[Path]:
    """Run all that is not finished, and write the report of all; return its files.

    Args:
        texts: with cases, which quote the data. quiet: no progress bars and tables.
    """
    plan, tasks = parse(values)
    folder, models = Path(folder), {}
    # The one that empties the caches of compiled programs comes last: the others share theirs.
    for name in sorted(tasks, key=lambda name: tasks[name].name == "speed"):
        task, model = tasks[name], None
        if task.needs_model:
            if task.overrides not in models:  # one at a time
                models = {task.overrides: pipeline.load(task.model, task.overrides)}
            model = models[task.overrides]
        runner.run(task, folder / name, editor=model, quiet=quiet)
    runs = [report.read(folder / name) for name in tasks]
    sections = report.sections(runs, texts, {name: plan.runs[name].note for name in tasks})
    head = [report.Section("About", [plan.note])] if plan.note else []
    return web_page.write([*head, *sections], folder / REPORT, f"{plan.name}: {plan.model}")
