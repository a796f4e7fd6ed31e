"""Figures of a task's summary: bars, or curves over a factor."""

import base64
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from larimar_jax.bench import summary as summaries
from larimar_jax.bench.task import Plot, Task


def svg(task: Task, plot: Plot, results: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return what a figure shows, in words, and the figure as a data URI."""
    import matplotlib
    from matplotlib.figure import Figure

    # Small, with large letters: it is still to be read where it is shrunk to a narrow screen.
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(5.0, 4.6), layout="constrained")
        axes = figure.subplots()
        draw(axes, task, plot, results)
        alt = f"{task.name}: {axes.get_ylabel()}"
        fit(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    source = base64.b64encode(file.getvalue()).decode()
    return alt, f"data:image/svg+xml;base64,{source}"


def draw(axes: Any, task: Task, plot: Plot, results: Sequence[Mapping[str, Any]]) -> None:
    """Draw one metric: bars beside each other, or curves."""
    name = plot.y or next(iter(task.metrics))
    metric = task.metrics[name]
    entries = [
        entry
        for entry in summaries.select(results, plot.where)
        if entry.get(name, {}).get("mean") is not None
    ]
    (_bars if isinstance(plot.x, tuple) else _curves)(axes, task, plot, name, entries)
    axes.set_ylabel(f"{metric.label}{' (percent, ± standard error)' * (metric.scale == 100.0)}")
    if metric.scale == 100.0:
        axes.set_ylim(0, 101)
    if plot.log == "y":
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _groups(task, x, entries) -> dict[str, list]:
    """The entries that differ in nothing but `x`, by what tells them from the others."""
    columns = [name for name in ("system", "kind", *task.factors) if name not in x]
    several = [
        name
        for name in columns
        if name != "system" and len({entry.get(name) for entry in entries}) > 1
    ]
    groups: dict[str, list] = {}
    for entry in entries:
        parts = [summaries.label(task, entry["system"])]
        for name in several:
            value = summaries.label(task, entry.get(name))
            parts.append(value if name == "kind" else f"{summaries.label(task, name)} = {value}")
        groups.setdefault(", ".join(parts), []).append(entry)
    return groups


def _bars(axes, task, plot, name, entries) -> None:
    groups = _groups(task, plot.x, entries)
    points = list(dict.fromkeys(tuple(entry.get(x) for x in plot.x) for entry in entries))
    width = 0.8 / max(1, len(groups))
    for place, (label, group) in enumerate(groups.items()):
        x = [points.index(tuple(entry.get(x) for x in plot.x)) for entry in group]
        x = np.asarray(x) + (place - (len(groups) - 1) / 2) * width
        means = [entry[name]["mean"] for entry in group]
        errors = [entry[name]["standard_error"] or 0.0 for entry in group]
        axes.bar(x, means, width, yerr=errors, label=label)
    ticks = [" x ".join(summaries.label(task, value) for value in point) for point in points]
    axes.set_xticks(range(len(points)), ticks)
    if plot.x != ("kind",):
        axes.set_xlabel(plot.xlabel or " x ".join(summaries.label(task, x) for x in plot.x))


def _curves(axes, task, plot, name, entries) -> None:
    points = sorted({entry[plot.x] for entry in entries if entry.get(plot.x) is not None})
    # Sizes that double, and values that are no sizes, stand at even distances.
    places = {point: point if plot.log == "x" else n for n, point in enumerate(points)}
    # A colour for each system; its lines differ in their style.
    lines_of: dict[str, int] = {}
    for label, group in _groups(task, (plot.x,), entries).items():
        system = group[0]["system"]
        style = lines_of[system] = lines_of.get(system, -1) + 1
        color = f"C{list(lines_of).index(system)}"
        on_axis = [entry for entry in group if entry.get(plot.x) is not None]
        if not on_axis:
            level = group[0][name]["mean"]
            axes.axhline(level, color=color, linestyle=(":", "-.")[style % 2], label=label)
            continue
        x = [places[entry[plot.x]] for entry in on_axis]
        means = [entry[name]["mean"] for entry in on_axis]
        errors = [entry[name]["standard_error"] or math.nan for entry in on_axis]
        drawn = dict(marker="o", color=color, linestyle=("-", "--", "-.", ":")[style % 4])
        axes.errorbar(x, means, errors, label=label, **drawn)
    if plot.log == "x":
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(places.values()), [summaries.label(task, point) for point in points])
    axes.set_xlabel(plot.xlabel or summaries.label(task, plot.x))


def fit(figure: Any) -> None:
    """Break the axes' labels, so that none is longer than its axis, and set the legends' size."""
    for axes in figure.axes:
        axes.set_xlabel(textwrap.fill(axes.get_xlabel(), 40))
        axes.set_ylabel(textwrap.fill(axes.get_ylabel(), 34))
        legend = axes.get_legend()
        for text in [] if legend is None else legend.get_texts():
            text.set_fontsize(10)
