"""Products with rounded factors, attention, norms and the layer stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larimar_jax import layers
from larimar_jax.layers import Context


def numbers(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def rounded(array, dtype):
    return np.asarray(array.astype(dtype).astype(jnp.float32), np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_and_gradients_are_those_of_rounded_factors(dtype):
    x, kernel, slope = numbers(0, 3, 5, 24), numbers(1, 24, 7), numbers(2, 3, 5, 7)
    y, back = jax.vjp(lambda x, kernel: layers.product(x, kernel, dtype), x, kernel)
    of_x, of_kernel = back(slope)
    a, w, g = (rounded(array, dtype) for array in (x, kernel, slope))
    assert y.dtype == of_x.dtype == of_kernel.dtype == jnp.float32
    np.testing.assert_allclose(y, a @ w, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(of_x, g @ w.T, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(of_kernel, np.einsum("btI,btO->IO", a, g), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("wanted", ["x", "kernel"])
def test_no_gradient_is_computed_for_what_is_frozen(wanted):
    x, kernel = numbers(0, 5, 24), numbers(1, 24, 7)

    def loss(trained):
        return layers.product(*((trained, kernel) if wanted == "x" else (x, trained))).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(x if wanted == "x" else kernel))
    assert text.count("dot_general[") == 2  # forward, and one backward


def test_linear_maps_round_their_factors_only_where_the_context_asks_for_it():
    linear = layers.Dense(24, 7, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x, mask = numbers(0, 2, 5, 24), jnp.ones((2, 1, 5), bool)
    plain = linear(x, Context(mask))
    low = linear(x, Context(mask, product_dtype="bfloat16"))
    np.testing.assert_array_equal(plain, x @ linear.kernel[...] + linear.bias[...])
    want = rounded(x, "bfloat16") @ rounded(linear.kernel[...], "bfloat16")
    np.testing.assert_allclose(low, want + np.asarray(linear.bias[...]), rtol=2e-6, atol=2e-6)
    assert low.dtype == plain.dtype == jnp.float32 and 1e-6 < np.abs(low - plain).max() < 0.1


def test_gradients_of_a_bfloat16_map_are_summed_in_float32():
    linear = layers.Dense(24, 7, bias=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, state = nnx.split(linear)
    x, slope = (numbers(i, 450, n).astype(jnp.bfloat16) for i, n in enumerate((24, 7)))
    context = Context(jnp.ones((1, 1, 1), bool))
    _, back = jax.vjp(lambda state: nnx.merge(graph, state)(x, context), state)
    (gradient,), (a, g) = back(slope), (np.float64(x), np.float64(slope))
    for name, want in dict(kernel=a.T @ g, bias=g.sum(axis=0)).items():
        np.testing.assert_allclose(gradient[name][...], want, rtol=1e-5, atol=1e-4)


def test_attention_to_nothing_is_finite():
    x = jnp.ones((1, 2, 1, 4))
    part = (x.transpose(0, 2, 3, 1), x.swapaxes(1, 2), jnp.zeros((1, 2, 2), bool))
    assert np.isfinite(layers.attend(x, [part])).all()


def test_softmax_is_float32_in_bfloat16():
    """Equal scores over 1000 keys: weights added up in bfloat16 would be far from 1."""
    x, many = jnp.ones((1, 1, 1, 4), jnp.bfloat16), jnp.ones((1, 1, 1000, 4), jnp.bfloat16)
    out = layers.attend(x, [(many.swapaxes(2, 3), many, jnp.ones((1, 1, 1000), bool))])
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=1e-2)


@pytest.mark.parametrize("length", [3, 4])
def test_fused_attention_gets_the_same_problem(monkeypatch, length):
    """On a GPU in half precision: the fused call, here computed by its XLA twin, gives the same."""
    rng = np.random.default_rng(0)
    query = jnp.bfloat16(rng.normal(size=(2, length, 6, 8)))
    key, value = jnp.bfloat16(rng.normal(size=(2, 2, 3, 5, 8)))
    key, mask = key.swapaxes(2, 3), rng.random((2, length, 5)) < 0.7
    mask[..., 0] = True
    ends = (slice(0, 2), slice(2, 5))
    parts = [(key[..., at], value[:, :, at], jnp.asarray(mask[:, :, at])) for at in ends]
    plain = layers.attend(query, parts)
    fused, calls = jax.nn.dot_product_attention, []

    def twin(query, key, value, *, mask, implementation):
        calls.append((implementation, query.shape[1], key.shape[1]))
        with jax.numpy_dtype_promotion("standard"):  # the library's own mixing of dtypes
            return fused(query, key, value, mask=mask, implementation="xla")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", twin)
    got = layers.attend(query, parts)
    assert calls == [("cudnn", 4, 6)]  # lengths made even
    # Weights are rounded to bfloat16 on both ways, in different orders.
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (got, plain)), atol=2e-2)
    assert not layers.flash_applies(query.astype(jnp.float32))
    assert not layers.flash_applies(query[:, :1])


@pytest.mark.parametrize("norm", [layers.RMSNorm, layers.LayerNorm])
def test_norms_survive_a_large_offset(norm):
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) + 500.0
    y = x - x.mean(-1, keepdims=True) if norm is layers.LayerNorm else x
    want = y / np.sqrt((y.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(64, 1e-6)(jnp.asarray(x)), want, atol=2e-3)


def test_a_stack_draws_its_layers_apart_and_scans_in_order():
    stack = layers.stack(
        lambda rngs: layers.Dense(4, 4, bias=False, dtype=jnp.float32, rngs=rngs), 3, nnx.Rngs(0)
    )
    kernel, x, context = stack.kernel[...], jnp.ones((1, 1, 4)), Context(jnp.ones((1, 1, 1), bool))
    assert kernel.shape == (3, 4, 4) and not (kernel[0] == kernel[1]).any()
    want = x
    for layer in range(3):
        want = want @ kernel[layer] + float(layer)

    def call(linear, x, number):
        return linear(x, context) + number, number * 2

    for remat in ("none", "dots", "layers"):
        y, doubled = layers.scan_layers(stack, call, x, jnp.arange(3.0), remat=remat)
        np.testing.assert_allclose(y, want, rtol=1e-6)
        np.testing.assert_array_equal(doubled, [0, 2, 4])


def test_rows_are_split_and_tables_gathered_only_under_a_mesh_with_the_axes_of_rows(cpu_devices):
    def places(*shape_and_names):
        mesh = jax.make_mesh(*shape_and_names, axis_types=(jax.sharding.AxisType.Auto,) * 2)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            trace = jax.make_jaxpr(lambda x: layers.gather(layers.split_rows(x)))
            text = str(trace(jnp.ones((8, 1, 1))))
            return layers.row_ways(), text.count("sharding_constraint")

    assert places((4, 2), ("data", "fsdp")) == (8, 2)
    assert places((4, 2), ("cells", "tensor")) == (0, 0)
    assert layers.row_ways() == 0 and layers.gather(jnp.ones(3)).shape == (3,)
