"""Writing and forgetting one fact at a time: right after every fact, against float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra import distance, prepare, ridge_solution
from algebra import unit as unit_rows

from larimar_jax.memory import diagnostics, finite, rls
from larimar_jax.memory.streaming import Streaming

K, C, IN, POOL = 24, 30, 12, 40
unit = functools.partial(unit_rows, columns=C)


def float32(*seeds, rows=POOL):
    return [jnp.float32(unit(seed, rows)) for seed in seeds]


@functools.cache
def built(ridge, noise):
    variant = Streaming(K, C, ridge=ridge, query_noise=noise)
    m0 = np.eye(K, C) + 0.1 * np.random.default_rng(9).standard_normal((K, C))
    return variant, prepare(variant, m0)


def exact(variant, prepared, keys, values, rows, slots=K):
    """M in float64 of the facts that are in, by the definition at the head of streaming.py, and W."""
    m0 = np.float64(prepared.prior_memory)
    keys, values = np.float64(keys), np.float64(values)
    weights = (keys @ np.linalg.pinv(m0))[rows]
    scale = 2.0 ** np.round(np.log2(np.square(weights).sum() / slots)) if len(rows) else 0.0
    shrink = float(variant.query_noise) ** 2 * scale
    ridge = float(np.float32(variant.ridge))
    return ridge_solution(m0, weights, values[rows], ridge, shrink), weights


def swaps(steps, seed=0):
    rng = np.random.default_rng(seed)
    inside, outside = list(range(IN)), list(range(IN, POOL))
    chosen, signs = [], []
    for _ in range(steps):
        out, new = rng.integers(len(inside)), rng.integers(len(outside))
        chosen += [inside[out], outside[new]]
        signs += [-1, 1]
        inside[out], outside[new] = outside[new], inside[out]
    return np.int32(chosen), np.int32(signs), inside


def begin(variant, prepared, keys, values, rows=IN):
    state = variant.write(prepared, variant.empty(prepared), keys[:rows], values[:rows])
    return rls.init(variant, prepared, state)


SETTINGS = [(1.0, 0.0), (1e-2, 0.0), (1e-3, 0.0), (1e-2, 0.5)]


@pytest.mark.parametrize("ridge, noise", SETTINGS)
def test_a_long_stream_reads_as_the_facts_that_are_in(ridge, noise):
    variant, prepared = built(ridge, noise)
    keys, values = float32(1, 2)
    chosen, signs, inside = swaps(300)
    now = begin(variant, prepared, keys, values)
    now, steps = rls.stream(variant, prepared, now, keys[chosen], values[chosen], signs)
    rows = jnp.array(inside)
    want, weights = exact(variant, prepared, keys, values, inside)
    assert distance(rls.read(variant, prepared, now, keys[rows]), weights @ want) < 3e-5
    assert int(now.count) == IN and int(now.state.refused) == 0 and not bool(steps.refused.any())
    # Solved anew, it is what `write` gives.
    state = rls.to_state(variant, prepared, now)
    written = variant.write(prepared, variant.empty(prepared), keys[rows], values[rows])
    assert int(state.count) == IN
    np.testing.assert_allclose(state.gram.total(), written.gram.total(), atol=1e-6)
    assert distance(weights @ np.float64(state.solution), weights @ want) < 3e-5
    # A factorisation comes with every forget, and with no write that does not need one.
    assert bool(steps.refactorized[signs < 0].all())
    assert float(steps.refactorized[signs > 0].mean()) <= 0.05


@pytest.mark.parametrize("ridge, noise", SETTINGS)
def test_writes_between_two_factorisations_are_as_exact_as_a_solve(ridge, noise):
    variant, prepared = built(ridge, noise)
    keys, values = float32(1, 2, rows=3 * rls.MAX_PENDING)
    now = begin(variant, prepared, keys, values, rows=1)
    now, steps = rls.stream(variant, prepared, now, keys[1:-1], values[1:-1])
    assert int(now.pending.number) > 100 and 1 < int(steps.refactorized.sum()) < 20
    rows = range(len(keys) - 1)
    want, weights = exact(variant, prepared, keys, values, rows)
    assert distance(now.solution, want) < 3e-5
    assert distance(rls.read(variant, prepared, now, keys[:-1]), weights @ want) < 3e-5
    # Each fact's leverage and innovation are those before it.
    m = exact(variant, prepared, keys, values, range(1))[0]
    innovation = np.linalg.norm(np.float64(values[1]) - weights[1] @ m)
    assert float(steps.innovation[0]) == pytest.approx(innovation, rel=1e-4)


def test_it_is_right_after_each_fact():
    variant, prepared = built(1e-2, 0.5)
    keys, values = float32(3, 4)
    chosen, signs, _ = swaps(20, seed=1)
    now, inside = begin(variant, prepared, keys, values), list(range(IN))
    for fact, sign in zip(chosen, signs, strict=True):
        row = (keys[fact][None], values[fact][None])
        now, _ = rls.stream(variant, prepared, now, *row, jnp.int32([sign]))
        inside.append(fact) if sign > 0 else inside.remove(fact)
        assert distance(now.solution, exact(variant, prepared, keys, values, inside)[0]) < 3e-5


# Rows of the key and of the value that are to be forgotten, of which 0 to 11 are in.
NOT_IN = {"never written": (30, 30, 0.0), "a written key, another value": (3, 30, 0.5)}


@pytest.mark.parametrize("key, value, noise", NOT_IN.values(), ids=NOT_IN)
def test_a_forget_of_what_is_not_in_is_refused_and_changes_nothing(key, value, noise):
    """With another value G is that of the facts that are left, and only the sums of values know."""
    variant, prepared = built(1e-2, noise)
    k, v = float32(5, 6)
    before = begin(variant, prepared, k, v)
    # A batch is refused as a whole.
    for rows, others in (([key], [value]), ([key, 0], [value, 0])):
        wrong = k[jnp.array(rows)], v[jnp.array(others)]
        state, certificate = diagnostics.forget(variant, prepared, before.state, *wrong)
        assert bool(certificate.refused)
        assert not rls.without(variant, prepared, before, *wrong)[1]
        for after in (state, variant.forget(prepared, before.state, *wrong)):
            assert int(after.refused) == len(rows) and int(after.count) == IN
            np.testing.assert_array_equal(after.gram.total(), before.state.gram.total())
        np.testing.assert_array_equal(state.solution, before.state.solution)
    # In a stream: what is in, what is not (twice), padding, and one more that is in.
    rows, others = np.array([0, key, 31, key, 2]), np.array([0, value, 31, value, 2])
    after, steps = rls.stream(variant, prepared, before, k[rows].at[2].set(0.0), v[others], -1)
    assert steps.refused.tolist() == [False, True, False, True, False]
    assert int(after.state.refused) == 2 and int(after.count) == IN - 2
    want, _ = exact(variant, prepared, k, v, [row for row in range(IN) if row not in (0, 2)])
    # Neither M nor the statistics owe anything.
    for solution in (after.solution, rls.to_state(variant, prepared, after).solution):
        assert distance(solution, want) < 1e-4


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-4])
def test_no_fact_that_is_in_is_refused_and_every_one_of_an_empty_memory_is(ridge, noise):
    """Down to the last one, fewer facts than slots and more, duplicates and small ones among them."""
    variant, prepared = built(ridge, noise)
    for total in (IN, K, POOL):
        keys, values = unit(14, total), unit(15, total)
        keys[1] = keys[0]  # A duplicate, and one whose value is another.
        keys[2], values[2] = keys[3], values[3]
        keys[4] *= 1e-2
        k, v = jnp.float32(keys), jnp.float32(values)
        start = begin(variant, prepared, k, v, rows=total)
        now, steps = rls.stream(variant, prepared, start, k, v, -1)
        assert not steps.refused.any() and int(now.count) == 0 and int(now.state.refused) == 0
        state = start.state
        for rows in (slice(0, None, 2), slice(1, None, 2)):
            state, certificate = diagnostics.forget(variant, prepared, state, k[rows], v[rows])
            assert not bool(certificate.refused)
        assert int(state.count) == 0 and distance(state.solution, prepared.prior_memory) < 1e-3
    # What is written is never refused, whatever its sign is known by.
    near = variant.update(prepared, start.state, k * 1.0001, v, jnp.ones(POOL, jnp.int32))
    assert int(near.count) == 2 * POOL and int(near.refused) == 0
    empty = variant.empty(prepared)
    _, certificate = diagnostics.forget(variant, prepared, empty, 0.01 * k[:1], v[:1])
    assert bool(certificate.refused)
    now = rls.init(variant, prepared, empty)
    assert rls.stream(variant, prepared, now, 0.01 * k[:1], v[:1], -1)[1].refused.tolist() == [True]


def test_what_float32_cannot_write_is_counted_as_refused():
    variant, prepared = built(1e-2, 0.0)
    bare = dataclasses.replace(variant, ridge=0.0)  # Fewer facts than slots: A is singular.
    state = bare.write(prepared, bare.empty(prepared), *float32(5, 6, rows=2))
    assert int(state.refused) == 2 and int(state.count) == 0
    np.testing.assert_array_equal(state.solution, prepared.prior_memory)


def test_many_memories_are_updated_under_one_vmap_and_one_compilation():
    variant, prepared = built(1e-2, 0.5)
    keys, values = (jnp.float32(unit(seed, 3 * 5)).reshape(3, 5, C) for seed in (7, 8))
    start, traced = rls.init(variant, prepared, variant.empty(prepared)), []

    def stream(keys, values):
        traced.append(keys)

        def step(now, fact):
            now, _, is_due = rls.write(variant, prepared, now, *fact)
            return now, is_due

        now, is_due = jax.lax.scan(step, start, (keys, values))
        return rls.refactorize(variant, prepared, now).solution, is_due

    many = jax.jit(jax.vmap(stream))
    many(values, keys)
    together, is_due = many(keys, values)
    assert is_due[:, 0].all()  # An empty memory has no μ, and the first fact gives it one.
    assert len(traced) == 1
    for solution, k, v in zip(together, keys, values, strict=True):
        assert distance(solution, exact(variant, prepared, k, v, list(range(5)))[0]) < 1e-5


@pytest.mark.parametrize("slots, number", [(24, 0), (24, 20), (24, 30), (150, 140)])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_facts_that_are_loaded_at_once_are_as_if_written_one_by_one(slots, number, noise):
    """20 are pending; 30 are solved for; 140 are more than are ever pending together otherwise."""
    variant = Streaming(slots, slots + 6, ridge=1e-2, query_noise=noise)
    prepared = prepare(variant, np.eye(slots, slots + 6))
    keys, values = (np.float32(unit_rows(seed, number + 4, slots + 6)) for seed in (1, 2))
    now = rls.init(variant, prepared, variant.empty(prepared))
    now = finite.load(variant, prepared, now, keys[:number], values[:number])
    assert int(now.state.count) == (number if noise or number >= slots else 0)
    for count in (number, number + 2, number + 4):
        rows = list(range(count))
        want, weights = exact(variant, prepared, keys, values, rows, slots)
        read = rls.read(variant, prepared, now, keys[:count])
        assert int(now.count) == count
        assert not count or distance(read, weights @ want) < 3e-5
        new = slice(count, count + 2)
        now, _ = finite.write(variant, prepared, now, keys[new], values[new])


@pytest.mark.parametrize("apart", [1.0, 0.02])
@pytest.mark.parametrize("base", [0, 8])
@pytest.mark.parametrize("gone", [[0], [2, 9], [11, 9, 10, 8]])
def test_a_write_that_waits_is_forgotten_as_if_it_had_never_been(gone, base, apart):
    """Keys are far apart or nearly alike. Of those that are solved for already, a forget solves anew."""
    variant, prepared = built(1e-4, 0.0)
    keys, values = (np.float32(unit(seed, IN + 1)) for seed in (1, 2))
    keys[1:] = keys[0] + apart * keys[1:]
    start = rls.init(variant, prepared, variant.empty(prepared))
    solved = rls.refactorize(
        variant, prepared, finite.write(variant, prepared, start, keys[:base], values[:base])[0]
    )
    rows = slice(base, IN)
    now, _ = finite.write(variant, prepared, solved, keys[rows], values[rows])
    after = finite.forget(variant, prepared, now, keys[gone], values[gone])
    left = [row for row in range(IN) if row not in gone]
    number = len(left) - base if min(gone) >= base else 0
    for more, rows in enumerate((left, [*left, IN])):
        want, weights = exact(variant, prepared, keys, values, rows)
        assert int(after.pending.number) == number + more
        read = finite.read(variant, prepared, after, keys[rows])
        assert distance(read, weights @ want) < (5e-4 if base else 1e-5)
        states = after.state, after.state, keys[gone], after.pending
        estimate = diagnostics.certify(variant, prepared, *states)
        assert 0.2 < float(estimate.distance) / distance(after.solution, want) < 5
        key = np.float64(keys[gone[0]]) @ np.linalg.pinv(np.float64(prepared.prior_memory))
        rest = 1e-4 * np.linalg.solve(weights.T @ weights + 1e-4 * np.eye(K), key)
        leverage = 1 - np.square(rest).sum() / np.square(key).sum()
        assert float(estimate.leverage) == pytest.approx(leverage, abs=1e-3)
        after, _ = finite.write(variant, prepared, after, keys[IN:], values[IN:])
    with pytest.raises(finite.MemoryNotFinite):
        finite.forget(variant, prepared, after, keys[gone] + 1.0, values[gone])


def test_a_write_moves_what_is_read_at_written_keys_by_no_more_than_it_says():
    """The last keys are next to written ones, where it moves most: by more than half of the bound."""
    variant, prepared = built(1e-3, 0.0)
    keys, values = (np.float32(unit(seed, IN + 6)) for seed in (1, 2))
    keys[IN + 3 :] = keys[:3] + 0.05 * keys[IN + 3 :]
    now, shares = rls.init(variant, prepared, variant.empty(prepared)), []
    for at, end in itertools.pairwise([*range(0, IN + 2, 2), *range(IN + 2, IN + 7)]):
        before = finite.read(variant, prepared, now, keys)
        now, bound = finite.write(variant, prepared, now, keys[at:end], values[at:end])
        change = finite.read(variant, prepared, now, keys)[:at] - before[:at]
        shares.append(np.linalg.norm(change, axis=1).max(initial=0.0) / bound)
    assert max(shares) <= 1 + 1e-4
    assert min(shares[-3:]) > 0.5
