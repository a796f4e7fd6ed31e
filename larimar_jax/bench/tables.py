"""Tables of a task's summary, for the terminal and for reports."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.table import Table

from larimar_jax.bench import summary as summaries
from larimar_jax.bench.task import Metric, Pivot, Task


class Grid(NamedTuple):
    """A table as text. marks: rows to be told from the others."""

    title: str
    header: list[str]
    rows: list[list[str]]
    caption: str = ""
    marks: frozenset[int] = frozenset()


def shown(task: Task, summary: Mapping[str, Any]) -> list[Table | str]:
    """Return what a run prints at its end: its tables and notes."""
    tables = []
    for grid in grids(task, summary):
        table = Table(*grid.header, title=grid.title, caption=grid.caption, show_lines=True)
        for row in grid.rows:
            table.add_row(*row)
        tables.append(table)
    return [*tables, *notes(task, summary["settings"])]


def notes(task: Task, settings: Mapping[str, Any]) -> list[str]:
    """Return what a run's tables do not show: records that were left out, and the paper's
    numbers."""
    skipped = settings.get("data", {}).get("skipped")
    lines = []
    if skipped:
        name = settings["data"]["name"]
        lines.append(f"{len(skipped)} malformed records of {name} were left out")
    return lines + ([f"The paper: {task.reference}"] if task.reference else [])


def grids(task: Task, summary: Mapping[str, Any]) -> list[Grid]:
    """Return the tables of a task."""
    return [grid(task, pivot, summary) for pivot in task.tables]


def grid(task: Task, pivot: Pivot, summary: Mapping[str, Any]) -> Grid:
    """Return the entries of a summary as one table."""
    entries = summaries.select(summary["results"], pivot.where)
    cells = pivot.cells or (tuple(task.metrics) if pivot.columns is None else (*task.metrics,)[:1])
    lines: dict[tuple, dict[Any, str]] = {}
    columns: dict[Any, str] = {}
    for entry in entries:
        key = tuple(entry.get(name) for name in pivot.rows)
        line = lines.setdefault(key, {})
        if pivot.columns is None:
            for name in cells:
                columns.setdefault(name, task.metrics[name].label)
                line[name] = noted(task.metrics[name], entry[name]) if name in entry else ""
        elif any(entry.get(name, {}).get("cases") for name in cells):
            column = entry.get(pivot.columns)
            columns.setdefault(column, summaries.label(task, column))
            numbers = [
                noted(task.metrics[name], entry[name], error=not place, note=not place)
                for place, name in enumerate(cells)
                if entry.get(name, {}).get("cases")
            ]
            # The note stands below all numbers of the cell.
            head, _, note = numbers[0].partition("\n")
            line[column] = "\n".join(filter(None, [head, *numbers[1:], note]))
    rows = [
        ["" if value is None else summaries.label(task, value) for value in key]
        + [line.get(column, "") for column in columns]
        for key, line in lines.items()
    ]
    if pivot.rows == ("system",) and pivot.columns == "kind" and "in_scope" in task.metrics:
        share = {
            entry["kind"]: entry["in_scope"]
            for entry in entries
            if entry.get("in_scope", {}).get("cases")
        }
        if share:
            metric = task.metrics["in_scope"]
            line = [noted(metric, share[kind]) if kind in share else "" for kind in columns]
            rows.append([metric.label, *line])
    labels = pivot.labels or pivot.rows
    header = [*(summaries.label(task, name) for name in labels), *columns.values()]
    title = pivot.title or f"{task.name}, {summary['cases']} cases"
    return Grid(title, header, rows, pivot.caption)


def noted(
    metric: Metric, estimate: Mapping[str, Any], *, error: bool = True, note: bool = True
) -> str:
    """Return an estimate for a table, above the note of what it does not beat."""
    text = number(estimate["mean"], metric.digits)
    if error and estimate["standard_error"] is not None:
        text += f" ± {estimate['standard_error']:.{metric.digits}f}"
    words = estimate.get("note", "") if note else ""
    return "\n".join(filter(None, (text, words.replace("beat ", "beat\n"))))


def number(value: float | None, digits: int = 1) -> str:
    """Return a mean for tables; one that rounds to nothing keeps its size."""
    if value is None:
        return "–"
    if value and abs(value) < 0.5 * 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:,.{digits}f}"
