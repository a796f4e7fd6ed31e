"""The towers against torch's numbers, and the promises of §2: slots, positions, cache."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larimar_jax import decoders, encoders, weights
from larimar_jax.layers import Prefix
from larimar_jax.weights.fill import fill
from larimar_jax.weights.safetensors import Safetensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
DECODERS = ("tiny_llama", "tiny_gpt2")


@functools.cache
def tiny(name, kind=decoders, dtype="float32", remat=False):
    """A tiny tower of transformers, and what torch computed with it."""
    said = json.loads((GOLDEN / name / "config.json").read_text())
    family = kind.family(said["model_type"])
    config = family.from_huggingface(said)
    abstract = nnx.eval_shape(
        lambda: family.MODEL(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
    )
    source = Safetensors(GOLDEN / name / "model.safetensors")
    return fill(abstract, family.KEYS, source), dict(np.load(GOLDEN / name / "golden.npz"))


@nnx.jit
def hidden(model, *args):
    """`model.hidden`, compiled: eager scans would compile anew at every call."""
    return model.hidden(*args)


logits = nnx.jit(lambda model, tokens: model.logits(model.hidden(tokens)[0]))
pool = nnx.jit(lambda model, tokens, mask: model(tokens, mask))


def random_prefix(model, active, slots=1, scale=1.0):
    c, rows = model.config, len(active)
    keys = jax.random.split(jax.random.key(7), 3)
    shape = (c.depth, rows, slots, c.kv_heads, c.head_size)
    return Prefix(
        embedding=scale * jax.random.normal(keys[0], (rows, c.width)),
        key=scale * jax.random.normal(keys[1], shape),
        value=scale * jax.random.normal(keys[2], shape),
        active=jnp.array(active),
    )


def row(tree, b):
    """One row of a Prefix."""
    return Prefix(
        tree.embedding[b : b + 1], tree.key[:, b : b + 1], tree.value[:, b : b + 1],
        tree.active[b : b + 1],
    )


@pytest.mark.parametrize("name", (*DECODERS, "tiny_llama_tied"))
def test_full_logits_match_torch(name):
    model, golden = tiny(name)
    got = logits(model, jnp.asarray(golden["tokens"]))
    np.testing.assert_allclose(got, golden["logits"], atol=1e-4)


def test_bert_with_tanh_pooler_matches_torch():
    model, golden = tiny("tiny_bert", encoders)
    pooled = pool(model, jnp.asarray(golden["tokens"]), jnp.asarray(golden["mask"]))
    np.testing.assert_allclose(pooled, golden["pooled"], atol=1e-4)


def test_minilm_matches_torch(minilm):
    model, tokenizer = minilm
    golden = np.load(GOLDEN / "minilm.npz")
    batch = tokenizer.encode(list(golden["texts"]), golden["ids"].shape[1])
    np.testing.assert_array_equal(batch.ids, golden["ids"])
    np.testing.assert_array_equal(batch.mask, golden["mask"])
    ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
    np.testing.assert_allclose(pool(model, ids, mask), golden["embeddings"], atol=1e-4)
    got, real = np.asarray(hidden(model, ids, mask))[:, :6, :64], golden["mask"][:, :6]
    np.testing.assert_allclose(got[real], golden["hidden"][real], atol=1e-4)


def test_smollm2_matches_torch(smollm2):
    model, tokenizer = smollm2
    golden = np.load(GOLDEN / "smollm2.npz")
    ids = golden["ids_0"]
    assert tokenizer.ids(str(golden["texts"][0])) == list(ids)
    got = np.asarray(logits(model, jnp.asarray(ids)[None])[0])
    np.testing.assert_allclose(got[:, ::193], golden["columns"], atol=1e-4)
    np.testing.assert_allclose(got[-1, ::5], golden["last"], atol=1e-4)
    log_p = jax.nn.log_softmax(jnp.asarray(got[:-1]))
    loss = -np.asarray(log_p)[np.arange(len(ids) - 1), ids[1:]].mean()
    assert np.exp(loss) == pytest.approx(float(golden["perplexity"]), rel=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_causality_by_gradients(name):
    """The loss at token t has a gradient to embeddings of tokens up to t, and to none after."""
    model, _ = tiny(name)
    tokens = jnp.arange(6)[None]  # all different: an embedding row is one token
    prefix = random_prefix(model, [True])
    graph, state = nnx.split(model)

    def output(state, t):
        return nnx.merge(graph, state).hidden(tokens, prefix)[0][0, t].sum()

    gradients = jax.jit(jax.vmap(jax.grad(output), (None, 0)))(state, jnp.arange(6))
    table = gradients["word"]["embedding"][...][:, :6]
    reached = np.asarray(jnp.abs(table).sum(2) > 0)  # [output t, token]
    np.testing.assert_array_equal(reached, np.tri(6, dtype=bool))


@pytest.mark.parametrize("name", DECODERS)
def test_every_slot_reaches_every_token(name):
    model, _ = tiny(name)
    prefix = random_prefix(model, [True, False], slots=2)

    def output(values, t):
        whole = Prefix(prefix.embedding, prefix.key, values, prefix.active)
        return model.hidden(jnp.arange(8).reshape(2, 4), whole)[0][:, t].sum()

    gradients = jax.jit(jax.vmap(jax.grad(output), (None, 0)))(prefix.value, jnp.arange(4))
    reached = np.asarray(jnp.abs(gradients).sum((4, 5)) > 0)  # [output t, L, B, P]
    assert reached[:, :, 0].all()
    assert not reached[:, :, 1].any()


@pytest.mark.parametrize(
    ("name", "with_prefix"), [("tiny_llama", True), ("tiny_llama", False), ("tiny_gpt2", True)]
)
def test_cached_equals_uncached_from_ragged_starts(name, with_prefix):
    model, golden = tiny(name)
    tokens = jnp.asarray(golden["tokens"])
    prefix = random_prefix(model, [True, False, True], slots=2) if with_prefix else None
    want, _ = hidden(model, tokens, prefix)
    lengths = jnp.array([2, 5, 4])
    # What stands to the right of a row's prompt is padding, and must leave no trace.
    padded = jnp.where(jnp.arange(6) < lengths[:, None], tokens[:, :6], 1)
    got, cache = hidden(model, padded, prefix, model.empty_cache(3, 11))
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(got[b, :length], want[b, :length], atol=2e-5)

    for i in range(6):
        at = lengths + i
        new = jnp.take_along_axis(tokens, at[:, None], axis=1)
        got, cache = hidden(model, new, prefix, cache, at)
        np.testing.assert_allclose(got[:, 0], want[jnp.arange(3), at], atol=2e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_batch_equals_rows_one_by_one(name):
    model, golden = tiny(name)
    tokens = jnp.asarray(golden["tokens"])
    prefix = random_prefix(model, [True, False, True])
    whole, _ = hidden(model, tokens, prefix)
    for b in range(3):
        alone, _ = hidden(model, tokens[b : b + 1], row(prefix, b))
        np.testing.assert_allclose(alone[0], whole[b], atol=2e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_inactive_rows_are_the_untouched_model(name):
    model, golden = tiny(name)
    tokens = jnp.asarray(golden["tokens"])
    # Not even a latent that is not finite may show.
    prefix = random_prefix(model, [False, True, False], scale=jnp.inf)
    got, _ = hidden(model, tokens, prefix)
    want, _ = hidden(model, tokens)
    np.testing.assert_allclose(got[::2], want[::2], atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_a_zero_latent_is_not_the_untouched_model(name):
    model, golden = tiny(name)
    tokens = jnp.asarray(golden["tokens"])
    zero, _ = hidden(model, tokens, random_prefix(model, [True] * 3, scale=0.0))
    untouched, _ = hidden(model, tokens)
    assert np.abs(zero - untouched).max() > 1e-2


@pytest.mark.parametrize("name", DECODERS)
def test_a_slot_equals_a_token_with_that_key_and_value(name):
    """A past slot is a token at position 0: take one's keys and values from a cache (§2)."""
    model, golden = tiny(name)
    tokens = jnp.asarray(golden["tokens"])
    want, cache = hidden(model, tokens, None, model.empty_cache(3, 11))
    c = model.config
    prefix = Prefix(
        embedding=jnp.zeros((3, c.width)),
        key=cache.key[:, :, :1],
        value=cache.value[:, :, :1],
        active=jnp.ones(3, bool),
    )
    got, _ = hidden(model, tokens[:, 1:], prefix)
    np.testing.assert_allclose(got, want[:, 1:], atol=2e-5)


