"""A streaming memory that changes all the time: one fact in or out in O(K² + KC).

`Streaming.write` solves for M anew, which is exact and costs a factorisation. Here a fact moves M along
its own gain (recursive least squares, Eq. 4),

    g = A⁻¹wᵀ,   M ← M + α g (z − wM) / (1 + α w g),   A⁻¹ ← A⁻¹ − α g gᵀ / (1 + α w g)

and neither A⁻¹ nor M is touched: A⁻¹ is that of the last refresh less the gains since then, M that of
the last refresh plus gains times errors, and the facts since then wait to be added to the statistics.
All of it are a few rows. So what rounding does to M never reaches the statistics, which stay exact sums,
and M is solved anew from them before it matters: after `RECENT` facts, where 1 + α w g is small (a fact
is forgotten that nothing else supports: the difference cancels), where μ changes its level, where A is
so ill-conditioned that no gain can be trusted, or where a forget may be of what was never written.

    now = rls.init(memory, prepared, state)
    now, steps = rls.stream(memory, prepared, now, keys, values, signs)       # T facts, one by one
    latent = rls.read(memory, prepared, now, queries)
    state = rls.to_state(memory, prepared, now)
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.compensated import Sum, rank_update
from larimar_jax.linalg import (
    add_ridge,
    cholesky,
    condition_of_inverse,
    dot,
    factor_solve,
    lower_inverse,
)
from larimar_jax.memory.base import Prepared, Sign, compiled, pytree
from larimar_jax.memory.streaming import Streaming, StreamingState

# Facts between two factorisations at the most.
RECENT = 128
# Relative error of M that streaming may add before it is solved anew, or FRESH · κ where that is more: a
# fresh solve has as much. One fact adds ROUNDING, and CANCELLED · κ / support times how far it moves M,
# relative to M: more than was measured, mostly ten times, for κ from 3 to 2e6.
DRIFT, FRESH, CANCELLED, ROUNDING = 3e-5, 5e-9, 2.5e-8, 3e-8
# A forget is looked at closely where J or u G uᵀ is less than −SLACK, and what rounding does for this κ,
# of what they are differences of.
SLACK = 1e-3


class Recent(NamedTuple):
    """The facts since the last refresh, one a row; rows of zeros where there is none.

    weights: w. news: z − wM₀, what the statistics take. signs: α, 0 for a forget that was refused.
    gains: g. scales: α / (1 + α w g). errors: z − wM, M that before the fact. number: how many. trace:
    tr(Σ α WᵀW) of all facts. drift: a bound on the relative error of M that was added since then.
    objective: J of all facts.
    """

    weights: Float[Array, "R K"]
    news: Float[Array, "R C"]
    signs: Float[Array, "R"]
    gains: Float[Array, "R K"]
    scales: Float[Array, "R"]
    errors: Float[Array, "R C"]
    number: Int[Array, ""]
    trace: Float[Array, ""]
    drift: Float[Array, ""]
    objective: Float[Array, ""]


@pytree
class RLSState:
    """A streaming memory whose M is up to date.

    state: its statistics, M and factor as of the last refresh. inverse: L⁻¹ of that factor. shrink: μ
    there. condition: κ(A) there. size: ‖M‖ there. recent: the facts since then.
    """

    state: StreamingState
    inverse: Float[Array, "K K"]
    shrink: Float[Array, ""]
    condition: Float[Array, ""]
    size: Float[Array, ""]
    recent: Recent

    @property
    def solution(self) -> Float[Array, "K C"]:
        """M."""
        moved = dot(self.recent.gains.T * self.recent.scales, self.recent.errors)
        return self.state.solution + moved

    @property
    def count(self) -> Int[Array, ""]:
        """Facts in."""
        return self.state.count + jnp.sum(self.recent.signs).astype(jnp.int32)


class Step(NamedTuple):
    """What one fact did, each [T]. leverage: w A⁻¹ wᵀ before it; innovation: ‖z − wM‖ before it;
    support: 1 + α w A⁻¹ wᵀ, which a forget needs above 0; refreshed: whether M was solved anew;
    refused: a forget of what cannot have been in (`Streaming.possible`), which changed nothing."""

    leverage: Float[Array, "*T"]
    innovation: Float[Array, "*T"]
    support: Float[Array, "*T"]
    refreshed: Bool[Array, "*T"]
    refused: Bool[Array, "*T"]


@compiled
def init(memory: Streaming, prepared: Prepared, state: StreamingState) -> RLSState:
    """Makes a state live."""
    zero, k, c = jnp.zeros((), jnp.float32), memory.slots, memory.latent

    def rows(*width: int):
        return jnp.zeros((RECENT, *width), jnp.float32)

    nothing = Recent(
        rows(k),
        rows(c),
        rows(),
        rows(k),
        rows(),
        rows(c),
        jnp.zeros((), jnp.int32),
        zero,
        zero,
        zero,
    )
    return refactorize(
        memory, prepared, RLSState(state, jnp.zeros((k, k), jnp.float32), zero, zero, zero, nothing)
    )


@compiled
def to_state(memory: Streaming, prepared: Prepared, live: RLSState) -> StreamingState:
    """The state as `Streaming.write` would have left it: with M and its factor solved anew."""
    return memory.solve(prepared, _summed(live))


@compiled
def read(
    memory: Streaming, prepared: Prepared, live: RLSState, queries: Float[Array, "Q C"]
) -> Float[Array, "Q C"]:
    """Z_read = W M, as the memory is now."""
    weights = memory.address(prepared, queries)
    moved = dot(dot(weights, live.recent.gains.T) * live.recent.scales, live.recent.errors)
    return dot(weights, live.state.solution) + moved


@compiled
def refactorize(memory: Streaming, prepared: Prepared, live: RLSState) -> RLSState:
    """M solved anew from the statistics; NaN where A is indefinite."""
    state = _summed(live)
    return _renewed(live, prepared, state, *_factored(memory, state.gram))


def _summed(live: RLSState) -> StreamingState:
    """The statistics with the recent facts; solution and factor are those of before."""
    state, recent = live.state, live.recent
    gram, cross = rank_update((state.gram, state.cross), recent.weights, recent.news, recent.signs)
    added = jnp.sum(recent.signs * jnp.sum(jnp.square(recent.news), axis=1))
    energy = state.energy.plus(added[None, None])
    return dataclasses.replace(state, gram=gram, cross=cross, energy=energy, count=live.count)


def _factored(memory: Streaming, gram: Sum):
    """The factor of A, μ, and tr(Σ α WᵀW)."""
    total = gram.total()
    trace = jnp.trace(total)
    shrink = memory.shrink_of(trace)
    return cholesky(add_ridge(total, memory.ridge + shrink)), shrink, trace


def _renewed(
    live: RLSState, prepared: Prepared, state: StreamingState, factor, shrink, trace
) -> RLSState:
    inverse = lower_inverse(factor)
    right = state.cross.total() - shrink * prepared.memory
    change = factor_solve(factor, right)
    # J without a product of K x K and K x C. Its terms may cancel, which `slack` in `_moved` allows for.
    objective = state.energy.total()[0, 0] + shrink * jnp.sum(jnp.square(prepared.memory))
    objective = objective - jnp.sum(change * right)
    state = dataclasses.replace(state, factor=factor, solution=prepared.memory + change)
    cleared = jax.tree.map(jnp.zeros_like, live.recent)
    return RLSState(
        state,
        inverse,
        shrink,
        condition_of_inverse(factor, inverse, steps=6),
        jnp.linalg.norm(state.solution),
        cleared._replace(trace=trace, objective=objective),
    )


@compiled
def update(
    memory: Streaming,
    prepared: Prepared,
    live: RLSState,
    key: Float[Array, "C"],
    value: Float[Array, "C"],
    sign: Sign = 1,
) -> tuple[RLSState, Step, Bool[Array, ""]]:
    """One fact in or out, without ever solving anew: for many memories under one `vmap`.

    Returns:
      The memory; what the fact did; and whether it is due: `refactorize` it before the next fact, and
      before it is read. (Its statistics are right in any case.)
    """
    weights = memory.address(prepared, key[None])
    fact = _fact(live, prepared, weights, value[None], sign)
    recent, step, due = _moved(memory, live, live.recent, *(row[0] for row in fact))
    return dataclasses.replace(live, recent=recent), step, due


def _fact(live: RLSState, prepared: Prepared, weights, values, sign):
    """What `_moved` needs of facts, for many of them at once: w, z − wM₀, z − wM and w A⁻¹ with the M
    and A of the last refresh, and α, 0 for padding."""
    values = values.astype(jnp.float32)
    signs = jnp.broadcast_to(jnp.asarray(sign, jnp.float32), weights.shape[:1])
    return (
        weights,
        values - dot(weights, prepared.memory),
        values - dot(weights, live.state.solution),
        dot(dot(weights, live.inverse.T), live.inverse),
        jnp.where(jnp.any(weights != 0, axis=1), signs, 0.0),
    )


def _moved(memory: Streaming, live: RLSState, recent: Recent, w, new, error, gain, alpha):
    """One fact more: (the recent facts, what it did, whether a refresh is due)."""
    shares = recent.scales * dot(recent.gains, w)
    gain = gain - dot(shares, recent.gains)
    error = error - dot(shares, recent.errors)
    leverage = dot(w, gain)
    support = 1.0 + alpha * leverage
    squared = jnp.sum(jnp.square(w))
    trace = recent.trace + alpha * squared
    # As `Streaming.possible` will say of it: J after this fact, and u G uᵀ.
    scale = alpha / jnp.where(support > 0, support, 1.0)
    missed = jnp.sum(jnp.square(error))
    objective = recent.objective + scale * missed
    ridge = memory.ridge + live.shrink
    held = leverage / support - ridge * jnp.sum(jnp.square(gain / support))
    slack = SLACK + 4.0 * jnp.finfo(jnp.float32).eps * live.condition
    doubt = (objective < -slack * live.state.energy.total()[0, 0]) | (
        held < -slack * squared / ridge
    )
    moved = jnp.abs(scale) * jnp.sqrt(jnp.sum(jnp.square(gain)) * missed)
    share = moved / jnp.maximum(live.size, jnp.finfo(jnp.float32).tiny)
    added = CANCELLED * live.condition * share / jnp.maximum(support, 1e-6) + ROUNDING
    drift = recent.drift + jnp.where(alpha == 0, 0.0, added)
    last = jnp.minimum(recent.number, RECENT - 1)
    now = Recent(
        weights=recent.weights.at[last].set(w),
        news=recent.news.at[last].set(new),
        signs=recent.signs.at[last].set(alpha),
        gains=recent.gains.at[last].set(gain),
        scales=recent.scales.at[last].set(scale),
        errors=recent.errors.at[last].set(error),
        number=recent.number + 1,
        trace=trace,
        drift=drift,
        objective=objective,
    )
    most = jnp.maximum(DRIFT, FRESH * live.condition)
    due = (memory.shrink_of(trace) != live.shrink) | (drift > most) | (support <= 0)
    due = due | (now.number >= RECENT) | (doubt & (alpha < 0))
    no = jnp.zeros((), bool)
    return now, Step(leverage, jnp.sqrt(missed), support, no, no), due


@compiled
def stream(
    memory: Streaming,
    prepared: Prepared,
    live: RLSState,
    keys: Float[Array, "T C"],
    values: Float[Array, "T C"],
    sign: Sign = 1,
) -> tuple[RLSState, Step]:
    """T facts one by one, in or out (`sign` ±1 each, or for all; 0 and zero rows are left out).

    M is right after each of them, to `DRIFT` or what a fresh solve would be. A forget of what cannot
    have been in changes nothing and counts in `refused`, as in `Streaming.write`. Not for
    differentiation: M counts as a constant.
    """
    total = keys.shape[0]
    window = min(total, RECENT)
    weights = memory.address(prepared, jax.lax.stop_gradient(keys))
    signs = jnp.broadcast_to(jnp.asarray(sign, jnp.float32), (total,))
    # As many rows more as a window that begins at the last fact needs.
    given = tuple(
        jnp.pad(rows, ((0, window), *((0, 0),) * (rows.ndim - 1)))
        for rows in (weights, jax.lax.stop_gradient(values), signs)
    )

    def segment(carry):
        """Facts up to the next refresh, and the refresh: what they need of M and A is computed for all
        of them at once."""
        live, steps, start = carry
        rows = (jax.lax.dynamic_slice_in_dim(x, start, window) for x in given)
        facts = _fact(live, prepared, *rows)
        end = jnp.minimum(start + window, total)

        def fact(carry):
            recent, steps, at, _ = carry
            recent, step, due = _moved(memory, live, recent, *(x[at - start] for x in facts))
            steps = jax.tree.map(lambda all_, one: all_.at[at].set(one), steps, step)
            return recent, steps, at + 1, due

        recent, steps, at, due = jax.lax.while_loop(
            lambda carry: (carry[2] < end) & ~carry[3],
            fact,
            (live.recent, steps, start, jnp.zeros((), bool)),
        )
        # A loop of one turn or none: a condition would copy what it leaves as it is.
        live, refused, _ = jax.lax.while_loop(
            lambda carry: carry[2],
            lambda carry: (*_checked(memory, prepared, carry[0]), jnp.zeros((), bool)),
            (dataclasses.replace(live, recent=recent), jnp.zeros((), bool), due),
        )
        steps = steps._replace(
            refreshed=steps.refreshed.at[at - 1].set(due),
            refused=steps.refused.at[at - 1].set(refused),
        )
        return live, steps, at

    real, truth = jnp.zeros((total,), jnp.float32), jnp.zeros((total,), bool)
    start = (live, Step(real, real, real, truth, truth), jnp.zeros((), jnp.int32))
    live, steps, _ = jax.lax.while_loop(lambda carry: carry[2] < total, segment, start)
    return live, steps


def _checked(
    memory: Streaming, prepared: Prepared, live: RLSState
) -> tuple[RLSState, Bool[Array, ""]]:
    """`refactorize`, and whether the last fact was a forget of what cannot have been in: then without it."""
    recent = live.recent
    last = jnp.minimum(recent.number, RECENT) - 1
    sign = recent.signs[last]
    fewer = recent._replace(signs=recent.signs.at[last].set(0.0))
    without = dataclasses.replace(live, recent=fewer)
    found = refactorize(memory, prepared, live)
    before = _summed(without)
    fact = (recent.weights[last][None], recent.news[last][None], sign[None])
    refused = jax.lax.cond(
        sign < 0,
        lambda: ~memory.possible(prepared, before, found.state, *fact),
        lambda: jnp.zeros((), bool),
    )

    def kept():
        state = dataclasses.replace(before, refused=before.refused + 1)
        return _renewed(without, prepared, state, *_factored(memory, state.gram))

    return jax.lax.cond(refused, kept, lambda: found), refused
