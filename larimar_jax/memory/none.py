"""A control: nothing is ever written. A read is that of M₀: the query itself where K ≥ C."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from larimar_jax.memory.base import Memory, Prepared, Signs
from larimar_jax.memory.pytrees import Latents, Weights, pytree


@pytree
class NothingState:
    """refused: forgets, all of which are refused. count: always 0."""

    count: Int[Array, ""]
    refused: Int[Array, ""]


@pytree
class Nothing(Memory):
    """What every memory has to beat."""

    STORES = False
    FORGETS = False

    def empty(self, prepared: Prepared) -> NothingState:
        return NothingState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        self, prepared: Prepared, state: NothingState, keys: Latents, values: Latents, signs: Signs
    ) -> NothingState:
        signs = self.address_facts(prepared, keys, values, signs)[2]
        return NothingState(state.count, state.refused + jnp.sum(signs < 0).astype(jnp.int32))

    def matrix(self, prepared: Prepared, state: NothingState) -> Float[Array, "K C"]:
        return prepared.prior_memory

    def residual(self, prepared: Prepared, state: NothingState, weights: Weights) -> Weights:
        """Return the weights: no key is written that would explain them."""
        return weights
