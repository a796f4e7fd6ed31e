"""Each variant beside a plain float64 version of what it says it computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import linalg, memory

K, C = 8, 6
seeds = st.integers(0, 2**31 - 1)
check = settings(deadline=None, max_examples=6)


def facts(seed, n):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, C)), rng.standard_normal((n, C))


@functools.cache
def built(name, **options):
    variant = memory.build(name, slots=K, latent=C, **options)
    m0 = np.eye(K, C) + 0.2 * np.random.default_rng(1).standard_normal((K, C))
    prepared = variant.prepare(memory.MemoryParams(jnp.float32(m0), jnp.float32(-2.0)))
    return variant, prepared, np.float64(prepared.memory), variant.write, variant.read


def close(got, want, tolerance=1e-4):
    got, want = np.float64(got), np.float64(want)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def write(name, keys, values, sign=1, state=None, **options):
    variant, prepared, _, write, _ = built(name, **options)
    state = variant.empty(prepared) if state is None else state
    return write(prepared, state, jnp.float32(keys), jnp.float32(values), jnp.int32(sign))


@check
@given(seeds, st.sampled_from(["sequential", "block"]))
def test_kanerva_is_the_gaussian_posterior(seed, update):
    keys, values = facts(seed, 5)
    state = write("kanerva", keys, values, update=update)
    variant, prepared, m0, _, read = built("kanerva", update=update)
    w = keys @ np.linalg.pinv(m0)
    covariance = np.linalg.inv(np.eye(K) + w.T @ w / 0.1)
    mean = m0 + covariance @ w.T @ (values - w @ m0) / 0.1
    close(state.covariance, covariance)
    close(state.mean, mean)
    close(read(prepared, state, jnp.float32(keys)).latent, w @ mean)
    close(variant.posterior_variance(prepared, state, jnp.float32(keys)),
          np.einsum("nk,kl,nl->n", w, covariance, w) + 0.1)
    # Without query noise, and with λ = a, it is the streaming memory.
    other = write("streaming", keys, values, ridge=0.1, query_noise=0.0)
    close(state.mean, other.solution)


@pytest.mark.parametrize("update", ["sequential", "block"])
def test_kanerva_refuses_to_forget_what_it_never_saw(update):
    keys, values = facts(3, 6)
    state = write("kanerva", keys[:4], values[:4], update=update)
    refused = write("kanerva", keys[5:], values[5:], -1, state, update=update)
    assert int(refused.refused) == 1 and int(refused.count) == 4
    np.testing.assert_array_equal(refused.mean, state.mean)
    gone = write("kanerva", keys[1:2], values[1:2], -1, state, update=update)
    never = write("kanerva", keys[[0, 2, 3]], values[[0, 2, 3]], update=update)
    close(gone.mean, never.mean, 1e-3)  # ‖w‖²/a is about 60, and as much is lost of 1e-6.
    assert int(gone.refused) == 0 and int(gone.count) == 3


@check
@given(seeds)
def test_square_root_is_ridge_least_squares(seed):
    keys, values = facts(seed, 7)
    state = write("square_root", keys, values)
    variant, prepared, m0, _, read = built("square_root")
    w = keys @ np.linalg.pinv(m0)
    gram = w.T @ w + 0.1 * np.eye(K)
    close(state.factor, np.linalg.cholesky(gram))
    mean = m0 + np.linalg.solve(gram, w.T @ (values - w @ m0))
    close(variant.matrix(prepared, state), mean)
    close(read(prepared, state, jnp.float32(keys)).latent, w @ mean)
    gone = write("square_root", keys[2:4], values[2:4], -1, state)
    rest = [0, 1, 4, 5, 6]
    want = w[rest].T @ w[rest] + 0.1 * np.eye(K)
    close(gone.factor, np.linalg.cholesky(want), 1e-3)
    assert int(gone.count) == 5 and int(gone.refused) == 0
    refused = write("square_root", 9.0 * keys[:1], values[:1], -1, state)
    assert int(refused.refused) == 1 and int(refused.count) == 7
    np.testing.assert_array_equal(refused.factor, state.factor)


def test_a_factor_is_turned_forth_and_back():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((9, 6))
    gram, row = a.T @ a, rng.standard_normal(6)
    factor = jnp.float32(np.linalg.cholesky(gram))
    up, sound = linalg.factor_update(factor, jnp.float32(row), jnp.float32(1.0))
    assert bool(sound)
    close(up, np.linalg.cholesky(gram + np.outer(row, row)), 1e-6)
    down, sound = linalg.factor_update(up, jnp.float32(row), jnp.float32(-1.0))
    assert bool(sound)
    close(down, factor, 1e-5)
    same, sound = linalg.factor_update(factor, jnp.float32(10.0 * row), jnp.float32(-1.0))
    assert not bool(sound)
    np.testing.assert_array_equal(same, factor)


@check
@given(seeds)
def test_nearest_reads_the_value_of_the_nearest_key(seed):
    keys, values = facts(seed, 6)
    queries, _ = facts(seed + 1, 10)
    state = write("nearest", keys, values)
    variant, prepared, _, _, read = built("nearest")

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    similarity = unit(queries) @ unit(keys).T
    reading = read(prepared, state, jnp.float32(queries))
    close(reading.latent, values[similarity.argmax(1)], 1e-6)
    np.testing.assert_allclose(reading.confidence, np.clip(similarity.max(1), 0, 1), atol=1e-6)


def test_a_list_that_is_full_says_so_and_keeps_what_it_has():
    keys, values = facts(0, K + 3)
    state = write("nearest", keys, values)
    variant, prepared, _, _, read = built("nearest")
    assert int(state.count) == K and int(state.overflow) == 3
    close(read(prepared, state, jnp.float32(keys[:K])).latent, values[:K], 1e-6)
    freed = write("nearest", keys[2:3], values[2:3], -1, state)
    again = write("nearest", keys[K:], values[K:], 1, freed)
    assert int(again.count) == K and int(again.overflow) == 3 + 2
    close(read(prepared, again, jnp.float32(keys[K : K + 1])).latent, values[K : K + 1], 1e-6)
    # Another value under a known key is another fact.
    missing = write("nearest", keys[:1], values[1:2], -1, state)
    assert int(missing.refused) == 1 and int(missing.count) == K


@check
@given(seeds, st.sampled_from([0.0, 4.0, 64.0]))
def test_hopfield_is_softmax_attention(seed, beta):
    keys, values = facts(seed, 6)
    queries, _ = facts(seed + 1, 4)
    state = write("hopfield", keys, values, beta=beta)
    _, prepared, _, _, read = built("hopfield", beta=beta)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    scores = np.exp(beta * (unit(queries) @ unit(keys).T - 1))
    close(read(prepared, state, jnp.float32(queries)).latent,
          scores / scores.sum(1, keepdims=True) @ values)


@check
@given(seeds, st.sampled_from([0.3, 1.0]))
def test_the_delta_rule_takes_a_step_for_each_fact(seed, rate):
    keys, values = facts(seed, 5)
    state = write("delta_rule", keys, values, rate=rate)
    _, prepared, m0, _, read = built("delta_rule", rate=rate)
    m, weights = m0.copy(), keys @ np.linalg.pinv(m0)
    for w, z in zip(weights, values, strict=True):
        m += rate * np.outer(w, z - w @ m) / (w @ w)
    close(state.solution, m)
    if rate == 1.0:
        reading = read(prepared, state, jnp.float32(keys[4:]))
        close(reading.latent, values[4:])
        assert float(reading.confidence[0]) == pytest.approx(1.0, abs=1e-4)
    # Forgetting reads M₀ there.
    gone = write("delta_rule", keys[4:], values[4:], -1, state, rate=rate)
    if rate == 1.0:
        close(read(prepared, gone, jnp.float32(keys[4:])).latent, weights[4:] @ m0)


def test_nothing_is_what_an_empty_memory_reads():
    keys, values = facts(0, 3)
    state = write("none", keys, values)
    _, prepared, _, _, read = built("none")
    close(read(prepared, state, jnp.float32(keys)).latent, keys, 1e-5)  # K ≥ C: the query itself.
    assert int(write("none", keys, values, -1, state).refused) == 3


@check
@given(seeds)
def test_grown_slots_give_ridge_regression_on_the_encodings(seed):
    keys, values = facts(seed, 5)
    keys[3] = 0.3 * keys[0] - keys[1]  # In the span of two others: no slot of its own.
    options = dict(ridge=1e-2, query_noise=0.0)
    variant, prepared, m0, _, read = built("growing", **options)
    state = write("growing", keys[:3], values[:3], **options)
    state = write("growing", keys[3:], values[3:], 1, state, **options)
    assert int(state.grown) == 4 and int(state.crowded) == 0
    # Whatever the basis: in the encodings' own space it starts as what M₀ reads.
    start = np.linalg.pinv(m0) @ m0
    change = keys.T @ np.linalg.solve(keys @ keys.T + 1e-2 * np.eye(5), values - keys @ start)
    close(read(prepared, state, jnp.float32(keys)).latent, keys @ (start + change), 1e-3)
    # Earlier weights stay, so that a fact can be forgotten after others came.
    gone = write("growing", keys[1:2], values[1:2], -1, state, **options)
    rest = [0, 2, 3, 4]
    part = keys[rest]
    change = part.T @ np.linalg.solve(part @ part.T + 1e-2 * np.eye(4), values[rest] - part @ start)
    close(read(prepared, gone, jnp.float32(keys)).latent, keys @ (start + change), 2e-3)


def test_a_memory_that_is_grown_over_says_so():
    variant = memory.build("growing", slots=3, latent=C)
    prepared = variant.prepare(variant.init(jax.random.key(0)))
    keys, values = (jnp.float32(x) for x in facts(0, 5))
    state = variant.write(prepared, variant.empty(prepared), keys, values)
    assert int(state.grown) == 3 and int(state.crowded) == 2 and int(state.count) == 5


def test_a_grown_memory_refuses_to_forget_outside_its_span():
    keys, values = facts(3, 6)
    state = write("growing", keys[:4], values[:4])
    both = np.stack([keys[5], keys[1]])  # One that never was, and one that is in.
    gone = write("growing", both, np.stack([values[5], values[1]]), -1, state)
    assert int(gone.refused) == 1 and int(gone.count) == 3 and int(gone.grown) == 4
    never = write("growing", keys[[0, 2, 3]], values[[0, 2, 3]])
    read = built("growing")[4]
    prepared, asked = built("growing")[1], jnp.float32(keys[:4])
    close(read(prepared, gone, asked).latent, read(prepared, never, asked).latent, 1e-4)
