"""Memories of chunks and the recursive read, against float64 and against one plain memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import long_context as long
from larimar_jax import memory

K, C = 12, 10
RIDGE = 1e-2


def unit(seed, rows, columns=C):
    vectors = np.random.default_rng(seed).standard_normal((rows, columns))
    return np.float64(np.float32(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)))


@functools.cache
def built():
    variant = memory.build("streaming", slots=K, latent=C, ridge=RIDGE, query_noise=0.0)
    return variant, variant.prepare(variant.init(jax.random.key(0)))


def solved(keys, values, query):
    """(readout, confidence) in float64; M₀ is the K x C identity, so that weights are encodings."""
    w, query = (np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, K - C)]) for a in (keys, query))
    inverse = np.linalg.inv(w.T @ w + RIDGE * np.eye(K))
    m = np.eye(K, C) + inverse @ w.T @ (values - w @ np.eye(K, C))
    return query @ m, 1 - np.square(RIDGE * inverse @ query).sum() / np.square(query).sum()


def reference(keys, values, query, fan_in, by):
    def parts(*arrays):
        return [[a[i : i + fan_in] for a in arrays] for i in range(0, len(arrays[0]), fan_in)]

    pairs = [solved(*part, query) for part in parts(keys, values)]
    latent, first = map(np.array, zip(*pairs, strict=True))
    confidence = first
    while len(latent) > 1:
        levels = parts(latent, confidence)
        weights = [(c / c.max())[:, None] ** 4 for _, c in levels]
        facts = [
            (z, z) if by == "readout" else (weight * query, weight * z)
            for (z, _), weight in zip(levels, weights, strict=True)
        ]
        latent = np.array([solved(*fact, query)[0] for fact in facts])
        confidence = np.array([c.max() for _, c in levels])
    return latent[0], first


@pytest.mark.parametrize("by", ["readout", "confidence"])
@pytest.mark.parametrize("facts, fan_in", [(3, 4), (4, 4), (9, 2), (23, 3)])
def test_the_recursion_is_that_of_float64(facts, fan_in, by):
    variant, prepared = built()
    keys, values = unit(0, facts), unit(1, facts)
    queries = keys[:3] + 0.3 * unit(2, 3)
    k, v, q = map(jnp.float32, (keys, values, queries))
    reading = long.read(variant, prepared, long.write(variant, prepared, k, v, fan_in), q, by=by)
    for i in range(3):
        latent, confidences = reference(keys, values, queries[i], fan_in, by)
        assert np.linalg.norm(reading.latent[i] - latent) < 2e-4 * np.linalg.norm(latent)
        np.testing.assert_allclose(reading.confidences[i], confidences, atol=1e-4)
        assert int(reading.chunk[i]) == confidences.argmax()
        assert float(reading.confidence[i]) == pytest.approx(confidences.max(), abs=1e-4)


def test_one_chunk_is_one_memory():
    variant, prepared = built()
    keys, values, queries = (jnp.float32(unit(seed, 5)) for seed in range(3))
    reading = long.read(variant, prepared, long.write(variant, prepared, keys, values, 8), queries)
    state = variant.write(prepared, variant.empty(prepared), keys, values)
    plain = variant.read(prepared, state, queries)
    # The same solve in another program: κ(A) is a few hundred.
    np.testing.assert_allclose(reading.latent, plain.latent, atol=3e-5)
    np.testing.assert_allclose(reading.confidence, plain.confidence, atol=3e-5)


def test_any_fan_in_of_the_levels_and_any_order_of_chunks_finds_the_fact():
    variant, prepared = built()
    keys, values = unit(3, 40), unit(4, 40)
    order = np.random.default_rng(0).permutation(10)
    moved = np.arange(40).reshape(10, 4)[order].reshape(-1)
    for rows in (np.arange(40), moved):
        facts = jnp.float32(keys[rows]), jnp.float32(values[rows])
        memories = long.write(variant, prepared, *facts, 4)
        for fan_in in (2, 3, 10, 64):
            reading = long.read(variant, prepared, memories, jnp.float32(keys), fan_in)
            assert (np.argmax(reading.latent @ values.T, axis=1) == np.arange(40)).mean() > 0.9
            assert (rows[4 * np.asarray(reading.chunk)] // 4 == np.arange(40) // 4).mean() > 0.95


def test_a_fact_is_put_in_changed_and_forgotten_in_its_chunk_alone():
    def same(one, two):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, two)

    variant, prepared = built()
    keys, values = (jnp.float32(unit(seed, 12)) for seed in (5, 6))
    memories = long.write(variant, prepared, keys, values, 4)
    gone = long.change(variant, prepared, memories, 5, jnp.zeros(C), jnp.zeros(C))
    blank = keys.at[5].set(0.0), values.at[5].set(0.0)
    same(gone, long.write(variant, prepared, *blank, 4))
    same(long.change(variant, prepared, gone, 5, keys[5], values[5]), memories)
    more = long.room(variant, prepared, memories, 2)
    assert more.keys.shape == (5, 4, C)
    chunks = [long.read(variant, prepared, m, keys).chunk for m in (more, memories)]
    np.testing.assert_array_equal(*chunks)
    key = jnp.float32(unit(7, 1))
    late = long.change(variant, prepared, more, jnp.int32(19), key[0], values[0])
    assert int(long.read(variant, prepared, late, key).chunk[0]) == 4


def test_thousands_of_chunks_are_one_program_and_found_again():
    variant = memory.build("direct", slots=64, latent=64, query="prior")
    prepared = variant.prepare(variant.init(jax.random.key(0)))
    keys, values = unit(8, 8192, 64), unit(9, 8192, 64)
    traced = []

    @jax.jit
    def recall(keys, values, queries):
        traced.append(True)
        memories = long.write(variant, prepared, keys, values, 4)
        return long.read(variant, prepared, memories, queries)

    for seed in (0, 1):
        rows = np.random.default_rng(seed).permutation(8192)[:16]
        queries = jnp.float32(keys[rows] + 0.4 * unit(seed, 16, 64))
        reading = recall(jnp.float32(keys), jnp.float32(values), queries)
        assert (np.argmax(reading.latent @ values.T, axis=1) == rows).mean() > 0.9
    assert len(traced) == 1


def test_nothing_to_chunk_and_a_place_that_is_not_there_are_errors():
    variant, prepared = built()
    for facts, fan_in in ((5, 1), (0, 4)):
        rows = jnp.zeros((facts, C))
        with pytest.raises(ValueError, match="at least 2, and at least one fact"):
            long.write(variant, prepared, rows, rows, fan_in)
    memories = long.write(variant, prepared, jnp.ones((3, C)), jnp.ones((3, C)), 2)
    with pytest.raises(ValueError, match="4 places, from 0, and 4"):
        long.change(variant, prepared, memories, 4, jnp.ones(C), jnp.ones(C))
    with pytest.raises(ValueError, match="at least 2"):
        long.read(variant, prepared, memories, jnp.ones((1, C)), 1)
