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
from jaxtyping import Array, Float, Int, PRNGKeyArray

from larimar_jax.linalg import add_ridge, dot, inverse_factor, inverse_solve
from larimar_jax.memory._rows import Rows
from larimar_jax.memory.base import Prepared, Reading, Real, pytree, sample, share
from larimar_jax.memory.streaming import level


@pytree
class DualState:
    """The facts of one memory, forgotten and padded ones as zero rows, and what a read needs of them.

    whiten: L⁻¹ for the Cholesky factor L of S. shrink: μ. refused: forgets that found nothing.
    """

    weights: Float[Array, "N K"]
    values: Float[Array, "N C"]
    whiten: Float[Array, "N N"]
    shrink: Float[Array, ""]
    refused: Int[Array, ""]


@pytree
class Dual(Rows):
    """The streaming memory of few facts.

    ridge: λ; query_noise: ρ, how far queries are expected to lie from keys (see streaming.py).
    """

    ridge: Real = dataclasses.field(default=1e-2, kw_only=True)
    query_noise: Real = dataclasses.field(default=0.5, kw_only=True)

    def solve(
        self,
        prepared: Prepared,
        weights: Float[Array, "N K"],
        values: Float[Array, "N C"],
        refused: Int[Array, ""],
    ) -> DualState:
        """S of all facts, ready to be solved with."""
        gram = dot(weights, weights.T)
        # tr(WWᵀ) and not the sum of all squares of W: that would be another pass over N x K numbers.
        shrink = jnp.square(self.query_noise) * level(jnp.trace(gram), self.slots)
        matrix = add_ridge(gram, self.ridge + shrink)
        return DualState(weights, values, inverse_factor(matrix), shrink, refused)

    def read(
        self,
        prepared: Prepared,
        state: DualState,
        queries: Float[Array, "Q C"],
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """Z_read = W M with W addressed by M_ref. Confidence: 1 − ‖w − aW‖² / ‖w‖²."""
        mean = self.address(prepared, queries)
        log_variance = self.log_variance(prepared, state, queries)
        weights = sample(mean, log_variance, rng)
        shares, left = self._shared(state, weights)
        latent = dot(shares, state.values) + self._kept(state.shrink) * dot(left, prepared.memory)
        if rng is not None:
            left = self._shared(state, mean)[1]
        squared, apart = (jnp.sum(jnp.square(rows), axis=1) for rows in (mean, left))
        return Reading(latent, mean, log_variance, share(squared - apart, squared))

    def matrix(self, prepared: Prepared, state: DualState) -> Float[Array, "K C"]:
        """The posterior memory M."""
        kept = self._kept(state.shrink)
        wanted = state.values - kept * dot(state.weights, prepared.memory)
        return kept * prepared.memory + dot(state.weights.T, self._solve(state, wanted))

    def _shared(self, state: DualState, weights: Float[Array, "Q K"]):
        """a [Q, N] of each query's weights w, and w − aW [Q, K]."""
        shares = self._solve(state, dot(state.weights, weights.T)).T
        return shares, weights - dot(shares, state.weights)

    def _solve(self, state: DualState, right: Float[Array, "N n"]) -> Float[Array, "N n"]:
        """S⁻¹ right."""
        matrix = add_ridge(dot(state.weights, state.weights.T), self.ridge + state.shrink)
        return inverse_solve(matrix, state.whiten, right)

    def _kept(self, shrink: Float[Array, ""]) -> Float[Array, ""]:
        """β, the share of M₀ that is kept where nothing is written; 1 where μ is 0, whatever λ."""
        ridge = jnp.asarray(self.ridge, jnp.float32)
        return jnp.where(shrink > 0, ridge / jnp.where(shrink > 0, ridge + shrink, 1.0), 1.0)
