"""Run folders as one report: tables with the paper's beside them, pictures, cases, and comparisons.

What a benchmark's file may say to it, beside `tables(summary)`:

    PAPER              text: what the paper has in this place, shown under the table
    values(record)     {what: score of this case}, higher is better; the cases that are shown and the
                       comparison of two runs go by it
    UNIT               text: of a hundred times these values, "percent" where it is not there
    texts(record)      a case as lines to read
    draw(axes, summary)   a picture of the result
    headlines(summary)    its rows of the first table (headline.py)
"""

import base64
import dataclasses
import io
import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from larimar_jax import bench
from larimar_jax.bench import given, headline, metrics, runner, systems

# How many of the worst and of the best cases are shown.
SHOWN = 3
# Two runs differ in a row if chance alone gave such a difference in fewer runs than this, all rows of
# the comparison taken together (Holm).
LEVEL = 0.05
# Losses and shares come from float32.
ROUNDING = 1e-6


class Grid(NamedTuple):
    """A table as text. marks: rows to be told from the others."""

    title: str
    header: list[str]
    rows: list[list[str]]
    caption: str = ""
    marks: frozenset[int] = frozenset()


class Picture(NamedTuple):
    """alt: what it shows. source: an SVG or PNG file as a data URI."""

    alt: str
    source: str


class Case(NamedTuple):
    """A case to read: why it is shown, and its lines."""

    title: str
    lines: list[str]


Item = Grid | Picture | Case | str


class Section(NamedTuple):
    """Of one run, or of a comparison."""

    title: str
    items: list[Item]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run as its folder holds it. module: the benchmark's file, None where it has none."""

    folder: Path
    summary: Mapping[str, Any]
    records: list[runner.Record]
    module: ModuleType | None

    @property
    def benchmark(self) -> str:
        return self.summary["benchmark"]


class NoRun(ValueError):
    """A folder without a finished run."""


def read(folder: str | Path) -> Run:
    """A run folder.

    Raises:
        NoRun: it has no summary, because it is none or because the run has not ended.
    """
    folder = Path(folder)
    path = folder / runner.SUMMARY
    if not path.is_file():
        begun = (folder / runner.CASES).is_file()
        raise NoRun(
            f"{folder} has no {runner.SUMMARY}: "
            + ("its run has not ended; the command that began it goes on with it." if begun
               else "it is no folder of a benchmark's run. Give what was `--out` of `larimar bench`.")
        )
    summary = json.loads(path.read_text(encoding="utf-8"))
    return Run(folder, summary, runner.read_cases(folder), bench.benchmarks().get(summary["benchmark"]))


def inside(folder: str | Path) -> list[Path]:
    """The finished runs that a folder holds, as `larimar reproduce` makes them, in the order of their
    names; itself, where it is a run or holds none."""
    folder = Path(folder)
    if (folder / runner.SETTINGS).exists() or not folder.is_dir():
        return [folder]
    return sorted(each for each in folder.iterdir() if (each / runner.SUMMARY).exists()) or [folder]


def sections(runs: Sequence[Run], texts: bool = True) -> list[Section]:
    """Where there are several, all in a line each; then every run, and after them a comparison of each
    run with the first one of its benchmark.

    Args:
        texts: with the worst and best cases, which quote the benchmark's data.
    """
    found = [*_overview(runs), *(_of_run(run, texts) for run in runs)]
    for name in dict.fromkeys(run.benchmark for run in runs):
        first, *others = (run for run in runs if run.benchmark == name)
        found += [compare(first, other) for other in others if hasattr(first.module, "values")]
    return found


def _overview(runs: Sequence[Run]) -> list[Section]:
    told = [
        (run.folder.name, run.module.headlines(run.summary))
        for run in runs
        if hasattr(run.module, "headlines")
    ]
    return [Section("Overview", [grid(headline.table(told))])] if len(told) > 1 else []


