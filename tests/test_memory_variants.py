"""Each variant beside a plain float64 version of what it documents."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra import close, distance, prepare, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import linalg, memory

K, C = 8, 6
check = settings(deadline=None, max_examples=6)
GOLDEN = np.load(Path(__file__).parent / "golden" / "kanerva.npz")


def facts(seed, n):
    return np.random.default_rng(seed).standard_normal((2, n, C))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Built:
    """A variant with its float64 prior memory, and its functions on float64 rows."""

    def __init__(self, name, **options):
        self.variant = memory.build(name, slots=K, latent=C, **options)
        m0 = np.eye(K, C) + 0.2 * np.random.default_rng(1).standard_normal((K, C))
        self.prepared = prepare(self.variant, m0)
        self.m0 = np.float64(self.prepared.prior_memory)
        self.empty = self.variant.empty(self.prepared)

    def update(self, keys, values, sign=1, state=None):
        signs = jnp.full(len(keys), sign, jnp.int32)
        state = self.empty if state is None else state
        keys, values = jnp.float32(keys), jnp.float32(values)
        return self.variant.update(self.prepared, state, keys, values, signs)

    def read(self, state, queries):
        return self.variant.read(self.prepared, state, jnp.float32(queries))

    def weights(self, keys):
        return keys @ np.linalg.pinv(self.m0)

    def matrix(self, state):
        return self.variant.matrix(self.prepared, state)


built = functools.cache(Built)


@check
@given(seeds)
def test_kanerva_is_the_gaussian_posterior(seed):
    keys, values = facts(seed, 5)
    ours = built("kanerva")
    state, w = ours.update(keys, values), ours.weights(keys)
    covariance = np.linalg.inv(np.eye(K) + w.T @ w / 0.1)
    mean = ours.m0 + covariance @ w.T @ (values - w @ ours.m0) / 0.1
    close(state.covariance, covariance, 1e-4)
    close(state.mean, mean, 1e-4)
    close(ours.read(state, keys).latent, w @ mean, 1e-4)
    # Without query noise, and with λ = a, it is the streaming memory.
    streaming = built("streaming", ridge=0.1, query_noise=0.0)
    close(state.mean, streaming.update(keys, values).solution, 1e-4)


def recursion(m, keys, values, a, last=1.0):
    """Kalman's update in float64, each fact addressed by the memory before it; the noise of the last
    has the sign `last`."""
    u = np.eye(len(m))
    for i, (key, z) in enumerate(zip(keys, values, strict=True)):
        sign = last if i + 1 == len(keys) else 1.0
        w = np.linalg.solve(m @ m.T + a * np.eye(len(m)), m @ key)
        gain = u @ w / (w @ u @ w + sign * a)
        m, u = m + np.outer(gain, z - w @ m), u - np.outer(gain, w @ u)
    return m, u


def test_kanerva_refuses_to_forget_what_it_never_saw_or_whose_key_is_gone():
    keys, values = facts(3, 6)
    for memory_of_keys, row in (("current", 0), ("current", 3), ("reference", 5)):
        ours = built("kanerva", addressed_by=memory_of_keys)
        state = ours.update(keys[:4], values[:4])
        refused = ours.update(keys[row:][:1], values[row:][:1], -1, state)
        assert int(refused.refused) == 1 and int(refused.count) == 4
        np.testing.assert_array_equal(refused.mean, state.mean)
        np.testing.assert_array_equal(refused.covariance, state.covariance)
    assert built("kanerva", addressed_by="current").variant.for_edits() == ours.variant
    left = ours.update(keys[1:2], values[1:2], -1, state)
    never = ours.update(keys[[0, 2, 3]], values[[0, 2, 3]])
    close(left.mean, never.mean, 1e-3)  # ‖w‖²/a is about 60, and as much is lost of 1e-6.
    assert int(left.refused) == 0 and int(left.count) == 3
    # Even of the last fact the current memory gives another key: taking that out is not forgetting.
    again = [np.concatenate([x[:4], x[3:4]]) for x in (keys, values)]
    taken, _ = recursion(ours.m0, *again, 0.1, last=-1.0)
    assert distance(taken, recursion(ours.m0, keys[:3], values[:3], 0.1)[0]) > 0.1


@check
@given(seeds, st.sampled_from([0.3, 3.0]))
def test_kanerva_keys_a_fact_by_the_memory_before_it(seed, a):
    keys, values = facts(seed, 5)
    ours = built("kanerva", addressed_by="current", observation=a)
    mean, covariance = recursion(ours.m0, keys, values, a)
    state = ours.update(keys, values)
    close(state.mean, mean, 1e-4)
    close(state.covariance, covariance, 1e-4)
    # The pseudo-inverse of a memory in float32 is as good as its condition squared allows.
    tolerance = max(1e-4, np.finfo(np.float32).eps * np.linalg.cond(mean) ** 2)
    close(ours.read(state, keys).latent, keys @ np.linalg.pinv(mean) @ mean, tolerance)


@pytest.mark.parametrize("case", ["released", "random", "noisy", "small", "tall"])
def test_kanerva_is_the_released_code_without_direct_writing(case):
    names = "prior encodings queries noise memory covariance weights read".split()
    m0, z, queries, noise, *expected = (GOLDEN[f"{case}/{name}"] for name in names)
    slots, latent = m0.shape
    options = dict(slots=slots, latent=latent, observation=float(noise) ** 2 / (1 + 1e-6))

    def run(**addressing):
        variant = memory.build("kanerva", **options, **addressing)
        prepared, z32 = prepare(variant, m0), jnp.float32(z)
        state = variant.write(prepared, variant.empty(prepared), z32, z32)
        reading = variant.read(prepared, state, jnp.float32(queries))
        return state.mean, (1 + 1e-6) * state.covariance, reading.weights, reading.latent

    ours = run(addressed_by="current", addressing="ben_israel_cohen")
    for a, b in zip(ours, expected, strict=True):
        close(a, b, 1e-6)
    # Keys from M₀ make another memory, but where K > C: there it reads each encoding already.
    assert (distance(run()[0], expected[0]) > 0.1) == (case != "tall")


def test_kanerva_stays_finite_for_repeats_and_when_full_at_the_released_variance():
    options = dict(slots=4, latent=C, observation=1e-12)
    variant = memory.build("kanerva", addressed_by="current", **options)
    prepared = prepare(variant, np.eye(4, C))

    def write(z):
        return variant.write(prepared, variant.empty(prepared), jnp.float32(z), jnp.float32(z))

    z = facts(1, 3)[0]
    once = write(z)
    close(write(np.tile(z, (9, 1))).mean, once.mean, 1e-6)
    # Not even by M_ref is enough left of such a variance to forget a fact.
    first = jnp.float32(z[:1])
    assert int(variant.for_edits().forget(prepared, once, first, first).refused) == 1
    full = write(facts(0, 27)[0])
    assert jnp.linalg.norm(full.mean) < 100.0 and jnp.linalg.norm(full.covariance) < 1e-3


@check
@given(seeds)
def test_square_root_is_ridge_least_squares(seed):
    keys, values = facts(seed, 7)
    ours = built("square_root")
    state, w = ours.update(keys, values), ours.weights(keys)
    gram = w.T @ w + 0.1 * np.eye(K)
    close(state.factor, np.linalg.cholesky(gram), 1e-4)
    mean = ours.m0 + np.linalg.solve(gram, w.T @ (values - w @ ours.m0))
    close(ours.matrix(state), mean, 1e-4)
    close(ours.read(state, keys).latent, w @ mean, 1e-4)
    left = ours.update(keys[2:4], values[2:4], -1, state)
    rest = w[[0, 1, 4, 5, 6]]
    close(left.factor, np.linalg.cholesky(rest.T @ rest + 0.1 * np.eye(K)), 1e-3)
    assert int(left.count) == 5 and int(left.refused) == 0
    refused = ours.update(9.0 * keys[:1], values[:1], -1, state)
    assert int(refused.refused) == 1 and int(refused.count) == 7
    np.testing.assert_array_equal(refused.factor, state.factor)


def test_a_factor_is_rotated_forth_and_back():
    rng = np.random.default_rng(0)
    a, row = rng.standard_normal((9, 6)), rng.standard_normal(6)
    factor = jnp.float32(np.linalg.cholesky(a.T @ a))
    up, is_sound = linalg.factor_update(factor, jnp.float32(row), jnp.float32(1.0))
    assert bool(is_sound)
    close(up, np.linalg.cholesky(a.T @ a + np.outer(row, row)), 1e-6)
    down, is_sound = linalg.factor_update(up, jnp.float32(row), jnp.float32(-1.0))
    assert bool(is_sound)
    close(down, factor, 1e-5)
    same, is_sound = linalg.factor_update(factor, jnp.float32(10.0 * row), jnp.float32(-1.0))
    assert not bool(is_sound)
    np.testing.assert_array_equal(same, factor)


@check
@given(seeds)
def test_nearest_reads_the_value_of_the_nearest_key(seed):
    (keys, values), queries = facts(seed, 6), facts(seed + 1, 10)[0]
    ours = built("nearest")
    similarity = unit(queries) @ unit(keys).T
    reading = ours.read(ours.update(keys, values), queries)
    close(reading.latent, values[similarity.argmax(1)], 1e-6)
    np.testing.assert_allclose(reading.confidence, np.clip(similarity.max(1), 0, 1), atol=1e-6)


def test_a_list_that_is_full_counts_what_it_leaves_out():
    keys, values = facts(0, K + 3)
    ours = built("nearest")
    state = ours.update(keys, values)
    assert int(state.count) == K and int(state.overflow) == 3
    close(ours.read(state, keys[:K]).latent, values[:K], 1e-6)
    freed = ours.update(keys[2:3], values[2:3], -1, state)
    again = ours.update(keys[K:], values[K:], 1, freed)
    assert int(again.count) == K and int(again.overflow) == 3 + 2
    close(ours.read(again, keys[K : K + 1]).latent, values[K : K + 1], 1e-6)
    # Another value under a known key is another fact.
    refused = ours.update(keys[:1], values[1:2], -1, state)
    assert int(refused.refused) == 1 and int(refused.count) == K


@check
@given(seeds, st.sampled_from([0.0, 4.0, 64.0]))
def test_hopfield_is_softmax_attention(seed, beta):
    (keys, values), queries = facts(seed, 6), facts(seed + 1, 4)[0]
    ours = built("hopfield", beta=beta)
    scores = np.exp(beta * (unit(queries) @ unit(keys).T - 1))
    want = scores / scores.sum(1, keepdims=True) @ values
    close(ours.read(ours.update(keys, values), queries).latent, want, 1e-4)


@check
@given(seeds, st.sampled_from([0.3, 1.0]))
def test_the_delta_rule_takes_a_step_for_each_fact(seed, rate):
    keys, values = facts(seed, 5)
    ours = built("delta_rule", rate=rate)
    state, m, weights = ours.update(keys, values), ours.m0.copy(), ours.weights(keys)
    for w, z in zip(weights, values, strict=True):
        m += rate * np.outer(w, z - w @ m) / (w @ w)
    close(state.solution, m, 1e-4)
    if rate == 1.0:
        reading = ours.read(state, keys[4:])
        close(reading.latent, values[4:], 1e-4)
        assert float(reading.confidence[0]) == pytest.approx(1.0, abs=1e-4)
        # Forgetting reads M₀ there.
        left = ours.update(keys[4:], values[4:], -1, state)
        close(ours.read(left, keys[4:]).latent, weights[4:] @ ours.m0, 1e-4)


@check
@given(seeds)
def test_growing_slots_give_ridge_regression_on_the_encodings(seed):
    keys, values = facts(seed, 5)
    keys[3] = 0.3 * keys[0] - keys[1]  # In the span of two others: no slot of its own.
    ours = built("growing", ridge=1e-2, query_noise=0.0)
    state = ours.update(keys[3:], values[3:], 1, ours.update(keys[:3], values[:3]))
    assert int(state.used) == 4 and int(state.overflow) == 0

    def expected(rows):
        # Whatever the basis: in the encodings' own space it starts as what M₀ reads.
        start, part = np.linalg.pinv(ours.m0) @ ours.m0, keys[rows]
        gram = part @ part.T + 1e-2 * np.eye(len(rows))
        return keys @ (start + part.T @ np.linalg.solve(gram, values[rows] - part @ start))

    close(ours.read(state, keys).latent, expected([0, 1, 2, 3, 4]), 1e-3)
    # Earlier weights stay, so that a fact can be forgotten after others came.
    left = ours.update(keys[1:2], values[1:2], -1, state)
    close(ours.read(left, keys).latent, expected([0, 2, 3, 4]), 2e-3)


def test_growing_counts_facts_without_a_slot_and_refuses_forgets_outside_its_span():
    variant = memory.build("growing", slots=3, latent=C)
    prepared = variant.prepare(variant.init(jax.random.key(0)))
    keys, values = (jnp.float32(x) for x in facts(0, 5))
    state = variant.write(prepared, variant.empty(prepared), keys, values)
    assert int(state.used) == 3 and int(state.overflow) == 2 and int(state.count) == 5
    (keys, values), ours = facts(3, 6), built("growing")
    state = ours.update(keys[:4], values[:4])
    rows = [5, 1]  # One that never was, and one that is in.
    left = ours.update(keys[rows], values[rows], -1, state)
    assert int(left.refused) == 1 and int(left.count) == 3 and int(left.used) == 4
    never = ours.update(keys[[0, 2, 3]], values[[0, 2, 3]])
    close(ours.read(left, keys[:4]).latent, ours.read(never, keys[:4]).latent, 1e-4)
