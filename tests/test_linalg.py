"""The least-squares algebra against float64 NumPy, over shapes, ranks and paddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra import close, distance, matrix, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import linalg
from larimar_jax.memory.addressing import newton_schulz_pinv
from larimar_jax.memory.compensated import rank_update, zero_sum

SHAPES = [(3, 7), (7, 3), (5, 5)]  # a few fixed shapes: each compiles once
check = settings(max_examples=12)
pinv = jax.jit(linalg.pinv)
pinv_of_batch = jax.jit(jax.vmap(linalg.pinv))


def draw(seed, shape, rank=5, high=10.0):
    return matrix(seed, *shape, min(rank, *shape), low=1.0, high=high)


@check
@given(st.sampled_from(SHAPES), st.integers(1, 5), seeds)
def test_pinv_of_any_rank(shape, rank, seed):
    a = draw(seed, shape, rank)
    close(pinv(jnp.float32(a)), np.linalg.pinv(a, rcond=1e-6), 1e-5)


@check
@given(st.sampled_from(SHAPES), st.integers(0, 2), seeds)
def test_pinv_ignores_zero_rows(shape, row, seed):
    a = draw(seed, shape)
    a[row] = 0.0
    inverse = pinv(jnp.float32(a))
    assert not np.any(np.abs(inverse[:, row]) > 1e-6)
    rest = np.delete(np.arange(shape[0]), row)
    close(inverse[:, rest], np.linalg.pinv(a[rest], rcond=1e-6), 1e-4)


def test_pinv_of_nothing():
    assert not np.any(pinv(jnp.zeros((3, 7))))
    assert linalg.pinv(jnp.zeros((0, 7))).shape == (7, 0)


@check
@given(st.sampled_from(SHAPES), st.integers(1, 5), seeds)
def test_pinv_derivative_keeps_the_rank(shape, rank, seed):
    """Along A(t) = U(t) V(t), whose rank is constant, against central differences in float64."""
    rng = np.random.default_rng(seed)
    rank = min(rank, *shape)
    a = draw(seed, shape, rank, high=3.0)
    u, s, vt = np.linalg.svd(a)
    u, v = u[:, :rank] * s[:rank], vt[:rank]
    du, dv = rng.standard_normal(u.shape), rng.standard_normal(v.shape)

    def along(t):
        return np.linalg.pinv((u + t * du) @ (v + t * dv), rcond=1e-6)

    want = (along(1e-5) - along(-1e-5)) / 2e-5
    direction = du @ v + u @ dv
    close(jax.jvp(pinv, (jnp.float32(a),), (jnp.float32(direction),))[1], want, 1e-3)
    # Reverse mode is the transpose of the same rule.
    probe = rng.standard_normal(shape[::-1])
    gradient = jax.grad(lambda x: jnp.sum(pinv(x) * jnp.float32(probe)))(jnp.float32(a))
    scale = np.linalg.norm(probe) * np.linalg.norm(want)
    assert abs(np.sum(gradient * direction) - np.sum(probe * want)) < 1e-3 * scale


@pytest.mark.parametrize("shape", [(24, 9), (768, 16), (64, 64)])
def test_a_gpus_pinv_by_a_gram_matrix_is_as_exact_up_to_a_condition_of_1e3(shape):
    gram, thin = jax.jit(linalg._gram_pinv), jax.jit(linalg._thin_pinv)
    cutoff = jnp.float32(np.finfo(np.float32).eps * max(shape))
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, shape[1])))[0] for n in shape)
    for power in (0, 1, 2, 3, 4, 5):
        a = jnp.float32((u * np.logspace(0, -power, shape[1])) @ v.T)
        want, inverse = np.linalg.pinv(np.float64(a), rcond=1e-12), gram(a, cutoff)
        if power <= 3:
            assert distance(inverse, want) < max(1e-6, 2 * distance(thin(a, cutoff), want))
        else:
            close(inverse, thin(a, cutoff), 1e-6)
    # Padding, repeats, and nothing at all; and a batch, of which one alone has no full rank.
    full = jnp.float32(u)
    padded = full.at[:, 0].set(0.0)
    assert not np.any(gram(padded, cutoff)[0])
    batch = jnp.stack([full, padded, full.at[:, 1].set(full[:, 0]), jnp.zeros(shape)])
    for a, inverse in zip(batch, jax.vmap(gram, (0, None))(batch, cutoff), strict=True):
        close(inverse, np.linalg.pinv(np.float64(a), rcond=1e-6), 1e-4)
        close(gram(a, cutoff), inverse, 1e-4)


def test_a_gpu_takes_the_pinv_that_is_products():
    a = jax.ShapeDtypeStruct((8, 768, 16), jnp.float32)
    texts = {
        platform: pinv_of_batch.trace(a).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda")
    }
    assert "potrf" in texts["cuda"] and "potrf" not in texts["cpu"]
    # QR and SVD are in a branch, for a batch in which a matrix has no full rank.
    assert "gesvd" in texts["cuda"].partition("stablehlo.case")[2]


def test_newton_schulz_acts_on_singular_values_as_stated():
    singular = np.array([0.25, 1.0, 8.0, 40.0])
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 4)))[0] for n in (4, 9))
    inverted = (1.0 - (1.0 - 5e-4 * singular**2) ** 2**15) / singular
    for left, right in ((u, v), (v, u)):
        inverse = newton_schulz_pinv(jnp.float32((left * singular) @ right.T))
        close(inverse, (right * inverted) @ left.T, 1e-4)
    assert abs(inverted[0] * singular[0] - 0.64) < 0.01
    diverging = newton_schulz_pinv(jnp.float32([[64.0]]))
    assert not abs(float(diverging[0, 0]) * 64.0 - 1.0) < 1.0


def test_factor_solve_and_condition():
    a = draw(0, (9, 6), 6)
    gram = a.T @ a
    factor = linalg.cholesky(jnp.float32(gram))
    assert linalg.is_positive_definite(factor)
    right = np.random.default_rng(1).standard_normal((6, 3))
    close(linalg.factor_solve(factor, jnp.float32(right)), np.linalg.solve(gram, right), 1e-4)
    estimate, exact = float(linalg.condition(factor)), np.linalg.cond(gram)
    assert 0.5 * exact < estimate < 1.01 * exact
    assert not linalg.is_positive_definite(linalg.cholesky(-jnp.eye(3)))
    for side in (a, a.T):
        assert float(linalg.matrix_condition(jnp.float32(side))) == pytest.approx(
            np.linalg.cond(side), rel=1e-4
        )


@pytest.mark.parametrize("function", [linalg.pinv, newton_schulz_pinv])
def test_batches_are_a_vmap(function):
    batch = jax.random.normal(jax.random.key(2), (3, 4, 6))
    alone = jnp.stack([function(a) for a in batch])
    np.testing.assert_allclose(jax.vmap(function)(batch), alone, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 33, 130, 300])
def test_an_inverse_factor_alone_and_in_a_batch(size):
    rows = np.random.default_rng(size).standard_normal((3, size, size + 5))
    grams = rows @ rows.transpose(0, 2, 1) + np.eye(size)
    want = np.linalg.inv(np.linalg.cholesky(grams))
    # Only the lower half is read.
    lower = jnp.float32(np.tril(grams) + 7 * np.triu(np.ones((size, size)), 1))
    close(jax.jit(linalg.inverse_factor)(lower[0]), want[0], 1e-5)
    close(jax.jit(jax.vmap(linalg.inverse_factor))(lower), want, 1e-5)
    assert not np.isfinite(linalg.inverse_factor(-lower[0])).all()


def test_inverse_solve_and_its_slopes():
    rng = np.random.default_rng(0)
    a, right, on = (rng.standard_normal((6, n)) for n in (9, 4, 4))
    gram = a @ a.T

    def value(gram, right):
        return jnp.sum(on * linalg.inverse_solve(gram, linalg.inverse_factor(gram), right))

    for_gram, for_right = jax.grad(value, argnums=(0, 1))(jnp.float32(gram), jnp.float32(right))
    back, solved = np.linalg.solve(gram, on), np.linalg.solve(gram, right)
    close(for_gram, -back @ solved.T, 1e-4)
    close(for_right, back, 1e-4)


def test_a_condition_of_a_batch_is_true_of_all():
    def skip(x):
        return jax.lax.cond(linalg.all_in_batch(x > 0), lambda: x, lambda: -x)

    mixed, positive = jnp.float32([1.0, -2.0, 3.0]), jnp.float32([1.0, 2.0])
    np.testing.assert_array_equal(jax.vmap(skip)(mixed), -mixed)
    np.testing.assert_array_equal(jax.vmap(skip)(positive), positive)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(skip))(mixed[:, None]), -mixed[:, None])
    np.testing.assert_array_equal(jax.vmap(jax.grad(skip))(positive), [1.0, 1.0])
    # One loop over branches is left, and no choice between two that were both computed.
    assert "cond" in str(jax.make_jaxpr(jax.vmap(skip))(mixed))


# Sums in twice float32

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
