"""The pieces of the towers against plain NumPy, and the registry of families."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larimar_jax import decoders, encoders, layers, registry


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def naive(query, key, value, mask):
    """Attention in loops; key is [B, G, d, S], value [B, G, S, d]."""
    batch, length, heads, size = query.shape
    group = heads // key.shape[1]
    out = np.zeros((batch, length, heads, size))
    for b, t, h in np.ndindex(batch, length, heads):
        scores = query[b, t, h] @ key[b, h // group] / np.sqrt(size)
        out[b, t, h] = softmax(np.where(mask[b, t], scores, -np.inf)) @ value[b, h // group]
    return out.reshape(batch, length, -1)


def random_attention(dtype=np.float32, length=3):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, length, 6, 8)).astype(dtype)
    key, value = rng.normal(size=(2, 2, 3, 5, 8)).astype(dtype)
    key = key.swapaxes(2, 3)
    mask = rng.random((2, length, 5)) < 0.7
    mask[..., 0] = True
    return query, key, value, mask


def test_attend_groups_query_heads_over_key_heads():
    query, key, value, mask = random_attention()
    got = layers.attend(jnp.asarray(query), [tuple(map(jnp.asarray, (key, value, mask)))])
    np.testing.assert_allclose(got, naive(query, key, value, mask), atol=1e-6)


def test_attend_over_parts_equals_attend_over_all():
    query, key, value, mask = map(jnp.asarray, random_attention())
    cuts = [(0, 2), (2, 3), (3, 5)]
    parts = [(key[..., a:b], value[:, :, a:b], mask[:, :, a:b]) for a, b in cuts]
    whole = layers.attend(query, [(key, value, mask)])
    np.testing.assert_allclose(layers.attend(query, parts), whole, atol=1e-6)


def test_attend_to_nothing_is_finite():
    x = jnp.ones((1, 2, 1, 4))
    part = (x.transpose(0, 2, 3, 1), x.swapaxes(1, 2), jnp.zeros((1, 2, 2), bool))
    assert np.isfinite(layers.attend(x, [part])).all()


def test_softmax_is_float32_in_bfloat16():
    """Equal scores over 1000 keys: weights added up in bfloat16 would be far from 1."""
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    many = jnp.ones((1, 1, 1000, 4), jnp.bfloat16)
    out = layers.attend(x, [(many.swapaxes(2, 3), many, jnp.ones((1, 1, 1000), bool))])
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=1e-2)


@pytest.mark.parametrize("length", [3, 4])
def test_fused_attention_is_given_the_same_problem(monkeypatch, length):
    """On a GPU in half precision: the fused call, here computed by its XLA twin, gives the same."""
    given = random_attention(jnp.bfloat16, length)
    query, key, value, mask = map(jnp.asarray, given)
    parts = [(key[..., :2], value[:, :, :2], mask[:, :, :2])]
    parts += [(key[..., 2:], value[:, :, 2:], mask[:, :, 2:])]
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
    # Weights are rounded to bfloat16 on both ways, in another order.
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
        lambda rngs: layers.linear(4, 4, bias=False, dtype=jnp.float32, rngs=rngs), 3, nnx.Rngs(0)
    )
    kernel = stack.kernel[...]
    assert kernel.shape == (3, 4, 4)
    assert not (kernel[0] == kernel[1]).any()
    x = jnp.ones((1, 1, 4))
    extra = jnp.arange(3.0)
    outs = [
        layers.scan_layers(stack, lambda f, x, e: (f(x) + e, e * 2), x, extra, remat=remat)
        for remat in ("none", "dots", "layers")
    ]
    want = x
    for layer in range(3):
        want = want @ kernel[layer] + float(layer)
    for y, doubled in outs:
        np.testing.assert_allclose(y, want, rtol=1e-6)
        np.testing.assert_array_equal(doubled, [0, 2, 4])


def test_prefix_and_cache_are_pytrees_that_hold_anything():
    cache = layers.Cache(jnp.zeros((2, 1, 1, 8, 4)), jnp.zeros((2, 1, 1, 4, 8)))
    shapes = jax.tree.map(lambda a: a.shape, cache)
    assert shapes.value == (2, 1, 1, 4, 8)
    assert [str(path[0]) for path, _ in jax.tree.leaves_with_path(cache)] == [".key", ".value"]


def test_families_are_found_by_file():
    assert set(decoders.families()) >= {"llama", "gpt2", "gptj"}
    assert set(encoders.families()) >= {"bert"}
    assert decoders.family("llama").MODEL is decoders.families()["llama"].MODEL
    assert decoders.family("mistral") is decoders.family("qwen2") is decoders.family("llama")
    with pytest.raises(ValueError, match="unknown decoder family 'lama'; known: .*llama"):
        decoders.family("lama")


def test_an_unfinished_family_is_an_error(monkeypatch):
    found = types.SimpleNamespace(name="half")
    monkeypatch.setattr(registry.pkgutil, "iter_modules", lambda path: [found])
    fake = types.SimpleNamespace(__path__=[], CONFIG=1)
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: fake)
    with pytest.raises(TypeError, match="half looks like a family but does not define MODEL"):
        registry.scan("anything", "CONFIG", "MODEL")
