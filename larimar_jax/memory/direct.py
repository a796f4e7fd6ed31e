"""Algorithm 1, exactly: least squares writes an episode, the posterior memory reads it (§3).

    write: W₀ = Z' M_ref†,  M = W₀† Z'        read: W̄ = Z M†,  Z_read = W M

M is K x C, but of rank at most N, so its pseudo-inverse is never computed as that of a K x C
matrix. With keys X and values Z, W₀ = X M_ref†, and projectors Π = W₀W₀†, Π_Z = ZZ† (N x N),
Cline's identity (AB)† = (A†AB)†(ABB†)† for A = W₀†, B = Z gives

    M† = (Π Z)† (W₀† Π_Z)†

whatever the ranks: every pseudo-inverse is of a thin matrix with N rows or columns. In the ordinary
case Π = Π_Z (keys and values are the same encodings and M_ref loses none of their rank) this is
M† = Z† W₀: with Z = USVᵀ, W₀ = U G and G = SVᵀM_ref† of full row rank, M = G† S Vᵀ has full-rank
factors, hence M† = V S⁻¹ G = Z† W₀. Then W̄ M = Q Z†Z, the orthogonal projection of the query on
the span of what is written: M_ref cancels. The general form costs two more thin pseudo-inverses and
stays exact for keys ≠ values, equal values under different keys, and a prior memory of low rank.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.linalg import all_in_batch, dot, pinv
from larimar_jax.memory._rows import Rows
from larimar_jax.memory.base import Prepared, share
from larimar_jax.memory.pytrees import Latents, Weights, pytree, static

# How far apart Π and Π_Z may be, by their largest number, to count as equal: 10 times rounding.
_EQUAL = 1e-5


@pytree
class DirectState:
    """The facts of one memory, forgotten and padded ones as zero rows, and the factors of M and M†.

    M = inverse @ values. M† = outer @ inner, or outer alone where inner is None (N > K); both are
    None where reading does not address by the posterior.
    """

    weights: Weights
    values: Latents
    inverse: Float[Array, "K N"]
    outer: Float[Array, "C n"] | None
    inner: Float[Array, "n K"] | None
    written: Bool[Array, ""]
    refused: Int[Array, ""]


@pytree
class Direct(Rows):
    """Algorithm 1 with exact pseudo-inverses.

    query: what a query is addressed by. 'posterior' is Algorithm 1's W̄ = Q M†; 'prior' is
    W̄ = Q M_ref†, the protocol of §4, for which keys are prompts and values prompts with answers.
    A memory without facts is read as M₀.
    """

    query: Literal["posterior", "prior"] = static(default="posterior", kw_only=True)

    def for_edits(self) -> "Direct":
        """Return the memory that addresses queries as it addressed keys, by M_ref."""
        return dataclasses.replace(self, query="prior")

    def solve(
        self, prepared: Prepared, weights: Weights, values: Latents, refused: Int[Array, ""]
    ) -> DirectState:
        inverse, outer, inner = self._factors(weights, values)
        return DirectState(weights, values, inverse, outer, inner, jnp.any(weights != 0), refused)

    def query_weights(self, prepared: Prepared, state: DirectState, queries: Latents) -> Weights:
        """Return Q M†, or Q M_ref† (see `query`)."""
        if state.outer is None:
            return self.address(prepared, queries)
        posterior = dot(queries.astype(jnp.float32), state.outer)
        posterior = posterior if state.inner is None else dot(posterior, state.inner)
        return jax.lax.cond(
            all_in_batch(state.written),
            lambda: posterior,
            lambda: jnp.where(state.written, posterior, self.address(prepared, queries)),
        )

    def recall(self, prepared: Prepared, state: DirectState, weights: Weights) -> Latents:
        """Return W W₀† Z; W M₀ where no fact is left."""
        return jnp.where(
            state.written,
            dot(dot(weights, state.inverse), state.values),
            dot(weights, prepared.prior_memory),
        )

    def confidence(
        self, prepared: Prepared, state: DirectState, queries: Latents, weights: Weights
    ) -> Float[Array, "Q"]:
        """Return the share of the query's weights under M_ref in the span of the written ones."""
        # Addressed again: where only the latent is used, XLA drops all of this.
        weights = self.address(prepared, queries)
        explained = dot(dot(weights, state.inverse), state.weights)
        return share(jnp.sum(jnp.square(explained), axis=1), jnp.sum(jnp.square(weights), axis=1))

    def matrix(self, prepared: Prepared, state: DirectState) -> Float[Array, "K C"]:
        """Return M = W₀† Z, the least-squares memory of least norm; M₀ where no fact is left."""
        return jnp.where(state.written, dot(state.inverse, state.values), prepared.prior_memory)

    def _factors(self, weights: Weights, values: Latents):
        """Return W₀†, and the two factors of M† (see the head of this file)."""
        inverse = pinv(weights)
        if self.query == "prior":
            return inverse, None, None
        if weights.shape[0] > self.slots:  # M itself is now the thin matrix
            return inverse, pinv(dot(inverse, values)), None
        value_inverse = pinv(values)
        projector, value_projector = dot(weights, inverse), dot(values, value_inverse)  # Π, Π_Z
        is_ordinary = jnp.all(jnp.abs(projector - value_projector) <= _EQUAL)
        outer, inner = jax.lax.cond(
            all_in_batch(is_ordinary),
            lambda: (value_inverse, weights),
            lambda: (pinv(dot(projector, values)), pinv(dot(inverse, value_projector))),
        )
        return inverse, outer, inner
