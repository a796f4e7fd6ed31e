"""The towers against torch's numbers; a folder that is added to golden/ is tested by itself."""

import dataclasses
import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons.generation import continue_ids
from flax import nnx
from transformers import AutoConfig

from larimar_jax import decoders, encoders, registry
from larimar_jax.decoders.decoder import Prefix, Tree
from larimar_jax.weights.huggingface import Folder
from larimar_jax.weights.key_table import fill

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = {**registry.by_model_type("larimar_jax.decoders")}
FAMILIES |= registry.by_model_type("larimar_jax.encoders")
KINDS = {path.name: Folder(path).config()["model_type"] for path in sorted(GOLDEN.glob("tiny_*"))}
DECODERS = [name for name, kind in KINDS.items() if hasattr(FAMILIES[kind], "logits")]
ENCODERS = [name for name in KINDS if name not in DECODERS]

# Each way to compute, of a batch as of a row; what else sets models of one file apart is in `computed`.
APART = ["tiny_bert_mean", "tiny_gpt2", "tiny_gptj", "tiny_llama", "tiny_qwen2_window"]

# Measured: at most 0.053, of 0.030 as a whole.
BFLOAT16 = 0.06


def assert_close(actual, want, relative):
    """Both as a whole and at the worst number, against the largest."""
    actual, want = np.asarray(actual, np.float64), np.asarray(want, np.float64)
    error = actual - want
    whole = float(np.linalg.norm(error) / np.linalg.norm(want))
    worst = float(np.abs(error).max() / np.abs(want).max())
    assert max(whole, worst) <= relative, f"{whole:.2g} as a whole, {worst:.2g} at worst"


@functools.cache
def golden(name):
    """What torch computed: see golden/make_tiny.py."""
    return dict(np.load(GOLDEN / name / "golden.npz"))


def family(name):
    return FAMILIES[KINDS[name]]


@functools.cache
def abstract(name, dtype="float32", remat="none"):
    folder = Folder(GOLDEN / name)
    config = family(name).CONFIG.from_huggingface(folder.config())
    config = dataclasses.replace(config, **folder.pooling())
    return nnx.eval_shape(lambda: family(name)(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))


@functools.cache
def tiny(name, dtype="float32", remat="none"):
    source = Folder(GOLDEN / name).tensors()
    return fill(abstract(name, dtype, remat), family(name).hf_keys, source)


def torch_gradients(name):
    """By path: they go where their parameters went, as a file of weights."""
    parts = {key.partition("gradient/")[2]: value for key, value in golden(name).items()}
    parts.pop("")
    shapes = {key: value.shape for key, value in parts.items()}
    source = types.SimpleNamespace(path="", shapes=lambda: shapes, read=parts.__getitem__)
    return by_path(nnx.state(fill(abstract(name), family(name).hf_keys, source)))


def tokens_of(name):
    """Tokens [3, T] and which of them are real."""
    tokens, lengths = golden(name)["tokens"], golden(name)["lengths"]
    return jnp.asarray(tokens), jnp.arange(tokens.shape[1]) < lengths[:, None]


@nnx.jit
def hidden(model, *args):
    """`model.hidden`, compiled: eager scans would compile anew at every call."""
    return model.hidden(*args)


@nnx.jit
def output(model, tokens, real):
    """A decoder's logits, an encoder's vectors."""
    if hasattr(model, "logits"):
        return model.logits(model.hidden(tokens)[0])
    return model(tokens, real)


@functools.cache
def computed(name, remat="none"):
    """(loss, `output`, gradients by path) of the golden batch."""
    tokens, real = tokens_of(name)

    def loss(state):
        out = output(nnx.merge(graph, state), tokens, real)
        if name in ENCODERS:
            return jnp.sum(out * golden(name)["weight"]), out
        log_p = jax.nn.log_softmax(out[:, :-1])
        log_p = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[:, :, 0]
        return -jnp.mean(log_p, where=real[:, 1:]), out

    graph, state = nnx.split(tiny(name, remat=remat))
    (value, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    return value, out, by_path(gradient)


def by_path(state):
    return {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def random_prefix(model, active, slots=1, scale=1.0, tied=False):
    """A different latent for each row; `tied` has one vector for key and value, as the paper."""
    c, rows = model.config, len(active)
    keys = jax.random.split(jax.random.key(7), 3)
    shape = (c.depth, rows, slots, c.kv_heads, c.head_size)
    return Prefix(
        embedding=scale * jax.random.normal(keys[0], (rows, c.width)),
        key=scale * jax.random.normal(keys[1], shape),
        value=scale * jax.random.normal(keys[1 if tied else 2], shape),
        active=jnp.array(active),
    )


def test_families_are_classes_by_file_and_by_model_type():
    assert set(decoders.families()) >= {"llama", "gpt2", "gptj"}
    assert set(encoders.families()) >= {"bert"}
    assert decoders.family("mistral") is decoders.family("qwen2") is decoders.families()["llama"]
    with pytest.raises(ValueError, match="unknown decoder family 'lama'; known: .*llama"):
        decoders.family("lama")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            [("Half", registry.FAMILY[:1])],
            "half.Half looks like .* but does not define model_types",
        ),
        ([("One", registry.FAMILY), ("Two", registry.FAMILY)], "half defines two families"),
    ],
)
def test_an_unfinished_family_or_a_second_one_in_a_file_is_an_error(monkeypatch, classes, message):
    members = {
        name: type(name, (), {"__module__": "half", **dict.fromkeys(attributes)})
        for name, attributes in classes
    }
    fake = types.SimpleNamespace(__path__=[], __name__="half", name="half", **members)
    monkeypatch.setattr(registry.pkgutil, "iter_modules", lambda path: [fake])
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: fake)
    with pytest.raises(TypeError, match=message):
        registry.families("anything")


