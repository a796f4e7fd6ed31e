"""A control: fast weights, written by the delta rule one fact after the other.

    M ← M + η wᵀ(z − wM) / ‖w‖²

A step of gradient descent on the fact alone (normalised least mean squares), where the other memories
solve for all facts: the last fact is read back exactly for η = 1, earlier ones are partly overwritten.
Forgetting writes what M₀ would read there, which is not what was there before.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from larimar_jax.linalg import dot
from larimar_jax.memory.base import Memory, Prepared, Signs
from larimar_jax.memory.pytrees import Latents, Real, Weights, pytree


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
        zero, identity = jnp.zeros((), jnp.int32), jnp.eye(self.slots, dtype=jnp.float32)
        return DeltaRuleState(prepared.prior_memory, identity, zero, zero)

    def update(
        self,
        prepared: Prepared,
        state: DeltaRuleState,
        keys: Latents,
        values: Latents,
        signs: Signs,
    ) -> DeltaRuleState:

        def step(state: DeltaRuleState, fact):
            w, z, sign = fact
            size = jnp.sum(jnp.square(w))
            rate = jnp.where(sign != 0, self.rate / jnp.where(size > 0, size, 1.0), 0.0)
            target = jnp.where(sign > 0, z, dot(w, prepared.prior_memory))
            change = rate * w[:, None]
            # A write leaves less of M₀; a forget brings it back.
            left = jnp.where(sign > 0, 0.0, w) - dot(w, state.left)
            return DeltaRuleState(
                state.solution + change * (target - dot(w, state.solution))[None, :],
                state.left + change * left[None, :],
                state.count + sign.astype(jnp.int32),
                state.refused,
            ), None

        return jax.lax.scan(step, state, self.address_facts(prepared, keys, values, signs))[0]

    def matrix(self, prepared: Prepared, state: DeltaRuleState) -> Float[Array, "K C"]:
        return state.solution

    def residual(self, prepared: Prepared, state: DeltaRuleState, weights: Weights) -> Weights:
        """Return the part of the query's weights that still reads M₀."""
        return dot(weights, state.left)
