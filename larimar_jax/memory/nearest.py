"""A control: the value of the nearest key, as a key–value list reads (GRACE-like methods keep one)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from larimar_jax.memory._list import Listed
from larimar_jax.memory.base import pytree


@pytree
class Nearest(Listed):
    """Reads the value whose key has the largest cosine with the query; equal ones share it."""

    def weigh(self, similarity: Float[Array, "Q K"], used: Bool[Array, "K"]) -> Float[Array, "Q K"]:
        """One-hot."""
        similarity = jax.lax.stop_gradient(similarity)
        best = similarity >= jnp.max(similarity, axis=1, keepdims=True) - 1e-6
        best = (best & used[None, :]).astype(jnp.float32)
        return best / jnp.maximum(jnp.sum(best, axis=1, keepdims=True), 1.0)