def test_every_model_type_has_a_golden_folder():
    assert set(KINDS.values()) == set(FAMILIES)


@pytest.mark.parametrize("name", KINDS)
def test_outputs_and_losses_match_torch(name):
    loss, out, _ = computed(name)
    tokens, real = tokens_of(name)
    if name in DECODERS:
        assert_close(np.asarray(out)[real], golden(name)["logits"], 1e-4)
        assert float(loss) == pytest.approx(float(golden(name)["loss"]), rel=1e-5)
    else:
        states = np.asarray(hidden(tiny(name), tokens, real))
        assert_close(states[real], golden(name)["hidden"], 1e-4)
        assert_close(out, golden(name)["pooled"], 1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_every_gradient_matches_torch(name):
    """Key biases without rotary positions have none: the softmax cancels them, up to rounding."""
    gradients, want = computed(name)[2], torch_gradients(name)
    assert gradients.keys() == want.keys()
    norms = {path: np.linalg.norm(gradient) for path, gradient in want.items()}
    rounding = 1e-6 * max(norms.values())
    error = {path: np.linalg.norm(gradients[path] - want[path]) for path in want}
    assert not {path: e for path, e in error.items() if e > max(1e-3 * norms[path], rounding)}


@pytest.mark.parametrize("remat", ["dots", "layers"])
@pytest.mark.parametrize("name", APART[:4])
def test_remat_changes_no_gradient(name, remat):
    gradients, want = computed(name, remat=remat)[2], computed(name)[2]
    whole = np.sqrt(sum(np.sum(np.square(gradient)) for gradient in want.values()))
    for path in want:
        assert np.linalg.norm(gradients[path] - want[path]) <= 1e-6 * whole, path


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_text_is_that_of_torch(name):
    """Two prompts of different lengths, packed into one row; torch decoded them alone."""
    prompts = [golden(name)[f"prompt_{i}"].tolist() for i in range(2)]
    want = np.stack([golden(name)[f"greedy_{i}"] for i in range(2)])
    np.testing.assert_array_equal(continue_ids(tiny(name), prompts, want.shape[1]), want)


@pytest.mark.parametrize("name", APART[1:])
def test_cached_equals_uncached_from_ragged_starts(name):
    model, (tokens, _) = tiny(name), tokens_of(name)
    prefix = random_prefix(model, [True, False, True], slots=2)
    want, _ = hidden(model, tokens, prefix)
    start = jnp.array([2, 9, 4])
    # What stands to the right of a row's prompt is padding, and must leave no trace.
    prompt = jnp.where(jnp.arange(9) < start[:, None], tokens[:, :9], 1)
    states, cache = hidden(model, prompt, prefix, model.empty_cache(3, tokens.shape[1]))
    for b in range(3):
        assert_close(states[b, : start[b]], want[b, : start[b]], 1e-5)
    for count in (5, 1):
        at = start[:, None] + jnp.arange(count)
        new = jnp.take_along_axis(tokens, at, axis=1)
        states, cache = hidden(model, new, prefix, cache, start)
        assert_close(states, jnp.take_along_axis(want, at[:, :, None], axis=1), 1e-5)
        start = start + count


@pytest.mark.parametrize("name", APART)
def test_a_batch_equals_its_rows_and_is_blind_to_padding(name):
    model, (tokens, real) = tiny(name), tokens_of(name)
    if name in ENCODERS:
        whole = computed(name)[1]
        padded = output(model, jnp.where(real, tokens, 5), real)
        np.testing.assert_array_equal(padded, output(model, tokens, real))
    else:
        prefix = random_prefix(model, [True, False, True])
        whole, _ = hidden(model, tokens, prefix)
    for b, length in enumerate(golden(name)["lengths"]):
        row = slice(b, b + 1)
        if name in ENCODERS:
            alone = output(model, tokens[row, :length], real[row, :length])
            assert_close(alone[0], whole[b], 1e-5)
        else:
            vectors = (prefix.embedding[row], prefix.key[:, row], prefix.value[:, row])
            alone, _ = hidden(model, tokens[row], Prefix(*vectors, prefix.active[row]))
            assert_close(alone[0, :length], whole[b, :length], 1e-5)


@pytest.mark.parametrize("name", APART)
def test_bfloat16_is_near_float32(name):
    model, (tokens, real) = tiny(name, dtype="bfloat16"), tokens_of(name)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(nnx.state(model)))
    out = output(model, tokens, real)
    assert out.dtype == jnp.float32
    if name in ENCODERS:
        assert_close(out, golden(name)["pooled"], BFLOAT16)
    else:
        assert model.empty_cache(1, 4).key.dtype == hidden(model, tokens)[0].dtype == jnp.bfloat16
        assert_close(np.asarray(out)[real], golden(name)["logits"], BFLOAT16)


