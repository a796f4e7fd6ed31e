"""A list of facts as they were written: what the controls `nearest` and `hopfield` read from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from larimar_jax.linalg import dot
from larimar_jax.memory._rows import MATCH
from larimar_jax.memory.base import Memory, Prepared, Reading, Sign, observe, pytree, sample


@pytree
class ListState:
    """K rows, those in use by `used`. count: facts in. refused: forgets that found nothing. overflow:
    facts that found no row, and are not in the memory."""

    keys: Float[Array, "K C"]
    values: Float[Array, "K C"]
    used: Bool[Array, "K"]
    count: Int[Array, ""]
    refused: Int[Array, ""]
    overflow: Int[Array, ""]


def empty(slots: int, latent: int) -> ListState:
    """A list of `slots` free rows."""
    rows, zero = jnp.zeros((slots, latent), jnp.float32), jnp.zeros((), jnp.int32)
    return ListState(rows, rows, jnp.zeros((slots,), bool), zero, zero, zero)


def cosines(queries: Float[Array, "Q C"], keys: Float[Array, "K C"]) -> Float[Array, "Q K"]:
    """Between −1 and 1; 0 for rows of zeros."""

    def unit(rows):
        squared = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
        nothing = squared == 0
        return jnp.where(nothing, 0.0, rows / jnp.sqrt(jnp.where(nothing, 1.0, squared)))

    return dot(unit(queries.astype(jnp.float32)), unit(keys).T)


@pytree
class Listed(Memory):
    """A memory of at most K facts, each in a row of its own; says how a query weighs the rows.

    Facts go into the first free row, one after the other; one that finds none is counted in
    `overflow` and left out. Forgetting frees the first row with that key and value.
    """

    SAME = "reads"

    def weigh(self, similarity: Float[Array, "Q K"], used: Bool[Array, "K"]) -> Float[Array, "Q K"]:
        """Weights of the rows by cosine; at least one row is in use."""
        raise NotImplementedError(f"{type(self).__name__} does not weigh its rows")

    def empty(self, prepared: Prepared) -> ListState:
        """No facts; a read is that of M₀."""
        return empty(self.slots, self.latent)

    def write(
        self,
        prepared: Prepared,
        state: ListState,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> ListState:
        """Facts one by one, in their order."""
        keys, values = observe(keys, values, self.noise, rng)
        signs = jnp.broadcast_to(jnp.asarray(sign, jnp.int32), keys.shape[:1])
        signs = jnp.where(jnp.any(keys != 0, axis=1), signs, 0)
        return jax.lax.scan(lambda s, fact: (_one(s, *fact), None), state, (keys, values, signs))[0]

    def read(
        self,
        prepared: Prepared,
        state: ListState,
        queries: Float[Array, "Q C"],
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """Z_read = W M with the values as M. Confidence: the cosine of the nearest key, at least 0."""
        some = jnp.any(state.used)
        similarity = cosines(queries, state.keys)
        similarity = jnp.where(state.used[None, :], similarity, -2.0)
        found = self.weigh(similarity, state.used)
        mean = jnp.where(some, found, self.address(prepared, queries))
        log_variance = self.log_variance(prepared, state, queries)
        latent = dot(sample(mean, log_variance, rng), self.matrix(prepared, state))
        confidence = jnp.where(some, jnp.clip(jnp.max(similarity, axis=1), 0.0, 1.0), 0.0)
        return Reading(latent, mean, log_variance, confidence)

    def matrix(self, prepared: Prepared, state: ListState) -> Float[Array, "K C"]:
        """The values in their rows; M₀ where nothing is written."""
        return jnp.where(jnp.any(state.used), state.values, prepared.memory)


def _one(state: ListState, key, value, sign) -> ListState:
    def near(rows, row):
        apart = jnp.sum(jnp.square(rows - row), axis=1)
        return apart <= MATCH**2 * jnp.sum(jnp.square(row))

    same = state.used & near(state.keys, key) & near(state.values, value)
    wanted = jnp.where(sign > 0, ~state.used, same)
    row, there = jnp.argmax(wanted), jnp.any(wanted)
    at = (jnp.arange(state.used.shape[0]) == row) & there & (sign != 0)
    comes = sign > 0
    return ListState(
        jnp.where(at[:, None], jnp.where(comes, key, 0.0), state.keys),
        jnp.where(at[:, None], jnp.where(comes, value, 0.0), state.values),
        jnp.where(at, comes, state.used),
        state.count + jnp.where(there, sign, 0),
        state.refused + ((sign < 0) & ~there).astype(jnp.int32),
        state.overflow + (comes & ~there).astype(jnp.int32),
    )
