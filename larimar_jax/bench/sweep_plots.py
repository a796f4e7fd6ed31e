"""Pictures of a sweep: capacity, retention, and recall against size."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]
# By the label of a variant, the rows of its best settings.
Best = Mapping[str, Sequence[Row]]
# Errors that a picture shows: nothing below can be seen, and a read that is off by more is off.
_SHOWN = (0.03, 20)


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Write capacity, retention and pareto as PNG files for each source; return their paths.

    Each variant is drawn at its own best settings: for every number of facts per slot, the mean over
    seeds of the settings whose mean recall over all numbers is the highest.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    plots = {"capacity": _capacity, "retention": _retention, "pareto": _pareto}
    paths = []
    for source in dict.fromkeys(row["kind"] for row in rows):
        best = _best([row for row in rows if row["kind"] == source])
        for name, plot in plots.items():
            figure = Figure(figsize=(7.5, 4.5), layout="constrained")
            axes = figure.subplots()
            # As many colours as there are memories.
            axes.set_prop_cycle(color=colormaps["tab20"].colors)
            plot(axes, best)
            axes.legend(fontsize=8)
            axes.grid(alpha=0.3)
            paths.append(Path(folder) / f"{source}_{name}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def _best(rows: Sequence[Row]) -> Best:
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        settings = json.dumps(row["settings"], sort_keys=True)
        groups.setdefault(row["system"], {}).setdefault(settings, []).append(row)
    return {
        label: max(choices.values(), key=lambda rows: np.mean([row["recall"] for row in rows]))
        for label, choices in groups.items()
    }


def _load(row: Row) -> float:
    return row["facts"] / row["slots"]


def _capacity(axes: Any, best: Best) -> None:
    for label, rows in best.items():
        loads = sorted({_load(row) for row in rows})
        error = [np.mean([row["error"] for row in rows if _load(row) == load]) for load in loads]
        axes.plot(loads, np.clip(error, *_SHOWN), marker="o", markersize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="facts per slot", ylabel="relative error of a read")
    axes.set_xticks(loads, [f"{load:.3g}" for load in loads], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title(f"error at wordings that were not written (drawn within {_SHOWN})")


def _retention(axes: Any, best: Best) -> None:
    for label, rows in best.items():
        load = max((_load(row) for row in rows if row["facts"] <= row["slots"]), default=None)
        quarters = [row["recall_by_age"] for row in rows if _load(row) == load]
        if quarters:
            axes.plot(range(1, 5), np.mean(quarters, axis=0), marker="o", markersize=3, label=label)
    axes.set(
        xlabel="quarter of the stream in which a fact was written", ylabel="recall", ylim=(0, 1.03)
    )
    axes.set_xticks(range(1, 5), ["first", "second", "third", "last"])
    axes.set_title("recall of early facts, at the largest load up to one fact a slot")


def _pareto(axes: Any, best: Best) -> None:
    for label, rows in best.items():
        sizes = sorted({row["bytes"] for row in rows})
        recall = [np.mean([r["recall"] for r in rows if r["bytes"] == size]) for size in sizes]
        time = 1e3 * np.mean([row["seconds"] for row in rows])
        points = axes.plot(np.array(sizes) / 1e6, recall, marker="o", markersize=3, alpha=0.8)
        points[0].set_label(f"{label} ({time:.1f} ms)")
    axes.set(xscale="log", xlabel="MB of state", ylabel="recall", ylim=(0, 1.03))
    axes.set_title("recall against size; in brackets, the time of a write and its reads")
