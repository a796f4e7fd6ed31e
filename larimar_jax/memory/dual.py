"""Ridge regression in its dual form: many memories of few facts each (§4).

The memory is that of `streaming`, with the same λ and μ, and costs N x N where N facts are in: with
r = λ + μ and S = W Wᵀ + rI, the identity (WᵀW + rI)⁻¹Wᵀ = WᵀS⁻¹ turns its solution into

    M = βM₀ + WᵀS⁻¹ (Z − βWM₀),     β = λ / r

A query's weights w are shared out among the facts, a = wWᵀS⁻¹, and what no fact takes is left to M₀:

    z_read = aZ + β (w − aW) M₀

Neither A nor M is ever formed, and M₀ is multiplied with queries alone, so that a thousand tenants with
sixteen facts each take the room of one full memory, and are written and read under one `vmap`.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from larimar_jax.linalg import add_ridge, dot, inverse_factor, inverse_solve
from larimar_jax.memory._rows import Rows
from larimar_jax.memory.base import Prepared
from larimar_jax.memory.pytrees import Latents, Real, Weights, pytree
from larimar_jax.memory.streaming import power_of_two_scale


@pytree
class DualState:
    """The facts of one memory, forgotten and padded ones as zero rows, and what a read needs of them.

    whiten: L⁻¹ for the Cholesky factor L of S. shrink: μ. refused: forgets of no written fact.
    """

    weights: Weights
    values: Latents
    whiten: Float[Array, "N N"]
    shrink: Float[Array, ""]
    refused: Int[Array, ""]


@pytree
class Dual(Rows):
    """The streaming memory of few facts. ridge: λ. query_noise: ρ (see streaming.py)."""

    ridge: Real = dataclasses.field(default=1e-2, kw_only=True)
    query_noise: Real = dataclasses.field(default=0.5, kw_only=True)

    def solve(
        self, prepared: Prepared, weights: Weights, values: Latents, refused: Int[Array, ""]
    ) -> DualState:
        gram = dot(weights, weights.T)
        # tr(WWᵀ) and not the sum of all squares of W: that would be another pass over N x K numbers.
        scale = power_of_two_scale(jnp.trace(gram), self.slots)
        shrink = jnp.square(self.query_noise) * scale
        matrix = add_ridge(gram, self.ridge + shrink)
        return DualState(weights, values, inverse_factor(matrix), shrink, refused)

    def recall(self, prepared: Prepared, state: DualState, weights: Weights) -> Latents:
        """Return aZ + β (w − aW) M₀."""
        shares = self._shares(state, weights)
        left = weights - dot(shares, state.weights)
        return dot(shares, state.values) + self._beta(state) * dot(left, prepared.prior_memory)

    def residual(self, prepared: Prepared, state: DualState, weights: Weights) -> Weights:
        return weights - dot(self._shares(state, weights), state.weights)

    def matrix(self, prepared: Prepared, state: DualState) -> Float[Array, "K C"]:
        prior = self._beta(state) * prepared.prior_memory
        errors = state.values - dot(state.weights, prior)
        return prior + dot(state.weights.T, self._solve(state, errors))

    def _shares(self, state: DualState, weights: Float[Array, "Q K"]) -> Float[Array, "Q N"]:
        """Return a of each query's weights w."""
        return self._solve(state, dot(state.weights, weights.T)).T

    def _solve(self, state: DualState, right: Float[Array, "N n"]) -> Float[Array, "N n"]:
        """Return S⁻¹ right."""
        matrix = add_ridge(dot(state.weights, state.weights.T), self.ridge + state.shrink)
        return inverse_solve(matrix, state.whiten, right)

    def _beta(self, state: DualState) -> Float[Array, ""]:
        """Return β, the share of M₀ that stays where nothing is written; 1 for μ = 0, whatever λ."""
        ridge, has_shrink = jnp.asarray(self.ridge, jnp.float32), state.shrink > 0
        return jnp.where(has_shrink, ridge / jnp.where(has_shrink, ridge + state.shrink, 1.0), 1.0)