# How a latent conditions a decoder (§2)


def drawn_tokens(rows, length):
    return jnp.asarray(np.random.default_rng(1).integers(0, 89, (rows, length)), jnp.int32)


@pytest.mark.parametrize("name", DECODERS)
def test_active_rows_are_conditioned_and_inactive_ones_are_the_untouched_model(name):
    """Slots reach every token, however far behind its window they lie."""
    want, (tokens, real), active = golden(name), tokens_of(name), np.array([True, False, True])
    key, value = (want["slots"][:, part].swapaxes(2, 3) for part in (0, 1))
    prefix = Prefix(*map(jnp.asarray, (want["embedding"], key, value, active)))
    states, _ = hidden(tiny(name), tokens, prefix)
    rows = np.broadcast_to(active[:, None], real.shape)[real]
    logits = np.where(rows[:, None], want["conditioned"], want["logits"])
    assert_close(np.asarray(tiny(name).logits(states))[real], logits, 1e-5)


@pytest.mark.parametrize("name", APART[1:])
def test_texts_of_one_row_have_latents_of_their_own(name):
    """Two texts in each of two rows, one of them not active, as in four rows."""
    model, tokens = tiny(name), drawn_tokens(4, 6)
    prefix = random_prefix(model, [True, False, True, True], slots=2)
    want, _ = hidden(model, tokens, prefix)
    own = np.repeat(np.arange(2, dtype=np.int32), 6)
    causal = np.arange(12)[:, None] >= np.arange(12)
    visible = np.broadcast_to(causal & (own[:, None] == own), (2, 12, 12))
    index = np.broadcast_to(np.tile(np.arange(6, dtype=np.int32), 2), (2, 12))
    tree = Tree(*map(jnp.asarray, (index, visible, np.broadcast_to(own, (2, 12)))))
    states, _ = hidden(model, tokens.reshape(2, 12), prefix, None, None, tree)
    assert np.abs(states.reshape(want.shape) - want).max() <= 2e-6 * np.abs(want).max()


@pytest.mark.parametrize("name", APART[1:])
def test_no_bit_of_a_latent_shows_in_inactive_rows_and_a_zero_latent_is_not_inactive(name):
    """Not even of a latent that is not finite, nor of what other rows hold.

    A call without a prefix is another program, which may add in another order.
    """
    model, tokens = tiny(name), drawn_tokens(3, 24)
    infinite, _ = hidden(model, tokens, random_prefix(model, [False, True, False], scale=jnp.inf))
    inactive, _ = hidden(model, tokens, random_prefix(model, [False] * 3, scale=0.0))
    zero, _ = hidden(model, tokens, random_prefix(model, [True] * 3, scale=0.0))
    untouched, _ = hidden(model, tokens)
    np.testing.assert_array_equal(infinite[::2], inactive[::2])
    assert np.abs(inactive - untouched).max() <= 1e-6 * np.abs(untouched).max()
    assert np.abs(zero - untouched).max() > 1e-2


@pytest.mark.parametrize("name", [*APART[1:], "tiny_mistral"])
def test_gradients_reach_back_as_far_as_the_windows(name):
    """The output at token t has a gradient to the embeddings of what t attends to, and no further."""
    model, length = tiny(name), 12
    tokens = jnp.arange(length)[None]  # all different: an embedding row is one token
    prefix = random_prefix(model, [True])
    graph, state = nnx.split(model)

    def output(state, t):
        return nnx.merge(graph, state).hidden(tokens, prefix)[0][0, t].sum()

    gradients = jax.jit(jax.vmap(jax.grad(output), (None, 0)))(state, jnp.arange(length))
    table = gradients["word"]["embedding"][...][:, :length]
    reached = np.asarray(jnp.abs(table).sum(2) > 0)  # [output t, token]
    # Two layers, each to four tokens before its own; one layer without a window reaches all.
    back = 4 + 4 if name == "tiny_mistral" else length
    want = np.tri(length, dtype=bool) & ~np.tri(length, k=-back - 1, dtype=bool)
    np.testing.assert_array_equal(reached, want)


