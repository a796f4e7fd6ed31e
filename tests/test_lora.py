"""Low-rank changes: nothing at the start, the same merged as apart, and strict about their place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx

from larimar_jax import config, lora, model
from larimar_jax.decoders.base import Tree


def _build(modules="^decoder/layers/(attention/(query|value)|up)$", attached=True):
    values = tiny_config()
    values["model"]["lora"] = dict(rank=3, scale=0.5, modules=modules) if attached else None
    return model.build(config.parse(values), jax.random.key(0))


@functools.partial(nnx.jit, static_argnames="active")
def _logits(larimar, active=(True, True)):
    """Of two rows, under a memory or not; None is the base LM."""
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    condition = None
    if active is not None:
        latent = np.random.default_rng(1).normal(size=(2, 16)).astype(np.float32)
        condition = larimar.condition(jnp.asarray(latent), jnp.asarray(active))
    return larimar.decoder.logits(larimar.hidden(tokens, condition)[0])


def _moved(larimar):
    """The same model with factors that do something."""
    draw = np.random.default_rng(0)
    arrays = {
        name: draw.normal(0, 0.3, leaf.shape).astype(np.float32)
        for name, leaf in model.parameters(larimar).items()
        if lora.is_factor(name)
    }
    return model.AbstractModel(nnx.eval_shape(lambda: larimar)).model(
        dict(model.parameters(larimar)) | arrays
    )


def test_at_the_start_it_changes_nothing():
    np.testing.assert_array_equal(_logits(_build()), _logits(_build(attached=False)))


def test_only_rows_that_a_memory_conditions_change():
    changed, plain = _moved(_build()), _build(attached=False)
    np.testing.assert_array_equal(_logits(changed, None), _logits(plain, None))
    mixed = _logits(changed, (True, False))
    np.testing.assert_allclose(mixed[0], _logits(changed)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mixed[1], _logits(plain, (True, False))[1])
    assert np.abs(mixed[0] - _logits(plain)[0]).max() > 1e-3


def test_texts_that_share_a_row_change_as_their_own_latent_says():
    """Two texts in one row, one of them under an active latent."""
    changed = _moved(_build())
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    latent = np.random.default_rng(1).normal(size=(2, 16)).astype(np.float32)
    condition = changed.condition(jnp.asarray(latent), jnp.asarray([True, False]))
    text = jnp.arange(12) // 6
    index = jnp.arange(12, dtype=jnp.int32) % 6
    seen = (text[:, None] == text) & (index[:, None] >= index)
    tree = Tree(index[None], seen[None], text.astype(jnp.int32)[None])
    hidden, _ = changed.hidden(tokens.reshape(1, 12), condition, tree=tree)
    together = changed.decoder.logits(hidden).reshape(2, 6, -1)
    np.testing.assert_allclose(together, _logits(changed, (True, False)), rtol=1e-4, atol=1e-5)


def test_an_encoder_that_is_changed_is_changed_for_every_text():
    changed, plain = (_build("^encoder/layers/attention/query$", on) for on in (True, False))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    first, second = (m.encode(tokens, tokens >= 0) for m in (_moved(changed), plain))
    assert np.abs(first - second).min(axis=1).max() > 0


def test_the_factors_are_of_the_chosen_maps_and_the_maps_count_as_changed():
    names = set(model.parameters(_build()))
    more = names - set(model.parameters(_build(attached=False)))
    maps = ("attention/query", "attention/value", "up")
    assert more == {f"decoder/layers/{m}/{f}" for m in maps for f in lora.FACTORS}
    assert lora.changed(names) == {
        f"decoder/layers/{m}/{p}" for m in maps for p in ("kernel", "bias")
    }


def test_merged_it_says_the_same_and_is_the_plain_model():
    apart = _moved(_build())
    want = _logits(apart)
    assert np.abs(want - _logits(_build(attached=False))).max() > 1e-3
    lora.merge(apart)
    np.testing.assert_allclose(_logits(apart), want, rtol=1e-5, atol=1e-6)
    assert set(model.parameters(apart)) == set(model.parameters(_build(attached=False)))
    assert not [n for _, n in nnx.iter_modules(apart) if isinstance(n, lora.LoraLinear)]


def test_a_regex_that_finds_no_map_names_those_there_are():
    with pytest.raises(ValueError, match="decoder/layers/attention/query"):
        _build("^decoder/layers/attention/kweri$")


def test_an_untied_head_is_no_map_that_could_change():
    values = tiny_config()
    values["model"]["decoder"] = dict(
        family="gptj",
        vocab_size=64,
        width=32,
        depth=1,
        heads=2,
        mlp=64,
        rotary=8,
        max_length=32,
        norm_eps=1e-5,
    )
    values["model"]["lora"] = dict(rank=3, scale=0.5, modules="^decoder/head$")
    with pytest.raises(ValueError, match="found in no linear map") as error:
        model.build(config.parse(values), jax.random.key(0))
    assert "decoder/layers/up" in str(error.value) and "decoder/head\n" not in f"{error.value}\n"
