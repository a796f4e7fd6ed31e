"""The code of an answer, written beside its encoding and read back as tokens (§10).

Ours, not the paper's. A latent of some hundred numbers holds what a text is about, and not how its words
are written. So the value of a fact carries its answer behind the encoding, token by token: place j of P
holds the code of the j-th token, d signs that a hash of its id decides, and the place after the last
one that of the end-of-text token. M₀ and queries are zero there: what is read at these places is what
was written, weighed as the memory weighs all else, and gone when the fact is.

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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.config import AnswerCodeConfig
from larimar_jax.linalg import dot

# A place that holds no token.
NOTHING = -1
# Tokens of a place that are returned: far fewer than these are ever beyond chance.
TOP_TOKENS = 8
# Rows whose cosines to all tokens are held at a time.
_ROWS = 8
# A readout shorter than this beside codes of length 1 is rounding.
_SILENT = 1e-5


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
        tokens, gain = (
            jnp.take_along_axis(a, place, axis=1) for a in (self.tokens, self.logit_gain)
        )
        gain = jnp.where(depth[..., None] < self.logit_gain.shape[1], gain, 0.0)
        rows = jnp.arange(logits.shape[0])[:, None, None]
        return logits.at[rows, jnp.arange(logits.shape[1])[:, None], tokens].add(gain)


def size(config: AnswerCodeConfig | None) -> int:
    """Return how many numbers a value has more than its encoding: S = P·d."""
    return 0 if config is None else config.positions * config.width


def pack(
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
def encode(config: AnswerCodeConfig, tokens: Int[Array, "n P"]) -> Float[Array, "n S"]:
    """Return the codes of n answers, as `pack` returns them."""
    codes = jnp.where((tokens == NOTHING)[..., None], 0.0, _codes(tokens, config.width))
    return codes.reshape(len(tokens), -1)


def decode(
    config: AnswerCodeConfig,
    readout: Float[Array, "B S"],
    vocab_size: int,
    active: Bool[Array, " B"],
) -> TokenEvidence:
    """Return the evidence in readouts; rows that are not active, or read nothing, gain exactly 0."""
    codes = _codes(jnp.arange(vocab_size), config.width)
    chance = math.log(vocab_size)

    def decode_row(row):
        norm = jnp.linalg.norm(row, axis=-1, keepdims=True)
        cosine = jnp.maximum(dot(row / jnp.where(norm > _SILENT, norm, 1.0), codes.T), 0.0)
        best, token = jax.lax.top_k(cosine, min(TOP_TOKENS, vocab_size))
        gain = jax.nn.softplus(_log_likelihood_ratio(best, config.width) - chance)
        return token, jnp.where(norm > _SILENT, jnp.minimum(gain, config.limit), 0.0)

    rows = readout.reshape(len(readout), config.positions, config.width)
    tokens, gain = jax.lax.map(decode_row, rows, batch_size=_ROWS)
    return TokenEvidence(tokens, jnp.where(active[:, None, None], gain, 0.0))


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
