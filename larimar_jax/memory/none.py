"""A control: nothing is ever written. A read is that of M₀: the query itself where K ≥ C."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from larimar_jax.linalg import dot
from larimar_jax.memory.base import Memory, Prepared, Reading, Sign, pytree, sample


@pytree
class NothingState:
    """refused: forgets, none of which found anything. count: always 0."""

    count: Int[Array, ""]
    refused: Int[Array, ""]


@pytree
class Nothing(Memory):
    """What every other memory has to beat."""

    STORES = False

    def empty(self, prepared: Prepared) -> NothingState:
        """Nothing."""
        return NothingState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def write(
        self,
        prepared: Prepared,
        state: NothingState,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> NothingState:
        """Counts the forgets."""
        signs = jnp.broadcast_to(jnp.asarray(sign, jnp.int32), keys.shape[:1])
        gone = jnp.sum((signs < 0) & jnp.any(keys != 0, axis=1)).astype(jnp.int32)
        return NothingState(state.count, state.refused + gone)

    def read(
        self,
        prepared: Prepared,
        state: NothingState,
        queries: Float[Array, "Q C"],
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """W M₀, with no confidence."""
        mean = self.address(prepared, queries)
        log_variance = self.log_variance(prepared, state, queries)
        latent = dot(sample(mean, log_variance, rng), prepared.memory)
        return Reading(latent, mean, log_variance, jnp.zeros(queries.shape[0], jnp.float32))

    def matrix(self, prepared: Prepared, state: NothingState) -> Float[Array, "K C"]:
        """M₀."""
        return prepared.memory
