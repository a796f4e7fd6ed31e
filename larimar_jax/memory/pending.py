"""The writes of a streaming memory since its last factorisation, one a row (rls.py).

They are not in its sums yet, so that one of them is forgotten by leaving its row out: α = +1 and α = −1
of one row add up to nothing. With the A and M that were solved for last, and the Cholesky factor L of
I + WA⁻¹Wᵀ, they move A⁻¹ along L⁻¹WA⁻¹ and M along that and L⁻¹(Z − WM).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.linalg import dot
from larimar_jax.memory.pytrees import Latents, Weights

# The squared distance of two rows, relative to their squared norm, up to which only rounding is between.
_SAME = 1e-11


class Pending(NamedTuple):
    """Writes, and rows of zeros behind them.

    weights: w. errors: z − wM₀, for the statistics. signs: 1 for a write, 0 for none. gains and
    innovations: g and z − wM before the write, each divided by √(1 + w g). inverse: L⁻¹. number: rows in
    use. trace: tr(Σ α WᵀW) of all facts.
    """

    weights: Float[Array, "R K"]
    errors: Float[Array, "R C"]
    signs: Float[Array, "R"]
    gains: Float[Array, "R K"]
    innovations: Float[Array, "R C"]
    inverse: Float[Array, "R R"]
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

    def refined(self, first: int | Int[Array, ""] = 0) -> "Pending":
        """Return the writes with innovations that make up for what rounding did to the gains of those
        from `first` on, once: it counts where keys are nearly alike and the ridge is small.

        WGᵀ of the gains G should be L − L⁻ᵀ. What its upper half is astray by, Δ, reads ΔI of the
        innovations I too much at the rows before: LI + ΔI for LI. I − L⁻¹ΔI has LI again.
        """
        upper = dot(self.weights * self.signs[:, None], self.gains.T) + self.inverse.T
        is_new = jnp.arange(len(upper)) >= first
        astray = dot(self.inverse, jnp.where(is_new, jnp.triu(upper, 1), 0.0))
        return self._replace(innovations=self.innovations - dot(astray, self.innovations))


def square(rows: Float[Array, "*R C"]) -> Float[Array, "*R"]:
    """Return the squared norms of rows."""
    return jnp.sum(jnp.square(rows), axis=-1)
