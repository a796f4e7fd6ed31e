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
    found = np.random.default_rng(seed).standard_normal((rows, columns))
    return np.float64(np.float32(found / np.linalg.norm(found, axis=1, keepdims=True)))


@functools.cache
def built():
    variant = memory.build("streaming", slots=K, latent=C, ridge=RIDGE, query_noise=0.0)
    prepared = variant.prepare(variant.init(jax.random.key(0)))
    return variant, prepared


def solved(keys, values):
    """(M, A⁻¹) in float64; M₀ is the K x C identity, so that weights are the encodings themselves."""
    w = np.pad(keys, ((0, 0), (0, K - C)))
    inverse = np.linalg.inv(w.T @ w + RIDGE * np.eye(K))
    m0 = np.eye(K, C)
    return m0 + inverse @ w.T @ (values - w @ m0), inverse


def asked(keys, values, query):
    """(readout, confidence)"""
    m, inverse = solved(keys, values)
    w = np.pad(query, (0, K - C))
    return w @ m, 1 - np.square(RIDGE * inverse @ w).sum() / np.square(w).sum()


def reference(keys, values, query, fan_in, by):
    parts = range(0, len(keys), fan_in)
    latent, sure = zip(*(asked(keys[i : i + fan_in], values[i : i + fan_in], query) for i in parts),
                       strict=True)
    first, latent, sure = np.array(sure), np.array(latent), np.array(sure)
    while len(latent) > 1:
        answers, surest = [], []
        for i in range(0, len(latent), fan_in):
            z, c = latent[i : i + fan_in], sure[i : i + fan_in]
            weight = (c / c.max())[:, None] ** 4
            keys = z if by == "readout" else weight * query
            answers.append(asked(keys, z if by == "readout" else weight * z, query)[0])
            surest.append(c.max())
        latent, sure = np.array(answers), np.array(surest)
    return latent[0], first


@pytest.mark.parametrize("by", ["readout", "confidence"])
@pytest.mark.parametrize("facts, fan_in", [(3, 4), (4, 4), (9, 2), (23, 3)])
def test_the_recursion_is_that_of_float64(facts, fan_in, by):
    variant, prepared = built()
    keys, values = unit(0, facts), unit(1, facts)
    queries = keys[:3] + 0.3 * unit(2, 3)
    k, v, q = map(jnp.float32, (keys, values, queries))
    memories = long.write(variant, prepared, k, v, fan_in)
    found = long.read(variant, prepared, memories, q, by=by)
    for i in range(3):
        latent, sure = reference(keys, values, queries[i], fan_in, by)
        assert np.linalg.norm(found.latent[i] - latent) < 2e-4 * np.linalg.norm(latent)
        np.testing.assert_allclose(found.sure[i], sure, atol=1e-4)
        assert int(found.chunk[i]) == sure.argmax()
        assert float(found.confidence[i]) == pytest.approx(sure.max(), abs=1e-4)


def test_one_chunk_is_one_memory():
    variant, prepared = built()
    keys, values, queries = (jnp.float32(unit(seed, 5)) for seed in range(3))
    found = long.read(variant, prepared, long.write(variant, prepared, keys, values, 8), queries)
    state = variant.write(prepared, variant.empty(prepared), keys, values)
    plain = variant.read(prepared, state, queries)
    # The same solve in another program: κ(A) is a few hundred.
    np.testing.assert_allclose(found.latent, plain.latent, atol=3e-5)
    np.testing.assert_allclose(found.confidence, plain.confidence, atol=3e-5)


def test_any_fan_in_of_the_levels_and_any_order_of_chunks_finds_the_fact():
    variant, prepared = built()
    keys, values = unit(3, 40), unit(4, 40)
    order = np.random.default_rng(0).permutation(10)
    moved = np.arange(40).reshape(10, 4)[order].reshape(-1)
    for rows in (np.arange(40), moved):
        memories = long.write(variant, prepared, jnp.float32(keys[rows]), jnp.float32(values[rows]), 4)
        for fan_in in (2, 3, 10, 64):
            found = long.read(variant, prepared, memories, jnp.float32(keys), fan_in)
            assert (np.argmax(found.latent @ values.T, axis=1) == np.arange(40)).mean() > 0.9
            assert (rows[4 * np.asarray(found.chunk)] // 4 == np.arange(40) // 4).mean() > 0.95


def test_a_fact_is_put_in_changed_and_forgotten_in_its_chunk_alone():
    variant, prepared = built()
    keys, values = (jnp.float32(unit(seed, 12)) for seed in (5, 6))
    memories = long.write(variant, prepared, keys, values, 4)
    nothing = jnp.zeros(C)
    gone = long.change(variant, prepared, memories, 5, nothing, nothing)
    blank = keys.at[5].set(0.0), values.at[5].set(0.0)
    same = long.write(variant, prepared, *blank, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gone, same)
    back = long.change(variant, prepared, gone, 5, keys[5], values[5])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, memories)
    more = long.room(variant, prepared, memories, 2)
    assert more.keys.shape == (5, 4, C)
    found = long.read(variant, prepared, more, keys)
    before = long.read(variant, prepared, memories, keys)
    np.testing.assert_array_equal(found.chunk, before.chunk)
    late = long.change(variant, prepared, more, jnp.int32(19), jnp.float32(unit(7, 1))[0], values[0])
    assert int(long.read(variant, prepared, late, jnp.float32(unit(7, 1))).chunk[0]) == 4


def test_thousands_of_chunks_are_one_program_and_found_again():
    variant = memory.build("direct", slots=64, latent=64, query="prior")
    prepared = variant.prepare(variant.init(jax.random.key(0)))
    keys, values = unit(8, 8192, 64), unit(9, 8192, 64)
    traced = 0

    @jax.jit
    def recall(keys, values, queries):
        nonlocal traced
        traced += 1
        return long.read(variant, prepared, long.write(variant, prepared, keys, values, 4), queries)

    k, v = jnp.float32(keys), jnp.float32(values)
    for seed in (0, 1):
        rows = np.random.default_rng(seed).permutation(8192)[:16]
        queries = jnp.float32(keys[rows] + 0.4 * unit(seed, 16, 64))
        found = recall(k, v, queries)
        assert (np.argmax(found.latent @ values.T, axis=1) == rows).mean() > 0.9
    assert traced == 1


@pytest.mark.parametrize("facts, fan_in", [(5, 1), (0, 4)])
def test_nothing_to_chunk_is_an_error(facts, fan_in):
    variant, prepared = built()
    rows = jnp.zeros((facts, C))
    with pytest.raises(ValueError, match="at least 2, and at least one fact"):
        long.write(variant, prepared, rows, rows, fan_in)


def test_a_place_that_is_not_there_is_an_error():
    variant, prepared = built()
    memories = long.write(variant, prepared, jnp.ones((3, C)), jnp.ones((3, C)), 2)
    with pytest.raises(ValueError, match="4 places, from 0, and 4"):
        long.change(variant, prepared, memories, 4, jnp.ones(C), jnp.ones(C))
    with pytest.raises(ValueError, match="at least 2"):
        long.read(variant, prepared, memories, jnp.ones((1, C)), 1)
