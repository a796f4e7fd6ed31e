"""The spelling of an answer, written beside its encoding and read back as tokens (§10).

Ours, not the paper's. A latent of some hundred numbers says what a text is about, and not how its words
are written. So the value of a fact carries its answer behind the encoding, token by token: place j of P
holds the code of the j-th token, d signs that a hash of its id decides, and the place after the last
one holds the code of END. M₀ and queries are zero there: what is read at these places is what was
written, weighed as the memory weighs all else, and gone when the fact is.

Reading tests each of V tokens against chance. If a place reads y = a·code(v) + isotropic noise, then the
log likelihood ratio against noise alone, at the likeliest a > 0 and size of the noise, is

    e_v = −d/2 · ln(1 − cos²(y, code(v))),    of which chance gives the best of V tokens about ln V

A place tells a token, or the END after which the language model speaks freely, or nothing. With the
language model as prior, Bayes' rule is

    p(v | y) ∝ p(v) · (1 + exp(e_END − ln V) + exp(e_v − ln V))

so that the logit of v gains ln(1 + exp(e_v − ln V) / (1 + exp(e_END − ln V))): nothing is tuned, and a
memory that is full of others' codes says less by itself.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.linalg import dot
from larimar_jax.memory.contract import MemoryParams
from larimar_jax.settings import SpellingConfig

# Places that hold no token: one after the last, and those after it.
END, NOTHING = -1, -2
# Tokens that are kept of a place: of what is beyond chance, far fewer than these are ever left.
KEPT = 8
# Rows whose cosines to all tokens are held at a time.
_ROWS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spelled:
    """What B readouts spell at P places: the likeliest tokens and what their logits gain, in nats."""

    tokens: Int[Array, "B P k"]
    gain: Float[Array, "B P k"]

    def rows(self, index: Int[Array, " R"]) -> "Spelled":
        """Chosen rows, in the order of `index`."""
        return Spelled(self.tokens[index], self.gain[index])

    def add(
        self, logits: Float[Array, "B n V"], depth: Int[Array, "B n"]
    ) -> Float[Array, "B n V"]:
        """The logits of tokens at these places of the answer (0 is its first), with what they gain."""
        place = jnp.minimum(depth, self.gain.shape[1] - 1)[..., None]
        tokens, gain = (jnp.take_along_axis(a, place, axis=1) for a in (self.tokens, self.gain))
        gain = jnp.where(depth[..., None] < self.gain.shape[1], gain, 0.0)
        rows = jnp.arange(logits.shape[0])[:, None, None]
        return logits.at[rows, jnp.arange(logits.shape[1])[:, None], tokens].add(gain)


def size(config: SpellingConfig | None) -> int:
    """How many numbers a value has more than its encoding: P·d."""
    return 0 if config is None else config.positions * config.width


def places(config: SpellingConfig, answer: Sequence[int]) -> list[int]:
    """An answer's tokens at P places: with an END if there is one left, and NOTHING after it."""
    told = [*answer[: config.positions], *([END] if len(answer) < config.positions else [])]
    return told + [NOTHING] * (config.positions - len(told))


@functools.partial(jax.jit, static_argnums=0)
def spell(config: SpellingConfig, tokens: Int[Array, "n P"]) -> Float[Array, "n S"]:
    """What is written of n answers, given their `places`; S = P·d."""
    codes = jnp.where((tokens == NOTHING)[..., None], 0.0, _codes(tokens, config.width))
    return codes.reshape(len(tokens), -1)


def read(
    config: SpellingConfig,
    readout: Float[Array, "B S"],
    vocab_size: int,
    active: Bool[Array, " B"],
) -> Spelled:
    """What is spelled by what was read; rows that are not active, or read nothing, gain exactly 0."""
    codes = _codes(jnp.arange(-1, vocab_size), config.width)  # END first
    chance = math.log(vocab_size)

    def one(row):
        norm = jnp.linalg.norm(row, axis=-1, keepdims=True)
        cosine = jnp.maximum(dot(row / jnp.where(norm > _SILENT, norm, 1.0), codes.T), 0.0)
        best, token = jax.lax.top_k(cosine[:, 1:], min(KEPT, vocab_size))
        ended = jax.nn.softplus(_evidence(cosine[:, :1], config.width) - chance)
        gain = jax.nn.softplus(_evidence(best, config.width) - chance - ended)
        return token, jnp.where(norm > _SILENT, jnp.minimum(gain, config.limit), 0.0)

    rows = readout.reshape(len(readout), config.positions, config.width)
    tokens, gain = jax.lax.map(one, rows, batch_size=_ROWS)
    return Spelled(tokens, jnp.where(active[:, None, None], gain, 0.0))


# A readout shorter than this beside codes of length 1 is rounding.
_SILENT = 1e-5


def _evidence(cosine: Float[Array, "P k"], width: int) -> Float[Array, "P k"]:
    """e_v in nats; finite for a cosine of 1."""
    apart = jnp.maximum(1.0 - jnp.square(cosine), jnp.finfo(jnp.float32).eps)
    return -0.5 * width * jnp.log(apart)


def _codes(tokens: Int[Array, "*n"], width: int) -> Float[Array, "*n d"]:
    """d signs for each id, of length 1 together. Saved memories depend on them: they never change."""
    key = jax.random.key(0, impl="threefry2x32")

    def signs(token):
        words = jax.random.bits(jax.random.fold_in(key, token), (width // 32,), jnp.uint32)
        bits = words[:, None] >> jnp.arange(32, dtype=jnp.uint32) & jnp.uint32(1)
        return 2.0 * bits.reshape(width).astype(jnp.float32) - 1.0

    ids = jnp.asarray(tokens, jnp.int32).astype(jnp.uint32)
    return jax.vmap(signs)(ids.ravel()).reshape(*ids.shape, width) / math.sqrt(width)


def widen(params: MemoryParams, more: int) -> MemoryParams:
    """A memory's parameters for latents with so many numbers more, all of them 0 in M₀."""

    def pad(part: Array | None, axis: int) -> Array | None:
        if part is None or more == 0:
            return part
        return jnp.pad(part, [(0, more * (at == axis)) for at in range(part.ndim)])

    return dataclasses.replace(
        params,
        prior=pad(params.prior, 1),
        reference=pad(params.reference, 1),
        variance_by_query=pad(params.variance_by_query, 0),
        variance_by_memory=pad(params.variance_by_memory, 1),
    )


def pack(config: SpellingConfig, answers: Sequence[Sequence[int] | None]) -> Int[np.ndarray, "n P"]:
    """The `places` of n answers; None, which a query has, is nothing at all."""
    nothing = [NOTHING] * config.positions
    return np.asarray(
        [nothing if answer is None else places(config, answer) for answer in answers], np.int32
    ).reshape(-1, config.positions)
