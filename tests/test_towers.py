"""The towers against torch's numbers; a folder that is added to golden/ is tested by itself."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larimar_jax import decoders, encoders, generate, weights
from larimar_jax.decoders.base import Prefix
from larimar_jax.weights.huggingface import Folder
from larimar_jax.weights.key_table import fill

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = {
    t: f for k in (decoders, encoders) for f in k.families().values() for t in f.model_types
}
KINDS = {path.name: Folder(path).config()["model_type"] for path in sorted(GOLDEN.glob("tiny_*"))}
DECODERS = [name for name, kind in KINDS.items() if hasattr(FAMILIES[kind], "logits")]
ENCODERS = [name for name in KINDS if name not in DECODERS]
BOTH = [*DECODERS, *ENCODERS]

# Measured: at most 0.053, of 0.030 as a whole.
BFLOAT16 = 0.06


def assert_close(got, want, relative):
    """Both as a whole and at the worst number, against the largest."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = got - want
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
    config = family(name).CONFIG.from_huggingface(Folder(GOLDEN / name).config())
    config = dataclasses.replace(config, **Folder(GOLDEN / name).pooling())
    return nnx.eval_shape(
        lambda: family(name)(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
    )


@functools.cache
def tiny(name, dtype="float32", remat="none"):
    source = Folder(GOLDEN / name).tensors()
    return fill(abstract(name, dtype, remat), family(name).hf_keys, source)


class Gradients:
    """Torch's gradients as a file of weights: they go where their parameters went."""

    path = "gradients"

    def __init__(self, name):
        self.tensors = {
            key.removeprefix("gradient/"): value
            for key, value in golden(name).items()
            if key.startswith("gradient/")
        }

    def shapes(self):
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name):
        return self.tensors[name]


def tokens_of(name):
    """Tokens [3, T] and which of them are real."""
    tokens, lengths = golden(name)["tokens"], golden(name)["lengths"]
    return jnp.asarray(tokens), jnp.arange(tokens.shape[1]) < lengths[:, None]


@nnx.jit
def hidden(model, *args):
    """`model.hidden`, compiled: eager scans would compile anew at every call."""
    return model.hidden(*args)


logits = nnx.jit(lambda model, tokens: model.logits(model.hidden(tokens)[0]))
pool = nnx.jit(lambda model, tokens, mask: model(tokens, mask))


@functools.cache
def computed(name, remat="none"):
    """(loss, logits or pooled vectors, gradients by path) of the golden batch."""
    tokens, real = tokens_of(name)

    def loss(state):
        model = nnx.merge(graph, state)
        if name in ENCODERS:
            out = model(tokens, real)
            return jnp.sum(out * golden(name)["weight"]), out
        out = model.logits(model.hidden(tokens)[0])
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


def row(prefix, b):
    """One row of a Prefix."""
    return Prefix(
        prefix.embedding[b : b + 1],
        prefix.key[:, b : b + 1],
        prefix.value[:, b : b + 1],
        prefix.active[b : b + 1],
    )


def test_every_model_type_has_a_golden_folder():
    assert set(KINDS.values()) == set(FAMILIES)


