"""The least-squares algebra against float64 NumPy, over shapes, ranks, ridges and paddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import linalg

SHAPES = [(3, 7), (7, 3), (5, 5)]  # a few fixed shapes: each compiles once
seeds = st.integers(0, 2**31 - 1)
check = settings(deadline=None, max_examples=12)

pinv = jax.jit(linalg.pinv)


def draw(seed, m, n, rank, spread=10.0):
    """A float64 m x n matrix of that rank with singular values from 1 to `spread`."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((m, rank)))[0]
    v = np.linalg.qr(rng.standard_normal((n, rank)))[0]
    return (u * rng.uniform(1.0, spread, rank)) @ v.T


def close(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    error = np.linalg.norm(got - want)
    assert error <= tolerance * np.linalg.norm(want), (error, np.linalg.norm(want))


@check
@given(st.sampled_from(SHAPES), st.integers(1, 5), seeds)
def test_pinv_of_any_rank(shape, rank, seed):
    a = draw(seed, *shape, min(rank, *shape))
    close(pinv(jnp.float32(a)), np.linalg.pinv(a, rcond=1e-6), 1e-5)


@check
@given(st.sampled_from(SHAPES), st.integers(0, 2), seeds)
def test_pinv_ignores_zero_rows(shape, row, seed):
    a = draw(seed, *shape, min(shape))
    a[row] = 0.0
    got = pinv(jnp.float32(a))
    assert not np.any(np.abs(got[:, row]) > 1e-6)
    rest = np.delete(np.arange(shape[0]), row)
    close(got[:, rest], np.linalg.pinv(a[rest], rcond=1e-6), 1e-4)


def test_pinv_of_nothing():
    assert not np.any(pinv(jnp.zeros((3, 7))))
    assert linalg.pinv(jnp.zeros((0, 7))).shape == (7, 0)


@check
@given(st.sampled_from(SHAPES), st.integers(1, 5), seeds)
def test_pinv_derivative_keeps_the_rank(shape, rank, seed):
    """Along A(t) = U(t) V(t), whose rank is constant, against central differences in float64."""
    m, n = shape
    rng = np.random.default_rng(seed)
    rank = min(rank, m, n)
    a = draw(seed, m, n, rank, spread=3.0)
    u, s, vt = np.linalg.svd(a)
    u, v = u[:, :rank] * s[:rank], vt[:rank]
    du, dv = rng.standard_normal(u.shape), rng.standard_normal(v.shape)

    def along(t):
        return np.linalg.pinv((u + t * du) @ (v + t * dv), rcond=1e-6)

    want = (along(1e-5) - along(-1e-5)) / 2e-5
    direction = du @ v + u @ dv
    got = jax.jvp(pinv, (jnp.float32(a),), (jnp.float32(direction),))[1]
    close(got, want, 1e-3)
    # Reverse mode is the transpose of the same rule.
    probe = rng.standard_normal((n, m))
    gradient = jax.grad(lambda x: jnp.sum(pinv(x) * jnp.float32(probe)))(jnp.float32(a))
    scale = np.linalg.norm(probe) * np.linalg.norm(want)
    assert abs(np.sum(gradient * direction) - np.sum(probe * want)) < 1e-3 * scale


def test_pinv_gradient_is_finite_for_repeats_and_padding():
    a = jax.random.normal(jax.random.key(0), (5, 7))
    a = a.at[1].set(a[0]).at[4].set(0.0)
    assert jnp.all(jnp.isfinite(jax.grad(lambda a: jnp.sum(jnp.sin(pinv(a))))(a)))


def test_newton_schulz_acts_on_singular_values_as_stated():
    singular = np.array([0.25, 1.0, 8.0, 40.0])
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    v = np.linalg.qr(rng.standard_normal((9, 4)))[0]
    kept = (1.0 - (1.0 - 5e-4 * singular**2) ** 2**15) / singular
    for a, want in (
        ((u * singular) @ v.T, (v * kept) @ u.T),
        ((v * singular) @ u.T, (u * kept) @ v.T),
    ):
        close(linalg.newton_schulz_pinv(jnp.float32(a)), want, 1e-4)
    assert abs(kept[0] * singular[0] - 0.64) < 0.01
    diverging = linalg.newton_schulz_pinv(jnp.float32([[64.0]]))
    assert not abs(float(diverging[0, 0]) * 64.0 - 1.0) < 1.0


@check
@given(st.sampled_from(SHAPES), st.floats(1e-2, 10.0), seeds)
def test_ridge_solve(shape, ridge, seed):
    w = draw(seed, *shape, min(shape), spread=3.0)
    rng = np.random.default_rng(seed)
    z, prepared = rng.standard_normal((shape[0], 4)), rng.standard_normal((shape[1], 4))
    gram = w.T @ w + ridge * np.eye(shape[1])
    args = jnp.float32(w), jnp.float32(z), jnp.float32(ridge)
    close(linalg.ridge_solve(*args), np.linalg.solve(gram, w.T @ z), 1e-4)
    want = np.linalg.solve(gram, w.T @ z + ridge * prepared)
    close(linalg.ridge_solve(*args, jnp.float32(prepared)), want, 1e-4)


def test_factor_and_condition():
    a = draw(0, 9, 6, 6)
    gram = a.T @ a
    factor = linalg.cholesky(jnp.float32(gram))
    assert linalg.is_positive_definite(factor)
    right = np.random.default_rng(1).standard_normal((6, 3))
    close(linalg.factor_solve(factor, jnp.float32(right)), np.linalg.solve(gram, right), 1e-4)
    estimate = float(linalg.condition(factor))
    assert 0.5 * np.linalg.cond(gram) < estimate < 1.01 * np.linalg.cond(gram)
    assert not linalg.is_positive_definite(linalg.cholesky(-jnp.eye(3)))


@pytest.mark.parametrize("function", [linalg.pinv, linalg.newton_schulz_pinv])
def test_batches_are_a_vmap(function):
    batch = jax.random.normal(jax.random.key(2), (3, 4, 6))
    one_by_one = jnp.stack([function(a) for a in batch])
    np.testing.assert_allclose(jax.vmap(function)(batch), one_by_one, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 33, 130, 300])
