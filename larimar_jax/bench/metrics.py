"""The metrics, as pure functions of what a row holds.

ℓ(p, t) = −(1/n) Σ_j log P(t_j | p, t_<j), in nats, over the n tokens of a target t that follows the
prompt p with one separating space.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

# Of CounterFact's prompts, in the order of tables and of the harmonic mean.
KINDS = ("edit", "paraphrase", "neighbourhood")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over cases and its standard error, in percent unless another scale is named.

    `standard_error` is the sample standard deviation over √cases, None where fewer than two cases
    leave it undefined. `mean` is None where no case has a value.
    """

    mean: float | None
    standard_error: float | None
    cases: int


class UnusableScore(ValueError):
    """A score is not a finite number; counting it as a failure would hide a broken model."""


def success(kind: str, new: float, true: float) -> float:
    """Return S of a prompt: 1 where the wanted target is the likelier one.

    Wanted is the new target for `edit` and `paraphrase`, the true one for `neighbourhood`. A tie
    fails in each. `new` and `true` are ℓ of the two targets.
    """
    wanted, unwanted = _wanted_first(kind, new, true)
    return float(wanted < unwanted)


def magnitude(kind: str, new: float, true: float) -> float:
    """Return M of a prompt in [−1, 1]: e^−ℓ(wanted) − e^−ℓ(unwanted)."""
    wanted, unwanted = _wanted_first(kind, new, true)
    return math.exp(-wanted) - math.exp(-unwanted)


def rewrite_columns(column: Mapping[str, Any], losses: Float[np.ndarray, "2"]) -> dict[str, float]:
    """Return S, M and both ℓ of a row whose kind is one of `KINDS`."""
    new, true = (float(loss) for loss in losses)
    kind = column["kind"]
    success_and_magnitude = {"S": success(kind, new, true), "M": magnitude(kind, new, true)}
    return success_and_magnitude | {"loss_new": new, "loss_true": true}


def _wanted_first(kind: str, new: float, true: float) -> tuple[float, float]:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of prompt {kind!r}; known: {', '.join(KINDS)}")
    return (true, new) if kind == "neighbourhood" else (new, true)


def estimate(values: Sequence[float] | Float[np.ndarray, " N"], scale: float = 100.0) -> Estimate:
    """Return mean and standard error of per-case values, both times the scale."""
    array = np.asarray(values, np.float64)
    return weighted(array, np.ones_like(array), scale)


def weighted(
    values: Float[np.ndarray, " N"],
    weights: Float[np.ndarray, " N"],
    scale: float = 1.0,
    exponential: bool = False,
) -> Estimate:
    """Return the weighted mean of per-case values, or exp of it, with its standard error by the
    delta method.

    Of losses in nats and numbers of tokens exp is a perplexity; of differences of losses, a ratio
    of perplexities.
    """
    if len(values) == 0:
        return Estimate(None, None, 0)
    mean = float((values * weights).sum() / weights.sum())
    shown = math.exp(mean) if exponential else mean
    error = None
    if len(values) > 1:
        residual = (values - mean) * weights
        spread = float(residual.std(ddof=1) / math.sqrt(len(values)) / weights.mean())
        error = scale * spread * (shown if exponential else 1.0)
    return Estimate(scale * shown, error, len(values))


def harmonic(columns: Float[np.ndarray, "N R"]) -> Estimate:
    """Return the harmonic mean of the R rates whose per-case values are the columns, in percent.

    The standard error is the delta method's, gradient ∂H/∂S_r = H²/(R·S_r²), with the covariance of
    the columns over the same N cases. A rate of zero makes the score zero and its error undefined.
    """
    cases, rates = columns.shape
    if cases == 0:
        return Estimate(None, None, 0)
    means = columns.mean(axis=0)
    if np.any(means <= 0.0):
        return Estimate(0.0, None, cases)
    score = rates / float(np.sum(1.0 / means))
    error = None
    if cases > 1:
        linear = (columns - means) @ (score**2 / (rates * means**2))
        error = float(100.0 * linear.std(ddof=1) / math.sqrt(cases))
    return Estimate(100.0 * score, error, cases)


# Answers in words, for streams of edits


def first_line(text: str) -> str:
    """Return the first line of an answer that is not empty."""
    return next((line for line in text.splitlines() if line.strip()), "")


def answer_words(text: str, limit: int | None = None) -> list[str]:
    """Return the first words of an answer, without the marks that end it there: a decoder goes on
    with "Rome. It is" as well as with "Rome"."""
    return " ".join(text.split()[:limit]).rstrip(".,;:!?").split()


def token_f1(generated: Sequence, gold: Sequence) -> float:
    """Return SQuAD's F1 in [0, 1]: overlap of the two multisets of tokens.

    Two empty answers agree (1); one empty answer scores 0.
    """
    if not generated or not gold:
        return float(len(generated) == len(gold))
    return _f1(sum((Counter(generated) & Counter(gold)).values()), len(generated), len(gold))


def token_f1_grace(generated: Sequence, gold: Sequence) -> float:
    """Return GRACE's F1 in [0, 1]: overlap of the two *sets*, divided by the lengths with repeats.

    A perfect answer that repeats a token scores below 1; kept for comparison with its tables.
    """
    if not generated or not gold:
        return float(len(generated) == len(gold))
    return _f1(len(set(generated) & set(gold)), len(generated), len(gold))


def _f1(shared: int, generated: int, gold: int) -> float:
    if shared == 0:
        return 0.0
    precision, recall = shared / generated, shared / gold
    return 2.0 * precision * recall / (precision + recall)
