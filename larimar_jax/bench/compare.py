"""Train variants of one config, several seeds of each side by side, and judge what each does to editing.

    OUT/VARIANT/      a run of the task below (runner.py): settings.json, config.json, checkpoints/,
                      rows.jsonl, summary.json
    OUT/              rows.jsonl and summary.json of all, report.md, report.html, compare.png

A variant is a list of settings that differ from the config, by default another memory. All train on the
same text, tokenised once, with the same budget. A case is a seed, so that ± is the standard error over
seeds. A variant that is finished is not trained again, and one that was stopped goes on from its last
checkpoint; variants may be added to a folder.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import runpy
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
from rich.console import Console

from larimar_jax import config as configs
from larimar_jax import memory, model, schema
from larimar_jax.bench import figures, memory_edits, report, runner, tables, web_page
from larimar_jax.bench import summary as summaries
from larimar_jax.bench.task import Metric, Pivot, Plot, Task, option
from larimar_jax.config import Config
from larimar_jax.data import edit_records, pieces
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.train import ensemble, loop, sharding
from larimar_jax.train.evaluate import Evaluator
from larimar_jax.train.logging import environment, say
from larimar_jax.train.step import TrainState, TrainStep
from larimar_jax.weights.model_file import replace_file

# What decodes a held-out text: terms of an evaluation, by their kind.
_ROUTES = {"through": "reconstruction", "bypassed": "autoencoding", "zero": "language"}
_KINDS = ("edit", "paraphrase", "hard", "neighbourhood", "before", "forgotten", "others", "stream")


class UnknownVariants(ValueError):
    """A list of variants that is no list of variants."""


class Inputs(NamedTuple):
    """What a variant is trained and judged on. tokenizers: (encoder's, decoder's)."""

    tokenizers: tuple[Any, Any]
    training: pieces.TokenizedPieces
    held_out: pieces.TokenizedPieces
    records: Sequence[EditRecord]
    hard: Sequence[EditRecord]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Task):
    """One variant of a comparison: its seeds are trained side by side, and judged by editing."""

    metrics: ClassVar = {
        "S": Metric("S"),
        "M": Metric("M"),
        "greedy": Metric("greedy"),
        "nats": Metric("nats per token", scale=1.0, digits=3, lower=True),
        "seconds": Metric("ms", scale=1e3, median=True, lower=True),
        "share": Metric("share", lower=True),
    }
    factors = ("facts",)
    kinds = (*_KINDS, "batch", *_ROUTES, "step", "write_read", "compile", "skipped", "reads")
    labels: ClassVar = {
        "system": "variant",
        "facts": "N",
        "hard": "hard paraphrase",
        "before": "to be forgotten",
        "forgotten": "forgotten",
        "others": "others of K",
        "through": "through memory",
        "bypassed": "memory bypassed",
        "zero": "z = 0",
        "step": "training step",
        "write_read": "write and read one fact",
        "compile": "compile the step",
        "skipped": "steps skipped, %",
        "reads": "reads not finite, %",
    }
    tables = (
        Pivot(
            cells=("S", "M"),
            where={"kind": _KINDS},
            title="One fact in memory; of K facts an eighth before and after it is forgotten; a stream",
            caption="S ± standard error over seeds, below it M; percent; no scope detector",
        ),
        Pivot(
            columns="facts",
            cells=("S", "greedy"),
            where={"kind": "batch"},
            title="N facts in one memory",
            caption="S ± standard error over seeds, below it answers given greedily; percent",
        ),
        Pivot(
            cells=("nats",),
            where={"kind": tuple(_ROUTES)},
            title="Held-out text",
            caption="nats per token ± standard error over seeds",
        ),
        Pivot(
            cells=("seconds", "share"),
            where={"kind": kinds[-5:]},
            title="Cost",
            caption="ms; a step is of all seeds",
        ),
    )
    plots = ()
    quoted = False
    listed = False

    variant: str = option("its name", default="")
    seeds: int = option("how many", default=3)
    data: str = option("edit records", default="")
    config: Config | None = None
    folder: Path | None = None
    inputs: Callable[[], Inputs] | None = None
    title: str = ""
    quiet: bool = False

    def cases(self, systems: Any = None) -> Sequence[Any]:
        """Return the seeds."""
        return [types.SimpleNamespace(case_id=seed) for seed in range(self.seeds)]

    def data_settings(self) -> dict[str, Any]:
        """Return what the records are."""
        return edit_records.provenance(self.data)

    def evaluate(self, systems: Any, cases: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """Train all seeds, or go on with them, and yield their measures."""
        inputs = self.inputs()
        hashes = dict(
            zip(("encoder", "decoder"), (each.hash for each in inputs.tokenizers), strict=True)
        )
        trained = ensemble.train(
            self.config,
            self.seeds,
            inputs.training,
            self.folder,
            {"config": configs.to_dict(self.config), "tokenizers": hashes},
            title=self.title,
            progress=not self.quiet,
        )
        if not self.quiet:
            say(f"{self.title}: {self.config.train.steps:,} steps are done; edits")
        # In the order of cases, and within a case in that of the measures.
        rows = sorted(self._measures(inputs, trained), key=lambda row: row["case"])
        yield from ({"case": row["case"], "system": self.variant, **row} for row in rows)

    def _measures(self, inputs: Inputs, trained: ensemble.Trained) -> Iterator[dict[str, Any]]:
        config, abstract = self.config, model.AbstractModel(model.abstract(self.config))
        parameters, axes = jax.device_put(trained.parameters), trained.axes
        own = configs.make_memory(config)
        models = memory_edits.EditedModels(abstract, parameters, axes, own, inputs.tokenizers)
        yield from memory_edits.rows(models, inputs.records, inputs.hard)
        # On one device; the edits of an evaluation are those of a session's memory.
        alone = dataclasses.replace(config.train, mesh=(1, 1, 1), edits=0)
        mesh, config = sharding.make_mesh(alone.mesh), dataclasses.replace(config, train=alone)
        train_step = TrainStep(config, abstract, mesh)
        evaluator = Evaluator(train_step, inputs.held_out, inputs.tokenizers)
        for seed in range(self.seeds):
            params = {n: a if axes[n] is None else a[seed] for n, a in parameters.items()}
            state = TrainState(None, {n: params[n] for n in train_step.trained}, None, {}, None)
            terms = evaluator(state, train_step.freeze(params))
            for kind, term in _ROUTES.items():
                nats = terms[term] if math.isfinite(terms[term]) else None
                yield dict(case=seed, kind=kind, nats=nats)
            yield dict(case=seed, kind="skipped", share=float(trained.skipped[seed]))
        yield dict(case=0, kind="step", seconds=trained.seconds)
        yield dict(case=0, kind="compile", seconds=trained.compile_seconds)


def settings_of(
    values: Mapping[str, Any], names: Sequence[str] = (), file: str | Path | None = None
) -> dict[str, Config]:
    """Return the config of every variant.

    A memory takes from the config's section `memory` the settings that it has too, and its own defaults
    for all others.

    Args:
        values: the config as a nested dict.
        names: memories. file: of further variants, a Python file whose get_variants() returns
            {name: [settings as of --set]}. With neither, every memory is a variant.
    Raises:
        UnknownVariants: the file has no such function, or a name is no name for a folder.
        ConfigError: naming each variant that is no config, with its problems.
    """
    configs.parse(values)
    names = names or (() if file else sorted(memory.variants()))
    variants = {name: [f"memory.variant={name}"] for name in names}
    if file is not None:
        functions = runpy.run_path(str(file))
        if "get_variants" not in functions:
            raise UnknownVariants(
                f"{file} defines no get_variants(). It returns a dict of lists, such as "
                '{"no_kl": ["objective.kl=0.0"]}.'
            )
        variants |= functions["get_variants"]()
    if bad := [name for name in variants if not re.fullmatch(r"\w[\w.+-]*", name)]:
        raise UnknownVariants(f"{bad}: a variant's name is that of its folder; take letters.")
    parsed, problems = {}, []
    for name, overrides in variants.items():
        try:
            parsed[name] = configs.parse(_overridden(values, overrides))
        except schema.ConfigError as error:
            lines = map(str.strip, str(error).splitlines()[1:])
            problems += [f"variant {name}: {line}" for line in lines]
    schema.refuse(problems)
    return parsed


def _overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the config with these settings, and of another memory than before those that it has."""
    result = schema.override(values, overrides)
    section, stated = result["memory"], {text.partition("=")[0] for text in overrides}
    kind = memory.variants().get(section.get("variant"))
    if kind is not None and section["variant"] != values["memory"]["variant"]:
        known = {"variant", *(field.name for field in dataclasses.fields(kind))}
        result["memory"] = {
            key: value
            for key, value in section.items()
            if key in known or f"memory.{key}" in stated
        }
    return result


