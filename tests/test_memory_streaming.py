"""Ridge least squares of a stream beside §4 in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from algebra import C, K, check, close, facts, matrix, prepare, ridge_solution, seeds
from hypothesis import given
from hypothesis import strategies as st

from larimar_jax.memory.addressing import Gaussian
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
@given(st.floats(1e-2, 10.0), st.integers(0, 11), seeds)
def test_streaming_is_ridge_least_squares_in_any_order(ridge, split, seed):
    variant, prepared, k, v, _, solution = stream(seed, ridge)
    update = functools.partial(variant.update, prepared)
    at_once = update(variant.empty(prepared), k, v, signs(12, 1))
    close(at_once.solution, solution(), 1e-5)
    state = variant.empty(prepared)
    for i in np.random.default_rng(seed).permutation(12):
        state = update(state, k[i : i + 1], v[i : i + 1], signs(1, 1))
    close(state.solution, at_once.solution, 1e-5)
    # Any one of them is forgotten: M never saw it.
    state = update(state, k[split : split + 1], v[split : split + 1], signs(1, -1))
    close(state.solution, solution(np.delete(np.arange(12), split)), 1e-4)
    assert int(state.count) == 11 and int(state.refused) == 0


@check
@given(seeds)
def test_streaming_forgets_at_a_small_ridge(seed):
    variant, prepared, k, v, _, solution = stream(seed, 1e-3)
    state = variant.update(prepared, variant.empty(prepared), k, v, signs(12, 1))
    state = variant.update(prepared, state, k[3:4], v[3:4], signs(1, -1))
    close(state.solution, solution(np.delete(np.arange(12), 3)), 1e-4)


def test_streaming_tends_to_the_pseudo_inverse():
    """§4: as λ → 0 the memory is the least-squares solution nearest to M₀."""
    variant, prepared, k, v, weights, _ = stream(3, 1e-5, n=4)
    state = variant.write(prepared, variant.empty(prepared), k, v)
    m0, values = np.float64(prepared.prior_memory), np.float64(v)
    want = m0 + np.linalg.pinv(weights) @ (values - weights @ m0)
    close(weights @ np.float64(state.solution), weights @ want, 1e-3)
    close(state.solution, want, 1e-2)


def test_streaming_sweeps_ridges_and_widths_in_one_vmap():
    m0, keys, values = matrix(4, *SIZES), matrix(5, 12, 6), matrix(6, 12, 6)
    k, v = jnp.float32(keys), jnp.float32(values)
    prepared = prepare(Streaming(*SIZES, addressing=Gaussian()), m0)

    def solve(ridge, width):
        swept = Streaming(*SIZES, ridge=ridge, query_noise=0.0, addressing=Gaussian(width))
        return swept.write(prepared, swept.empty(prepared), k, v).solution

    ridges, widths = np.float32([0.3, 1.0, 10.0]), np.float32([0.1, 1.0, 3.0])
    solved = jax.jit(jax.vmap(solve))(ridges, widths)
    for solution, ridge, width in zip(solved, ridges, widths, strict=True):
        weights = Gaussian(jnp.float32(width)).weigh(jnp.float32(m0), k)
        close(solution, ridge_solution(m0, np.float64(weights), values, float(ridge)), 1e-5)


def test_streaming_accumulates_a_long_stream_before_it_solves():
    variant, prepared, k, v, weights, solution = stream(5, 0.1)
    batches = (k.reshape(4, 3, 6), v.reshape(4, 3, 6))

    def step(state, batch):
        return variant.accumulate(prepared, state, *batch, signs(3, 1)), None

    @jax.jit
    def run(state):
        return variant.solve(prepared, jax.lax.scan(step, state, batches)[0])

    state = run(variant.empty(prepared))
    close(state.solution, solution(), 1e-5)
    true = np.linalg.cond(weights.T @ weights + float(variant.ridge) * np.eye(8))
    assert 0.3 * true < float(variant.condition(state)) < 1.01 * true


def test_streaming_does_not_drift():
    """Two thousand writes and forgets later the memory is that of the eight facts left (§4)."""
    variant, prepared, k, v, _, solution = stream(6, 1e-2, n=16)
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


def test_streaming_addresses_by_a_reference_of_its_own():
    reference, (keys, _) = jnp.float32(matrix(8, K, C)), facts(13)
    variant = Streaming(K, C)
    prepared = prepare(variant, matrix(7, K, C), reference_memory=reference)
    weights = variant.read(prepared, variant.empty(prepared), keys).weights
    close(weights, np.float64(keys) @ np.linalg.pinv(np.float64(reference)), 1e-4)
