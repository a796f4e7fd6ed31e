"""Scope detection: is a query about something that was written? (§6)

A query is scored by its best cosine over the written prompts. In scope → memory-conditioned decoding;
out of scope → the untouched language model. ESD, the paper's external detector, compares a sentence
encoder's embeddings as they are; ISD, its internal one, is a classifier on the model's own encodings.
Here that is one of two, and its arrays are in the model's file.

`PROJECTION`: the same cosine after a linear map W.

`WORDINGS` and `RELATIONS`: a sentence without its names and numbers is a frame f, which tells the
relation that is asked for. It is compared with encodings u_t of many wordings, whose relations are Y_t,

    p(r | f) = Σ_t softmax_t(γ cos(f, u_t)) Y_tr,

and the score is (1 − ω) Σ_r √(p(r | query) p(r | key)) + ω cos(query, key): the Bhattacharyya
coefficient of the relations and the cosine of whole sentences, as one inner product of
`relation_embedding`s. Names, numbers, negation and opposites are compared as words
(`data/lexical.comparable`).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.data import lexical
from larimar_jax.data.segments import sentences
from larimar_jax.latent_layout import Condition
from larimar_jax.linalg import dot
from larimar_jax.weights import model_file

PROJECTION = "scope/projection"
WORDINGS, RELATIONS = "scope/wordings", "scope/relations"
ARRAYS = (PROJECTION, WORDINGS, RELATIONS)
# γ and ω.
SHARPNESS, WHOLE = 30.0, 0.35


# What chat templates put around a turn, and the names of speakers and parts before one.
_MARKUP = re.compile(
    r"<\|[^<>]*\|>|</?(?:s|bos|eos|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>"
)
_LABEL = re.compile(
    r"\A[\s#*>-]*\b(?:user|assistant|system|human|bot|ai|model|q|a|question|answer|instruction|input"
    r"|response)[\s*]*(?::[\s*]*|$)",
    re.IGNORECASE,
)
_INLINE_LABEL = re.compile(
    r"(?<=[^\s#*>])\s+(?=[#*> ]*(?:Q|A|Question|Answer|User|Assistant|Human|Bot)\s*:)"
)
# A line ends a sentence where it is the name of a speaker, or the next begins with a capital or a digit;
# and a semicolon does.
_LINE = re.compile(r"\n\s*\n|\n(?=\W{0,8}[A-Z0-9À-Ý])|\n(?=\w+\n)|(?<=;)\s")
_FUNCTION_WORDS = (
    "and|but|so|then|also|now|today|there|in|at|on|to|of|for|from|by|with|about|as|is|was|are|were|does"
    "|did|do|has|had|can|could|will|would|where|whom|whose|when|how|why|because|while|if"
)
# A sentence refers back where a pronoun comes before any noun that it could mean ("the town she …"), or
# where it has no noun at all.
_PRONOUN = re.compile(
    rf"\W*(?:(?:{_FUNCTION_WORDS})\W+)*(?:this|that|these|those)\b"
    rf"|\W*(?:(?:{_FUNCTION_WORDS}|(?:who|which|what|the|a)\s+\w+)\s+)*"
    r"(?:it|its|he|him|his|she|her|hers|they|them|their|theirs)\b",
    re.IGNORECASE,
)
_NO_NOUN = re.compile(rf"\W*(?:(?:{_FUNCTION_WORDS}|who|which|what|the|an?)\b\W*)*", re.IGNORECASE)
# Words of a sentence that only begins the answer of the question before it.
_BEGINNING = 4


class NearDuplicate(UserWarning):
    """A prompt that is easily taken for one that is written."""


class Recalled(NamedTuple):
    """What a memory reads for each prompt: None, and no tokens of an answer, is the base LM's."""

    facts: list[int | None]
    scores: list[float]
    tokens: list[int]
    readout: Float[np.ndarray, "n _"]
    milliseconds: dict[str, float]

    def row(self, number: int) -> "Recalled":
        """Return what is read for one prompt."""
        parts = ([part[number]] for part in self[:3])
        return Recalled(*parts, self.readout[number : number + 1], self.milliseconds)

    def condition(self, condition: Callable[..., Condition]) -> Condition | None:
        """Return `Pipeline.condition` of the readouts; where nothing is in scope None, the base LM's
        program."""
        inside = np.asarray([fact is not None for fact in self.facts], bool)
        return condition(self.readout, inside) if inside.any() else None


