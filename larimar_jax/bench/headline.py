"""What a run says in a line: the first table of a report, with controls and the paper beside it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from larimar_jax.bench import controls, systems

# The columns, of `systems.SYSTEMS`.
SHOWN = ("base", "zero", "prompt", "lookup", "larimar")
PAPER = "the paper"


class Headline(NamedTuple):
    """A row. values: an estimate, in percent, of each system of `SHOWN` that has one. paper: its number,
    of another language model."""

    label: str
    values: Mapping[str, Mapping[str, Any]]
    paper: str = ""


def of(
    results: Mapping[str, Any], find: Callable[[Any], Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The values of a row, where `find` takes them from what each system has in `results`."""
    return {name: find(results[name]) for name in SHOWN if name in results}


def table(runs: Sequence[tuple[str, Sequence[Headline]]]) -> Table:
    """A row a headline.

    Args:
        runs: of each its folder's name and its headlines.
    """
    # Forgetting, long context and unseen wordings have nothing that decides about scope.
    labels = [*(systems.SYSTEMS[name] for name in SHOWN[:-1]), "Larimar"]
    caption = "percent ± standard error; the paper: Larimar-1.3B, of GPT-2 large"
    made = Table("", *labels, PAPER, caption=caption)
    for name, rows in runs:
        for row in rows:
            cells = [
                controls.noted(row.values[system]) if system in row.values else "" for system in SHOWN
            ]
            made.add_row(f"{name}: {row.label}", *cells, row.paper)
    return made