@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_loss_match_torch(name):
    loss, got, _ = computed(name)
    _, real = tokens_of(name)
    assert_close(np.asarray(got)[real], golden(name)["logits"], 1e-4)
    assert float(loss) == pytest.approx(float(golden(name)["loss"]), rel=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_and_vectors_match_torch(name):
    tokens, real = tokens_of(name)
    _, pooled, _ = computed(name)
    assert_close(np.asarray(hidden(tiny(name), tokens, real))[real], golden(name)["hidden"], 1e-4)
    assert_close(pooled, golden(name)["pooled"], 1e-4)


@pytest.mark.parametrize("name", BOTH)
def test_every_gradient_matches_torch(name):
    """Key biases without rotary positions have none: the softmax cancels them, up to rounding."""
    got = computed(name)[2]
    want = by_path(nnx.state(fill(abstract(name), family(name).hf_keys, Gradients(name))))
    assert got.keys() == want.keys()
    norms = {path: np.linalg.norm(gradient) for path, gradient in want.items()}
    rounding = 1e-6 * max(norms.values())
    error = {path: np.linalg.norm(got[path] - want[path]) for path in want}
    assert not {path: e for path, e in error.items() if e > max(1e-3 * norms[path], rounding)}


# A layer of each file with a tower; what sets models of one file apart is in `computed` above.
@pytest.mark.parametrize("remat", ["dots", "layers"])
@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt2", "tiny_gptj", "tiny_llama"])
def test_remat_changes_no_gradient(name, remat):
    got, want = computed(name, remat=remat)[2], computed(name)[2]
    whole = np.sqrt(sum(np.sum(np.square(gradient)) for gradient in want.values()))
    for path in want:
        assert np.linalg.norm(got[path] - want[path]) <= 1e-6 * whole, path


@nnx.jit(static_argnames="count")
def greedy(model, tokens, lengths, count):
    """The best `count` tokens after each right-padded prompt, one cached step at a time."""
    rows, length = tokens.shape
    x, cache = model.hidden(tokens, None, model.empty_cache(rows, length + count))

    def step(carry, i):
        last, cache = carry
        best = jnp.argmax(model.logits(last), axis=-1)
        x, cache = model.hidden(best[:, None], None, cache, lengths + i)
        return (x[:, 0], cache), best

    _, said = jax.lax.scan(step, (x[jnp.arange(rows), lengths - 1], cache), jnp.arange(count))
    return said.T


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_text_is_that_of_torch(name):
    """Two prompts of different lengths in one batch; torch decoded them alone."""
    prompts = [golden(name)[f"prompt_{i}"] for i in range(2)]
    want = np.stack([golden(name)[f"greedy_{i}"] for i in range(2)])
    lengths = jnp.array([len(prompt) for prompt in prompts])
    padded = np.zeros((2, lengths.max()), np.int32)
    for b, prompt in enumerate(prompts):
        padded[b, : len(prompt)] = prompt
    got = greedy(tiny(name), jnp.asarray(padded), lengths, want.shape[1])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", DECODERS)
def test_prompts_in_one_row_go_on_as_torch_says_of_each_alone(name):
    prompts = [golden(name)[f"prompt_{i}"].tolist() for i in range(2)]
    want = np.stack([golden(name)[f"greedy_{i}"] for i in range(2)])
    np.testing.assert_array_equal(generate.continue_ids(tiny(name), prompts, want.shape[1]), want)


@pytest.mark.parametrize("name", DECODERS)
def test_cached_equals_uncached_from_ragged_starts(name):
    model = tiny(name)
    tokens, _ = tokens_of(name)
    prefix = random_prefix(model, [True, False, True], slots=2)
    want, _ = hidden(model, tokens, prefix)
    start = jnp.array([2, 9, 4])
    # What stands to the right of a row's prompt is padding, and must leave no trace.
    prompt = jnp.where(jnp.arange(9) < start[:, None], tokens[:, :9], 1)
    got, cache = hidden(model, prompt, prefix, model.empty_cache(3, tokens.shape[1]))
    for b in range(3):
        assert_close(got[b, : start[b]], want[b, : start[b]], 1e-5)
    for count in (5, 1):
        at = start[:, None] + jnp.arange(count)
        got, cache = hidden(model, jnp.take_along_axis(tokens, at, axis=1), prefix, cache, start)
        assert_close(got, jnp.take_along_axis(want, at[:, :, None], axis=1), 1e-5)
        start = start + count


@pytest.mark.parametrize("name", DECODERS)
def test_a_batch_equals_its_rows_one_by_one(name):
    model = tiny(name)
    tokens, _ = tokens_of(name)
    prefix = random_prefix(model, [True, False, True])
    whole, _ = hidden(model, tokens, prefix)
    for b, length in enumerate(golden(name)["lengths"]):
        alone, _ = hidden(model, tokens[b : b + 1], row(prefix, b))
        assert_close(alone[0, :length], whole[b, :length], 1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_batch_equals_its_rows_and_is_blind_to_padding(name):
    tokens, real = tokens_of(name)
    whole = computed(name)[1]
    for b, length in enumerate(golden(name)["lengths"]):
        alone = pool(tiny(name), tokens[b : b + 1, :length], real[b : b + 1, :length])
        assert_close(alone[0], whole[b], 1e-5)
    np.testing.assert_array_equal(
        pool(tiny(name), jnp.where(real, tokens, 5), real), pool(tiny(name), tokens, real)
    )


@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16_decodes_near_float32(name):
    model = tiny(name, dtype="bfloat16")
    tokens, real = tokens_of(name)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(nnx.state(model)))
    assert model.empty_cache(1, 4).key.dtype == hidden(model, tokens)[0].dtype == jnp.bfloat16
    got = logits(model, tokens)
    assert got.dtype == jnp.float32
    assert_close(np.asarray(got)[real], golden(name)["logits"], BFLOAT16)


@pytest.mark.parametrize("name", ENCODERS)
def test_bfloat16_encodes_near_float32(name):
    got = pool(tiny(name, dtype="bfloat16"), *tokens_of(name))
    assert got.dtype == jnp.float32
    assert_close(got, golden(name)["pooled"], BFLOAT16)


def test_minilm_matches_torch(minilm):
    model, tokenizer = minilm
    want = np.load(GOLDEN / "minilm.npz")
    batch = tokenizer.encode(list(want["texts"]), want["ids"].shape[1])
    np.testing.assert_array_equal(batch.ids, want["ids"])
    np.testing.assert_array_equal(batch.mask, want["mask"])
    ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
    np.testing.assert_allclose(pool(model, ids, mask), want["embeddings"], atol=1e-4)
    got, real = np.asarray(hidden(model, ids, mask))[:, :6, :64], want["mask"][:, :6]
    np.testing.assert_allclose(got[real], want["hidden"][real], atol=1e-4)


def test_smollm2_matches_torch(smollm2):
    model, tokenizer = smollm2
    want = np.load(GOLDEN / "smollm2.npz")
    ids = want["ids_0"]
    assert tokenizer.ids(str(want["texts"][0])) == list(ids)
    got = np.asarray(logits(model, jnp.asarray(ids)[None])[0])
    np.testing.assert_allclose(got[:, ::193], want["columns"], atol=1e-4)
    np.testing.assert_allclose(got[-1, ::5], want["last"], atol=1e-4)
    log_p = jax.nn.log_softmax(jnp.asarray(got[:-1]))
    loss = -np.asarray(log_p)[np.arange(len(ids) - 1), ids[1:]].mean()
    assert np.exp(loss) == pytest.approx(float(want["perplexity"]), rel=1e-4)


def test_an_empty_text_is_finite(minilm):
    model, _ = minilm
    nothing = jnp.zeros((1, 8), jnp.int32)
    assert np.isfinite(pool(model, nothing, nothing > 0)).all()


def test_too_many_tokens():
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


@pytest.mark.parametrize("name", BOTH)
def test_sizes_survive_the_way_to_hugging_face_and_back(name):
    sizes = family(name).CONFIG.from_huggingface(Folder(GOLDEN / name).config())
    said = sizes.to_huggingface()
    assert said["model_type"] == KINDS[name]
    assert family(name).CONFIG.from_huggingface(said) == sizes


@pytest.mark.parametrize("name", ["tiny_llama_tied", "tiny_llama_biased", "tiny_qwen2"])
def test_rope_settings_in_their_older_form(name):
    """Before transformers 5, rope_theta stood beside rope_scaling, whose type was 'type'."""
    said = Folder(GOLDEN / name).config()
    older = {key: value for key, value in said.items() if key != "rope_parameters"}
    scaling = dict(said["rope_parameters"])
    older["rope_theta"] = scaling.pop("rope_theta")
    older["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    assert family(name).CONFIG.from_huggingface(older) == family(name).CONFIG.from_huggingface(said)


def rope(kind, **numbers):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **numbers}}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", rope("dynamic", factor=2.0), "rope scaling 'dynamic'"),
        ("llama", rope("llama3", factor=2.0), "'llama3' lacks its 'low_freq_factor'"),
        ("qwen2", rope("yarn", factor=2.0, truncate=False), "truncate=false"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu'"),
        (
            "qwen2_window",
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            "layer_types alternate",
        ),
        ("qwen2_window", {"layer_types": "sliding"}, "no list of 3 kinds"),
        ("qwen2_window", {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
        ("qwen2_window", {"max_window_layers": "1"}, "max_window_layers is '1'"),
        ("mistral", {"sliding_window": "5"}, "sliding_window is '5'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("gpt2", {"activation_function": "relu"}, "relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("gptj", {"activation_function": "relu"}, "relu"),
        ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("bert", {"hidden_act": "relu"}, "relu"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
    ],
)
def test_settings_that_are_not_computed_are_errors(name, change, message):
    said = Folder(GOLDEN / f"tiny_{name}").config()
    with pytest.raises(ValueError, match=message):
        family(f"tiny_{name}").CONFIG.from_huggingface({**said, **change})


@pytest.mark.parametrize(
    ("name", "left_out", "sizes"),
    [
        ("qwen2_window", {"use_sliding_window"}, dict(window=0)),
        ("qwen2_window", {"max_window_layers", "layer_types"}, dict(window=0)),  # of 28 layers on
        ("qwen2_window", {"sliding_window"}, dict(window=4096, unwindowed=1)),
        ("mistral", {"sliding_window"}, dict(window=4096, unwindowed=0)),
        ("bert", {"layer_norm_eps", "type_vocab_size"}, dict(norm_eps=1e-12, type_vocab=2)),
    ],
)
def test_what_is_not_said_is_as_hugging_face_has_it(name, left_out, sizes):
    said = Folder(GOLDEN / f"tiny_{name}").config()
    kept = {n: v for n, v in said.items() if n not in left_out}
    made = family(f"tiny_{name}").CONFIG.from_huggingface(kept)
    assert {n: getattr(made, n) for n in sizes} == sizes


def test_sizes_that_do_not_fit_are_errors():
    llama = decoders.family("llama").CONFIG
    with pytest.raises(ValueError, match="4 heads do not share 3 kv_heads"):
        llama(10, 8, 1, heads=4, kv_heads=3, head_size=2, mlp=8)
    with pytest.raises(ValueError, match="even head_size, not 3"):
        llama(10, 8, 1, heads=4, kv_heads=2, head_size=3, mlp=8)
    with pytest.raises(ValueError, match="width 10 is not a multiple of 4 heads"):
        decoders.family("gpt2").CONFIG(10, 10, 1, heads=4, mlp=8)
    gptj = dict(vocab_size=10, width=8, depth=1, heads=2, mlp=8, max_length=8, norm_eps=1e-5)
    for rotary in (0, 3, 6):
        with pytest.raises(ValueError, match=f"even and at most 4, not {rotary}"):
            decoders.family("gptj").CONFIG(rotary=rotary, **gptj)
    with pytest.raises(ValueError, match="unknown pooling 'max'"):
        encoders.family("bert").CONFIG(10, 8, 1, heads=4, mlp=8, pooling="max")


def test_weights_of_both_towers_are_public():
    assert set(weights.PACKAGED) == {"minilm", "smollm2"}
