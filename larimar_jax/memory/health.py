"""What can be said about a streaming memory from its statistics alone: is it exact, and is it full?

Nothing here needs the facts. Distances to the memory that a fresh solve would give are estimated with a
few random vectors ω: E‖Xω‖² = ‖X‖² for every matrix X, so that A⁻¹(B − μM₀ − A(M − M₀))ω, a product
with the residual and two with the inverse, stands for M's distance to its own definition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.linalg import (
    add_ridge,
    condition,
    dot,
    factor_solve,
    lower_inverse,
    spd_quadratic,
)
from larimar_jax.memory.base import Prepared, compiled, share
from larimar_jax.memory.streaming import Streaming, StreamingState

# Random vectors of an estimate: its standard error is a fifth.
_PROBES = 16
# The predicted error of a read, relative to what was to be learned, from which a memory counts as full:
# half of its energy is then lost.
FULL = 0.7


class Health(NamedTuple):
    """count: facts in. condition: an estimate of κ(A). distance: relative distance of M to a fresh
    solve. load: the degrees of freedom that are taken, tr(A⁻¹ Σ α WᵀW) / K, in [0, 1]. error: the
    relative error to be expected of reading a written fact by a query with noise ρ. full: whether that
    is above `FULL`.
    """

    count: Int[Array, ""]
    condition: Float[Array, ""]
    distance: Float[Array, ""]
    load: Float[Array, ""]
    error: Float[Array, ""]
    full: Bool[Array, ""]


class Certainty(NamedTuple):
    """How sure a read is, each [Q]. leverage: h = w A⁻¹ wᵀ, small where many facts speak and large where
    none does. variance: of each number of the readout, s²(1 + h), for M − M₀ ~ N(0, s²/λ) and the s²
    that makes what is written likeliest, J / NC. distance: ‖w − w G A⁻¹‖ / ‖w‖, to the
    span of the written keys, from near 0 for a written key to 1 for a query that no fact is about."""

    leverage: Float[Array, "Q"]
    variance: Float[Array, "Q"]
    distance: Float[Array, "Q"]


class Certificate(NamedTuple):
    """What a forget leaves. distance: relative distance of M to the memory of the facts that are left,
    which is the one that never saw the fact if the fact was in. leverage: the share of the key's weights
    that the facts still in explain: 0 where none is about it. refused: whether the memory is as it was,
    because the statistics show that the fact was not in (`Streaming.possible`).
    """

    distance: Float[Array, ""]
    leverage: Float[Array, ""]
    refused: Bool[Array, ""]


@compiled
def health(memory: Streaming, prepared: Prepared, state: StreamingState) -> Health:
    """The state's health, in the time of a few reads and one triangular inverse."""
    gram = state.gram.total()
    shrink = memory.shrink(gram)
    ridge = memory.ridge + shrink
    inverse = lower_inverse(state.factor)
    taken = memory.slots - ridge * jnp.sum(jnp.square(inverse))
    left = jnp.maximum(memory.unexplained(prepared, state), 0.0)
    spread = shrink * jnp.sum(jnp.square(state.solution))
    wanted = state.energy.total()[0, 0]
    error = jnp.sqrt(share((left + spread)[None], wanted[None]))[0]
    return Health(
        state.count,
        condition(state.factor),
        distance(memory, prepared, state),
        taken / memory.slots,
        error,
        error > FULL,
    )


@compiled
def certainty(
    memory: Streaming, prepared: Prepared, state: StreamingState, queries: Float[Array, "Q C"]
) -> Certainty:
    """How sure the readouts of these queries are."""
    weights = memory.address(prepared, queries)
    gram = state.gram.total()
    ridge = memory.ridge + memory.shrink(gram)
    leverage = spd_quadratic(add_ridge(gram, ridge), state.factor, weights)
    facts = jnp.maximum(state.count, 1).astype(jnp.float32)
    noise = jnp.maximum(memory.objective(prepared, state), 0.0) / (facts * memory.latent)
    return Certainty(
        leverage,
        noise * (1.0 + leverage),
        jnp.sqrt(1.0 - _claimed(memory, state, weights)),
    )


@compiled
def distance(memory: Streaming, prepared: Prepared, state: StreamingState) -> Float[Array, ""]:
    """‖M − M*‖ / ‖M*‖, estimated: M* is the exact solution of the statistics, whose factor the state
    holds (as after `write` and `solve`; `accumulate` leaves an old one).

    Below about 1e-7 κ(A) it is the rounding of a solve, which a fresh one would have as well.
    """
    probes = jax.random.normal(jax.random.key(0), (memory.latent, _PROBES), jnp.float32)
    shrink = memory.shrink(state.gram.total())
    moved = dot(state.solution - prepared.memory, probes)
    # The two halves of the sums apart: their total would be rounded to what is to be measured.
    right = dot(state.cross.high, probes) + dot(state.cross.low, probes)
    right = right - shrink * dot(prepared.memory, probes)
    left = dot(state.gram.high, moved) + dot(state.gram.low, moved)
    residual = right - left - (memory.ridge + shrink) * moved
    missed = factor_solve(state.factor, residual)
    return jnp.linalg.norm(missed) / jnp.sqrt(float(_PROBES)) / jnp.linalg.norm(state.solution)


@compiled
def forget(
    memory: Streaming,
    prepared: Prepared,
    state: StreamingState,
    keys: Float[Array, "N C"],
    values: Float[Array, "N C"],
) -> tuple[StreamingState, Certificate]:
    """Takes facts out (`write` with α = −1), and certifies it. The leverage is that of the first key."""
    after = memory.write(prepared, state, keys, values, -1)
    return after, Certificate(
        distance(memory, prepared, after),
        leverage(memory, prepared, after, keys[:1])[0],
        after.refused > state.refused,
    )


@compiled
def leverage(
    memory: Streaming, prepared: Prepared, state: StreamingState, keys: Float[Array, "N C"]
) -> Float[Array, "N"]:
    """The share of each key's weights that the facts in the memory explain."""
    return _claimed(memory, state, memory.address(prepared, keys))


def _claimed(
    memory: Streaming, state: StreamingState, weights: Float[Array, "Q K"]
) -> Float[Array, "Q"]:
    """The share of each row's squared weights that written keys explain."""
    gram = state.gram.total()
    left = (memory.ridge + memory.shrink(gram)) * factor_solve(state.factor, weights.T)
    squared = jnp.sum(jnp.square(weights), axis=1)
    return share(squared - jnp.sum(jnp.square(left), axis=0), squared)