def _of_run(run: Run, texts: bool) -> Section:
    settings, environment = run.summary["settings"], run.summary["environment"]
    model, data = settings.get("model", {}), settings.get("data", {})
    name = model.get("model") or model.get("name") if isinstance(model, Mapping) else model
    facts = [
        f"{run.summary['cases']} cases",
        f"model {name}" if name else "",
        f"data {data['name']}" if isinstance(data, Mapping) and data.get("name") else "",
        f"mode {settings['mode']}" if settings.get("mode") else "",
        f"{run.summary['run']['seconds']:.0f} s",
        f"{environment['cores']} cores, {environment['backend']}",
        f"larimar-jax {environment['versions'].get('larimar-jax', '?')}, "
        f"jax {environment['versions'].get('jax', '?')}",
    ]
    items: list[Item] = [" · ".join(filter(None, facts))]
    if run.module is not None:
        items += [x if isinstance(x, str) else grid(x) for x in run.module.tables(run.summary)]
        items += given.notes(run.summary["settings"])
        if hasattr(run.module, "PAPER"):
            items.append(f"The paper: {run.module.PAPER}")
        if hasattr(run.module, "draw"):
            items.append(picture(run))
    for path in sorted(run.folder.glob("*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        items.append(Picture(path.stem.replace("_", " "), f"data:image/png;base64,{data}"))
    quoted = cases(run) if texts else []
    return Section(f"{run.benchmark} ({run.folder.name})", [*items, *quoted])


def grid(table: Table) -> Grid:
    """A rich table as text."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    header = [str(column.header) for column in table.columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return Grid(str(table.title or ""), header, rows, str(table.caption or ""))


def picture(run: Run) -> Picture:
    """What a benchmark draws of its result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Small, with large letters: it is still to be read where it is shrunk to a narrow screen.
    with pyplot.rc_context({"font.size": 11}):
        figure, axes = pyplot.subplots(figsize=(5.0, 4.6), layout="constrained")
        run.module.draw(axes, run.summary)
        alt = f"{run.benchmark}: {axes.get_ylabel() or axes.get_xlabel()}"
        axes.grid(alpha=0.3)
        fit(figure)
        held = io.BytesIO()
        figure.savefig(held, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    source = base64.b64encode(held.getvalue()).decode()
    return Picture(alt, f"data:image/svg+xml;base64,{source}")


def fit(figure: Any) -> None:
    """Breaks the axes' labels, so that none is longer than its axis, and enlarges the legends."""
    for axes in figure.axes:
        axes.set_xlabel(textwrap.fill(axes.get_xlabel(), 40))
        axes.set_ylabel(textwrap.fill(axes.get_ylabel(), 34))
        legend = axes.get_legend()
        for text in [] if legend is None else legend.get_texts():
            text.set_fontsize(10)


def cases(run: Run) -> list[Case]:
    """The cases with the lowest score of the memory, and those where it gains most on the base LM."""
    if not hasattr(run.module, "values") or not hasattr(run.module, "texts"):
        return []
    ours, base = (systems.SYSTEMS[name] for name in ("larimar", "base"))
    scored = []
    for record in run.records:
        values = run.module.values(record)
        mine, plain = (
            [value for name, value in values.items() if name.startswith(system)]
            for system in (ours if any(name.startswith(ours) for name in values) else "Larimar", base)
        )
        if mine:
            gain = float(np.mean(mine) - np.mean(plain)) if plain else float(np.mean(mine))
            scored.append((float(np.mean(mine)), gain, record))
    worst = sorted(scored, key=lambda each: each[0])[:SHOWN]
    best = sorted(scored, key=lambda each: -each[1])[:SHOWN]
    return [
        Case(f"{kind}: case {record['case_id']}, {100 * value:.0f} %", run.module.texts(record))
        for kind, value, record in itertools.chain(
            (("worst", value, record) for value, _, record in worst),
            (("best", value, record) for value, _, record in best),
        )
    ]


def compare(first: Run, second: Run) -> Section:
    """The paired differences of two runs over the cases that both have, and which of them are more than
    chance: Student's t over cases, Holm's correction over rows."""
    from scipy import stats

    pairs = _pairs(first, second)
    names = list(dict.fromkeys(name for one, other in pairs for name in one if name in other))
    rows, chances = [], []
    for name in names:
        both = [(one[name], other[name]) for one, other in pairs if name in one and name in other]
        before, after = np.asarray(both, np.float64).T
        # Rounding alike in every case would otherwise be no chance.
        after = np.where(np.abs(after - before) < ROUNDING, before, after)
        apart = metrics.paired_difference(list(after), list(before))
        same = len(both) < 2 or np.allclose(after - before, (after - before)[0])
        if same:  # no spread: they differ everywhere alike, or nowhere
            chance = 1.0 if len(both) < 2 or np.array_equal(after, before) else 0.0
        else:
            chance = float(stats.ttest_rel(after, before).pvalue)
        chances.append(chance)
        rows.append(
            [name, f"{100 * before.mean():.1f}", f"{100 * after.mean():.1f}",
             systems.percent(vars(apart)), f"{chance:.2g}", str(len(both))]
        )  # fmt: skip
    marks = _holm(chances)
    for row, marked in enumerate(marks):
        rows[row].append("differs" if marked else "")
    told = [first.folder.name, second.folder.name]
    header = ["", *told, "difference", "p", "cases", f"at {LEVEL}"]
    notes = [] if _data(first) == _data(second) else [
        "The two runs are not of the same data: the cases are paired by their ids alone."
    ]  # fmt: skip
    unit = getattr(first.module, "UNIT", "percent")
    table = Grid("", header, rows, unit, frozenset(i for i, m in enumerate(marks) if m))
    return Section(f"{first.benchmark}: {told[1]} against {told[0]}", [*notes, table])


def _data(run: Run) -> Any:
    data = run.summary["settings"].get("data", {})
    return data.get("sha256") if isinstance(data, Mapping) else data


def _pairs(first: Run, second: Run) -> list[tuple[Mapping[str, float], Mapping[str, float]]]:
    values = first.module.values
    known = {record["case_id"]: record for record in second.records}
    return [
        (values(record), values(known[record["case_id"]]))
        for record in first.records
        if record["case_id"] in known
    ]


def _holm(chances: Sequence[float]) -> list[bool]:
    """Which of several differences stand at `LEVEL` together (Holm 1979)."""
    marks = [False] * len(chances)
    for rank, row in enumerate(np.argsort(chances, kind="stable")):
        if chances[row] > LEVEL / (len(chances) - rank):
            break
        marks[row] = True
    return marks
