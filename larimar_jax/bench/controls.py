"""What the controls of every benchmark have in common: facts as text, each text measured once, and rows
that say where a memory does not beat the lookup."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from larimar_jax.bench import systems


def in_front(facts: Sequence[str | None], prompts: Sequence[str]) -> list[str]:
    """Each fact as a sentence in front of its prompt; None leaves the prompt as it is."""
    return [
        prompt if fact is None else f"{fact.rstrip('.')}. {prompt}"
        for fact, prompt in zip(facts, prompts, strict=True)
    ]


def measured(
    measure: Callable[[list[str], list[Any]], Sequence[Any]],
    sides: Mapping[str, Sequence[str]],
    targets: Sequence[Any],
) -> dict[str, Any]:
    """What a model under one condition, such as the untouched LM, makes of several controls, which are
    other prompts for it.

    A text that several of them have, such as the plain prompt where a lookup finds nothing, is measured
    once for each target, all in one call.

    Args:
        measure: (prompts, their targets) → values, one each: an array [m, …] or a list.
        sides: of each control, n prompts. targets: n, of any kind that a measure takes.
    Returns:
        The values of each control, n in an array or a list as of `measure`.
    """
    place: dict[tuple[str, Any], int] = {}
    asked = [tuple(target) if isinstance(target, list) else target for target in targets]
    rows = {
        name: [place.setdefault(row, len(place)) for row in zip(prompts, asked, strict=True)]
        for name, prompts in sides.items()
    }
    values = measure([prompt for prompt, _ in place], [target for _, target in place])
    if isinstance(values, np.ndarray):
        return {name: values[found] for name, found in rows.items()}
    return {name: [values[row] for row in found] for name, found in rows.items()}


def noted(found: Mapping[str, Any], shown: str | None = None) -> str:
    """A cell of a table: what is shown, else the estimate, above the note of `systems.versus_lookup`."""
    note = found.get("note", "").replace(" the", "\nthe")
    return "\n".join(filter(None, (systems.percent(found) if shown is None else shown, note)))
