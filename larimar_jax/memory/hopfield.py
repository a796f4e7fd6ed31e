"""A control: softmax attention over a list of facts, the read of a modern Hopfield network
(Ramsauer et al. 2020)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from larimar_jax.memory.nearest import Nearest
from larimar_jax.memory.pytrees import Real, Weights, pytree


@pytree
class Hopfield(Nearest):
    """The list of `nearest`, read with weights softmax(β · cosine) over the rows in use.

    beta: β, the inverse temperature: towards infinity it is `nearest`, at 0 the mean of all values.
    """

    beta: Real = dataclasses.field(default=32.0, kw_only=True)

    def weigh(self, similarity: Float[Array, "Q K"], used: Bool[Array, "K"]) -> Weights:
        scores = jnp.where(used[None, :], self.beta * similarity, -jnp.inf)
        # Where no row is in use the weights are not used, and have to be finite.
        scores = jnp.where(jnp.any(used), scores, 0.0)
        return jax.nn.softmax(scores, axis=1)
