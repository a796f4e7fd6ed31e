"""Streaming one fact at a time: right after every fact, by itself, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import memory
from larimar_jax.memory import health, rls
from larimar_jax.memory.streaming import Streaming

K, C, IN, POOL = 24, 30, 12, 40


def unit(seed, rows, columns=C):
    found = np.random.default_rng(seed).standard_normal((rows, columns))
    return np.float64(np.float32(found / np.linalg.norm(found, axis=1, keepdims=True)))


@functools.cache
def built(ridge, noise):
    variant = Streaming(K, C, ridge=ridge, query_noise=noise)
    m0 = np.eye(K, C) + 0.1 * np.random.default_rng(9).standard_normal((K, C))
    prepared = variant.prepare(memory.MemoryParams(jnp.float32(m0), jnp.zeros(())))
    return variant, prepared, functools.partial(rls.stream, variant)


def exact(variant, prepared, keys, values, rows):
    """M in float64 of the facts that are in, by the definition at the head of streaming.py."""
    m0 = np.asarray(prepared.memory, np.float64)
    w, z = (keys @ np.linalg.pinv(m0))[rows], values[rows]
    size = np.square(w).sum() / K
    level = 2.0 ** np.round(np.log2(size)) if len(rows) else 0.0
    shrink = float(variant.query_noise) ** 2 * level
    matrix = w.T @ w + (float(np.float32(variant.ridge)) + shrink) * np.eye(K)
    return m0 + np.linalg.solve(matrix, w.T @ (z - w @ m0) - shrink * m0), w


def swaps(steps, seed=0):
    rng = np.random.default_rng(seed)
    inside, outside = list(range(IN)), list(range(IN, POOL))
    chosen, signs = [], []
    for _ in range(steps):
        gone, come = rng.integers(len(inside)), rng.integers(len(outside))
        chosen += [inside[gone], outside[come]]
        signs += [-1, 1]
        inside[gone], outside[come] = outside[come], inside[gone]
    return np.int32(chosen), np.int32(signs), inside


def begin(variant, prepared, keys, values):
    state = variant.write(prepared, variant.empty(prepared), keys[:IN], values[:IN])
    return rls.init(variant, prepared, state)


@pytest.mark.parametrize("ridge, noise", [(1.0, 0.0), (1e-2, 0.0), (1e-3, 0.0), (1e-2, 0.5)])
def test_a_long_stream_reads_as_the_facts_that_are_in(ridge, noise):
    variant, prepared, stream = built(ridge, noise)
    keys, values = unit(1, POOL), unit(2, POOL)
    k, v = jnp.float32(keys), jnp.float32(values)
    chosen, signs, inside = swaps(300)
    now, steps = stream(prepared, begin(variant, prepared, k, v), k[chosen], v[chosen], signs)
    want, w = exact(variant, prepared, keys, values, inside)
    found = np.asarray(rls.read(variant, prepared, now, k[jnp.array(inside)]), np.float64)
    assert np.linalg.norm(found - w @ want) < 3e-5 * np.linalg.norm(w @ want)
    assert int(now.count) == IN and int(now.state.refused) == 0
    assert not bool(steps.refused.any())
    # Settled, it is what `write` gives.
    state = rls.to_state(variant, prepared, now)
    written = variant.write(prepared, variant.empty(prepared), k[jnp.array(inside)], v[jnp.array(inside)])
    assert int(state.count) == IN
    np.testing.assert_allclose(state.gram.total(), written.gram.total(), atol=1e-6)
    read = w @ np.float64(state.solution)
    assert np.linalg.norm(read - w @ want) < 3e-5 * np.linalg.norm(w @ want)
    # A refresh comes by itself, and not at every fact where none is needed.
    refreshed = float(steps.refreshed.mean())
    assert len(signs) // rls.RECENT / len(signs) <= refreshed + 1e-6
    assert refreshed <= (0.05 if noise or ridge == 1.0 else 0.6)


def test_it_is_right_after_each_fact():
    variant, prepared, stream = built(1e-2, 0.5)
    keys, values = unit(3, POOL), unit(4, POOL)
    k, v = jnp.float32(keys), jnp.float32(values)
    chosen, signs, _ = swaps(20, seed=1)
    now, inside = begin(variant, prepared, k, v), list(range(IN))
    for fact, sign in zip(chosen, signs, strict=True):
        now, _ = stream(prepared, now, k[fact][None], v[fact][None], jnp.int32(sign))
        inside.append(fact) if sign > 0 else inside.remove(fact)
        want, _ = exact(variant, prepared, keys, values, inside)
        assert np.linalg.norm(np.float64(now.solution) - want) < 3e-5 * np.linalg.norm(want)


def test_what_was_never_written_is_refused_and_changes_nothing():
    variant, prepared, stream = built(1e-2, 0.0)
    keys, values = unit(5, POOL), unit(6, POOL)
    k, v = jnp.float32(keys), jnp.float32(values)
    before = begin(variant, prepared, k, v)
    # One that is in, one that never was (twice, among others), padding, and one more that is in.
    rows = np.array([0, 30, 31, 30, 2])
    key = k[rows].at[2].set(0.0)
    after, steps = stream(prepared, before, key, v[rows], -1)
    assert steps.refused.tolist() == [False, True, False, True, False]
    assert int(after.state.refused) == 2 and int(after.count) == IN - 2
    rest = [row for row in range(IN) if row not in (0, 2)]
    want, _ = exact(variant, prepared, keys, values, rest)
    assert np.linalg.norm(np.float64(after.solution) - want) < 1e-4 * np.linalg.norm(want)
    # The statistics owe nothing either.
    settled = rls.to_state(variant, prepared, after)
    assert np.linalg.norm(np.float64(settled.solution) - want) < 1e-4 * np.linalg.norm(want)


def test_a_written_key_with_another_value_is_refused():
    """G is then that of the facts that are left, and only the sums of values know."""
    variant, prepared, stream = built(1e-2, 0.5)
    keys, values = unit(5, POOL), unit(6, POOL)
    k, v = jnp.float32(keys), jnp.float32(values)
    before = begin(variant, prepared, k, v)
    # What is written is never refused, whatever its sign is known by.
    close_by = variant.write(prepared, before.state, k[:IN] * 1.0001, v[:IN], jnp.int32(1))
    assert int(close_by.count) == 2 * IN and int(close_by.refused) == 0
    for rows in ([3], [3, 0]):
        other = v[jnp.array(rows)].at[0].set(v[30])
        state, certificate = health.forget(variant, prepared, before.state, k[jnp.array(rows)], other)
        assert bool(certificate.refused) and int(state.refused) == len(rows)
        np.testing.assert_array_equal(state.solution, before.state.solution)
        np.testing.assert_array_equal(state.gram.total(), before.state.gram.total())
    after, steps = stream(prepared, before, k[jnp.array([0, 3, 2])], v[jnp.array([0, 30, 2])], -1)
    assert steps.refused.tolist() == [False, True, False] and int(after.state.refused) == 1
    want, _ = exact(variant, prepared, keys, values, [r for r in range(IN) if r not in (0, 2)])
    assert np.linalg.norm(np.float64(after.solution) - want) < 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-4])
def test_nothing_can_be_forgotten_of_a_memory_without_facts(ridge, noise):
    variant, prepared, stream = built(ridge, noise)
    k, v = jnp.float32(unit(5, POOL)), jnp.float32(unit(6, POOL))
    empty = variant.empty(prepared)
    _, certificate = health.forget(variant, prepared, empty, 0.01 * k[:1], v[:1])
    assert bool(certificate.refused)
    _, steps = stream(prepared, rls.init(variant, prepared, empty), 0.01 * k[:1], v[:1], -1)
    assert steps.refused.tolist() == [True]


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-4])
def test_no_fact_that_is_in_is_refused(ridge, noise):
    """Down to the last one, fewer facts than slots and more, duplicates and small ones among them."""
    variant, prepared, stream = built(ridge, noise)
    for total in (IN, K, POOL):
        keys, values = unit(14, total), unit(15, total)
        keys[1] = keys[0]  # A duplicate, and one whose value is another.
        keys[2], values[2] = keys[3], values[3]
        keys[4] *= 1e-2
        k, v = jnp.float32(keys), jnp.float32(values)
        state = variant.write(prepared, variant.empty(prepared), k, v)
        now, steps = stream(prepared, rls.init(variant, prepared, state), k, v, -1)
        assert not steps.refused.any() and int(now.count) == 0 and int(now.state.refused) == 0
        half, certificate = health.forget(variant, prepared, state, k[::2], v[::2])
        assert not bool(certificate.refused)
        emptied, certificate = health.forget(variant, prepared, half, k[1::2], v[1::2])
        assert not bool(certificate.refused) and int(emptied.count) == 0
        apart = np.float64(emptied.solution) - np.float64(prepared.memory)
        assert np.linalg.norm(apart) < 1e-3 * np.linalg.norm(prepared.memory)


def test_what_float32_cannot_write_is_counted_as_missing():
    variant, prepared, _ = built(1e-2, 0.0)
    bare = dataclasses.replace(variant, ridge=0.0)  # Fewer facts than slots: A is singular.
    k, v = jnp.float32(unit(5, 2)), jnp.float32(unit(6, 2))
    state = bare.write(prepared, bare.empty(prepared), k, v)
    assert int(state.refused) == 2 and int(state.count) == 0
    np.testing.assert_array_equal(state.solution, prepared.memory)


def test_many_memories_are_updated_under_one_vmap():
    variant, prepared, _ = built(1e-2, 0.5)
    keys, values = (jnp.float32(unit(seed, 3 * 5)).reshape(3, 5, C) for seed in (7, 8))
    start = rls.init(variant, prepared, variant.empty(prepared))

    def one(keys, values):
        def step(now, fact):
            now, _, due = rls.update(variant, prepared, now, *fact)
            return now, due

        now, due = jax.lax.scan(step, start, (keys, values))
        return rls.refactorize(variant, prepared, now).solution, due

    together, due = jax.jit(jax.vmap(one))(keys, values)
    assert due[:, 0].all()  # An empty memory has no μ, and the first fact gives it one.
    for found, k, v in zip(together, np.float64(keys), np.float64(values), strict=True):
        want, _ = exact(variant, prepared, k, v, list(range(5)))
        assert np.linalg.norm(np.float64(found) - want) < 1e-5 * np.linalg.norm(want)


def test_a_stream_compiles_once():
    variant, prepared, _ = built(1e-2, 0.5)
    traced = 0

    @jax.jit
    def stream(prepared, now, keys, values, signs):
        nonlocal traced
        traced += 1
        return rls.stream(variant, prepared, now, keys, values, signs)[0]

    keys, values = jnp.float32(unit(1, POOL)), jnp.float32(unit(2, POOL))
    now = begin(variant, prepared, keys, values)
    for seed in range(3):
        chosen, signs, _ = swaps(4, seed)
        now = stream(prepared, now, keys[chosen], values[chosen], signs)
    assert traced == 1


@pytest.mark.parametrize("ridge, noise", [(1.0, 0.0), (1e-2, 0.0), (1e-4, 0.0), (1e-2, 0.5)])
def test_a_certificate_is_near_the_measured_error(ridge, noise):
    variant, prepared, stream = built(ridge, noise)
    keys, values = unit(10, POOL), unit(11, POOL)
    k, v = jnp.float32(keys), jnp.float32(values)
    state = variant.write(prepared, variant.empty(prepared), k[:IN], v[:IN])
    after, certificate = health.forget(variant, prepared, state, k[3:4], v[3:4])
    rest = [row for row in range(IN) if row != 3]
    want, _ = exact(variant, prepared, keys, values, rest)

    def measured(solution):
        return np.linalg.norm(np.float64(solution) - want) / np.linalg.norm(want)

    assert 0.1 < float(certificate.distance) / measured(after.solution) < 10
    assert not bool(certificate.refused)
    # A memory that is not what its statistics say: the estimate finds by how much.
    for size in (1e-5, 1e-3, 1e-1):
        noise_on = size * np.random.default_rng(0).standard_normal((K, C)).astype(np.float32)
        bad = dataclasses.replace(after, solution=after.solution + noise_on)
        found = float(health.distance(variant, prepared, bad))
        assert 0.5 < found / measured(bad.solution) < 2
    # Asked again for what is gone: refused, and named.
    same, second = health.forget(variant, prepared, after, k[30:31], v[30:31])
    if noise == 0.0 and ridge < 1.0:
        assert bool(second.refused)
        np.testing.assert_array_equal(same.solution, after.solution)


def test_the_leverage_of_a_forgotten_key_is_what_others_still_say():
    variant, prepared, _ = built(1e-3, 0.0)
    keys, values = unit(12, POOL), unit(13, POOL)
    keys[1] = keys[0] + 0.05 * keys[5]  # A near-duplicate.
    k, v = jnp.float32(keys), jnp.float32(values)
    state = variant.write(prepared, variant.empty(prepared), k[:3], v[:3])
    _, alone = health.forget(variant, prepared, state, k[2:3], v[2:3])
    _, shared = health.forget(variant, prepared, state, k[0:1], v[0:1])
    assert float(alone.leverage) < 0.4 < 0.9 < float(shared.leverage)