def test_an_inverse_factor_alone_and_in_a_batch(size):
    rng = np.random.default_rng(size)
    rows = rng.standard_normal((3, size, size + 5))
    grams = rows @ rows.transpose(0, 2, 1) + np.eye(size)
    want = np.linalg.inv(np.linalg.cholesky(grams))
    # Only the lower half is read.
    lower = jnp.float32(np.tril(grams) + 7 * np.triu(np.ones((size, size)), 1))
    close(jax.jit(linalg.inverse_factor)(lower[0]), want[0], 1e-5)
    close(jax.jit(jax.vmap(linalg.inverse_factor))(lower), want, 1e-5)
    assert not np.isfinite(linalg.inverse_factor(-lower[0])).all()


def test_inverse_solve_and_its_slopes():
    rng = np.random.default_rng(0)
    a, right, on = rng.standard_normal((6, 9)), rng.standard_normal((6, 4)), rng.standard_normal((6, 4))
    gram = a @ a.T

    def value(gram, right):
        return jnp.sum(on * linalg.inverse_solve(gram, linalg.inverse_factor(gram), right))

    for_gram, for_right = jax.grad(value, argnums=(0, 1))(jnp.float32(gram), jnp.float32(right))
    back, solved = np.linalg.solve(gram, on), np.linalg.solve(gram, right)
    close(for_gram, -back @ solved.T, 1e-4)
    close(for_right, back, 1e-4)


def test_a_condition_of_many_is_one_for_all():
    def skip(x):
        return jax.lax.cond(linalg.all_in_batch(x > 0), lambda: x, lambda: -x)

    some, all_of_them = jnp.float32([1.0, -2.0, 3.0]), jnp.float32([1.0, 2.0])
    np.testing.assert_array_equal(jax.vmap(skip)(some), -some)
    np.testing.assert_array_equal(jax.vmap(skip)(all_of_them), all_of_them)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(skip))(some[:, None]), -some[:, None])
    np.testing.assert_array_equal(jax.vmap(jax.grad(skip))(all_of_them), [1.0, 1.0])
    # One loop over branches is left, and no choice between two that were both computed.
    assert "cond" in str(jax.make_jaxpr(jax.vmap(skip))(some))
