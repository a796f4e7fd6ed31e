"""What a streaming memory says of itself, against what it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import memory
from larimar_jax.memory import health
from larimar_jax.memory.streaming import Streaming

K, C = 32, 48


def facts(seed, n, columns=C):
    found = np.random.default_rng(seed).standard_normal((n, columns))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@functools.cache
def written(n, noise=0.5, ridge=1e-3):
    variant = Streaming(K, C, ridge=ridge, query_noise=noise)
    m0 = jnp.eye(K, C, dtype=jnp.float32)
    prepared = variant.prepare(memory.MemoryParams(m0, jnp.zeros(())))
    keys, values = facts(0, n), facts(1, n)
    state = variant.write(prepared, variant.empty(prepared), jnp.float32(keys), jnp.float32(values))
    return variant, prepared, state, keys, values


@pytest.mark.parametrize("n", [4, 16, 32, 64, 256])
def test_the_expected_error_is_the_error_of_noisy_reads(n):
    variant, prepared, state, keys, values = written(n)
    found = health.health(variant, prepared, state)
    w = keys[:, :K]
    rng = np.random.default_rng(2)
    size = np.sqrt(np.square(w).sum() / n / K)
    solution, m0 = np.float64(state.solution), np.eye(K, C)
    errors = [
        np.square((w + 0.5 * size * rng.standard_normal(w.shape)) @ solution - values).sum()
        for _ in range(200)
    ]
    want = np.sqrt(np.mean(errors) / np.square(values - w @ m0).sum())
    assert float(found.error) == pytest.approx(want, rel=0.25)
    assert bool(found.full) == (float(found.error) > health.FULL)
    assert int(found.count) == n


def test_load_rises_with_facts_and_the_alarm_comes_before_recall_is_gone():
    reports, recalls = [], []
    for n in (4, 16, 32, 64, 256):
        variant, prepared, state, keys, values = written(n)
        reports.append(health.health(variant, prepared, state))
        noisy = keys + 0.5 * facts(3, n)
        read = np.float64(variant.read(prepared, state, jnp.float32(noisy)).latent)
        nearest = np.argmax(read @ values.T, axis=1)
        recalls.append(float(np.mean(nearest == np.arange(n))))
    loads = [float(report.load) for report in reports]
    assert all(0 <= a < b <= 1 for a, b in zip(loads, loads[1:], strict=False))
    alarms = [bool(report.full) for report in reports]
    assert not alarms[0] and alarms[-1]
    assert all(recall > 0.9 for recall, alarm in zip(recalls, alarms, strict=True) if not alarm)


def test_load_is_the_degrees_of_freedom():
    variant, prepared, state, *_ = written(16)
    gram = np.float64(state.gram.total())
    ridge = 1e-3 + float(variant.shrink(state.gram.total()))
    want = np.trace(np.linalg.solve(gram + ridge * np.eye(K), gram)) / K
    assert float(health.health(variant, prepared, state).load) == pytest.approx(want, rel=1e-4)


def test_certainty_tells_written_keys_from_unrelated_queries():
    variant, prepared, state, keys, values = written(12, 0.0, 1e-2)
    rng = np.random.default_rng(5)
    other = rng.standard_normal((20, C))
    other[:, :K] -= other[:, :K] @ np.linalg.pinv(keys[:, :K]) @ keys[:, :K]
    inside = health.certainty(variant, prepared, state, jnp.float32(keys))
    outside = health.certainty(variant, prepared, state, jnp.float32(other))
    assert float(inside.distance.max()) < 0.2 < 0.99 < float(outside.distance.min())
    assert float(inside.leverage.max()) < 1.0 < float(outside.leverage.min())
    # s²(1 + h), where each column of the errors is N(0, s²(I + WWᵀ/λ)), s² at its likeliest.
    w, errors = keys[:, :K], values - keys[:, :K] @ np.eye(K, C)
    noise = np.sum(errors * np.linalg.solve(np.eye(12) + w @ w.T / 1e-2, errors)) / errors.size
    inverse = np.linalg.inv(w.T @ w + 1e-2 * np.eye(K))
    want = noise * (1 + np.einsum("nk,kl,nl->n", w, inverse, w))
    np.testing.assert_allclose(inside.variance, want, rtol=2e-2)


@pytest.mark.parametrize("n", [16, 48, 64, 80, 256])
def test_noisy_queries_have_no_peak_where_facts_are_as_many_as_slots(n):
    """§3's double descent, at an eighth of its size: K = 64, C = 96, half of noise."""
    slots, latent = 64, 96
    rng = np.random.default_rng(0)
    facts = rng.standard_normal((n, latent))
    facts *= 10 / np.linalg.norm(facts, axis=1, keepdims=True)
    noise = rng.standard_normal((n, latent))
    noise *= 5 / np.linalg.norm(noise, axis=1, keepdims=True)
    z, q = jnp.float32(facts), jnp.float32(facts + noise)

    def error(variant):
        prepared = variant.prepare(variant.init(jax.random.key(0)))
        state = variant.write(prepared, variant.empty(prepared), z, z)
        apart = np.float64(variant.read(prepared, state, q).latent) - facts
        return float(np.sqrt(np.square(apart).sum() / np.square(facts).sum()))

    ours = error(memory.build("streaming", slots=slots, latent=latent))
    assert ours <= (0.55 if n <= slots else 0.66)
    if n == slots:
        assert error(memory.build("direct", slots=slots, latent=latent, query="prior")) > 4 * ours
