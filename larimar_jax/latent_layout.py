"""The layout of what an edited memory holds of a text: encoding, features of it, and its answer.

    [ e(text) : C | s·φ(e(text)) : F | encoding of the answer : R | answer code : S ]

Linear keys of C dimensions tell at most C facts apart, whatever K is. With random features φ of the
encoding (`RandomFeatures`) the product of two keys becomes

    z·z' + s² exp(−‖z − z'‖² / (2ℓ²))

and the memory holds about C + F facts before it has to blend them, in max(K, C + F) slots: those of M₀
beyond C, which an M₀ of C columns cannot use, and as many more as that takes. M₀ is extended so that it
reads every text back as itself as before. Without features and answers all of this is e(text).

A model with a reader (decoders/reader.py) speaks from the encoding of the answer, which it makes of the
answer's own tokens in the written text alone; R = C.

The code of an answer (§10) is ours, not the paper's. A latent of some hundred numbers holds what a text
is about, and not how its words are written. So the value of a fact carries its answer behind the
encoding, token by token: place j of P holds the code of the j-th token, d signs that a hash of its id
decides, and the place after the last one that of the end-of-text token. M₀ and queries are zero there:
what is read at these places is what was written, weighed as the memory weighs all else, and gone when
the fact is.

Reading tests each of V tokens against chance. If a place reads y = a·code(v) + isotropic noise, then the
log likelihood ratio against noise alone, at the likeliest a > 0 and size of the noise, is

    e_v = −d/2 · ln(1 − cos²(y, code(v))),    of which chance gives the best of V tokens about ln V

A place is evidence of one token, or of none, and then the language model decides alone. With its p(v) as
the prior, Bayes' rule is

    p(v | y) ∝ p(v) · (1 + exp(e_v − ln V))

which is what the logit of v gains. Nothing is tuned, and a memory that is full of other facts' codes
gives less evidence by itself.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import layers
from larimar_jax.config import AnswerCodeConfig, Config, KeyFeaturesConfig
from larimar_jax.decoders.decoder import Prefix
from larimar_jax.linalg import dot
from larimar_jax.memory.addressing import RandomFeatures
from larimar_jax.memory.base import MemoryParams
from larimar_jax.weights.tokenizer import Tokenizer, bucket

# A place that holds no token.
NOTHING = -1
# Tokens of a place that are returned: far fewer than these are ever beyond chance.
TOP_TOKENS = 8
# Rows whose cosines to all tokens are held at a time.
_ROWS = 8
# A readout shorter than this beside codes of length 1 is rounding.
_SILENT = 1e-5


@dataclasses.dataclass(frozen=True)
class LatentLayout:
    """The sizes of the parts: C, F, S and R."""

    encoding: int
    key_features: int
    answer_code: int
    answer_encoding: int = 0

    @property
    def size(self) -> int:
        """The size of a latent, C + F + R + S."""
        return self.encoding + self.key_features + self.answer_encoding + self.answer_code


def layout(config: Config) -> LatentLayout:
    """Return the layout of a model as it is edited."""
    features, code = config.editing.key_features, config.editing.answer_code
    count = 0 if features is None else features.count
    size = 0 if code is None else code.positions * code.width
    reads = config.model.reader is not None and config.editing.answer_encoding
    return LatentLayout(config.model.latent, count, size, config.model.latent if reads else 0)


def features(
    config: KeyFeaturesConfig | None, encodings: Float[Array, "n C"]
) -> Float[Array, "n F"]:
    """Return s·φ of encodings; F is 0 without a config. Saved memories depend on them: they never
    change."""
    if config is None:
        return jnp.zeros((len(encodings), 0), jnp.float32)
    key = jax.random.key(0, impl="threefry2x32")
    directions = jax.random.normal(key, (config.count, encodings.shape[1]), jnp.float32)
    return config.scale * RandomFeatures(config.length).weigh(directions, encodings)


@functools.partial(jax.jit, static_argnums=1)
def extend_prior(params: MemoryParams, sizes: LatentLayout) -> MemoryParams:
    """Return a model's memory for all parts: the last F slots of M₀ stand for the features, one each,
    and M₀ is zero at the answer code. M_ref is M₀.

    Raises:
      ValueError: σ_W is of slots or depends on M, and there are more slots than it was learned for.
    """

    def pad(part: Array | None, axis: int) -> Array | None:
        if part is None:
            return None
        more = sizes.size - sizes.encoding
        return jnp.pad(part, [(0, more * (at == axis)) for at in range(part.ndim)])

    slots, count = len(params.prior_memory), sizes.key_features
    more = max(0, sizes.encoding + count - slots) if count else 0
    if more and (params.log_variance.ndim or params.variance_by_query is not None):
        raise ValueError(
            f"the memory's σ_W was learned for {slots} slots, and editing.key_features needs "
            f"{slots + more}. Set editing.key_features.count to {count - more} at the most."
        )
    prior_memory = jnp.pad(pad(params.prior_memory, 1), ((0, more), (0, 0)))
    place = jnp.arange(count)
    prior_memory = prior_memory.at[slots + more - count + place, sizes.encoding + place].set(1.0)
    return dataclasses.replace(
        params,
        prior_memory=prior_memory,
        variance_by_query=pad(params.variance_by_query, 0),
        variance_by_memory=pad(params.variance_by_memory, 1),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenEvidence:
    """Evidence of tokens in B readouts at P places: the likeliest ones, and what their logits gain."""

    tokens: Int[Array, "B P k"]
    logit_gain: Float[Array, "B P k"]

    def rows(self, index: Int[Array, " R"]) -> "TokenEvidence":
        """Return chosen rows, in the order of `index`."""
        return TokenEvidence(self.tokens[index], self.logit_gain[index])

    def add(self, logits: Float[Array, "B n V"], depth: Int[Array, "B n"]) -> Float[Array, "B n V"]:
        """Return logits at these places of the answer (0 is its first token) with their gains."""
        place = jnp.minimum(depth, self.logit_gain.shape[1] - 1)[..., None]
        both = (self.tokens, self.logit_gain)
        tokens, gain = (jnp.take_along_axis(a, place, axis=1) for a in both)
        gain = jnp.where(depth[..., None] < self.logit_gain.shape[1], gain, 0.0)
        rows = jnp.arange(logits.shape[0])[:, None, None]
        return logits.at[rows, jnp.arange(logits.shape[1])[:, None], tokens].add(gain)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """All that a read hands to the decoder, one row per sequence.

    prefix: memory slots and embedding made from the latent (§2); a model with a reader has none.
    evidence: for the tokens of the answer. answer: its encoding, for the reader.
    """

    prefix: Prefix | None
    evidence: TokenEvidence | None = None
    answer: Float[Array, "B R"] | None = None

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(jax.tree.leaves((self.of_answer, self.prefix and self.prefix.active))[0])

    @property
    def of_answer(self) -> tuple[Array | None, TokenEvidence | None]:
        """What logits need of it, and no layer."""
        return self.answer, self.evidence

    def rows(self, index: Int[Array, " R"]) -> "Condition":
        """Return the condition of chosen rows, in the order of `index`."""
        # Slots lead with their layer.
        return jax.tree.map(lambda a: a[:, index] if a.ndim == 5 else a[index], self)


def pack_answers(
    config: AnswerCodeConfig, answers: Sequence[Sequence[int] | None], eos: int
) -> Int[np.ndarray, "n P"]:
    """Return the tokens of n answers at P places: `eos` after the last one, if a place is left, and
    NOTHING after that. None, which a query has, is NOTHING at all places."""
    packed = np.full((len(answers), config.positions), NOTHING, np.int32)
    for row, answer in enumerate(answers):
        if answer is not None:
            tokens = [*answer, eos][: config.positions]
            packed[row, : len(tokens)] = tokens
    return packed


@functools.partial(jax.jit, static_argnums=0)
def encode_answers(config: AnswerCodeConfig, tokens: Int[Array, "n P"]) -> Float[Array, "n S"]:
    """Return the codes of n answers, as `pack_answers` returns them."""
    codes = jnp.where((tokens == NOTHING)[..., None], 0.0, _codes(tokens, config.width))
    return codes.reshape(len(tokens), -1)


def decode_answers(
    config: AnswerCodeConfig,
    readout: Float[Array, "B S"],
    vocab_size: int,
    active: Bool[Array, " B"],
) -> TokenEvidence:
    """Return the evidence in readouts of one or more codes, P of places in all; rows that are not
    active, or read nothing, gain exactly 0."""
    codes = _codes(jnp.arange(vocab_size), config.width)
    chance = math.log(vocab_size)

    def decode_row(row):
        norm = jnp.linalg.norm(row, axis=-1, keepdims=True)
        cosine = jnp.maximum(dot(row / jnp.where(norm > _SILENT, norm, 1.0), codes.T), 0.0)
        best, token = jax.lax.top_k(cosine, min(TOP_TOKENS, vocab_size))
        gain = jax.nn.softplus(_log_likelihood_ratio(best, config.width) - chance)
        return token, jnp.where(norm > _SILENT, jnp.minimum(gain, config.limit), 0.0)

    rows = readout.reshape(len(readout), -1, config.width)
    tokens, gain = jax.lax.map(decode_row, rows, batch_size=_ROWS)
    return TokenEvidence(tokens, jnp.where(active[:, None, None], gain, 0.0))


def within_answers(
    readout: Float[np.ndarray, "n C"],
    layout: LatentLayout,
    config: AnswerCodeConfig | None,
    tokens: Sequence[int],
) -> Float[np.ndarray, "n _"]:
    """Return readouts up to where the longest of their answers ends: every place takes time."""
    places = bucket(max(tokens, default=0) + 1)
    begin = layout.size - layout.answer_code
    return readout if config is None else readout[:, : begin + places * config.width]


def answer_tokens(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    answers: Sequence[str | None],
    mask: Bool[np.ndarray, "n S"],
) -> Bool[np.ndarray, "n S"]:
    """Return which tokens of n texts, each of which ends with its answer, are the answer's.

    Args:
      answers: None for a text without one. mask: of the texts' tokens.
    """
    span = np.zeros(mask.shape, bool)
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        if answer is not None:
            prompt = text.strip().removesuffix(answer.strip()).rstrip()
            end = mask[row].sum() - len(tokenizer.suffix)
            count = len(tokenizer.ids(text)) - len(tokenizer.ids(prompt))
            span[row, max(0, end - count) : end] = True
    return span


@functools.partial(jax.jit, static_argnums=(0, 6))
def encode(
    graph: nnx.GraphDef,
    state: nnx.State,
    projection: Float[Array, "H H"] | None,
    tokens: Int[Array, "n S"],
    mask: Bool[Array, "n S"],
    span: Bool[Array, "n S"] | None,
    config: KeyFeaturesConfig | None,
) -> tuple[Float[Array, "n H"], Float[Array, "n C"], Float[Array, "n H"], Float[Array, "n R"]]:
    """Return embeddings, encodings with their features, pooled encodings, and encodings of answers."""
    model = nnx.merge(graph, state)
    hidden = model.encoder.hidden(tokens, mask)
    embedding = pooled = model.encoder.pool(hidden, mask)
    if projection is not None:
        embedding = jnp.matmul(pooled, projection, precision="highest")
    latent = model.to_latent(pooled)
    latent = jnp.concatenate([latent, features(config, latent)], axis=1)
    answer = latent[:, :0] if span is None else model.reader.encode(hidden, span)
    return embedding, latent, pooled, answer


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def condition(
    graph: nnx.GraphDef,
    state: nnx.State,
    readout: Float[Array, "n C"],
    active: Bool[Array, " n"],
    layout: LatentLayout,
    config: AnswerCodeConfig | None,
) -> Any:
    """Return a model's condition of readouts, with what they hold of their answers."""
    model, answer, evidence = nnx.merge(graph, state), None, None
    begin = layout.encoding + layout.key_features
    end = begin + layout.answer_encoding
    if layout.answer_encoding:
        answer = jnp.where(active[:, None], readout[:, begin:end], 0.0)
    if config is not None:
        codes = readout[:, end:]
        evidence = decode_answers(config, codes, model.decoder.config.vocab_size, active)
    return model.condition(readout[:, : layout.encoding], active, evidence, answer)