def run(
    values: Mapping[str, Any],
    out: str | Path,
    *,
    memories: Sequence[str] = (),
    variants: str | Path | None = None,
    seeds: int = 3,
    data: str | None = None,
    quiet: bool = False,
) -> list[Path]:
    """Train and judge every variant that is not finished; return the paths of report and picture.

    Args:
        values: the config as a nested dict. memories, variants: as `settings_of`.
        data: edit records of names that the corpus does not have; by default those of the synthetic
            world, 300 or four times the memory's slots.
    Raises:
        OtherRun: a variant's folder belongs to another config; names the keys.
        DifferentSettings: it has another number of seeds, or other records.
    """
    out, parsed = Path(out), settings_of(values, memories, variants)
    slots = max(configs.make_memory(config).slots for config in parsed.values())
    data = data or f"world:{max(memory_edits.SINGLE, 4 * slots)}"
    began, loaded = time.perf_counter(), {}
    for name, config in parsed.items():
        loop.claim(out / name, config)
    tasks = [
        Compare(
            variant=name,
            seeds=seeds,
            chunk=seeds,
            data=data,
            config=config,
            folder=out / name,
            inputs=functools.partial(_inputs, config, data, out, loaded, quiet),
            title=f"{name} ({place} of {len(parsed)})",
            quiet=quiet,
        )
        for place, (name, config) in enumerate(parsed.items(), start=1)
    ]
    for task in tasks:
        runner.run(task, task.folder, quiet=True)
    rows = [row for name in parsed for row in runner.read_rows(out / name)]
    settings = {"variants": {name: configs.to_dict(config) for name, config in parsed.items()}}
    summary = {
        "benchmark": Compare.name,
        "cases": seeds,
        "results": summaries.summarise(tasks[0], rows),
        "settings": settings | {"data": tasks[0].data_settings()},
        "environment": environment(),
        "run": {"seconds": round(time.perf_counter() - began, 1)},
    }
    replace_file(out / runner.ROWS, "".join(json.dumps(row) + "\n" for row in rows))
    replace_file(out / runner.SUMMARY, json.dumps(runner.as_json(summary), indent=2) + "\n")
    picture = _draw(tasks[0], summary, out / "compare.png")
    if not quiet:
        for item in tables.shown(tasks[0], summary):
            Console().print(item)
    finished = report.FinishedRun(out, summary, rows, tasks[0])
    return [*web_page.write(report.sections([finished]), out, "Larimar: a comparison"), picture]


