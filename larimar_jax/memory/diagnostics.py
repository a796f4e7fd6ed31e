"""Diagnostics of a streaming memory from its statistics alone: is it exact, and is it full?

Nothing here needs the facts. Distances to the memory that a fresh solve would give are estimated with a
few random vectors ω: E‖Xω‖² = ‖X‖² for every matrix X, so that A⁻¹(B − μM₀ − A(M − M₀))ω, a product
with the residual and two with the inverse, stands for M's distance to its own definition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.linalg import condition, dot, factor_solve, lower_inverse, solve_lower
from larimar_jax.memory.base import Prepared, share
from larimar_jax.memory.compensated import product_of_few
from larimar_jax.memory.pending import Pending
from larimar_jax.memory.pytrees import Latents
from larimar_jax.memory.streaming import Streaming, StreamingState

# Random vectors of an estimate: its standard error is a fifth.
_PROBES = 16
# The expected error of a read, relative to what was to be learned, from which a memory counts as full:
# half of its energy is then lost.
FULL = 0.7


class Diagnostics(NamedTuple):
    """count: facts in. condition: an estimate of κ(A). distance: relative distance of M to a fresh
    solve. load: the share of the degrees of freedom in use, tr(A⁻¹ Σ α WᵀW) / K, in [0, 1]. error: the
    expected relative error of reading a written fact by a query with noise ρ. full: whether that is
    above `FULL`.
    """

    count: Int[Array, ""]
    condition: Float[Array, ""]
    distance: Float[Array, ""]
    load: Float[Array, ""]
    error: Float[Array, ""]
    full: Bool[Array, ""]


class Certainty(NamedTuple):
    """How certain a read is, each [Q]. leverage: h = w A⁻¹ wᵀ, small where many facts are about the
    query and large where none is. variance: of each number of the readout, s²(1 + h), for
    M − M₀ ~ N(0, s²/λ) and the s² of largest likelihood, J / NC. distance: ‖w − w G A⁻¹‖ / ‖w‖, to the
    span of the written keys, from near 0 for a written key to 1 for a query that no fact is about."""

    leverage: Float[Array, "Q"]
    variance: Float[Array, "Q"]
    distance: Float[Array, "Q"]


class Certificate(NamedTuple):
    """The certificate of a forget. distance: relative distance of M to the memory of the facts that are
    left, which is the one that never saw the fact if the fact was in. leverage: the share of the key's
    weights that the facts still in explain: 0 where none is about it. refused: whether the memory is as
    it was, because the statistics show that the fact was not in (`Streaming.is_consistent`).
    """

    distance: Float[Array, ""]
    leverage: Float[Array, ""]
    refused: Bool[Array, ""]


@jax.jit
def diagnose(memory: Streaming, prepared: Prepared, state: StreamingState) -> Diagnostics:
    """Return the diagnostics of a state, in the time of a few reads and one triangular inverse."""
    gram = state.gram.total()
    shrink = memory.shrink(gram)
    free = (memory.ridge + shrink) * jnp.sum(jnp.square(lower_inverse(state.factor)))
    unexplained = jnp.maximum(memory.unexplained(prepared, state), 0.0)
    spread = shrink * jnp.sum(jnp.square(state.solution))
    error = jnp.sqrt(share((unexplained + spread)[None], state.energy.total()[0]))[0]
    return Diagnostics(
        state.count,
        condition(state.factor),
        distance(memory, prepared, state),
        (memory.slots - free) / memory.slots,
        error,
        error > FULL,
    )


@jax.jit
def certainty(
    memory: Streaming, prepared: Prepared, state: StreamingState, queries: Latents
) -> Certainty:
    """Return how certain the readouts of these queries are."""
    weights = memory.address(prepared, queries)
    leverage = jnp.sum(jnp.square(solve_lower(state.factor, weights)), axis=1)
    facts = jnp.maximum(state.count, 1).astype(jnp.float32)
    noise = jnp.maximum(memory.objective(prepared, state), 0.0) / (facts * memory.latent)
    explained = memory.confidence(prepared, state, queries, weights)
    return Certainty(leverage, noise * (1.0 + leverage), jnp.sqrt(1.0 - explained))


@jax.jit
def distance(
    memory: Streaming, prepared: Prepared, state: StreamingState, pending: Pending | None = None
) -> Float[Array, ""]:
    """Estimate ‖M − M*‖ / ‖M*‖: M* is the exact solution of the statistics, whose factor the state
    holds (as after `update` and `solve`; `accumulate` leaves a stale one). Below about 1e-7 κ(A) it
    is the rounding of a solve, which a fresh one would have as well.

    Args:
      pending: writes since the state was solved (memory/rls.py), which M and M* then have as well.
    """
    # A constant: drawn in the program, they are drawn again in each product.
    probes = np.random.default_rng(0).standard_normal((memory.latent, _PROBES), np.float32)
    probes = jnp.asarray(probes)
    change = dot(state.solution - prepared.prior_memory, probes)
    if pending is not None:
        change = change + dot(pending.gains.T, dot(pending.innovations, probes))
    before = dot(prepared.prior_memory, probes)
    # Halves of sums and parts of products apart: rounded together they would hide what is measured.
    right, more = product_of_few(state.cross.high, probes)
    left, less = product_of_few(state.gram.high, change)
    low = dot(state.cross.low, probes) - dot(state.gram.low, change)
    low = low - memory.shrink(state.gram.total()) * before
    residual = right - left + (more - less + low - memory.total_ridge(state) * change)
    if pending is not None:
        unexplained = dot(pending.errors, probes) - dot(pending.weights, change)
        residual = residual + dot(pending.weights.T, unexplained)
    error = factor_solve(state.factor, residual)
    if pending is not None:
        error = error - dot(pending.gains.T, dot(pending.gains, residual))
    return jnp.linalg.norm(error) / jnp.linalg.norm(before + change)


@jax.jit
def certify(
    memory: Streaming,
    prepared: Prepared,
    before: StreamingState,
    after: StreamingState,
    keys: Latents,
    pending: Pending | None = None,
) -> Certificate:
    """Certify the forget of facts with these keys; the leverage is that of the first one.

    Args:
      pending: as in `distance`, of the memory after it.
    """
    weights = memory.address(prepared, keys[:1])
    left = memory.residual(prepared, after, weights)
    if pending is not None:
        shares = dot(dot(weights, pending.gains.T), pending.gains)
        left = left - memory.total_ridge(after) * shares
    whole, rest = (jnp.sum(jnp.square(rows), axis=1) for rows in (weights, left))
    apart, is_refused = distance(memory, prepared, after, pending), after.refused > before.refused
    return Certificate(apart, share(whole - rest, whole)[0], is_refused)


def forget(
    memory: Streaming, prepared: Prepared, state: StreamingState, keys: Latents, values: Latents
) -> tuple[StreamingState, Certificate]:
    """Forget facts, and certify it."""
    after = memory.forget(prepared, state, keys, values)
    return after, certify(memory, prepared, state, after, keys)