def test_minilm_matches_torch(minilm):
    model, tokenizer = minilm
    want = np.load(GOLDEN / "minilm.npz")
    batch = tokenizer.encode(list(want["texts"]), want["ids"].shape[1])
    np.testing.assert_array_equal(batch.ids, want["ids"])
    np.testing.assert_array_equal(batch.mask, want["mask"])
    ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
    np.testing.assert_allclose(output(model, ids, mask), want["embeddings"], atol=1e-4)
    states, real = np.asarray(hidden(model, ids, mask))[:, :6, :64], want["mask"][:, :6]
    np.testing.assert_allclose(states[real], want["hidden"][real], atol=1e-4)
    nothing = jnp.zeros((1, 8), jnp.int32)
    assert np.isfinite(output(model, nothing, nothing > 0)).all()


def test_smollm2_matches_torch(smollm2):
    model, tokenizer = smollm2
    want = np.load(GOLDEN / "smollm2.npz")
    ids = want["ids_0"]
    assert tokenizer.ids(str(want["texts"][0])) == list(ids)
    logits = np.asarray(output(model, jnp.asarray(ids)[None], None)[0])
    np.testing.assert_allclose(logits[:, ::193], want["columns"], atol=1e-4)
    np.testing.assert_allclose(logits[-1, ::5], want["last"], atol=1e-4)
    log_p = jax.nn.log_softmax(jnp.asarray(logits[:-1]))
    loss = -np.asarray(log_p)[np.arange(len(ids) - 1), ids[1:]].mean()
    assert np.exp(loss) == pytest.approx(float(want["perplexity"]), rel=1e-4)


def test_too_many_tokens_are_an_error():
    gpt2, llama, bert = tiny("tiny_gpt2"), tiny("tiny_llama"), tiny("tiny_bert")
    with pytest.raises(ValueError, match="97 tokens exceed this decoder's 96 positions"):
        gpt2.hidden(jnp.zeros((1, 97), jnp.int32))
    # The slot takes one of the learned positions.
    with pytest.raises(ValueError, match="96 tokens exceed this decoder's 95 positions"):
        gpt2.hidden(jnp.zeros((1, 96), jnp.int32), random_prefix(gpt2, [True]))
    with pytest.raises(ValueError, match="97 tokens exceed this decoder's 96"):
        llama.hidden(jnp.zeros((1, 97), jnp.int32))
    with pytest.raises(ValueError, match="a cache of 97 exceeds"):
        llama.empty_cache(1, 97)
    with pytest.raises(ValueError, match="33 tokens, but this encoder has 32 positions"):
        bert(jnp.zeros((1, 33), jnp.int32), jnp.ones((1, 33), bool))


@pytest.mark.parametrize("name", KINDS)
def test_sizes_survive_the_way_to_hugging_face_and_back(name):
    sizes = family(name).CONFIG.from_huggingface(Folder(GOLDEN / name).config())
    settings = sizes.to_huggingface()
    assert settings["model_type"] == KINDS[name]
    assert family(name).CONFIG.from_huggingface(settings) == sizes
    assert family(name).CONFIG.from_huggingface(AutoConfig.for_model(**settings).to_dict()) == sizes


def rope(kind, **numbers):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **numbers}}


ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2", rope("yarn", factor=2.0, truncate=False), "truncate=false"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu'"),
        ("qwen2_window", {"layer_types": ALTERNATING}, "layer_types alternate"),
        ("llama", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        ("gpt2", {"activation_function": "relu"}, "relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
    ],
)
def test_settings_that_are_not_computed_are_errors(name, change, message):
    settings = Folder(GOLDEN / f"tiny_{name}").config()
    with pytest.raises(ValueError, match=message):
        family(f"tiny_{name}").CONFIG.from_huggingface({**settings, **change})


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("llama", dict(heads=4, kv_heads=3, head_size=2), "4 heads do not share 3 kv_heads"),
        ("llama", dict(heads=4, kv_heads=2, head_size=3), "even head_size, not 3"),
        ("gpt2", dict(heads=3), "width 8 is not a multiple of 3 heads"),
        *(
            ("gptj", dict(heads=2, rotary=n, max_length=8, norm_eps=1e-5), f"at most 4, not {n}")
            for n in (0, 3, 6)
        ),
        ("bert", dict(heads=4, pooling="max"), "unknown pooling 'max'"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(kind, sizes, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[kind].CONFIG(vocab_size=10, width=8, depth=1, mlp=8, **sizes)
