"""How a latent conditions a decoder (§2): slots, positions, inactive rows; against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
from flax import nnx
from test_towers import hidden, random_prefix

from larimar_jax import decoders
from larimar_jax.decoders.decoder import Tree

FAMILIES = decoders.families()
SIZES = dict(vocab_size=29, depth=2, heads=4, mlp=20, max_length=32)
ROTARY = dict(width=12, head_size=6, rope_theta=30.0, **SIZES)
CONFIGS = {
    "learned": ("gpt2", dict(width=20, **SIZES)),
    "interleaved": ("gptj", dict(width=24, rotary=4, norm_eps=1e-5, **SIZES)),
    "halves": ("llama", dict(kv_heads=4, **ROTARY)),
    "grouped": ("llama", dict(kv_heads=2, **ROTARY)),
    "biased": ("llama", dict(kv_heads=2, attention_bias="all", mlp_bias=True, **ROTARY)),
    "windowed": ("llama", dict(kv_heads=2, window=3, **ROTARY)),
    "windowed_late": (
        "llama",
        dict(kv_heads=1, window=2, unwindowed=1, attention_bias="qkv", **ROTARY),
    ),
}
LENGTH = 9


@functools.cache
def build(name):
    """A decoder with every parameter drawn, norms and biases too."""
    family, sizes = FAMILIES[CONFIGS[name][0]], CONFIGS[name][1]
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: family(family.CONFIG(**sizes), rngs=nnx.Rngs(0)))
    )
    draw = np.random.default_rng(0)

    def fill(path, leaf):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(mean + draw.normal(0, 0.3, leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, abstract))


def tokens_for(rows, length=LENGTH):
    return jnp.asarray(np.random.default_rng(1).integers(0, 29, (rows, length)), jnp.int32)


@pytest.mark.parametrize(("slots", "tied"), [(1, True), (3, False)])
@pytest.mark.parametrize("name", CONFIGS)
def test_active_rows_are_conditioned_and_inactive_ones_are_the_untouched_model(name, slots, tied):
    """Against NumPy; slots reach every token, however far behind its window they lie."""
    model, tokens = build(name), tokens_for(3)
    prefix = random_prefix(model, [True, False, True], slots, tied=tied)
    states, _ = hidden(model, tokens, prefix)
    parameters, latent = jax.tree.map(
        lambda a: np.asarray(a, np.float64), (nnx.to_pure_dict(nnx.state(model)), prefix)
    )
    for b, active in enumerate([True, False, True]):
        vectors = (latent.embedding[b], latent.key[:, b], latent.value[:, b])
        want = numpy_decoder.forward(
            parameters,
            model.config,
            np.asarray(tokens[b]),
            vectors if active else None,
            interleaved=name == "interleaved",
        )
        assert np.abs(states[b] - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_of_one_row_have_latents_of_their_own(name):
    """Two texts in each of two rows, one of them not active, as in four rows."""
    model, tokens = build(name), tokens_for(4, 6)
    prefix = random_prefix(model, [True, False, True, True], slots=2)
    want, _ = hidden(model, tokens, prefix)
    own = np.repeat(np.arange(2, dtype=np.int32), 6)
    causal = np.arange(12)[:, None] >= np.arange(12)
    visible = np.broadcast_to(causal & (own[:, None] == own), (2, 12, 12))
    index = np.broadcast_to(np.tile(np.arange(6, dtype=np.int32), 2), (2, 12))
    tree = Tree(*map(jnp.asarray, (index, visible, np.broadcast_to(own, (2, 12)))))
    states, _ = hidden(model, tokens.reshape(2, 12), prefix, None, None, tree)
    assert np.abs(states.reshape(want.shape) - want).max() <= 2e-6 * np.abs(want).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_no_bit_of_a_latent_shows_in_inactive_rows_and_a_zero_latent_is_not_inactive(name):
    """Not even of a latent that is not finite, nor of what other rows hold.

    A call without a prefix is another program, which may add in another order.
    """
    model, tokens = build(name), tokens_for(3, 24)
    infinite, _ = hidden(model, tokens, random_prefix(model, [False, True, False], scale=jnp.inf))
    inactive, _ = hidden(model, tokens, random_prefix(model, [False] * 3, scale=0.0))
    zero, _ = hidden(model, tokens, random_prefix(model, [True] * 3, scale=0.0))
    untouched, _ = hidden(model, tokens)
    np.testing.assert_array_equal(infinite[::2], inactive[::2])
    assert np.abs(inactive - untouched).max() <= 1e-6 * np.abs(untouched).max()
    assert np.abs(zero - untouched).max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_back_as_far_as_the_windows(name):
    """The output at token t has a gradient to the embeddings of what t attends to, and no further."""
    model = build(name)
    tokens = jnp.arange(LENGTH)[None]  # all different: an embedding row is one token
    prefix = random_prefix(model, [True])
    graph, state = nnx.split(model)

    def output(state, t):
        return nnx.merge(graph, state).hidden(tokens, prefix)[0][0, t].sum()

    gradients = jax.jit(jax.vmap(jax.grad(output), (None, 0)))(state, jnp.arange(LENGTH))
    table = gradients["word"]["embedding"][...][:, :LENGTH]
    reached = np.asarray(jnp.abs(table).sum(2) > 0)  # [output t, token]
    back = {"windowed": 2 + 2}.get(name, LENGTH)  # two layers, each to two tokens before its own
    want = np.tri(LENGTH, dtype=bool) & ~np.tri(LENGTH, k=-back - 1, dtype=bool)
    np.testing.assert_array_equal(reached, want)