def _inputs(config: Config, data: str, out: Path, loaded: dict[str, Inputs], quiet: bool) -> Inputs:
    """Return what a variant is trained and judged on, from `loaded` where it is there."""
    key = repr((config.data, config.model.encoder, config.model.decoder))
    if key not in loaded:
        source = repr((config.data.corpus, config.data.vocabulary))
        name = f"tokenizer-{hashlib.sha256(source.encode()).hexdigest()[:12]}.json"
        text = loop.open_text(config, out / name, not quiet)
        harder = re.sub("^world(?=:|$)", "world-hard", data)
        hard = edit_records.load(harder, memory_edits.SINGLE) if harder != data else []
        loaded[key] = Inputs(*text, edit_records.load(data), hard)
    return loaded[key]


def _draw(task: Compare, summary: Mapping[str, Any], path: Path) -> Path:
    """Draw S over N and S of every kind, for those who look before they read; return the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, rcsetup

    variants = summary["settings"]["variants"].values()
    slots = ", ".join(map(str, sorted({config["memory"]["slots"] for config in variants})))
    plots = (
        Plot(
            "facts", "S", {"kind": "batch"}, log="x", xlabel=f"N facts in one memory, K = {slots}"
        ),
        Plot(y="S", where={"kind": ("edit", "paraphrase", "hard", "neighbourhood")}),
        Plot(y="S", where={"kind": ("before", "forgotten", "others", "stream")}),
    )
    colors = pyplot.get_cmap("tab10" if len(variants) <= 10 else "tab20").colors
    with pyplot.rc_context({"axes.prop_cycle": rcsetup.cycler(color=colors)}):
        size = (18, 6 + 0.12 * len(variants))
        figure, panels = pyplot.subplots(1, 3, figsize=size, layout="constrained")
        for axes, plot in zip(panels, plots, strict=True):
            figures.draw(axes, task, plot, summary["results"])
        figures.fit(figure)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
    return path