def numpy_gpt2(p, config, tokens, prefix):
    """§2 for one row, in float64: the slot a past position, the embedding on every token."""

    def norm(x, w):
        y = x - x.mean(-1, keepdims=True)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + config.norm_eps)
        return y * w["scale"] + w["bias"]

    def affine(x, w):
        return x @ w["kernel"] + w["bias"]

    length = len(tokens)
    x = p["word"]["embedding"][tokens] + p["position"]["embedding"][1 : length + 1]
    x = x + prefix.embedding[0]
    for layer in range(config.depth):
        w = jax.tree.map(lambda a, i=layer: a[i], p["layers"])
        y = norm(x, w["attention_norm"])
        q, k, v = (
            affine(y, w["attention"][n]).reshape(length, config.heads, -1)
            for n in ("query", "key", "value")
        )
        k = np.concatenate([prefix.key[layer, 0], k])
        v = np.concatenate([prefix.value[layer, 0], v])
        mixed = np.zeros_like(q)
        for t, h in np.ndindex(length, config.heads):
            scores = k[: t + 2, h] @ q[t, h] / np.sqrt(config.head_size)
            e = np.exp(scores - scores.max())
            mixed[t, h] = (e / e.sum()) @ v[: t + 2, h]
        x = x + affine(mixed.reshape(length, -1), w["attention"]["output"])
        u = affine(norm(x, w["mlp_norm"]), w["up"])
        gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + affine(gelu, w["down"])
    return norm(x, p["norm"])


