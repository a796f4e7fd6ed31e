"""ROME: a rank-one edit of one MLP (Meng et al. 2022, arXiv 2202.05262).

With C = E[k kᵀ] over general text, k* the key of the subject and v* = k* W + δ its new value
(`_values.py`), W′ minimises Σ ‖k W′ − k W‖² over general keys subject to k* W′ = v* (Eq. 2):

    ΔW = C⁻¹k* δᵀ / (k*ᵀ C⁻¹ k*).

A key that is orthogonal to k* under C⁻¹ keeps its value. Layer 17 of 48 in GPT-2 XL, 5 of 28 in GPT-J.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from larimar_jax.editors._values import ValueEditor
from larimar_jax.editors.base import BaseLM, Change, EditedModel, Request
from larimar_jax.packing import LanguageModel


@dataclasses.dataclass(frozen=True)
class ROME(ValueEditor):
    """Rank-one edits, one fact after the other."""

    of_hidden: ClassVar[bool] = False

    layer: int | None = None  # None: at 17/48 of the depth

    def needs_moments(self, base: BaseLM) -> tuple[int, ...]:
        """Return its layer."""
        return (base.layer(self.layer, 17 / 48),)

    def each(self, base: BaseLM, facts: Sequence[Request]) -> list[EditedModel]:
        """Return the base with each edit alone; MomentsError where C has no inverse."""
        return [self.start(base).plus(c) for c in self._changes(base, base.model, facts)]

    def apply(self, edited: EditedModel, facts: Sequence[Request]) -> EditedModel:
        """Return the model after each edit in turn, whose key and value are those of the model then."""
        for fact in facts:
            (change,) = self._changes(edited.base, edited.model(), [fact])
            edited = edited.plus(change)
        return edited

    def _changes(
        self, base: BaseLM, model: LanguageModel, facts: Sequence[Request]
    ) -> list[Change]:
        (layer,) = self.needs_moments(base)
        values = self.values(base, model, facts, layer)
        keys = np.float64(values.keys[layer].T)
        directions = base.moments([layer])[layer].solve(keys)
        directions /= (keys * directions).sum(axis=0)
        return [
            Change({layer: (jnp.float32(direction[:, None]), jnp.asarray(delta[None]))})
            for direction, delta in zip(directions.T, values.delta, strict=True)
        ]
