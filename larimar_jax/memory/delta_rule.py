"""A control: fast weights, written by the delta rule one fact after the other.

    M ← M + η wᵀ(z − wM) / ‖w‖²

A step of gradient descent on the fact alone (normalised least mean squares), where the other memories
solve for all facts: the last fact is read back exactly for η = 1, earlier ones are partly overwritten.
Forgetting writes what M₀ would read there, which is not what was there before.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from larimar_jax.linalg import dot
from larimar_jax.memory.base import (
    Memory,
    Prepared,
    Reading,
    Real,
    Sign,
    observe,
    pytree,
    sample,
    share,
)


@pytree
class DeltaRuleState:
    """solution: M. left: Π(I − η wᵀw/‖w‖²) [K, K], what writing has left of M₀. count: facts in.
    refused: always 0: fast weights cannot tell what was written."""

    solution: Float[Array, "K C"]
    left: Float[Array, "K K"]
    count: Int[Array, ""]
    refused: Int[Array, ""]


@pytree
class DeltaRule(Memory):
    """Fast weights. rate: η, in (0, 2) or they diverge."""

    SAME = "nothing"

    rate: Real = dataclasses.field(default=1.0, kw_only=True)

    def empty(self, prepared: Prepared) -> DeltaRuleState:
        """M₀."""
        zero = jnp.zeros((), jnp.int32)
        return DeltaRuleState(prepared.memory, jnp.eye(self.slots, dtype=jnp.float32), zero, zero)

    def write(
        self,
        prepared: Prepared,
        state: DeltaRuleState,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> DeltaRuleState:
        """One step for each fact, in their order."""
        keys, values = observe(keys, values, self.noise, rng)
        weights = self.address(prepared, keys)
        signs = jnp.broadcast_to(jnp.asarray(sign, jnp.int32), keys.shape[:1])

        def one(state: DeltaRuleState, fact):
            w, z, sign = fact
            size = jnp.sum(jnp.square(w))
            step = jnp.where(
                (size > 0) & (sign != 0), self.rate / jnp.where(size > 0, size, 1.0), 0.0
            )
            wanted = jnp.where(sign > 0, z, dot(w, prepared.memory))
            change = step * w[:, None]
            kept = state.left - change * dot(w, state.left)[None, :]
            undone = state.left + change * (w - dot(w, state.left))[None, :]
            return DeltaRuleState(
                state.solution + change * (wanted - dot(w, state.solution))[None, :],
                jnp.where(sign > 0, kept, undone),
                state.count + jnp.where(size > 0, sign, 0),
                state.refused,
            ), None

        return jax.lax.scan(one, state, (weights, values, signs))[0]

    def read(
        self,
        prepared: Prepared,
        state: DeltaRuleState,
        queries: Float[Array, "Q C"],
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """Z_read = W M. Confidence: how much of the query's weights no longer reads M₀."""
        mean = self.address(prepared, queries)
        log_variance = self.log_variance(prepared, state, queries)
        latent = dot(sample(mean, log_variance, rng), state.solution)
        squared = jnp.sum(jnp.square(mean), axis=1)
        left = jnp.sum(jnp.square(dot(mean, state.left)), axis=1)
        return Reading(latent, mean, log_variance, share(squared - left, squared))

    def matrix(self, prepared: Prepared, state: DeltaRuleState) -> Float[Array, "K C"]:
        """M."""
        return state.solution
