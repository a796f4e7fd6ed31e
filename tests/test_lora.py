"""Low-rank changes: nothing at the start, the same merged as apart, and strict about their place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx

from larimar_jax import config, lora, model
from larimar_jax.decoders.decoder import Tree

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
LATENT = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16)), jnp.float32)


def build(modules="^decoder/layers/(attention/(query|value)|up)$", **change):
    values = tiny_config()
    values["model"] |= change
    values["model"]["lora"] = modules and dict(rank=3, scale=0.5, modules=modules)
    return model.build(config.parse(values), jax.random.key(0))


@functools.partial(nnx.jit, static_argnames="active")
def logits(larimar, active=(True, True)):
    """Of two rows, under a memory or not; None is the base LM."""
    condition = None if active is None else larimar.condition(LATENT, jnp.asarray(active))
    return larimar.decoder.logits(larimar.hidden(TOKENS, condition)[0])


def trained(larimar):
    """The same model with factors that change it."""
    draw, values = np.random.default_rng(0), dict(model.parameters(larimar))
    for name in filter(lora.is_factor, values):
        values[name] = jnp.asarray(draw.normal(0, 0.3, values[name].shape), jnp.float32)
    return model.AbstractModel(nnx.eval_shape(lambda: larimar)).model(values)


def test_at_the_start_it_changes_nothing():
    np.testing.assert_array_equal(logits(build()), logits(build(None)))


def test_only_rows_that_a_memory_conditions_change():
    changed, plain = trained(build()), build(None)
    np.testing.assert_array_equal(logits(changed, None), logits(plain, None))
    mixed = logits(changed, (True, False))
    np.testing.assert_allclose(mixed[0], logits(changed)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mixed[1], logits(plain, (True, False))[1])
    assert np.abs(mixed[0] - logits(plain)[0]).max() > 1e-3


def test_texts_that_share_a_row_change_by_their_own_latents():
    changed = trained(build())
    condition = changed.condition(LATENT, jnp.asarray([True, False]))
    text, index = jnp.arange(12, dtype=jnp.int32) // 6, jnp.arange(12, dtype=jnp.int32) % 6
    visible = (text[:, None] == text) & (index[:, None] >= index)
    tree = Tree(index[None], visible[None], text[None])
    hidden, _ = changed.hidden(TOKENS.reshape(1, 12), condition, tree=tree)
    together = changed.decoder.logits(hidden).reshape(2, 6, -1)
    np.testing.assert_allclose(together, logits(changed, (True, False)), rtol=1e-4, atol=1e-5)


def test_an_encoder_that_is_changed_is_changed_for_every_text():
    changed = trained(build("^encoder/layers/attention/query$"))
    first, second = (m.encode(TOKENS, TOKENS >= 0) for m in (changed, build(None)))
    assert np.abs(first - second).min(axis=1).max() > 0


def test_the_factors_are_of_the_chosen_maps_and_the_maps_count_as_changed():
    names, maps = set(model.parameters(build())), ("attention/query", "attention/value", "up")
    added = names - set(model.parameters(build(None)))
    assert added == {f"decoder/layers/{m}/{f}" for m in maps for f in lora.FACTORS}
    frozen = {f"decoder/layers/{m}/{p}" for m in maps for p in ("kernel", "bias")}
    assert lora.changed(names) == frozen


def test_merged_it_computes_the_same_and_is_the_plain_model():
    apart, plain = trained(build()), build(None)
    want = logits(apart)
    assert np.abs(want - logits(plain)).max() > 1e-3
    lora.merge(apart)
    np.testing.assert_allclose(logits(apart), want, rtol=1e-5, atol=1e-6)
    assert set(model.parameters(apart)) == set(model.parameters(plain))
    assert not [n for _, n in nnx.iter_modules(apart) if isinstance(n, lora.LoraDense)]


@pytest.mark.parametrize("modules", ["^decoder/layers/attention/kweri$", "^decoder/head$"])
def test_a_regex_that_matches_no_map_or_an_untied_head_alone_names_those_there_are(modules):
    sizes = dict(vocab_size=64, width=32, depth=1, heads=2, mlp=64)
    gptj = dict(family="gptj", rotary=8, max_length=32, norm_eps=1e-5, **sizes)
    with pytest.raises(ValueError, match="found in no linear map") as error:
        build(modules, decoder=gptj)
    assert "decoder/layers/up" in str(error.value) and "decoder/head\n" not in f"{error.value}\n"
