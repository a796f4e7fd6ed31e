"""Products with rounded factors: against float64 NumPy of the same rounded numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larimar_jax import layers, products

DTYPES = ("float32", "bfloat16", "float16")


def numbers(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


def rounded(array, dtype: str) -> np.ndarray:
    return np.asarray(array.astype(dtype).astype(jnp.float32), np.float64)


def with_gradients(x, kernel, slope, dtype):
    with products.factors(dtype):
        found, back = jax.vjp(products.product, x, kernel)
        return found, *back(slope)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_gradients_are_those_of_rounded_factors(dtype):
    x, kernel, slope = numbers(0, 3, 5, 24), numbers(1, 24, 7), numbers(2, 3, 5, 7)
    found, of_x, of_kernel = with_gradients(x, kernel, slope, dtype)
    a, w, g = (rounded(array, dtype) for array in (x, kernel, slope))
    assert found.dtype == of_x.dtype == of_kernel.dtype == jnp.float32
    np.testing.assert_allclose(found, a @ w, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(of_x, g @ w.T, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(of_kernel, np.einsum("btI,btO->IO", a, g), rtol=2e-6, atol=4e-6)


def test_nothing_is_rounded_that_nobody_asked_to_round():
    x, kernel = numbers(0, 5, 24), numbers(1, 24, 7)
    with products.factors("bfloat16"):
        rounded = products.product(x, kernel)
    plain = products.product(x, kernel)
    np.testing.assert_array_equal(plain, x @ kernel)
    assert 1e-4 < np.abs(rounded - plain).max() < 0.2


@pytest.mark.parametrize("wanted", ["x", "kernel"])
def test_no_gradient_is_computed_for_what_is_frozen(wanted):
    x, kernel = numbers(0, 5, 24), numbers(1, 24, 7)

    def loss(one):
        pair = (one, kernel) if wanted == "x" else (x, one)
        return products.product(*pair).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(x if wanted == "x" else kernel))
    assert text.count("dot_general[") == 2  # there, and one way back


def test_linear_maps_of_towers_follow_the_context():
    linear = layers.linear(24, 7, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = numbers(0, 2, 5, 24)
    plain = linear(x)
    with products.factors("bfloat16"):
        low = linear(x)
    expected = rounded(x, "bfloat16") @ rounded(linear.kernel[...], "bfloat16")
    np.testing.assert_allclose(low, expected + np.asarray(linear.bias[...]), rtol=2e-6, atol=2e-6)
    assert low.dtype == plain.dtype == jnp.float32 and not np.array_equal(low, plain)


def test_what_is_no_linear_map_is_refused():
    x, kernel = numbers(0, 5, 24), numbers(1, 7, 24)
    with pytest.raises(ValueError, match="not that of a linear map"):
        products.dot_general(x, kernel, (((1,), (1,)), ((), ())))
    with pytest.raises(ValueError, match="precision"):
        products.dot_general(x, kernel.T, (((1,), (0,)), ((), ())), precision="highest")
