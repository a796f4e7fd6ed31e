"""Figures of a task's summary: bars by kind, or curves over a factor."""

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

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Small, with large letters: it is still to be read where it is shrunk to a narrow screen.
    with pyplot.rc_context({"font.size": 11}):
        figure, axes = pyplot.subplots(figsize=(5.0, 4.6), layout="constrained")
        draw(axes, task, plot, results)
        alt = f"{task.name}: {axes.get_ylabel()}"
        fit(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    source = base64.b64encode(file.getvalue()).decode()
    return alt, f"data:image/svg+xml;base64,{source}"


def draw(axes: Any, task: Task, plot: Plot, results: Sequence[Mapping[str, Any]]) -> None:
    """Draw one metric: a bar for each system and kind, or a curve for each of them."""
    name = plot.y or next(iter(task.metrics))
    metric = task.metrics[name]
    entries = [
        entry
        for entry in summaries.select(results, plot.where)
        if entry.get(name, {}).get("mean") is not None
    ]
    (_bars if plot.x == "kind" else _curves)(axes, task, plot, name, entries)
    axes.set_ylabel(f"{metric.label}{' (percent, ± standard error)' * (metric.scale == 100.0)}")
    if metric.scale == 100.0:
        axes.set_ylim(0, 101)
    if plot.log == "y":
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _bars(axes, task, plot, name, entries) -> None:
    systems = list(dict.fromkeys(entry["system"] for entry in entries))
    kinds = list(dict.fromkeys(entry["kind"] for entry in entries))
    width = 0.8 / max(1, len(systems))
    for place, system in enumerate(systems):
        of_system = [entry for entry in entries if entry["system"] == system]
        x = [kinds.index(entry["kind"]) for entry in of_system]
        x = np.asarray(x) + (place - (len(systems) - 1) / 2) * width
        means = [entry[name]["mean"] for entry in of_system]
        errors = [entry[name]["standard_error"] or 0.0 for entry in of_system]
        axes.bar(x, means, width, yerr=errors, label=summaries.label(task, system))
    axes.set_xticks(range(len(kinds)), [summaries.label(task, kind) for kind in kinds])


def _curves(axes, task, plot, name, entries) -> None:
    points = sorted({entry[plot.x] for entry in entries if entry.get(plot.x) is not None})
    # Sizes that double, and values that are no sizes, stand at even distances.
    places = {point: point if plot.log == "x" else n for n, point in enumerate(points)}
    kinds = {entry["kind"] for entry in entries}
    lines: dict[tuple, list] = {}
    for entry in entries:
        lines.setdefault((entry["system"], entry["kind"]), []).append(entry)
    for number, ((system, kind), of_line) in enumerate(lines.items()):
        label = summaries.label(task, system)
        label += f", {summaries.label(task, kind)}" if len(kinds) > 1 else ""
        on_axis = [entry for entry in of_line if entry.get(plot.x) is not None]
        if not on_axis:
            level = of_line[0][name]["mean"]
            axes.axhline(level, color=f"C{number}", linestyle=":", label=label)
            continue
        x = [places[entry[plot.x]] for entry in on_axis]
        means = [entry[name]["mean"] for entry in on_axis]
        errors = [entry[name]["standard_error"] or math.nan for entry in on_axis]
        axes.errorbar(x, means, errors, marker="o", color=f"C{number}", label=label)
    if plot.log == "x":
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(places.values()), [str(point) for point in points])
    axes.set_xlabel(plot.xlabel or summaries.label(task, plot.x))


def fit(figure: Any) -> None:
    """Break the axes' labels, so that none is longer than its axis, and set the legends' size."""
    for axes in figure.axes:
        axes.set_xlabel(textwrap.fill(axes.get_xlabel(), 40))
        axes.set_ylabel(textwrap.fill(axes.get_ylabel(), 34))
        legend = axes.get_legend()
        for text in [] if legend is None else legend.get_texts():
            text.set_fontsize(10)
