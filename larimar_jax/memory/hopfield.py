"""A control: softmax attention over a list of facts, the read of a modern Hopfield network
(Ramsauer et al. 2020)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from larimar_jax.memory._list import Listed
from larimar_jax.memory.base import Real, pytree


@pytree
class Hopfield(Listed):
    """Weights are softmax(β · cosine) over the rows in use.

    beta: β, the inverse temperature: towards infinity it is `nearest`, at 0 the mean of all values.
    """

    beta: Real = dataclasses.field(default=32.0, kw_only=True)

    def weigh(self, similarity: Float[Array, "Q K"], used: Bool[Array, "K"]) -> Float[Array, "Q K"]:
        """The softmax."""
        scores = jnp.where(used[None, :], self.beta * similarity, -jnp.inf)
        # Where no row is in use nothing is weighed, and the weights are never looked at.
        scores = jnp.where(jnp.any(used), scores, 0.0)
        return jax.nn.softmax(scores, axis=1)
