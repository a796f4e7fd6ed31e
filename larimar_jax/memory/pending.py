"""The writes of a streaming memory since its last factorisation, one a row (rls.py).

They are not in its sums yet, so that one of them is forgotten by leaving its row out: α = +1 and α = −1
of one row add up to nothing. With the A and M that were solved for last, and the Cholesky factor L of
I + WA⁻¹Wᵀ, they move A⁻¹ along L⁻¹WA⁻¹ and M along that and L⁻¹(Z − WM).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.linalg import dot, solve_lower
from larimar_jax.memory.pytrees import Latents, Weights

# The squared distance of two rows, relative to their squared norm, up to which only rounding is between.
_SAME = 1e-11


class Pending(NamedTuple):
    """Writes, and rows of zeros behind them.

    weights: w. errors: z − wM₀, for the statistics. signs: 1 for a write, 0 for none. gains and
    innovations: g and z − wM before the write, each divided by √(1 + w g). residuals: z − wM of the M
    that was solved for. number: rows in use. trace: tr(Σ α WᵀW) of all facts.
    """

    weights: Float[Array, "R K"]
    errors: Float[Array, "R C"]
    signs: Float[Array, "R"]
    gains: Float[Array, "R K"]
    innovations: Float[Array, "R C"]
    residuals: Float[Array, "R C"]
    number: Int[Array, ""]
    trace: Float[Array, ""]

    def signs_without(
        self, weights: Weights, errors: Latents, signs: Float[Array, "N"]
    ) -> tuple[Float[Array, "R"], Bool[Array, "N"]]:
        """Return the signs of the rows that are left without N of them, and whether each was there; one
        of sign 0 is padding."""

        def take(left, row):
            weight, error, sign = row
            apart = square(self.weights - weight) + square(self.errors - error)
            nearest = jnp.argmin(jnp.where(left > 0, apart, jnp.inf))
            size = square(weight) + square(error)
            is_in = (left[nearest] > 0) & (apart[nearest] <= _SAME * size)
            return left.at[nearest].add(-jnp.where(is_in, sign, 0.0)), is_in | (sign == 0)

        return jax.lax.scan(take, self.signs, (weights, errors, signs))

    def refined(self) -> "Pending":
        """Return these writes with what rounding left of them solved for once more: keys that are nearly
        alike, and little ridge, need it.

        WGᵀ of the gains G is L − L⁻ᵀ, and X = L⁻ᵀI of the innovations I what a read at each row misses:
        the solution of (I + WA⁻¹Wᵀ)X = Z − WM, which is X + WGᵀI in the terms of a read.
        """
        moved = dot(self.weights * self.signs[:, None], self.gains.T)
        half = 0.5 * jnp.diagonal(moved)
        factor = jnp.tril(moved, -1) + jnp.diag(half + jnp.sqrt(jnp.square(half) + 1.0))
        missed = solve_lower(factor, self.innovations.T, transposed=False).T
        left = self.residuals * self.signs[:, None] - missed - dot(moved, self.innovations)
        return self._replace(innovations=self.innovations + solve_lower(factor, left.T).T)


def square(rows: Float[Array, "*R C"]) -> Float[Array, "*R"]:
    """Return the squared norms of rows."""
    return jnp.sum(jnp.square(rows), axis=-1)
