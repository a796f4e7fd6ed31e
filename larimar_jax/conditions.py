"""Rows of a condition on the host, where equal ones are found and any are taken without compiling."""

import hashlib

import jax
import numpy as np
from jaxtyping import Int

from larimar_jax.answer_code import TokenEvidence
from larimar_jax.model import Condition


def check_rows(condition: Condition, prompts: int) -> None:
    """Raises ValueError where a condition has fewer rows than there are prompts."""
    given = len(condition.prefix.active)
    if given < prompts:
        raise ValueError(
            f"the condition has {given} rows for {prompts} prompts; row i of it belongs to prompt i"
        )


class Rows:
    """The rows of a condition that belong to so many prompts; ValueError as `check_rows`.

    first: of each prompt, the first row that equals its own.
    """

    def __init__(self, condition: Condition, prompts: int):
        check_rows(condition, prompts)
        leaves, self._tree = jax.tree.flatten(condition)
        # Slots lead with their layer.
        self._leaves = [(np.asarray(leaf), 1 if leaf.ndim == 5 else 0) for leaf in leaves]
        evidence, self._form = jax.tree.flatten(condition.evidence)
        self._spelled = [np.asarray(leaf) for leaf in evidence]
        found: dict[bytes, int] = {}
        self.first = [found.setdefault(self._digest(row), row) for row in range(prompts)]

    def _digest(self, row: int) -> bytes:
        made = hashlib.sha256()
        for leaf, axis in self._leaves:
            made.update(leaf.take(row, axis).tobytes())
        return made.digest()

    def take(self, rows: Int[np.ndarray, " R"]) -> Condition:
        """The condition of chosen rows."""
        return self._tree.unflatten(
            [jax.device_put(leaf.take(rows, axis)) for leaf, axis in self._leaves]
        )

    def evidence(self, rows: Int[np.ndarray, " R"]) -> TokenEvidence | None:
        """What is spelled in chosen rows: slots are large, and logits need none of them."""
        return self._form.unflatten([jax.device_put(leaf[rows]) for leaf in self._spelled])
