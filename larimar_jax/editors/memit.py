"""MEMIT: many facts in the MLPs of several layers (Meng et al. 2023, arXiv 2210.07229).

Each fact has z = h + δ, what the hidden state behind the last of the layers is to be at its subject's
last token (`_values.py`). In order, each layer takes its share of what is still missing (Eqs. 14, 20):

    ΔW = (λC + K Kᵀ)⁻¹ K R,      R = (z − h now) / (layers that are left),

K [I, n] the keys of the facts under the model as it is by then, R [n, D]. C⁻¹ is factored once:
(λC + K Kᵀ)⁻¹ K = B (1 + Kᵀ B)⁻¹ with B = (λC)⁻¹ K.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from larimar_jax.editors._values import ValueEditor, Values
from larimar_jax.editors.base import BaseLM, Change, EditedModel, Request
from larimar_jax.editors.moments import Moments
from larimar_jax.editors.subjects import subject_keys
from larimar_jax.schema import Count, Natural, Positive


@dataclasses.dataclass(frozen=True)
class MEMIT(ValueEditor):
    """Facts spread over several layers, all at once."""

    of_hidden: ClassVar[bool] = True

    layers: tuple[int, ...] = ()  # those that are edited; empty: at 13/48 to 17/48 of the depth
    moments_weight: Positive = 15_000.0  # λ, of C beside the keys of the facts
    steps: Count = 25
    clamp: Positive = 0.75
    prefixes: Natural = 5

    def needs_moments(self, base: BaseLM) -> tuple[int, ...]:
        """Return its layers, in order."""
        shares = np.arange(13, 18) / 48
        layers = self.layers or tuple(base.layer(None, share) for share in shares)
        return tuple(sorted({base.layer(layer, 0.0) for layer in layers}))

    def each(self, base: BaseLM, facts: Sequence[Request]) -> list[EditedModel]:
        """Return the base with each fact alone; MomentsError where C has no inverse."""
        values = self.values(base, base.model, facts, self.needs_moments(base)[-1])
        rows = [np.s_[n : n + 1] for n in range(len(facts))]
        return [self._spread(self.start(base), facts[row], values.rows(row)) for row in rows]

    def apply(self, edited: EditedModel, facts: Sequence[Request]) -> EditedModel:
        """Return the model with all facts, one change of every layer."""
        layer = self.needs_moments(edited.base)[-1]
        values = self.values(edited.base, edited.model(), facts, layer)
        return self._spread(edited, facts, values)

    def _spread(self, edited: EditedModel, facts: Sequence[Request], values: Values) -> EditedModel:
        base, change = edited.base, Change({}, {})
        layers, prefixes = self.needs_moments(base), base.prefixes(self.prefixes)
        moments, target = base.moments(layers), np.float64(values.hidden) + values.delta
        for place, layer in enumerate(layers):
            model = edited.plus(change).model()
            keys, places = subject_keys(model, base.tokenizer, facts, prefixes, layers[-1] + 1)
            missing = target - places.hidden[layers[-1], :: len(prefixes)]
            earlier = [c.keys[layer] for c in edited.changes]
            own = np.float64(keys[layer].T)
            directions = self.directions(moments[layer], own, np.hstack([own[:, :0], *earlier]))
            factors = (jnp.float32(directions), jnp.float32(missing / (len(layers) - place)))
            change.factors[layer], change.keys[layer] = factors, own
        return edited.plus(change)

    def directions(
        self,
        moments: Moments,
        keys: Float[np.ndarray, "I n"],
        earlier: Float[np.ndarray, "I m"],
    ) -> Float[np.ndarray, "I n"]:
        """Return B with ΔW = B R, in float64. earlier: keys of the edits before."""
        spread = moments.solve(keys) / self.moments_weight
        return spread @ np.linalg.inv(np.eye(keys.shape[1]) + keys.T @ spread)
