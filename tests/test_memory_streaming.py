"""Ridge least squares of a stream beside §4 in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from algebra import check, close, matrix, prepare, ridge_solution, seeds
from hypothesis import given
from hypothesis import strategies as st

from larimar_jax.memory.streaming import Streaming

SIZES = (8, 6)


def stream(seed, ridge, n=12):
    """A memory, what it prepares, n facts and their float64 weights; λ relative to ‖Σ WᵀW‖₂."""
    m0, keys, values = matrix(seed, *SIZES), matrix(seed + 1, n, 6), matrix(seed + 2, n, 6)
    weights = keys @ np.linalg.pinv(m0)
    ridge = np.float32(ridge * np.linalg.norm(weights, 2) ** 2)
    variant = Streaming(*SIZES, ridge=jnp.float32(ridge), query_noise=0.0)
    prepared = prepare(variant, m0)

    def solution(rows=slice(None)):
        return ridge_solution(m0, weights[rows], values[rows], float(ridge))

    return variant, prepared, jnp.float32(keys), jnp.float32(values), weights, solution


def signs(n, sign):
    return jnp.full(n, sign, jnp.int32)


@check
@given(st.just(1e-3) | st.floats(1e-2, 10.0), st.integers(0, 11), seeds)
def test_streaming_is_ridge_least_squares_in_any_order(ridge, split, seed):
    variant, prepared, k, v, _, solution = stream(seed, ridge)
    update = functools.partial(variant.update, prepared)
    at_once = update(variant.empty(prepared), k, v, signs(12, 1))
    tolerance = 1e-5 if ridge >= 1e-2 else 1e-4  # κ ≤ 100, κ ≤ 1000
    close(at_once.solution, solution(), tolerance)
    state = variant.empty(prepared)
    for i in np.random.default_rng(seed).permutation(12):
        state = update(state, k[i : i + 1], v[i : i + 1], signs(1, 1))
    close(state.solution, at_once.solution, tolerance)
    # Any one of them is forgotten: M never saw it.
    state = update(state, k[split : split + 1], v[split : split + 1], signs(1, -1))
    close(state.solution, solution(np.delete(np.arange(12), split)), 1e-4)
    assert int(state.count) == 11 and int(state.refused) == 0


def test_streaming_tends_to_the_pseudo_inverse():
    """§4: as λ → 0 the memory is the least-squares solution nearest to M₀."""
    variant, prepared, k, v, weights, _ = stream(3, 1e-5, n=4)
    state = variant.write(prepared, variant.empty(prepared), k, v)
    m0, values = np.float64(prepared.prior_memory), np.float64(v)
    want = m0 + np.linalg.pinv(weights) @ (values - weights @ m0)
    close(weights @ np.float64(state.solution), weights @ want, 1e-3)
    close(state.solution, want, 1e-2)


def test_streaming_does_not_drift():
    """Two thousand writes and forgets later the memory is that of the eight facts left (§4)."""
    variant, prepared, k, v, weights, solution = stream(6, 1e-2, n=16)
    rng = np.random.default_rng(0)
    alive, changes = set(range(8)), [(i, 1) for i in range(8)]
    for _ in range(1000):
        out = int(rng.choice(sorted(alive)))
        new = int(rng.choice(sorted(set(range(16)) - alive)))
        alive = alive - {out} | {new}
        changes += [(out, -1), (new, 1)]

    def step(state, change):
        fact, sign = change
        return variant.accumulate(prepared, state, k[fact][None], v[fact][None], sign[None]), None

    changes = jnp.int32(np.array(changes))
    run = jax.jit(lambda state: jax.lax.scan(step, state, (changes[:, 0], changes[:, 1]))[0])
    state = variant.solve(prepared, run(variant.empty(prepared)))
    close(state.solution, solution(sorted(alive)), 1e-4)
    assert int(state.count) == 8
    rows = weights[sorted(alive)]
    true = np.linalg.cond(rows.T @ rows + float(variant.ridge) * np.eye(8))
    assert 0.3 * true < float(variant.condition(state)) < 1.01 * true
