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

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from larimar_jax.linalg import all_in_batch, dot, pinv
from larimar_jax.memory._rows import Rows
from larimar_jax.memory.base import Prepared, Reading, pytree, sample, share, static

# How far apart Π and Π_Z may be, by their largest number, to be the same: 10 times what rounding does.
_SAME = 1e-5


@pytree
class DirectState:
    """The facts of one memory, forgotten and padded ones as zero rows, and the factors of M and M†.

    M = inverse @ values. M† = outer @ inner, or outer alone where inner is None (N > K); both are
    None where reading does not address by the posterior.
    """

    weights: Float[Array, "N K"]
    values: Float[Array, "N C"]
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
    """

    query: Literal["posterior", "prior"] = static(default="posterior", kw_only=True)

    def solve(
        self,
        prepared: Prepared,
        weights: Float[Array, "N K"],
        values: Float[Array, "N C"],
        refused: Int[Array, ""],
    ) -> DirectState:
        """Algorithm 1's write."""
        inverse, outer, inner = self._factors(weights, values)
        return DirectState(weights, values, inverse, outer, inner, jnp.any(weights != 0), refused)

    def read(
        self,
        prepared: Prepared,
        state: DirectState,
        queries: Float[Array, "Q C"],
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """Algorithm 1's read; from a memory without facts, that of M₀."""
        queries = queries.astype(jnp.float32)
        asked = self.address(prepared, queries)
        mean = asked
        if state.outer is not None:
            found = dot(queries, state.outer)
            found = found if state.inner is None else dot(found, state.inner)
            # Addressed anew: where only the latent is asked for, `asked` is never computed.
            mean = jax.lax.cond(
                all_in_batch(state.written),
                lambda: found,
                lambda: jnp.where(state.written, found, self.address(prepared, queries)),
            )
        log_variance = self.log_variance(prepared, state, queries)
        weights = sample(mean, log_variance, rng)
        latent = jnp.where(
            state.written,
            dot(dot(weights, state.inverse), state.values),
            dot(weights, prepared.memory),
        )
        explained = dot(dot(asked, state.inverse), state.weights)
        return Reading(
            latent,
            mean,
            log_variance,
            share(jnp.sum(jnp.square(explained), axis=1), jnp.sum(jnp.square(asked), axis=1)),
        )

    def matrix(self, prepared: Prepared, state: DirectState) -> Float[Array, "K C"]:
        """M = W₀† Z, the least-squares memory of least norm; M₀ where no fact is left."""
        return jnp.where(state.written, dot(state.inverse, state.values), prepared.memory)

    def _factors(self, weights: Float[Array, "N K"], values: Float[Array, "N C"]):
        """W₀†, and the two factors of M† (see the head of this file)."""
        inverse = pinv(weights)
        if self.query == "prior":
            return inverse, None, None
        if weights.shape[0] > self.slots:  # M itself is now the thin matrix
            return inverse, pinv(dot(inverse, values)), None
        back = pinv(values)
        fitted, told = dot(weights, inverse), dot(values, back)  # Π, Π_Z
        ordinary = jnp.all(jnp.abs(fitted - told) <= _SAME)
        outer, inner = jax.lax.cond(
            all_in_batch(ordinary),
            lambda: (back, weights),
            lambda: (pinv(dot(fitted, values)), pinv(dot(inverse, told))),
        )
        return inverse, outer, inner
