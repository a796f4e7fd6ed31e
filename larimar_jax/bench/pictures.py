"""Pictures of a sweep: capacity, retention, and what recall costs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from larimar_jax.bench.runner import Record


def draw(records: Sequence[Record], folder: str | Path) -> list[Path]:
    """Writes capacity, retention and pareto as PNG files for each source; returns their paths.

    Each variant is drawn at its own best settings: for every number of facts per slot, the mean over
    seeds of the settings whose mean recall over all numbers is the highest.
    """
    import matplotlib

    matplotlib.use("Agg")
    made = []
    for source in dict.fromkeys(record["source"] for record in records):
        mine = _best([record for record in records if record["source"] == source])
        for kind in (_capacity, _retention, _pareto):
            path = Path(folder) / f"{source}_{kind.__name__.strip('_')}.png"
            _figure(path, lambda axes, kind=kind, mine=mine: kind(axes, mine))
            made.append(path)
    return made


# Errors that a picture shows: nothing below can be seen, and a read that is off by more is off.
_SHOWN = (0.03, 20)

# Fields of a record that are no setting of its variant.
_MEASURES = {
    "case_id", "label", "variant", "source", "slots", "facts", "rephrasings", "noise", "seed",
    "recall", "recall_written", "error", "error_written", "recall_by_age", "bytes", "seconds",
    "seconds_compiling",
}  # fmt: skip


def _best(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, dict[tuple, list[Record]]] = {}
    for record in records:
        settings = tuple(sorted((k, v) for k, v in record.items() if k not in _MEASURES))
        found.setdefault(record["label"], {}).setdefault(settings, []).append(record)
    return {
        label: max(choices.values(), key=lambda rows: np.mean([row["recall"] for row in rows]))
        for label, choices in found.items()
    }


def _figure(path: Path, fill) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    # As many colours as there are memories.
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    fill(axes)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _capacity(axes, variants: dict[str, list[Record]]) -> None:
    for label, rows in variants.items():
        loads = sorted({row["facts"] / row["slots"] for row in rows})
        error = [np.mean([r["error"] for r in rows if r["facts"] / r["slots"] == x]) for x in loads]
        axes.plot(loads, np.clip(error, *_SHOWN), marker="o", markersize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="facts per slot", ylabel="relative error of a read")
    axes.set_xticks(loads, [f"{load:.3g}" for load in loads], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title(f"error at wordings that were not written (drawn within {_SHOWN})")


def _retention(axes, variants: dict[str, list[Record]]) -> None:
    for label, rows in variants.items():
        load = max(row["facts"] / row["slots"] for row in rows if row["facts"] <= row["slots"])
        full = [row["recall_by_age"] for row in rows if row["facts"] / row["slots"] == load]
        axes.plot(range(1, 5), np.mean(full, axis=0), marker="o", markersize=3, label=label)
    axes.set(xlabel="quarter of the stream in which a fact was written", ylabel="recall", ylim=(0, 1.03))
    axes.set_xticks(range(1, 5), ["first", "second", "third", "last"])
    axes.set_title("what is left of early facts, at the largest load up to one fact a slot")


def _pareto(axes, variants: dict[str, list[Record]]) -> None:
    for label, rows in variants.items():
        sizes = sorted({row["bytes"] for row in rows})
        recall = [np.mean([row["recall"] for row in rows if row["bytes"] == size]) for size in sizes]
        time = np.mean([row["seconds"] for row in rows])
        points = axes.plot(np.array(sizes) / 1e6, recall, marker="o", markersize=3, alpha=0.8)
        points[0].set_label(f"{label} ({1e3 * time:.1f} ms)")
    axes.set(xscale="log", xlabel="MB of state", ylabel="recall", ylim=(0, 1.03))
    axes.set_title("recall against size; in brackets, the time of a write and its reads")
