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


def test_attend_groups_query_heads_over_key_heads():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 3, 6, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 5, 3, 4)).astype(np.float32)
    mask = rng.random((2, 3, 5)) < 0.7
    mask[..., 0] = True
    got = layers.attend(*map(jnp.asarray, (query, key, value, mask)))
    want = np.zeros((2, 3, 6, 4))
    for b, t, h in np.ndindex(2, 3, 6):
        scores = key[b, :, h // 2] @ query[b, t, h] / 2.0
        want[b, t, h] = softmax(np.where(mask[b, t], scores, -np.inf)) @ value[b, :, h // 2]
    np.testing.assert_allclose(got, want.reshape(2, 3, 24), atol=1e-6)


def test_attend_to_nothing_is_finite():
    x = jnp.ones((1, 2, 1, 4))
    assert np.isfinite(layers.attend(x, x, x, jnp.zeros((1, 2, 2), bool))).all()


def test_softmax_is_float32_in_bfloat16():
    """Equal scores over 1000 keys: weights added up in bfloat16 would be far from 1."""
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    many = jnp.ones((1, 1000, 1, 4), jnp.bfloat16)
    out = layers.attend(x, many, many, jnp.ones((1, 1, 1000), bool))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=1e-2)


def test_rotation_depends_on_distance_alone():
    rng = np.random.default_rng(0)
    query, key = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)

    def score(i, j):
        turns = [layers.rotation(jnp.array([[p]]), 8, 100.0) for p in (i, j)]
        return float(jnp.sum(layers.rotate(query, turns[0]) * layers.rotate(key, turns[1])))

    assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_position_zero_is_unrotated():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 2, 8)), jnp.float32)
    assert (layers.rotate(x, layers.rotation(jnp.array([[0]]), 8, 100.0)) == x).all()


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
        for remat in (False, True)
    ]
    want = x
    for layer in range(3):
        want = want @ kernel[layer] + float(layer)
    for y, doubled in outs:
        np.testing.assert_allclose(y, want, rtol=1e-6)
        np.testing.assert_array_equal(doubled, [0, 2, 4])


def test_positions_start_at_one_in_active_rows_only():
    prefix = layers.Prefix(
        jnp.zeros((2, 4)), *[jnp.zeros((1, 2, 1, 1, 4))] * 2, jnp.array([True, False])
    )
    span = layers.locate(jnp.zeros((2, 3), jnp.int32), prefix, None, jnp.array([0, 5]))
    np.testing.assert_array_equal(span.index, [[0, 1, 2], [5, 6, 7]])
    np.testing.assert_array_equal(span.position, [[1, 2, 3], [5, 6, 7]])
    np.testing.assert_array_equal(span.mask[:, 0], [[1, 1, 0, 0], [0, 1, 0, 0]])


def test_prefix_and_cache_are_pytrees_that_hold_anything():
    cache = layers.empty_cache(2, 1, 4, 1, 8, jnp.float32)
    shapes = jax.tree.map(lambda a: a.shape, cache)
    assert shapes.key == (2, 1, 4, 1, 8)
    assert [str(path[0]) for path, _ in jax.tree.leaves_with_path(cache)] == [".key", ".value"]


def test_more_tokens_than_the_cache_holds():
    cache = layers.empty_cache(2, 1, 4, 1, 8, jnp.float32)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache made for 4"):
        layers.locate(jnp.zeros((1, 5), jnp.int32), None, cache, None)


def test_families_are_found_by_file():
    assert set(decoders.families()) >= {"llama", "gpt2"}
    assert set(encoders.families()) >= {"bert"}
    assert decoders.family("llama").MODEL is decoders.families()["llama"].MODEL
    with pytest.raises(ValueError, match="unknown decoder family 'lama'; known: .*llama"):
        decoders.family("lama")


def test_an_unfinished_family_is_an_error(monkeypatch):
    found = types.SimpleNamespace(name="half")
    monkeypatch.setattr(registry.pkgutil, "iter_modules", lambda path: [found])
    fake = types.SimpleNamespace(__path__=[], CONFIG=1)
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: fake)
    with pytest.raises(TypeError, match="half looks like a family but does not define MODEL"):
        registry.scan("anything", "CONFIG", "MODEL")
