"""Recursive least squares: the streaming memory row by row, a write in O(K² + KC) (Eq. 4).

`Streaming.update` solves for M anew, which is exact and costs a factorisation. Here a write moves M
along its own gain,

    g = A⁻¹wᵀ,   M ← M + g (z − wM) / (1 + w g),   A⁻¹ ← A⁻¹ − g gᵀ / (1 + w g)

and touches neither A⁻¹ nor M: A⁻¹ is that of the last factorisation less the gains since then, M that
of the last factorisation plus gains times errors, and the facts since then wait to be added to the
statistics. All of it are a few rows. So what rounding does to M never reaches the statistics, which
stay exact sums, and M is solved from them anew before it matters: after `MAX_PENDING` writes, where μ
changes its power of two, and with a forget of what the statistics have. That is a difference, which
cancels where nothing else supports its fact: it is solved, certified and refused as in `Streaming`.
What still waits is forgotten by `withdraw`.

    now = rls.init(memory, prepared, state)
    now, steps = rls.stream(memory, prepared, now, keys, values, signs)    # T facts, one by one
    latent = rls.read(memory, prepared, now, queries)
    state = rls.to_state(memory, prepared, now)
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.linalg import add_ridge, cholesky, dot, lower_inverse, solve_lower
from larimar_jax.memory.base import Prepared, Signs
from larimar_jax.memory.pending import Pending, square
from larimar_jax.memory.pytrees import Latents, pytree
from larimar_jax.memory.streaming import Streaming, StreamingState

# Writes between two factorisations at the most.
MAX_PENDING = 128


@pytree
class RLSState:
    """A streaming memory whose M is up to date.

    state: its statistics, M and factor as of the last factorisation. inverse: L⁻¹ of that factor.
    shrink: μ there. pending: the writes since then.
    """

    state: StreamingState
    inverse: Float[Array, "K K"]
    shrink: Float[Array, ""]
    pending: Pending

    @property
    def solution(self) -> Float[Array, "K C"]:
        """M."""
        return self.state.solution + dot(self.pending.gains.T, self.pending.innovations)

    @property
    def count(self) -> Int[Array, ""]:
        """The number of facts in."""
        return self.state.count + jnp.sum(self.pending.signs).astype(jnp.int32)


class Step(NamedTuple):
    """The effect of each fact, [T]. leverage: w A⁻¹ wᵀ before it. innovation: ‖z − wM‖ before it.
    refactorized: whether M was solved anew. refused: a forget of what cannot have been in
    (`Streaming.is_consistent`), which changed nothing."""

    leverage: Float[Array, "*T"]
    innovation: Float[Array, "*T"]
    refactorized: Bool[Array, "*T"]
    refused: Bool[Array, "*T"]


@jax.jit
def init(memory: Streaming, prepared: Prepared, state: StreamingState) -> RLSState:
    """Return the row-by-row form of a state that is solved."""

    def rows(*size: int) -> Array:
        return jnp.zeros((MAX_PENDING, *size), jnp.float32)

    k, c = memory.slots, memory.latent
    trace = jnp.trace(state.gram.total())
    zero, identity = jnp.zeros((), jnp.int32), jnp.eye(MAX_PENDING, dtype=jnp.float32)
    pending = Pending(rows(k), rows(c), rows(), rows(k), rows(c), identity, zero, trace)
    return RLSState(state, lower_inverse(state.factor), memory.shrink_of_trace(trace), pending)


@jax.jit
def to_state(memory: Streaming, prepared: Prepared, now: RLSState) -> StreamingState:
    """Return the state as `Streaming.update` would have left it: M and its factor solved anew; NaN
    where A is indefinite."""
    return memory.solve(prepared, _summed(now))


@jax.jit
def refactorize(memory: Streaming, prepared: Prepared, now: RLSState) -> RLSState:
    """Solve for M anew from the statistics; NaN where A is indefinite."""
    return init(memory, prepared, to_state(memory, prepared, now))


@jax.jit
def read(memory: Streaming, prepared: Prepared, now: RLSState, queries: Latents) -> Latents:
    """Read Z_read = W M, as the memory is now."""
    weights = memory.address(prepared, queries)
    moved = dot(dot(weights, now.pending.gains.T), now.pending.innovations)
    return dot(weights, now.state.solution) + moved


@jax.jit
def write(
    memory: Streaming,
    prepared: Prepared,
    now: RLSState,
    key: Float[Array, "C"],
    value: Float[Array, "C"],
) -> tuple[RLSState, Step, Bool[Array, ""]]:
    """Write one fact without ever solving anew: for many memories under one `vmap`.

    Returns:
      The memory; the effect of the fact; and whether a factorisation is due: `refactorize` the memory
      before the next fact, and before it is read. (Its statistics are right in any case.)
    """
    facts = memory.facts(prepared, key[None], value[None], 1)
    row = (x[0] for x in (*facts, *_predicted(now, facts[0], value[None])))
    pending, step, is_due = _step(memory, now.shrink, now.pending, *row)
    return dataclasses.replace(now, pending=pending), step, is_due


@jax.jit
def begin(
    memory: Streaming,
    prepared: Prepared,
    empty: RLSState,
    keys: Latents,
    values: Latents,
    signs: Signs,
) -> tuple[RLSState, Bool[Array, ""]]:
    """Write N facts into an empty memory, in which they are pending as if they were written one by one:
    nothing is solved that is larger than N × N.

    Args:
      signs: 1; 0 for padding, which follows the facts: at least a row, for the next write.

    Returns:
      The memory, and whether a factorisation is due, as in `write`.
    """
    weights, errors, signs = memory.facts(prepared, keys, values, signs)
    weights, errors = (rows * signs[:, None] for rows in (weights, errors))
    gains = weights / memory.ridge
    factor = cholesky(add_ridge(dot(gains, weights.T), 1.0))
    gains, innovations = (solve_lower(factor, rows.T).T for rows in (gains, errors))
    number, trace = jnp.sum(signs).astype(jnp.int32), jnp.sum(square(weights))
    arrays = (weights, errors, signs, gains, innovations, lower_inverse(factor))
    pending = Pending(*arrays, number, trace).refined()
    is_finite = jnp.isfinite(gains).all() & jnp.isfinite(pending.innovations).all()
    is_due = (memory.shrink_of_trace(trace) != empty.shrink) | ~is_finite
    return dataclasses.replace(empty, pending=pending), is_due


@jax.jit
def withdraw(
    memory: Streaming, prepared: Prepared, now: RLSState, keys: Latents, values: Latents
) -> tuple[Pending, Bool[Array, ""]]:
    """Return the pending writes without N facts, and whether all of these are among them and μ stays;
    where not, the pending writes are of no use. Those that are left are written again."""
    pending = now.pending
    left, are_in = pending.signs_without(*memory.facts(prepared, keys, values, 1))
    order, number = jnp.argsort(left == 0), jnp.sum(left).astype(jnp.int32)
    weights, errors, signs = (x[order] for x in (pending.weights, pending.errors, left))
    innovations = errors - dot(weights, now.state.solution - prepared.prior_memory)
    rows = (weights, errors, signs, innovations, dot(dot(weights, now.inverse.T), now.inverse))
    after = jax.lax.fori_loop(
        0,
        jnp.where(are_in.all(), number, 0),
        lambda at, pending: _step(memory, now.shrink, pending, *(x[at] for x in rows))[0],
        init(memory, prepared, now.state).pending,
    )
    return after.refined(), are_in.all() & (memory.shrink_of_trace(after.trace) == now.shrink)


@jax.jit
def without(
    memory: Streaming, prepared: Prepared, now: RLSState, keys: Latents, values: Latents
) -> tuple[RLSState, Bool[Array, ""]]:
    """Return the memory without N facts, solved anew, and whether they can have been in: a caller that
    asks keeps `now` where not, and no choice copies what both have."""
    before, facts = _summed(now), memory.facts(prepared, keys, values, -1)
    after = memory.solve(prepared, before.add(*facts))
    is_sound = memory.is_consistent(prepared, before, after, *facts)
    return init(memory, prepared, after), is_sound & jnp.isfinite(after.solution).all()


@jax.jit
def stream(
    memory: Streaming,
    prepared: Prepared,
    now: RLSState,
    keys: Float[Array, "T C"],
    values: Float[Array, "T C"],
    signs: Signs = 1,
) -> tuple[RLSState, Step]:
    """Write (sign 1) or forget (−1) T facts one by one; sign 0 and zero rows are left out.

    M is right after each of them. A forget of what cannot have been in changes nothing and counts in
    `refused`, as in `Streaming.update`. Not for differentiation: M counts as a constant.
    """
    total = keys.shape[0]
    window = min(total, MAX_PENDING)
    keys, values = jax.lax.stop_gradient(keys), jax.lax.stop_gradient(values.astype(jnp.float32))
    facts = (*memory.facts(prepared, keys, values, signs), values)
    # As many more rows as a window that begins at the last fact needs.
    facts = [jnp.pad(x, ((0, window), *((0, 0),) * (x.ndim - 1))) for x in facts]

    def segment(carry):
        """Take facts up to the next factorisation, and factorise: what they need of M and A is computed
        for all of them at once."""
        now, steps, start = carry
        rows = [jax.lax.dynamic_slice_in_dim(x, start, window) for x in facts]
        rows[3:] = _predicted(now, rows[0], rows[3])
        end = jnp.minimum(start + window, total)

        def fact(carry):
            pending, steps, at, _ = carry
            row = (x[at - start] for x in rows)
            pending, step, is_due = _step(memory, now.shrink, pending, *row)
            steps = jax.tree.map(lambda a, b: a.at[at].set(b), steps, step)
            return pending, steps, at + 1, is_due

        pending, steps, at, is_due = jax.lax.while_loop(
            lambda carry: (carry[2] < end) & ~carry[3],
            fact,
            (now.pending, steps, start, jnp.zeros((), bool)),
        )
        weights, errors, sign = (jax.lax.dynamic_slice_in_dim(x, at - 1, 1) for x in facts[:3])
        before = dataclasses.replace(now, pending=pending)
        # A loop of one turn or none: a condition would copy what it leaves as it is.
        now, _ = jax.lax.while_loop(
            lambda carry: carry[1],
            lambda carry: (
                # The last fact is among the pending ones, unless it is to be forgotten.
                _factorized(memory, prepared, carry[0], weights, errors, jnp.minimum(sign, 0.0)),
                jnp.zeros((), bool),
            ),
            (before, is_due),
        )
        refused = now.state.refused > before.state.refused
        steps = steps._replace(
            refactorized=steps.refactorized.at[at - 1].set(is_due),
            refused=steps.refused.at[at - 1].set(refused),
        )
        return now, steps, at

    zeros, falses = jnp.zeros((total,), jnp.float32), jnp.zeros((total,), bool)
    start = (now, Step(zeros, zeros, falses, falses), jnp.zeros((), jnp.int32))
    now, steps, _ = jax.lax.while_loop(lambda carry: carry[2] < total, segment, start)
    return now, steps


def _summed(now: RLSState) -> StreamingState:
    """Return the statistics with the pending writes; solution and factor are those of before."""
    return now.state.add(now.pending.weights, now.pending.errors, now.pending.signs)


def _predicted(now: RLSState, weights: Float[Array, "N K"], values: Float[Array, "N C"]):
    """Return z − wM and w A⁻¹ of facts, with the M and A of the last factorisation."""
    gains = dot(dot(weights, now.inverse.T), now.inverse)
    return values - dot(weights, now.state.solution), gains


def _step(memory: Streaming, shrink, pending: Pending, w, error, sign, innovation, gain):
    """Return the pending writes with this one, if it is one, its Step, and whether to factorise."""
    shares = dot(pending.gains, w)
    gain = gain - dot(shares, pending.gains)
    innovation = innovation - dot(shares, pending.innovations)
    leverage = dot(w, gain)
    written = jnp.maximum(sign, 0.0)
    scale = written * jax.lax.rsqrt(1.0 + leverage)
    row = jnp.minimum(pending.number, len(pending.signs) - 1)
    unit = pending.inverse[row]  # of the identity, as every row to come
    inverse = jnp.where(sign > 0, scale * (unit - dot(shares, pending.inverse)), unit)
    pending = Pending(
        weights=pending.weights.at[row].set(w),
        errors=pending.errors.at[row].set(error),
        signs=pending.signs.at[row].set(written),
        gains=pending.gains.at[row].set(scale * gain),
        innovations=pending.innovations.at[row].set(scale * innovation),
        inverse=pending.inverse.at[row].set(inverse),
        number=pending.number + 1,
        trace=pending.trace + written * jnp.sum(jnp.square(w)),
    )
    is_due = (pending.number >= MAX_PENDING) | (memory.shrink_of_trace(pending.trace) != shrink)
    false = jnp.zeros((), bool)
    return pending, Step(leverage, jnp.linalg.norm(innovation), false, false), is_due | (sign < 0)


def _factorized(
    memory: Streaming,
    prepared: Prepared,
    now: RLSState,
    weights: Float[Array, "N K"],
    errors: Float[Array, "N C"],
    signs: Float[Array, "N"],
) -> RLSState:
    """Solve for M anew with these facts too; without them where they are refused."""
    before = _summed(now)
    number = jnp.sum(jnp.abs(signs)).astype(jnp.int32)
    after = memory.solve(prepared, before.add(weights, errors, signs))
    is_sound = jax.lax.cond(
        number > 0,
        lambda: memory.is_consistent(prepared, before, after, weights, errors, signs),
        lambda: jnp.ones((), bool),
    )
    refused = dataclasses.replace(before, refused=before.refused + number)
    state = jax.lax.cond(is_sound, lambda: after, lambda: memory.solve(prepared, refused))
    return init(memory, prepared, state)
