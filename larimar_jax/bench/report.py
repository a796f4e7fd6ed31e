"""Run folders as one report: tables with the paper's beside them, figures, cases, and
comparisons."""

import base64
import dataclasses
import json
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from larimar_jax import bench
from larimar_jax.bench import figures, metrics, queries, runner
from larimar_jax.bench import summary as summaries
from larimar_jax.bench.tables import Grid, grids, noted, notes, number
from larimar_jax.bench.task import Metric, Task, build

# How many of the worst and of the best cases are shown.
SHOWN = 3
# Two runs differ in a row if chance alone gave such a difference in fewer runs than this, all rows
# of the comparison taken together (Holm).
LEVEL = 0.05
# Losses and shares come from float32.
ROUNDING = 1e-6
# Columns of the overview; the memory is `larimar`, or where nothing decides about scope, `open`.
OVERVIEW = queries.SHARED


class Picture(NamedTuple):
    """alt: what it shows. source: an SVG or PNG file as a data URI."""

    alt: str
    source: str


class CaseText(NamedTuple):
    """A case to read: why it is shown, and its lines."""

    title: str
    lines: list[str]


Item = Grid | Picture | CaseText | str


class Section(NamedTuple):
    """Of one run, or of a comparison."""

    title: str
    items: list[Item]


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run as its folder holds it. task: None where its benchmark is not there."""

    folder: Path
    summary: Mapping[str, Any]
    rows: list[dict[str, Any]]
    task: Task | None

    @property
    def benchmark(self) -> str:
        return self.summary["benchmark"]


class NoRun(ValueError):
    """A folder without a finished run."""


def read(folder: str | Path) -> FinishedRun:
    """Return a run folder.

    Raises:
        NoRun: it has no results, because it is none or because the run has not ended.
    """
    folder = Path(folder)
    path = folder / runner.SUMMARY
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "results" not in summary:
        begun = (folder / runner.SETTINGS).is_file() or (folder / runner.CHUNKS).is_dir()
        raise NoRun(
            f"{folder} has no {runner.SUMMARY} with results: "
            + (
                "its run has not ended; the command that began it goes on with it."
                if begun
                else "it is no folder of a benchmark's run. Give what was `--out` of `larimar bench`."
            )
        )
    kind = bench.tasks().get(summary["benchmark"])
    task = None if kind is None else build(kind, summary["settings"].get("options", {}))
    return FinishedRun(folder, summary, runner.read_rows(folder), task)


def inside(folder: str | Path) -> list[Path]:
    """Return the finished runs that a folder holds, as `larimar reproduce` makes them, in the order
    of their names; itself, where it is a run or holds none."""
    folder = Path(folder)
    if (folder / runner.SETTINGS).exists() or not folder.is_dir():
        return [folder]
    return sorted(each for each in folder.iterdir() if (each / runner.SUMMARY).exists()) or [folder]


def sections(
    runs: Sequence[FinishedRun],
    texts: bool = True,
    remarks: Mapping[str, str] = types.MappingProxyType({}),
) -> list[Section]:
    """Return, where there are several, all in a line each; then every run, and after them a
    comparison of each run with the first one of its benchmark.

    Args:
        texts: with the worst and best cases, which quote the benchmark's data.
        remarks: below the tables of runs, by the names of their folders.
    """
    known = [run for run in runs if run.task is not None]
    parts = [overview(known)] if len(known) > 1 else []
    parts += [_of_run(run, texts, remarks.get(run.folder.name, "")) for run in runs]
    for name in dict.fromkeys(run.benchmark for run in known):
        first, *later = (run for run in known if run.benchmark == name)
        parts += [compare(first, run) for run in later]
    return parts


def overview(runs: Sequence[FinishedRun]) -> Section:
    """Return the first table of a report: a row for each group of a run's first metric, controls
    and the paper beside it."""
    rows = [row for run in runs for row in _headlines(run)]
    labels = [*(queries.LABELS[name] for name in OVERVIEW[:-1]), "Larimar"]
    metrics_shown = [next(iter(run.task.metrics.values())) for run in runs]
    scales = dict.fromkeys(each.label for each in metrics_shown if each.scale != 100.0)
    unit = f"percent, but for {' and '.join(scales)}," if scales else "percent"
    caption = f"{unit} ± standard error; the paper: Larimar-1.3B, of GPT-2 large"
    return Section("Overview", [Grid("", ["", *labels, "the paper"], rows, caption)])


def _headlines(run: FinishedRun) -> Iterator[list[str]]:
    task = run.task
    name, metric = next(iter(task.metrics.items()))
    settings = run.summary["settings"]
    conditions = [
        settings.get(section, {}).get(name) == value
        for section, values in task.paper_if.items()
        for name, value in values.items()
    ]
    paper = task.paper if all(conditions) else {}
    lines: dict[tuple, dict[str, str]] = {}
    for entry in summaries.select(run.summary["results"], task.overview):
        if name in entry and entry["system"] in (*OVERVIEW, "open"):
            key = (entry["kind"], *(entry.get(factor) for factor in task.factors))
            line = lines.setdefault(key, {})
            system = entry["system"]
            if system == "open" and "larimar" not in line:
                system = "larimar"
            line[system] = noted(metric, entry[name])
    for key, line in lines.items():
        label = summaries.group_label(task, ("", *key)).removeprefix(", ")
        less = " (less is better)" * _less(task, name, ("larimar", *key))
        if "larimar" in line:
            published = f"{paper[key]:g}" if key in paper else ""
            cells = [line.get(system, "") for system in OVERVIEW]
            yield [f"{run.folder.name}: {label}, {metric.label}{less}", *cells, published]


def _of_run(run: FinishedRun, texts: bool, remark: str) -> Section:
    settings, environment = run.summary["settings"], run.summary["environment"]
    name, data = settings.get("model", {}).get("name"), settings.get("data", {}).get("name")
    mode = settings.get("options", {}).get("mode")
    facts = [
        f"{run.summary['cases']} cases",
        f"model {name}" if name else "",
        f"data {data}" if data else "",
        f"mode {mode}" if mode else "",
        f"{run.summary['run']['seconds']:.0f} s",
        f"{environment['cores']} cores, {environment['backend']}",
        f"larimar-jax {environment['packages']['larimar-jax'] or '?'}, "
        f"jax {environment['packages']['jax']}",
    ]
    items: list[Item] = [" · ".join(filter(None, facts))]
    if run.task is not None:
        items += [*grids(run.task, run.summary), *notes(run.task, settings)]
        items += [remark] if remark else []
        for plot in run.task.plots:
            items.append(Picture(*figures.svg(run.task, plot, run.summary["results"])))
    for path in sorted(run.folder.glob("*.png")):
        source = base64.b64encode(path.read_bytes()).decode()
        items.append(Picture(path.stem.replace("_", " "), f"data:image/png;base64,{source}"))
    quoted = cases(run) if texts and run.task is not None and run.task.quoted else []
    return Section(f"{run.benchmark} ({run.folder.name})", [*items, *quoted])


# Cases


def cases(run: FinishedRun) -> list[CaseText]:
    """Return the cases with the lowest score of the memory, and those where it gains most on the
    base LM."""
    task, (name, metric) = run.task, next(iter(run.task.metrics.items()))
    values, rows = summaries.case_values(task, run.rows), summaries.by_case(run.rows)

    def mean(groups, keys):
        signs = [-1.0 if _less(task, name, key) else 1.0 for key in keys]
        return float(np.mean([sign * groups[key] for sign, key in zip(signs, keys, strict=True)]))

    scored = []
    for case, groups in values.items():
        ours = [key for key in groups if key[0] == "larimar"]
        ours = ours or [key for key in groups if key[0] not in queries.CONTROLS]
        base = [key for key in groups if key[0] == "base"]
        if ours:
            score = mean(groups, ours)
            gain = score - mean(groups, base) if base else score
            shown = _of_case(metric, float(np.mean([groups[key] for key in ours])))
            scored.append((score, gain, case, shown))
    worst = sorted(scored, key=lambda each: each[0])[:SHOWN]
    best = sorted(scored, key=lambda each: -each[1])[:SHOWN]
    return [
        CaseText(f"{title}: case {case}, {shown}", case_lines(task, rows[case]))
        for title, chosen in (("worst", worst), ("best", best))
        for _, _, case, shown in chosen
    ]


def _less(task: Task, name: str, key: tuple) -> bool:
    """Whether less is better in a group of rows."""
    entry = dict(zip(("system", "kind", *task.factors), key, strict=True))
    return task.lower_is_better(name, entry)


def _of_case(metric: Metric, value: float | int) -> str:
    """The metric of a case; a perplexity is that of its own ℓ."""
    value = math.exp(value) if metric.exponential else value
    return number(metric.scale * value, metric.digits)


def case_lines(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the rows of a case under its memory, or under all systems where it has none, as lines
    to read: its texts, then its metrics."""
    known = {"case", "system", "kind", "written", "prompt", "scope_score"}
    known |= {*task.factors, *task.metrics}
    ours = [row for row in rows if row["system"] == "larimar"] or rows
    lines = dict.fromkeys(f"written: {row['written']}" for row in rows if row.get("written"))
    for row in ours:
        texts = [
            f"{name.replace('_', ' ')} {f'{value:.2f}' if isinstance(value, float) else value}"
            for name, value in row.items()
            if name not in known and value not in (None, "")
        ]
        shown = [
            f"{metric.label} {_of_case(metric, row[name])}"
            for name, metric in task.metrics.items()
            if row.get(name) is not None
        ]
        factors = tuple(row.get(factor) for factor in task.factors)
        label = summaries.group_label(task, (row["system"], row["kind"], *factors))
        lines[f"{label}: {row.get('prompt', '')} → {', '.join([*texts, *shown])}"] = None
    return list(lines)