def logits(
    model: Any,
    hidden: Float[Array, "B D"],
    tokens: Int[Array, " B"],
    depth: Int[Array, " B"],
    answer: Float[Array, "B R"] | None,
    evidence: TokenEvidence | None,
) -> Float[Array, "B V"]:
    """Return logits after `tokens`, `depth` tokens into the answer, as what was read of it changes them.

    Args:
      model: a Larimar, or a decoder alone where there is no `answer`.
      hidden: the decoder's last hidden states there.
    """
    if answer is not None:
        newest = layers.look_up(model.decoder.word, tokens)
        hidden = model.reader(answer, hidden, newest, depth)
    result = model.decoder.logits(hidden)
    if evidence is not None:
        result = evidence.add(result[:, None], depth[:, None])[:, 0]
    return result


def _log_likelihood_ratio(cosine: Float[Array, "P k"], width: int) -> Float[Array, "P k"]:
    """Return e_v in nats; finite for a cosine of 1."""
    distance = jnp.maximum(1.0 - jnp.square(cosine), jnp.finfo(jnp.float32).eps)
    return -0.5 * width * jnp.log(distance)


def _codes(tokens: Int[Array, "*n"], width: int) -> Float[Array, "*n d"]:
    """Return d signs for each id, of length 1 together. Saved memories depend on them: they never
    change."""
    key = jax.random.key(0, impl="threefry2x32")

    def signs(token):
        words = jax.random.bits(jax.random.fold_in(key, token), (width // 32,), jnp.uint32)
        bits = words[:, None] >> jnp.arange(32, dtype=jnp.uint32) & jnp.uint32(1)
        return 2.0 * bits.reshape(width).astype(jnp.float32) - 1.0

    ids = jnp.asarray(tokens, jnp.int32).astype(jnp.uint32)
    return jax.vmap(signs)(ids.ravel()).reshape(*ids.shape, width) / math.sqrt(width)
