"""Scope detection: is a query about something that was written? (§6)

A query is scored by its best cosine over the written prompts. In scope → memory-conditioned decoding;
out of scope → the untouched language model. ESD, the paper's external detector, compares a sentence
encoder's embeddings as they are; ISD, its internal one, is a classifier on the model's own encodings:
here the same cosine after a linear map, which `calibrate` fits and a model's file has as `PROJECTION`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from larimar_jax.data.segments import sentences

PROJECTION = "scope/projection"


@dataclasses.dataclass(frozen=True)
class Match:
    """Per query: its best cosine, the written key that has it (−1: none), and the sentence."""

    score: Float[np.ndarray, " Q"]
    key: Int[np.ndarray, " Q"]
    sentence: Int[np.ndarray, " Q"]

    def within(self, threshold: float) -> Bool[np.ndarray, " Q"]:
        """Return which queries are in scope; none where nothing is written, whatever the threshold."""
        return (self.score >= threshold) & (self.key >= 0)


def split_sentences(queries: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the sentences of all queries, and the query that each belongs to.

    A query may carry sentences that have nothing to do with its question; the detector takes the
    best one (§6). A query of several sentences is also there as a whole, since a fact may have been
    written so.
    """
    texts: list[str] = []
    owners: list[int] = []
    for index, query in enumerate(queries):
        split = sentences(query)
        texts += split if len(split) == 1 else [query, *split]
        owners += [index] * (len(texts) - len(owners))
    return texts, owners


def nearest_key(
    embeddings: Float[np.ndarray, "S H"],
    owners: Sequence[int],
    written: Float[np.ndarray, "N H"],
    allowed: Bool[np.ndarray, "Q N"] | None = None,
) -> Match:
    """Return the best cosine of each query over its sentences and the written keys.

    Args:
      embeddings: of the sentences from `split_sentences`; they need not be of unit length.
      owners: the query of each sentence, ascending.
      written: embeddings of the N written keys; none gives a score of −1 to every query.
      allowed: which keys a query may match; default all. (Benchmarks hold one memory per case.)
    """
    owners = np.asarray(owners, np.int64)
    queries = int(owners[-1]) + 1 if len(owners) else 0
    first = np.searchsorted(owners, np.arange(queries))
    if len(written) == 0:
        return Match(np.full(queries, -1.0, np.float32), np.full(queries, -1), first)
    cosines = _unit(embeddings) @ _unit(written).T
    if allowed is not None:
        cosines = np.where(allowed[owners], cosines, -1.0)
    best = cosines.max(axis=1)
    # Of a query's sentences the best one, and of equals the first.
    sentence = np.lexsort((-best, owners))[first]
    key = np.where(best[sentence] > -1, cosines.argmax(axis=1)[sentence], -1)
    return Match(best[sentence], key, sentence)


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