# Comparisons


def compare(first: FinishedRun, second: FinishedRun) -> Section:
    """Return the paired differences of two runs over the cases that both have, and which of them
    are more than chance: Student's t over cases, Holm's correction over rows."""
    metric = next(iter(first.task.metrics.values()))
    before, after = (summaries.case_values(run.task, run.rows) for run in (first, second))
    keys = {key: None for case in before if case in after for key in before[case]}
    rows, chances = [], []
    for key in keys:
        pairs = [
            (before[case][key], after[case][key])
            for case in before
            if key in before[case] and key in after.get(case, {})
        ]
        if pairs:
            row, chance = _compared(metric, np.asarray(pairs, np.float64))
            rows.append([summaries.group_label(first.task, key), *row])
            chances.append(chance)
    marks = _holm(chances)
    for row, marked in zip(rows, marks, strict=True):
        row.append("differs" if marked else "")
    names = [first.folder.name, second.folder.name]
    header = ["", *names, "difference", "p", "cases", f"at {LEVEL}"]
    data = [run.summary["settings"].get("data", {}) for run in (first, second)]
    digests = [each.get("sha256") or each.get("name") for each in data]
    notes = []
    if digests[0] != digests[1]:
        notes = ["The two runs are not of the same data: the cases are paired by their ids alone."]
    marked = frozenset(place for place, mark in enumerate(marks) if mark)
    caption = "nats per token" if metric.exponential else metric.label
    table = Grid("", header, rows, caption, marked)
    return Section(f"{first.benchmark}: {names[1]} against {names[0]}", [*notes, table])


def _compared(metric: Metric, pairs: np.ndarray) -> tuple[list[str], float]:
    """The cells of a row, and how often chance gives such a difference."""
    from scipy import stats

    before, after = pairs.T
    # Rounding alike in every case would otherwise be no chance.
    after = np.where(np.abs(after - before) < ROUNDING, before, after)
    apart = after - before
    if len(pairs) < 2 or np.allclose(apart, apart[0]):
        # No spread: they differ everywhere alike, or nowhere.
        chance = 1.0 if len(pairs) < 2 or np.array_equal(after, before) else 0.0
    else:
        chance = float(stats.ttest_rel(after, before).pvalue)
    means = [number(metric.scale * side.mean(), metric.digits) for side in (before, after)]
    difference = noted(metric, vars(metrics.estimate(apart, metric.scale)))
    return [*means, difference, f"{chance:.2g}", str(len(pairs))], chance


def _holm(chances: Sequence[float]) -> list[bool]:
    """Which of several differences stand at `LEVEL` together (Holm 1979)."""
    marks = [False] * len(chances)
    for rank, row in enumerate(np.argsort(chances, kind="stable")):
        if chances[row] > LEVEL / (len(chances) - rank):
            break
        marks[row] = True
    return marks
