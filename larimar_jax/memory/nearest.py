"""A control: the value of the nearest key, as a key–value list reads (GRACE-like methods keep one)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.linalg import dot
from larimar_jax.memory._rows import matches
from larimar_jax.memory.base import Memory, Prepared, Signs
from larimar_jax.memory.pytrees import Latents, Weights, pytree


@pytree
class ListState:
    """K rows, those in use by `used`. count: facts in. refused: forgets of no written fact. overflow:
    facts for which no row was free, and which are not in the memory."""

    keys: Float[Array, "K C"]
    values: Float[Array, "K C"]
    used: Bool[Array, "K"]
    count: Int[Array, ""]
    refused: Int[Array, ""]
    overflow: Int[Array, ""]


@pytree
class Nearest(Memory):
    """At most K facts, each in a row of its own; a read is the value whose key has the largest cosine
    with the query, and the mean of equally near ones.

    Facts go into the first free row, one after the other; one for which no row is free is counted in
    `overflow` and left out. Forgetting frees the first row with that key and value.
    """

    SAME = "reads"

    def weigh(self, similarity: Float[Array, "Q K"], used: Bool[Array, "K"]) -> Weights:
        """Return the weights of the rows by cosine, one-hot; at least one row is in use."""
        similarity = jax.lax.stop_gradient(similarity)
        best = similarity >= jnp.max(similarity, axis=1, keepdims=True) - 1e-6
        best = (best & used[None, :]).astype(jnp.float32)
        return best / jnp.maximum(jnp.sum(best, axis=1, keepdims=True), 1.0)

    def empty(self, prepared: Prepared) -> ListState:
        """Return a list of free rows; a read is that of M₀."""
        rows, zero = jnp.zeros((self.slots, self.latent), jnp.float32), jnp.zeros((), jnp.int32)
        return ListState(rows, rows, jnp.zeros((self.slots,), bool), zero, zero, zero)

    def update(
        self, prepared: Prepared, state: ListState, keys: Latents, values: Latents, signs: Signs
    ) -> ListState:
        signs = jnp.broadcast_to(jnp.asarray(signs, jnp.int32), keys.shape[:1])
        signs = jnp.where(jnp.any(keys != 0, axis=1), signs, 0)
        facts = (keys, values, signs)
        return jax.lax.scan(lambda state, fact: (_step(state, *fact), None), state, facts)[0]

    def query_weights(self, prepared: Prepared, state: ListState, queries: Latents) -> Weights:
        """Return the weights of the rows; those of M_ref where nothing is written."""
        weights = self.weigh(_similarity(state, queries), state.used)
        return jnp.where(jnp.any(state.used), weights, self.address(prepared, queries))

    def confidence(
        self, prepared: Prepared, state: ListState, queries: Latents, weights: Weights
    ) -> Float[Array, "Q"]:
        """Return the cosine of the nearest key, at least 0."""
        return jnp.clip(jnp.max(_similarity(state, queries), axis=1), 0.0, 1.0)

    def matrix(self, prepared: Prepared, state: ListState) -> Float[Array, "K C"]:
        """Return the values in their rows; M₀ where nothing is written."""
        return jnp.where(jnp.any(state.used), state.values, prepared.prior_memory)


def _similarity(state: ListState, queries: Latents) -> Weights:
    """Return cosines between −1 and 1, 0 for rows of zeros; −2 for a row that is not in use."""

    def unit(rows):
        squared = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
        is_zero = squared == 0
        return jnp.where(is_zero, 0.0, rows / jnp.sqrt(jnp.where(is_zero, 1.0, squared)))

    cosines = dot(unit(queries.astype(jnp.float32)), unit(state.keys).T)
    return jnp.where(state.used[None, :], cosines, -2.0)


def _step(state: ListState, key, value, sign) -> ListState:
    is_write = sign > 0
    equal = state.used & matches(state.keys, key) & matches(state.values, value)
    candidates = jnp.where(is_write, ~state.used, equal)
    row, has_row = jnp.argmax(candidates), jnp.any(candidates)
    at = (jnp.arange(state.used.shape[0]) == row) & has_row & (sign != 0)
    return ListState(
        jnp.where(at[:, None], jnp.where(is_write, key, 0.0), state.keys),
        jnp.where(at[:, None], jnp.where(is_write, value, 0.0), state.values),
        jnp.where(at, is_write, state.used),
        state.count + jnp.where(has_row, sign, 0),
        state.refused + ((sign < 0) & ~has_row).astype(jnp.int32),
        state.overflow + (is_write & ~has_row).astype(jnp.int32),
    )
