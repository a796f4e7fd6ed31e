"""Diagnostics and certificates of a streaming memory, against what it is in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra import distance, prepare, unit
from test_memory_rls import exact

from larimar_jax import memory
from larimar_jax.memory import diagnostics
from larimar_jax.memory.streaming import Streaming

K, C = 32, 48


@functools.cache
def written(n, noise=0.5, ridge=1e-3):
    variant = Streaming(K, C, ridge=ridge, query_noise=noise)
    prepared = prepare(variant, np.eye(K, C))
    keys, values = unit(0, n, C), unit(1, n, C)
    facts = (jnp.float32(keys), jnp.float32(values))
    state = variant.write(prepared, variant.empty(prepared), *facts)
    return variant, prepared, state, keys, values


@pytest.mark.parametrize("n", [4, 16, 32, 64, 256])
def test_the_expected_error_is_the_error_of_noisy_reads(n):
    variant, prepared, state, keys, values = written(n)
    report = diagnostics.diagnose(variant, prepared, state)
    w = keys[:, :K]
    rng = np.random.default_rng(2)
    size = np.sqrt(np.square(w).sum() / n / K)
    queries = (w + 0.5 * size * rng.standard_normal(w.shape) for _ in range(200))
    errors = [np.square(query @ np.float64(state.solution) - values) for query in queries]
    want = np.sqrt(np.sum(errors) / 200 / np.square(values - w @ np.eye(K, C)).sum())
    assert float(report.error) == pytest.approx(want, rel=0.25)
    assert bool(report.full) == (float(report.error) > diagnostics.FULL)
    assert int(report.count) == n
    gram = np.float64(state.gram.total())
    ridge = 1e-3 + float(variant.shrink(state.gram.total()))
    load = np.trace(np.linalg.solve(gram + ridge * np.eye(K), gram)) / K
    assert float(report.load) == pytest.approx(load, rel=1e-4)


def test_load_rises_with_facts_and_the_alarm_comes_before_recall_is_gone():
    reports, recalls = [], []
    for n in (4, 16, 32, 64, 256):
        variant, prepared, state, keys, values = written(n)
        reports.append(diagnostics.diagnose(variant, prepared, state))
        noisy = jnp.float32(keys + 0.5 * unit(3, n, C))
        read = np.float64(variant.read(prepared, state, noisy).latent)
        recalls.append(float(np.mean(np.argmax(read @ values.T, axis=1) == np.arange(n))))
    loads = [float(report.load) for report in reports]
    assert all(0 <= a < b <= 1 for a, b in zip(loads, loads[1:], strict=False))
    alarms = [bool(report.full) for report in reports]
    assert not alarms[0] and alarms[-1]
    assert all(recall > 0.9 for recall, alarm in zip(recalls, alarms, strict=True) if not alarm)


def test_certainty_tells_written_keys_from_unrelated_queries():
    variant, prepared, state, keys, values = written(12, 0.0, 1e-2)
    unrelated = np.random.default_rng(5).standard_normal((20, C))
    unrelated[:, :K] -= unrelated[:, :K] @ np.linalg.pinv(keys[:, :K]) @ keys[:, :K]
    inside = diagnostics.certainty(variant, prepared, state, jnp.float32(keys))
    outside = diagnostics.certainty(variant, prepared, state, jnp.float32(unrelated))
    assert float(inside.distance.max()) < 0.2 < 0.99 < float(outside.distance.min())
    assert float(inside.leverage.max()) < 1.0 < float(outside.leverage.min())
    # s²(1 + h), where each column of the errors is N(0, s²(I + WWᵀ/λ)), s² at its likeliest.
    w, errors = keys[:, :K], values - keys[:, :K] @ np.eye(K, C)
    noise = np.sum(errors * np.linalg.solve(np.eye(12) + w @ w.T / 1e-2, errors)) / errors.size
    inverse = np.linalg.inv(w.T @ w + 1e-2 * np.eye(K))
    want = noise * (1 + np.einsum("nk,kl,nl->n", w, inverse, w))
    np.testing.assert_allclose(inside.variance, want, rtol=2e-2)


@pytest.mark.parametrize("ridge, noise", [(1.0, 0.0), (1e-2, 0.0), (1e-4, 0.0), (1e-2, 0.5)])
def test_a_certificate_is_near_the_measured_error(ridge, noise):
    slots, latent, n = 24, 30, 12
    variant = Streaming(slots, latent, ridge=ridge, query_noise=noise)
    m0 = np.eye(slots, latent) + 0.1 * np.random.default_rng(9).standard_normal((slots, latent))
    prepared = prepare(variant, m0)
    k, v = (jnp.float32(unit(seed, 40, latent)) for seed in (10, 11))
    state = variant.write(prepared, variant.empty(prepared), k[:n], v[:n])
    after, certificate = diagnostics.forget(variant, prepared, state, k[3:4], v[3:4])
    want, _ = exact(variant, prepared, k, v, [row for row in range(n) if row != 3])
    assert 0.1 < float(certificate.distance) / distance(after.solution, want) < 10
    assert not bool(certificate.refused)
    # A memory that is not what its statistics imply: the estimate shows by how much.
    for size in (1e-5, 1e-3, 1e-1):
        error = size * np.random.default_rng(0).standard_normal(m0.shape).astype(np.float32)
        bad = dataclasses.replace(after, solution=after.solution + error)
        estimate = float(diagnostics.distance(variant, prepared, bad))
        assert 0.5 < estimate / distance(bad.solution, want) < 2
    # What was never in is refused, and the certificate shows it.
    again, second = diagnostics.forget(variant, prepared, after, k[30:31], v[30:31])
    if noise == 0.0 and ridge < 1.0:
        assert bool(second.refused)
        np.testing.assert_array_equal(again.solution, after.solution)


def test_the_leverage_of_a_forgotten_key_is_what_others_still_explain():
    variant = Streaming(K, C, ridge=1e-3, query_noise=0.0)
    prepared = prepare(variant, np.eye(K, C))
    keys, values = unit(12, 6, C), jnp.float32(unit(13, 6, C))
    keys[1] = keys[0] + 0.05 * keys[5]  # A near-duplicate.
    k = jnp.float32(keys)
    state = variant.write(prepared, variant.empty(prepared), k[:3], values[:3])
    _, alone = diagnostics.forget(variant, prepared, state, k[2:3], values[2:3])
    _, shared = diagnostics.forget(variant, prepared, state, k[:1], values[:1])
    assert float(alone.leverage) < 0.4 < 0.9 < float(shared.leverage)


@pytest.mark.parametrize("n", [16, 48, 64, 80, 256])
def test_noisy_queries_have_no_peak_where_facts_are_as_many_as_slots(n):
    """§3's double descent, at an eighth of its size: K = 64, C = 96, half of noise."""
    slots, latent = 64, 96
    rng = np.random.default_rng(0)
    facts, noise = rng.standard_normal((2, n, latent))
    facts *= 10 / np.linalg.norm(facts, axis=1, keepdims=True)
    noise *= 5 / np.linalg.norm(noise, axis=1, keepdims=True)
    z, q = jnp.float32(facts), jnp.float32(facts + noise)

    def error(variant):
        prepared = variant.prepare(variant.init(jax.random.key(0)))
        state = variant.write(prepared, variant.empty(prepared), z, z)
        return distance(variant.read(prepared, state, q).latent, facts)

    ours = error(memory.build("streaming", slots=slots, latent=latent))
    assert ours <= (0.55 if n <= slots else 0.66)
    if n == slots:
        assert error(memory.build("direct", slots=slots, latent=latent, query="prior")) > 4 * ours
