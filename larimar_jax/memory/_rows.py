"""Facts kept as rows of weights and values: what `direct` and `dual` solve from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.memory.base import Memory, Prepared, Signs, State
from larimar_jax.memory.pytrees import Latents, Weights, pytree

# How far a recomputed fact may lie from the written one, relative to it, to be the one to forget:
# encoding a text in another batch shape moves it by 1e-6, a paraphrase by 1e-1.
MATCH = 1e-3


def matches(rows: Float[Array, "N n"], row: Float[Array, "n"]) -> Bool[Array, "N"]:
    """Return which rows are equal to a recomputed one."""
    distance = jnp.sum(jnp.square(rows - row), axis=1)
    return distance <= MATCH**2 * jnp.sum(jnp.square(row))


@pytree
class Rows(Memory):
    """A memory that is solved from all its facts; a variant defines `solve`.

    A later write adds its facts to those in the state (`weights` [N, K], `values` [N, C], `refused`):
    the memory is that of all of them, and arrays grow with every write (each number of facts compiles
    once). Forgetting zeroes the matching fact's row and leaves the shape; a fact written with noise
    matches no longer.
    """

    def solve(
        self, prepared: Prepared, weights: Weights, values: Latents, refused: Int[Array, ""]
    ) -> State:
        """Return the state of these facts; rows of zeros are none."""
        raise NotImplementedError(f"{type(self).__name__} does not solve for its rows")

    def empty(self, prepared: Prepared) -> State:
        """Return the state without facts: the memory is M₀."""
        weights = jnp.zeros((0, self.slots), jnp.float32)
        values = jnp.zeros((0, self.latent), jnp.float32)
        return self.solve(prepared, weights, values, jnp.zeros((), jnp.int32))

    def update(
        self, prepared: Prepared, state: State, keys: Latents, values: Latents, signs: Signs
    ) -> State:
        """Solve for all facts so far. In a batch of mixed signs the forgets go first, and act on what
        was there before the batch."""
        weights, values, alpha = self.address_facts(prepared, keys, values, signs)
        rows, refused = (state.weights, state.values), state.refused
        if not (isinstance(signs, int) and signs > 0):
            present, number = _forget(*rows, weights, values, alpha < 0)
            rows = tuple(jnp.where(present[:, None], row, 0.0) for row in rows)
            refused = refused + number
            if isinstance(signs, int):
                return self.solve(prepared, *rows, refused)
            weights, values = (jnp.where(alpha[:, None] > 0, row, 0.0) for row in (weights, values))
        rows = (jnp.concatenate(pair) for pair in zip(rows, (weights, values), strict=True))
        return self.solve(prepared, *rows, refused)


def _forget(
    weights: Weights,
    values: Latents,
    forgotten_weights: Float[Array, "G K"],
    forgotten_values: Float[Array, "G C"],
    is_forget: Bool[Array, "G"],
) -> tuple[Bool[Array, "N"], Int[Array, ""]]:
    """Return which of N facts stay when G are forgotten, and how many of the G were not there.

    One forget takes out one copy of its fact, so forgets act one after the other.
    """
    if weights.shape[0] == 0:
        return jnp.ones((0,), bool), jnp.sum(is_forget).astype(jnp.int32)

    def step(present, fact):
        weight, value, is_forget = fact
        match = present & matches(weights, weight) & matches(values, value) & is_forget
        first = jnp.arange(match.shape[0]) == jnp.argmax(match)
        return present & ~(match & first), is_forget & ~jnp.any(match)

    facts = (forgotten_weights, forgotten_values, is_forget)
    present, refused = jax.lax.scan(step, jnp.any(weights != 0, axis=1), facts)
    return present, jnp.sum(refused).astype(jnp.int32)