@dataclasses.dataclass(frozen=True)
class Match:
    """Per query: its best cosine, and the written key that has it (−1: none)."""

    score: Float[np.ndarray, " Q"]
    key: Int[np.ndarray, " Q"]

    def within(self, threshold: float) -> Bool[np.ndarray, " Q"]:
        """Return which queries are in scope; none where nothing is written, whatever the threshold."""
        return (self.score >= threshold) & (self.key >= 0)


def by_words(prompts: Sequence[str]) -> dict[str, str]:
    """Return prompts by what they are and by what they are without capitals, for `question`."""
    return {text.casefold(): text for text in prompts} | {text: text for text in prompts}


def question(query: str, written: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the part of a query that its continuation belongs to, which the detector compares (§6).

    It is the last sentence, with those before it as far as each refers back to the one before ("… the
    Eiffel Tower? It is in"), without chat markup and names of speakers. What is merely mentioned
    earlier is no part of it.

    Args:
      written: prompts, blanks between words, `by_words`; where the query ends with one of them, from a
        sentence's beginning on and whatever its capitals, it is that one.
    """
    blocks = _LINE.split(_INLINE_LABEL.sub("\n\n", _MARKUP.sub("\n\n", query)))
    parts = [sentence for block in blocks for sentence in sentences(block)]
    longest, tail, exact = max(map(len, written), default=0), "", ""
    for part in reversed(parts):
        tail = " ".join(f"{part} {tail}".split())
        if len(tail) > longest:
            break
        exact = written.get(tail) or written.get(tail.casefold()) or exact
    if exact:
        return exact
    parts = [text for part in parts if (text := _LABEL.sub("", part))]
    first = len(parts) - 1
    while first > 0 and _refers_back(parts[first], parts[first - 1]):
        first -= 1
    return " ".join(parts[first:]) or query


def _refers_back(sentence: str, before: str) -> bool:
    words = sentence.split()
    is_beginning = len(words) <= _BEGINNING and not any(word[0].isupper() for word in words[1:])
    return bool(
        _PRONOUN.match(sentence)
        or _NO_NOUN.fullmatch(sentence)
        or (is_beginning and before.endswith("?"))
    )


def nearest_key(
    embeddings: Float[np.ndarray, "Q H"],
    written: Float[np.ndarray, "N _"],
    allowed: Bool[np.ndarray, "Q N"] | None = None,
) -> Match:
    """Return the best cosine of each query's `question` over the written keys.

    Args:
      embeddings: they need not be of unit length.
      written: embeddings of the N written keys; none gives a score of −1 to every query.
      allowed: which keys a query may match; default all. (Benchmarks hold one memory per case.)
    """
    if len(written) == 0:
        count = len(embeddings)
        return Match(np.full(count, -1.0, np.float32), np.full(count, -1))
    likeness = cosines(embeddings, written)
    if allowed is not None:
        likeness = np.where(allowed, likeness, -1.0)
    best = likeness.max(axis=1)
    return Match(best, np.where(best > -1, likeness.argmax(axis=1), -1))


def cosines(
    embeddings: Float[np.ndarray, "Q H"], written: Float[np.ndarray, "N H"]
) -> Float[np.ndarray, "Q N"]:
    """Return the cosine of each query with each written key."""
    # A product of BLAS would wake threads, which takes longer than this does where others are at work.
    return np.einsum("qh,nh->qn", _unit(embeddings), _unit(written))


class RelationDetector(NamedTuple):
    """Unit encodings of T wordings, and the relations of each, which add up to 1."""

    wordings: Float[np.ndarray, "T H"]
    relations: Float[np.ndarray, "T R"]


def detectors(
    arrays: Mapping[str, Any], width: int, path: Path
) -> tuple[Float[np.ndarray, "H H"] | None, RelationDetector | None]:
    """Return W and the detector of relations, None for what is not among the arrays of a model's file.

    Raises:
      ExportError: one is of another encoder than that of `width`.
    """
    projection, *bank = (arrays.get(name) for name in ARRAYS)
    for name in (PROJECTION, WORDINGS):
        if name in arrays and arrays[name].shape[1] != width:
            raise model_file.ExportError(
                f"{path} does not fit its own config:\n  {name}: {arrays[name].shape} in the file, "
                f"{width} columns of the encoder. Run `larimar calibrate` on it again."
            )
    return projection, None if bank[0] is None else RelationDetector(*bank)


def comparable(
    detector: RelationDetector | None, queries: Sequence[str], prompts: Sequence[str]
) -> Bool[np.ndarray, "Q N"]:
    """Return which queries may mean which written prompts by what they name (`data/lexical`); all of
    them where no detector of relations is there to go by it."""
    every = np.ones((len(queries), len(prompts)), bool)
    return every if detector is None else lexical.comparable(queries, prompts)


def frames(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct frames of n texts (`data/lexical.evidence`), and the place of each text's."""
    each = [lexical.evidence(text).frame for text in texts]
    places = {frame: place for place, frame in enumerate(dict.fromkeys(each))}
    return list(places), [places[frame] for frame in each]


@jax.jit
def relation_embedding(
    texts: Float[Array, "n H"],
    frames: Float[Array, "n H"],
    wordings: Float[Array, "T H"],
    relations: Float[Array, "T R"],
) -> Float[Array, "n RH"]:
    """Return vectors whose inner product is the score of two sentences.

    Args:
      texts, frames: encodings of sentences and of their frames.
      wordings, relations: of a `RelationDetector`.
    """
    texts, frames = (
        x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (texts, frames)
    )
    shares = dot(jax.nn.softmax(SHARPNESS * dot(frames, wordings.T), axis=1), relations)
    parts = (math.sqrt(1 - WHOLE) * jnp.sqrt(shares), math.sqrt(WHOLE) * texts)
    return jnp.concatenate(parts, axis=1)


def _unit(vectors: Float[np.ndarray, "n H"]) -> Float[np.ndarray, "n H"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@dataclasses.dataclass(frozen=True)
class Detection:
    """How well scores separate positives from negatives, in [0, 1].

    threshold: `equal_error_threshold`. error: the equal error rate, the mean of the two shares there.
    f1: there. auroc: the chance that a positive scores above a negative, a tie being half.
    """

    threshold: float
    error: float
    f1: float
    auroc: float


def detection(positive: Float[np.ndarray, "P"], negative: Float[np.ndarray, "N"]) -> Detection:
    """Compute EER, F1 and AUROC from P positive and N negative scores.

    Raises:
      ValueError: there are none of a kind.
    """
    if not len(positive) or not len(negative):
        raise ValueError(
            "a detector is measured with positives and negatives, at least one of each"
        )
    # Here and not on top: its import takes a second, and every command would wait for it.
    from scipy import stats

    threshold = equal_error_threshold(positive, negative)
    right, wrong = (positive >= threshold).sum(), (negative >= threshold).sum()
    error = (1 - right / len(positive) + wrong / len(negative)) / 2
    f1 = 2 * right / (right + wrong + len(positive)) if right else 0.0
    wins = stats.mannwhitneyu(positive, negative).statistic
    auroc = wins / (len(positive) * len(negative))
    return Detection(threshold, float(error), float(f1), float(auroc))


def equal_error_threshold(
    positive: Float[np.ndarray, "P"],
    negative: Float[np.ndarray, "N"],
    weight: Float[np.ndarray, "N"] | None = None,
) -> float:
    """Return the threshold where the shares of missed positives and passed negatives are nearest.

    Args:
      weight: of each negative in that share, adding up to 1; default all alike.
    """
    # Every score is a threshold (≥ passes), and one that nothing passes.
    thresholds = np.append(np.unique(np.concatenate([positive, negative])), np.inf)
    missed = np.searchsorted(np.sort(positive), thresholds) / len(positive)
    order = np.argsort(negative)
    weight = np.full(len(negative), 1 / len(negative)) if weight is None else weight
    below = np.append(0.0, np.cumsum(weight[order]))
    passed = 1 - below[np.searchsorted(negative[order], thresholds)]
    return float(thresholds[np.argmin(np.abs(missed - passed))])