def test_a_latent_slot_against_numpy():
    model, golden = tiny("tiny_gpt2")
    prefix = random_prefix(model, [True])
    parameters = jax.tree.map(
        lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(model))
    )
    slot = jax.tree.map(np.asarray, prefix)
    want = numpy_gpt2(parameters, model.config, golden["tokens"][0], slot)
    got, _ = hidden(model, jnp.asarray(golden["tokens"][:1]), prefix)
    np.testing.assert_allclose(got[0], want, atol=1e-4)


def test_remat_changes_no_gradient():
    tokens = jnp.arange(8).reshape(2, 4)

    def gradient(remat):
        model, _ = tiny("tiny_llama", remat=remat)
        prefix = random_prefix(model, [True, True])
        loss = jax.grad(lambda p: model.hidden(tokens, p)[0].sum(), allow_int=True)
        return jax.jit(loss)(prefix).key

    np.testing.assert_allclose(gradient(True), gradient(False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16_computes_near_float32(name):
    model, golden = tiny(name, dtype="bfloat16")
    tokens = jnp.asarray(golden["tokens"])
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(nnx.state(model)))
    last, _ = hidden(model, tokens, random_prefix(model, [False] * 3))
    got = model.logits(last)
    assert (last.dtype, got.dtype) == (jnp.bfloat16, jnp.float32)
    assert np.abs(got - golden["logits"]).max() < 0.1 * np.abs(golden["logits"]).max()
    assert model.empty_cache(1, 4).key.dtype == jnp.bfloat16


def test_bert_in_bfloat16_and_blind_to_padding():
    model, golden = tiny("tiny_bert", encoders, dtype="bfloat16")
    tokens, mask = jnp.asarray(golden["tokens"]), jnp.asarray(golden["mask"])
    pooled = pool(model, tokens, mask)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, golden["pooled"], atol=0.1)
    np.testing.assert_array_equal(pool(model, jnp.where(mask, tokens, 5), mask), pooled)


def test_an_empty_text_is_finite(minilm):
    model, _ = minilm
    nothing = jnp.zeros((1, 8), jnp.int32)
    assert np.isfinite(pool(model, nothing, nothing > 0)).all()


def test_too_many_tokens():
    gpt2, llama = tiny("tiny_gpt2")[0], tiny("tiny_llama")[0]
    bert = tiny("tiny_bert", encoders)[0]
    with pytest.raises(ValueError, match="33 tokens exceed this decoder's 32 positions"):
        gpt2.hidden(jnp.zeros((1, 33), jnp.int32))
    # The slot takes one of the learned positions.
    with pytest.raises(ValueError, match="32 tokens exceed this decoder's 31 positions"):
        gpt2.hidden(jnp.zeros((1, 32), jnp.int32), random_prefix(gpt2, [True]))
    with pytest.raises(ValueError, match="65 tokens exceed this decoder's 64"):
        llama.hidden(jnp.zeros((1, 65), jnp.int32))
    with pytest.raises(ValueError, match="a cache of 65 exceeds"):
        llama.empty_cache(1, 65)
    with pytest.raises(ValueError, match="33 tokens, but this encoder has 32 positions"):
        bert(jnp.zeros((1, 33), jnp.int32), jnp.ones((1, 33), bool))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope scaling 'llama3'"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("gpt2", {"activation_function": "relu"}, "relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaling by layer"),
    ],
)
def test_settings_that_are_not_computed_are_errors(family, change, message):
    said = json.loads((GOLDEN / f"tiny_{family}" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        decoders.family(family).from_huggingface({**said, **change})


def test_sizes_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="4 heads do not share 3 kv_heads"):
        decoders.family("llama").CONFIG(10, 8, 1, heads=4, kv_heads=3, head_size=2, mlp=8)
    with pytest.raises(ValueError, match="width 10 is not a multiple of 4 heads"):
        decoders.family("gpt2").CONFIG(10, 10, 1, heads=4, mlp=8)
    with pytest.raises(ValueError, match="unknown pooling 'max'"):
        encoders.family("bert").CONFIG(10, 8, 1, heads=4, mlp=8, pooling="max")


def test_weights_of_both_towers_are_public():
    assert set(weights.PACKAGED) == {"minilm", "smollm2"}
