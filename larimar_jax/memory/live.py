"""A streaming memory that changes all the time: one fact in or out in O(K² + KC).

`Streaming.write` solves for M anew, which is exact and costs a factorisation. Here a fact moves M along
its own gain (recursive least squares, Eq. 4),

    g = A⁻¹wᵀ,   M ← M + α g (z − wM) / (1 + α w g),   A⁻¹ ← A⁻¹ − α g gᵀ / (1 + α w g)

and A⁻¹ is never formed: it is the inverse of the last factor, less the gains since then. What rounding
does to M is not fed back into the statistics, which stay exact sums, and M is solved anew from them
before it matters: after `RECENT` facts, where 1 + α w g is small (a fact is forgotten that nothing else
supports: the difference cancels), where μ changes its level, or where A is so ill-conditioned that no
gain can be trusted.

    now = live.begin(memory, prior, state)
    now, steps = live.stream(memory, prior, now, keys, values, signs)       # T facts, one by one
    latent = live.read(memory, prior, now, queries)
    state = live.settle(memory, prior, now)
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.linalg import (
    add_ridge,
    cholesky,
    condition_of_inverse,
    dot,
    factor_solve,
    is_positive_definite,
    lower_inverse,
    rank_update,
)
from larimar_jax.memory.contract import Prior, Sign, pytree
from larimar_jax.memory.streaming import Streaming, StreamingState

# Facts between two factorisations at the most.
RECENT = 64
# Relative error of M that streaming may add. One fact adds CANCELLED · κ / support, which for K = 512 is
# ten times what it was measured to add for κ from 3 to 2e4, and ROUNDING.
DRIFT, CANCELLED, ROUNDING = 3e-5, 1e-9, 3e-8


@pytree
class Live:
    """A streaming memory whose M is up to date.

    state: its statistics are up to date, its factor and solution are not (`settle`). solution: M.
    inverse: L⁻¹ of the factor of the last refresh. gains: g of the facts since then, one a row;
    scales: α / (1 + α w g) of each, 0 where there is none. pending: how many. shrink: μ at the refresh.
    condition: κ(A) there. drift: a bound on the relative error of M that was added since then.
    owed_weights, owed_error, owed: a fact that the statistics have counted and must not, with the sign
    that takes it out again.
    """

    state: StreamingState | None
    solution: Float[Array, "K C"]
    inverse: Float[Array, "K K"]
    gains: Float[Array, "R K"]
    scales: Float[Array, "R"]
    pending: Int[Array, ""]
    shrink: Float[Array, ""]
    condition: Float[Array, ""]
    drift: Float[Array, ""]
    owed_weights: Float[Array, "K"]
    owed_error: Float[Array, "C"]
    owed: Float[Array, ""]


class Step(NamedTuple):
    """What one fact did, each [T]. leverage: w A⁻¹ wᵀ before it; innovation: ‖z − wM‖ before it;
    support: 1 + α w A⁻¹ wᵀ, which a forget needs above 0; refreshed: whether M was solved anew;
    refused: a forget that would leave A indefinite, and changed nothing."""

    leverage: Float[Array, "*T"]
    innovation: Float[Array, "*T"]
    support: Float[Array, "*T"]
    refreshed: Bool[Array, "*T"]
    refused: Bool[Array, "*T"]


def begin(memory: Streaming, prior: Prior, state: StreamingState) -> Live:
    """Makes a state live."""
    zero, k, c = jnp.zeros((), jnp.float32), memory.slots, memory.latent
    blank = Live(
        state,
        state.solution,
        jnp.zeros((k, k), jnp.float32),
        jnp.zeros((RECENT, k), jnp.float32),
        jnp.zeros((RECENT,), jnp.float32),
        jnp.zeros((), jnp.int32),
        zero,
        zero,
        zero,
        jnp.zeros((k,), jnp.float32),
        jnp.zeros((c,), jnp.float32),
        zero,
    )
    return refresh(memory, prior, blank)


def settle(memory: Streaming, prior: Prior, live: Live) -> StreamingState:
    """The state as `Streaming.write` would have left it: with M and its factor solved anew."""
    return memory.solve(prior, _paid(live).state)


def read(
    memory: Streaming, prior: Prior, live: Live, queries: Float[Array, "Q C"]
) -> Float[Array, "Q C"]:
    """Z_read = W M, as the memory is now."""
    return dot(memory.address(prior, queries), live.solution)


def refresh(memory: Streaming, prior: Prior, live: Live) -> Live:
    """M solved anew from the statistics; NaN where A is indefinite."""
    live = _paid(live)
    gram = live.state.gram.total()
    shrink = memory.shrink(gram)
    factor = cholesky(add_ridge(gram, memory.ridge + shrink))
    return _renewed(live, prior, factor, shrink, live.state.cross.total())


def _renewed(live: Live, prior: Prior, factor, shrink, cross) -> Live:
    inverse = lower_inverse(factor)
    return dataclasses.replace(
        live,
        solution=prior.memory + factor_solve(factor, cross - shrink * prior.memory),
        inverse=inverse,
        scales=jnp.zeros_like(live.scales),
        pending=jnp.zeros((), jnp.int32),
        shrink=shrink,
        condition=condition_of_inverse(factor, inverse),
        drift=jnp.zeros((), jnp.float32),
    )


def _paid(live: Live) -> Live:
    """What is owed to the statistics, taken out."""
    rows = (live.owed_weights[None], live.owed_error[None], live.owed[None])
    state = live.state
    gram, cross = rank_update((state.gram, state.cross), *rows)
    energy = state.energy.plus((live.owed * jnp.sum(jnp.square(live.owed_error)))[None, None])
    count = state.count + live.owed.astype(jnp.int32)
    state = dataclasses.replace(state, gram=gram, cross=cross, energy=energy, count=count)
    return dataclasses.replace(live, state=state, owed=jnp.zeros((), jnp.float32))


def update(
    memory: Streaming,
    prior: Prior,
    live: Live,
    key: Float[Array, "C"],
    value: Float[Array, "C"],
    sign: Sign = 1,
) -> tuple[Live, Step, Bool[Array, ""]]:
    """One fact in or out, without ever solving anew: for many memories under one `vmap`.

    Returns:
      The memory; what the fact did; and whether it is due: `refresh` it before the next fact, and
      before it is read. (Its statistics are right in any case.)
    """
    weights = memory.address(prior, key[None])[0]
    live, step, due, _ = _moved(memory, prior, live, weights, value, sign)
    return live, step, due


def _moved(memory: Streaming, prior: Prior, live: Live, w, value, sign):
    alpha = jnp.where(jnp.any(w != 0), jnp.asarray(sign, jnp.float32).reshape(()), 0.0)
    value, state = value.astype(jnp.float32), live.state
    new = value - dot(w, prior.memory)
    # What is owed goes out with the new fact in, in one pass over the statistics.
    rows = (
        jnp.stack([w, live.owed_weights]),
        jnp.stack([new, live.owed_error]),
        jnp.stack([alpha, live.owed]),
    )
    gram, cross = rank_update((state.gram, state.cross), *rows)
    energy = state.energy.plus(jnp.sum(rows[2] * jnp.sum(jnp.square(rows[1]), axis=1))[None, None])
    count = state.count + jnp.sum(rows[2]).astype(jnp.int32)
    gain = dot(live.inverse.T, dot(live.inverse, w))
    gain = gain - dot(live.gains.T, live.scales * dot(live.gains, w))
    leverage = dot(w, gain)
    support = 1.0 + alpha * leverage
    scale = alpha / jnp.where(support > 0, support, 1.0)
    error = value - dot(w, live.solution)
    last = jnp.minimum(live.pending, live.gains.shape[0] - 1)
    added = CANCELLED * live.condition / jnp.maximum(support, 1e-6) + ROUNDING
    drift = live.drift + jnp.where(alpha == 0, 0.0, added)
    moved = dataclasses.replace(
        live,
        state=dataclasses.replace(state, gram=gram, cross=cross, energy=energy, count=count),
        solution=live.solution + (scale * gain)[:, None] * error[None, :],
        gains=live.gains.at[last].set(gain),
        scales=live.scales.at[last].set(scale),
        pending=live.pending + 1,
        drift=drift,
        owed=jnp.zeros((), jnp.float32),
    )
    size = jnp.trace(gram.high) + jnp.trace(gram.low)
    due = (memory.shrink_of(size) != live.shrink) | (drift > DRIFT) | (support <= 0)
    due = due | (moved.pending >= live.gains.shape[0])
    no = jnp.zeros((), bool)
    step = Step(leverage, jnp.sqrt(jnp.sum(jnp.square(error))), support, no, no)
    return moved, step, due, (w, new, alpha)


def stream(
    memory: Streaming,
    prior: Prior,
    live: Live,
    keys: Float[Array, "T C"],
    values: Float[Array, "T C"],
    sign: Sign = 1,
) -> tuple[Live, Step]:
    """T facts one by one, in or out (`sign` ±1 each, or for all; 0 and zero rows are left out).

    M is right after each of them, to `DRIFT`. A forget that would leave A indefinite changes nothing
    and counts in `missing`, as in `Streaming.write`. Not for differentiation: M counts as a constant.
    """

    def one(live: Live, fact):
        w, value, sign = fact
        moved, step, due, (w, new, alpha) = _moved(memory, prior, live, w, value, sign)
        # The statistics stay out of the branches: they would be copied there at every fact.
        state = moved.state
        cached = dataclasses.replace(moved, state=None)

        def anew(cached: Live) -> tuple[Live, Bool[Array, ""]]:
            gram, cross = state.gram.total(), state.cross.total()
            shrink = memory.shrink(gram)
            ridge = memory.ridge + shrink
            factor = cholesky(add_ridge(gram, ridge))
            sound = is_positive_definite(factor) | (alpha >= 0)
            back = jnp.where(sound, 0.0, alpha)
            gram = gram - back * w[:, None] * w[None, :]
            cross = cross - back * w[:, None] * new[None, :]
            shrink = jnp.where(sound, shrink, memory.shrink(gram))
            ridge = memory.ridge + shrink
            factor = jax.lax.cond(
                sound, lambda: factor, lambda: cholesky(add_ridge(gram, ridge))
            )
            solved = _renewed(cached, prior, factor, shrink, cross)
            return dataclasses.replace(
                solved, owed_weights=w, owed_error=new, owed=-back
            ), ~sound

        cached, refused = jax.lax.cond(due, anew, lambda c: (c, jnp.zeros((), bool)), cached)
        state = dataclasses.replace(state, missing=state.missing + refused.astype(jnp.int32))
        live = dataclasses.replace(cached, state=state)
        return live, step._replace(refreshed=due, refused=refused)

    weights = memory.address(prior, jax.lax.stop_gradient(keys))
    signs = jnp.broadcast_to(jnp.asarray(sign, jnp.int32), keys.shape[:1])
    facts = (weights, jax.lax.stop_gradient(values), signs)
    live, steps = jax.lax.scan(one, live, facts)
    return _paid(live), steps
