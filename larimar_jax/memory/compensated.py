"""Sums in about twice float32, and the statistics of least squares added up in them.

A fact that is written in one batch and forgotten in another must leave nothing behind, after a million
others: neither the product of a batch nor adding it to a sum may round as float32 does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from larimar_jax.linalg import dot


class Sum(NamedTuple):
    """A sum in about twice float32: `high` is the rounded total, `low` what rounding left."""

    high: Float[Array, "k C"]
    low: Float[Array, "k C"]

    def total(self) -> Float[Array, "K C"]:
        """Return the sum as one float32 matrix."""
        return self.high + self.low

    def plus(self, term: Float[Array, "K C"]) -> "Sum":
        """Return the sum with one more term, whose rounding goes into `low`."""
        high, error = _two_sum(self.high, term)
        return Sum(high, self.low + error)


def zero_sum(rows: int, columns: int) -> Sum:
    """Return the empty sum."""
    return Sum(jnp.zeros((rows, columns), jnp.float32), jnp.zeros((rows, columns), jnp.float32))


def _two_sum(a, b):
    """Add as Knuth, error-free: a + b = total + error exactly, without comparing magnitudes."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def rank_update(
    sums: tuple[Sum, Sum],
    weights: Float[Array, "N K"],
    errors: Float[Array, "N C"],
    sign: Float[Array, "N"],
    rows: Float[Array, "N k"] | None = None,
) -> tuple[Sum, Sum]:
    """Add Σᵢ sᵢ wᵢᵀwᵢ and Σᵢ sᵢ wᵢᵀeᵢ over N facts, sᵢ ∈ {−1, 0, 1}, to the statistics of least
    squares (Eq. 3). rows: the weights of the k slots whose rows of the sums are here; default all.

    What rounds in the product of 100 facts is a hundredth of what rounds in one matmul (a tenth for
    3,000), and adding it to what was there loses nothing. So a million facts do not drift that are
    written in one batch and forgotten in another, however large the sums have grown in between.
    """
    signed = (weights if rows is None else rows) * sign[:, None]
    gram, cross = sums
    for_gram, for_cross = product(signed, weights), product(signed, errors)
    for part in for_gram:
        gram = gram.plus(part)
    for part in for_cross:
        cross = cross.plus(part)
    return gram, cross


def product(left: Float[Array, "N K"], right: Float[Array, "N C"]):
    """Return leftᵀ right as two matrices to be added up: the product of the leading bits, which is
    exact (sums of integers below 2²⁴), and all the rest."""
    left_coarse, right_coarse = _coarse(left, len(left)), _coarse(right, len(left))
    rest = dot(
        jnp.concatenate([left_coarse, left - left_coarse]).T,
        jnp.concatenate([right - right_coarse, right]),
    )
    return dot(left_coarse.T, right_coarse), rest


def product_of_few(matrix: Float[Array, "K N"], right: Float[Array, "N C"]):
    """Return `matrix` right as `product` does, for few columns: the matrix is read once."""
    coarse, right_coarse = _coarse(matrix, len(right)), _coarse(right, len(right))
    both = dot(coarse, jnp.concatenate([right_coarse, right - right_coarse], axis=1))
    exact, rest = jnp.split(both, 2, axis=1)
    return exact, rest + dot(matrix - coarse, right)


def _coarse(rows: Float[Array, "R C"], terms: int) -> Float[Array, "R C"]:
    """Return the leading bits of all numbers on one grid, as many as a sum of so many products holds
    exactly; a constant to differentiation."""
    rows = jax.lax.stop_gradient(rows)
    bits = max(1, (24 - max(0, terms - 1).bit_length()) // 2)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(rows), initial=0.0))
    # Numbers below 2⁻¹⁰⁰ have no leading bits: their grid's inverse would overflow.
    grid = jnp.ldexp(jnp.float32(1.0), jnp.maximum(exponent, -100) - bits)
    return jnp.round(rows / grid) * grid
