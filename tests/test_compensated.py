"""Statistics of least squares in twice float32, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra import distance

from larimar_jax.memory.compensated import rank_update, zero_sum

SLOTS, LATENT = 24, 40
update = jax.jit(rank_update)


def facts(seed, number, scale=1.0):
    """Weights and errors, in float32 and as the same numbers in float64."""
    rng = np.random.default_rng(seed)
    rows = [jnp.float32(scale * rng.standard_normal((number, size))) for size in (SLOTS, LATENT)]
    return rows, [np.float64(x) for x in rows]


def start():
    return zero_sum(SLOTS, SLOTS), zero_sum(SLOTS, LATENT)


def total(sums):
    return [np.float64(x.high) + np.float64(x.low) for x in sums]


def test_a_small_fact_survives_a_large_one_that_comes_and_goes():
    (small, _), (large, _) = facts(0, 1), facts(1, 1, scale=3e3)
    once = update(start(), *small, jnp.ones(1))
    sums = update(update(once, *large, jnp.ones(1)), *large, -jnp.ones(1))
    for left, want in zip(total(sums), total(once), strict=True):
        assert distance(left, want) < 1e-6


# float32's unit is 6e-8. The more facts, the fewer bits of each lie on the exact grid.
@pytest.mark.parametrize("number, bound", [(0, 0.0), (1, 1e-9), (100, 5e-9), (3000, 2e-8)])
def test_a_batch_is_added_up_in_more_than_float32(number, bound):
    (weights, errors), (w, e) = facts(2, number)
    signs = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], number)
    sums = total(update(start(), weights, errors, jnp.float32(signs)))
    for ours, want in zip(sums, ((w.T * signs) @ w, (w.T * signs) @ e), strict=True):
        assert np.linalg.norm(ours - want) <= bound * np.linalg.norm(want)


def test_facts_written_together_and_forgotten_apart_leave_nothing():
    (weights, errors), (w, e) = facts(4, 96)
    sums = update(start(), weights, errors, jnp.ones(96))
    for rows in np.random.default_rng(5).permutation(96).reshape(-1, 8):
        sums = update(sums, weights[rows], errors[rows], -jnp.ones(8))
    for left, once in zip(total(sums), (w.T @ w, w.T @ e), strict=True):
        assert np.linalg.norm(left) < 1e-8 * np.linalg.norm(once)


def test_slopes_are_those_of_one_matmul():
    (weights, errors), (w, e) = facts(6, 9)
    rng = np.random.default_rng(7)
    on_gram, on_cross = (rng.standard_normal((SLOTS, size)) for size in (SLOTS, LATENT))

    def value(weights, errors):
        gram, cross = rank_update(start(), weights, errors, jnp.ones(9))
        return jnp.sum(gram.total() * on_gram) + jnp.sum(cross.total() * on_cross)

    for_weights, for_errors = jax.jit(jax.grad(value, argnums=(0, 1)))(weights, errors)
    assert distance(for_weights, w @ (on_gram + on_gram.T) + e @ on_cross.T) < 1e-5
    assert distance(for_errors, w @ on_cross) < 1e-5
