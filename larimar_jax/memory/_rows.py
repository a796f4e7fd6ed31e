"""Facts kept as rows of weights and values: what `direct` and `dual` solve from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from larimar_jax.memory.base import Memory, Prepared, Sign, State, observe, pytree

# How far a recomputed fact may lie from the written one, relative to it, to be the one to forget:
# encoding a text in another batch shape moves it by 1e-6, a paraphrase by 1e-1.
MATCH = 1e-3


@pytree
class Rows(Memory):
    """A memory that is solved from all its facts; says what it makes of them.

    A later write adds its facts to those in the state (`weights` [N, K], `values` [N, C], `refused`):
    the memory is that of all of them, and arrays grow with every write (each number of facts compiles
    once). Forgetting zeroes the matching fact's row and leaves the shape; a fact written with noise can
    not be found again.
    """

    def solve(
        self,
        prepared: Prepared,
        weights: Float[Array, "N K"],
        values: Float[Array, "N C"],
        refused: Int[Array, ""],
    ) -> State:
        """The state of these facts; rows of zeros are none."""
        raise NotImplementedError(f"{type(self).__name__} does not solve for its rows")

    def empty(self, prepared: Prepared) -> State:
        """No facts: the memory is M₀."""
        weights = jnp.zeros((0, self.slots), jnp.float32)
        values = jnp.zeros((0, self.latent), jnp.float32)
        return self.solve(prepared, weights, values, jnp.zeros((), jnp.int32))

    def write(
        self,
        prepared: Prepared,
        state: State,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> State:
        """Solves for all facts so far. In a batch of mixed signs the forgets go first, and act on what
        was there before the batch."""
        keys, values = observe(keys, values, self.noise, rng)
        weights = self.address(prepared, keys)
        old_weights, old_values, refused = state.weights, state.values, state.refused
        if not (isinstance(sign, int) and sign > 0):
            signs = jnp.broadcast_to(jnp.asarray(sign, jnp.int32), keys.shape[:1])
            keep, lost = _forget(old_weights, old_values, weights, values, signs < 0)
            old_weights, old_values = (
                jnp.where(keep[:, None], facts, 0.0) for facts in (old_weights, old_values)
            )
            refused = refused + lost
            if isinstance(sign, int):
                return self.solve(prepared, old_weights, old_values, refused)
            weights, values = (
                jnp.where(signs[:, None] > 0, facts, 0.0) for facts in (weights, values)
            )
        return self.solve(
            prepared,
            jnp.concatenate([old_weights, weights]),
            jnp.concatenate([old_values, values]),
            refused,
        )


def _forget(
    weights: Float[Array, "N K"],
    values: Float[Array, "N C"],
    gone_weights: Float[Array, "G K"],
    gone_values: Float[Array, "G C"],
    active: Bool[Array, "G"],
) -> tuple[Bool[Array, "N"], Int[Array, ""]]:
    """Which of the N facts stay when G are forgotten, and how many of the G were not there.

    One forget takes out one copy of its fact, so forgets look one after the other.
    """
    if weights.shape[0] == 0:
        return jnp.ones((0,), bool), jnp.sum(active & jnp.any(gone_weights != 0, axis=1)).astype(
            jnp.int32
        )

    def close(facts, fact):
        return jnp.sum(jnp.square(facts - fact), axis=1) <= MATCH**2 * jnp.sum(jnp.square(fact))

    def step(keep, gone):
        weight, value, wanted = gone
        wanted = wanted & jnp.any(weight != 0)
        match = keep & close(weights, weight) & close(values, value) & wanted
        first = jnp.argmax(match)
        keep = keep & ~(match & (jnp.arange(match.shape[0]) == first))
        return keep, wanted & ~jnp.any(match)

    present = jnp.any(weights != 0, axis=1)
    keep, lost = jax.lax.scan(step, present, (gone_weights, gone_values, active))
    return keep, jnp.sum(lost).astype(jnp.int32)
