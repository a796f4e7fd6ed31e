"""Ridge least squares of a stream beside §4 in float64, by the pseudo-inverse and by Gaussian keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from algebra import C, K, check, close, facts, matrix, seeds
from hypothesis import given
from hypothesis import strategies as st

from larimar_jax import memory
from larimar_jax.memory import addressing
from larimar_jax.memory.streaming import Streaming


def ridge(m0, weights, values, strength):
    """§4 in float64: Σ‖Z − WM‖² + λ‖M − M₀‖²."""
    gram = weights.T @ weights + strength * np.eye(m0.shape[0])
    return np.linalg.solve(gram, weights.T @ values + strength * m0)


STREAM = (8, 6)


def stream(seed, strength, n=12):
    """A memory, its prior, n facts and their float64 weights; λ relative to ‖Σ WᵀW‖₂."""
    m0, keys, values = matrix(seed, *STREAM), matrix(seed + 1, n, 6), matrix(seed + 2, n, 6)
    weights = keys @ np.linalg.pinv(m0)
    strength = strength * np.linalg.norm(weights, 2) ** 2
    variant = Streaming(*STREAM, ridge=jnp.float32(strength), query_noise=0.0)
    prepared = variant.prepare(memory.MemoryParams(jnp.float32(m0), jnp.zeros(())))
    return variant, prepared, m0, keys, values, weights, float(np.float32(strength))


@check
@given(st.floats(1e-2, 10.0), st.integers(0, 11), seeds)
def test_streaming_is_ridge_least_squares_in_any_order(strength, split, seed):
    variant, prepared, m0, keys, values, weights, strength = stream(seed, strength)
    write = functools.partial(variant.write, prepared)
    k, v = jnp.float32(keys), jnp.float32(values)
    plus = jnp.int32(1)
    at_once = write(variant.empty(prepared), k, v, plus)
    close(at_once.solution, ridge(m0, weights, values, strength), 1e-5)
    order = np.random.default_rng(seed).permutation(12)
    state = variant.empty(prepared)
    for i in order:
        state = write(state, k[i : i + 1], v[i : i + 1], plus)
    close(state.solution, at_once.solution, 1e-5)
    # Any one of them is forgotten: M never saw it.
    state = write(state, k[split : split + 1], v[split : split + 1], -plus)
    rest = np.delete(np.arange(12), split)
    close(state.solution, ridge(m0, weights[rest], values[rest], strength), 1e-4)
    assert int(state.count) == 11 and int(state.refused) == 0


@check
@given(seeds)
def test_streaming_forgets_at_a_small_ridge(seed):
    variant, prepared, m0, keys, values, weights, strength = stream(seed, 1e-3)
    write = functools.partial(variant.write, prepared)
    k, v = jnp.float32(keys), jnp.float32(values)
    state = write(variant.empty(prepared), k, v, jnp.int32(1))
    state = write(state, k[3:4], v[3:4], jnp.int32(-1))
    rest = np.delete(np.arange(12), 3)
    close(state.solution, ridge(m0, weights[rest], values[rest], strength), 1e-4)


def test_streaming_tends_to_the_pseudo_inverse():
    """§4: as λ → 0 the memory is the least-squares solution nearest to M₀."""
    variant, prepared, m0, keys, values, weights, _ = stream(3, 1e-5, n=4)
    k, v = jnp.float32(keys), jnp.float32(values)
    state = variant.write(prepared, variant.empty(prepared), k, v, jnp.int32(1))
    want = m0 + np.linalg.pinv(weights) @ (values - weights @ m0)
    close(weights @ np.asarray(state.solution, np.float64), weights @ want, 1e-3)
    close(state.solution, want, 1e-2)


def test_streaming_sweeps_ridges_in_one_vmap():
    variant, prepared, m0, keys, values, weights, _ = stream(4, 1.0)
    k, v = jnp.float32(keys), jnp.float32(values)

    def solution(strength):
        swept = Streaming(*STREAM, ridge=strength, query_noise=0.0)
        return swept.write(prepared, swept.empty(prepared), k, v).solution

    strengths = np.float32([0.3, 1.0, 10.0])
    for got, strength in zip(jax.jit(jax.vmap(solution))(strengths), strengths, strict=True):
        close(got, ridge(m0, weights, values, float(strength)), 1e-5)


def test_streaming_accumulates_a_long_stream_before_it_solves():
    variant, prepared, m0, keys, values, weights, strength = stream(5, 0.1)
    batches = (jnp.float32(keys).reshape(4, 3, 6), jnp.float32(values).reshape(4, 3, 6))

    def step(state, batch):
        return variant.accumulate(prepared, state, *batch), None

    @jax.jit
    def run(state):
        return variant.solve(prepared, jax.lax.scan(step, state, batches)[0])

    state = run(variant.empty(prepared))
    close(state.solution, ridge(m0, weights, values, strength), 1e-5)
    true = np.linalg.cond(weights.T @ weights + strength * np.eye(8))
    assert 0.3 * true < float(variant.condition(state)) < 1.01 * true


def test_streaming_does_not_drift():
    """Two thousand writes and forgets later the memory is that of the eight facts left (§4)."""
    variant, prepared, m0, keys, values, weights, strength = stream(6, 1e-2, n=16)
    k, v = jnp.float32(keys), jnp.float32(values)
    rng = np.random.default_rng(0)
    alive, changes = set(range(8)), [(i, 1) for i in range(8)]
    for _ in range(1000):
        out = int(rng.choice(sorted(alive)))
        new = int(rng.choice(sorted(set(range(16)) - alive)))
        alive = alive - {out} | {new}
        changes += [(out, -1), (new, 1)]

    def step(state, change):
        fact, sign = change
        return variant.accumulate(prepared, state, k[fact][None], v[fact][None], sign), None

    changes = jnp.int32(np.array(changes))
    run = jax.jit(lambda state: jax.lax.scan(step, state, (changes[:, 0], changes[:, 1]))[0])
    state = variant.solve(prepared, run(variant.empty(prepared)))
    left = sorted(alive)
    close(state.solution, ridge(m0, weights[left], values[left], strength), 1e-4)
    assert int(state.count) == 8


def test_streaming_addresses_by_a_reference_of_its_own():
    reference = jnp.float32(matrix(8, K, C))
    variant = Streaming(K, C)
    params = memory.MemoryParams(jnp.float32(matrix(7, K, C)), jnp.zeros(()), reference)
    keys, _ = facts(13)
    prepared = variant.prepare(params)
    weights = variant.read(prepared, variant.empty(prepared), keys).weights
    close(weights, np.asarray(keys, np.float64) @ np.linalg.pinv(np.float64(reference)), 1e-4)


gaussian = jax.jit(addressing.gaussian)
gaussian_gradient = jax.jit(
    jax.grad(lambda *a: jnp.sum(addressing.gaussian(*a)[:, 0]), argnums=(0, 1, 2))
)


@check
@given(st.sampled_from([1e-3, 0.1, 1.0, 10.0]), seeds)
def test_gaussian_addressing(width, seed):
    z, reference = matrix(seed, 4, 6), matrix(seed + 1, 5, 6)
    z = np.concatenate([z, reference[2:3], np.zeros((1, 6))])
    z32, reference32 = jnp.float32(z), jnp.float32(reference)
    got = gaussian(z32, reference32, jnp.float32(width))
    squared = ((z[:4, None] - reference[None]) ** 2).sum(-1)
    nearest = squared.min(1, keepdims=True)
    want = np.exp(-(squared - nearest) / (2 * width * nearest))
    want /= want.sum(1, keepdims=True)
    np.testing.assert_allclose(got[:4], want, atol=2e-3)
    np.testing.assert_allclose(got[4], np.eye(5)[2], atol=1e-6)  # itself a slot
    assert not np.any(got[5])  # padding
    one_hot = gaussian(z32, reference32, jnp.float32(0.0))
    np.testing.assert_array_equal(one_hot[:4], np.eye(5)[squared.argmin(1)])
    for gradient in gaussian_gradient(z32, reference32, jnp.float32(width)):
        assert np.all(np.isfinite(gradient))


def test_streaming_with_gaussian_keys_needs_no_pseudo_inverse():
    variant = Streaming(
        K, C, addressing="gaussian", width=jnp.float32(0.1), query_noise=0.0
    )
    params = memory.MemoryParams(jnp.float32(matrix(7, K, C)), jnp.zeros(()))
    prepared = variant.prepare(params)
    assert prepared.address.shape == (K, C)
    keys, values = facts(14)
    state = variant.write(prepared, variant.empty(prepared), keys, values, jnp.int32(1))
    weights = addressing.gaussian(keys, prepared.reference, 0.1)
    m0, w, z = (np.asarray(x, np.float64) for x in (prepared.memory, weights, values))
    close(state.solution, ridge(m0, w, z, 1e-2), 1e-5)
