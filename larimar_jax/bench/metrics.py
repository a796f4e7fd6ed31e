"""The metrics, as pure functions of per-case records.

ℓ(p, t) = −(1/n) Σ_j log P(t_j | p, t_<j), in nats, over the n tokens of a target t that follows the
prompt p with one separating space. Every function takes what a line of `cases.jsonl` holds, so a
score can always be recomputed, and split up, after the run.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

# In this order everywhere: tables, records, harmonic mean.
KINDS = ("edit", "paraphrase", "neighbourhood")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over cases and its standard error, in percent.

    `standard_error` is the sample standard deviation over √cases, None where fewer than two cases
    leave it undefined. `mean` is None where no case has a value.
    """

    mean: float | None
    standard_error: float | None
    cases: int


class UnusableScore(ValueError):
    """A record holds a score that is not a finite number, or does not pair its two targets."""


def success(kind: str, new: Float[np.ndarray, " P"], true: Float[np.ndarray, " P"]) -> float:
    """S of one case in [0, 1]: the share of its P prompts on which the wanted target is likelier.

    Wanted is the new target for `edit` and `paraphrase`, the true one for `neighbourhood`. A tie
    fails in each. `new` and `true` are ℓ of the two targets.
    """
    wanted, other = _wanted_first(kind, new, true)
    return float(np.mean(wanted < other))


def magnitude(kind: str, new: Float[np.ndarray, " P"], true: Float[np.ndarray, " P"]) -> float:
    """M of one case in [−1, 1]: mean of e^−ℓ(wanted) − e^−ℓ(other) over its P prompts."""
    wanted, other = _wanted_first(kind, new, true)
    return float(np.mean(np.exp(-wanted) - np.exp(-other)))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of per-case values, both times 100."""
    array = np.asarray(values, np.float64)
    if array.size == 0:
        return Estimate(None, None, 0)
    error = None
    if array.size > 1:
        error = float(100.0 * array.std(ddof=1) / math.sqrt(array.size))
    return Estimate(float(100.0 * array.mean()), error, int(array.size))


def harmonic(columns: Float[np.ndarray, "N R"]) -> Estimate:
    """The score: harmonic mean of the R rates whose per-case values are the columns, in percent.

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


def counterfact(cases: Sequence[Mapping[str, Sequence[Sequence[float]]]]) -> dict:
    """CounterFact's table for one system.

    Args:
        cases: one mapping a case, kind → list of [ℓ(new), ℓ(true)], one pair a prompt. Prompts are
            averaged inside a case, cases afterwards. A case without a prompt of some kind is left
            out of that kind's rows, and out of the score.
    Returns:
        {kind: {"S": Estimate, "M": Estimate}, "score": Estimate}.
    Raises:
        UnusableScore: a score is not finite; counting it as a failure would hide a broken model.
    """
    table: dict = {}
    for kind in KINDS:
        pairs = [_pairs(index, kind, case) for index, case in enumerate(cases)]
        pairs = [pair for pair in pairs if len(pair)]
        table[kind] = {
            "S": estimate([success(kind, p[:, 0], p[:, 1]) for p in pairs]),
            "M": estimate([magnitude(kind, p[:, 0], p[:, 1]) for p in pairs]),
        }
    complete = [case for case in cases if all(len(case.get(kind, ())) for kind in KINDS)]
    columns = [
        [success(kind, *np.asarray(case[kind], np.float64).T) for kind in KINDS]
        for case in complete
    ]
    table["score"] = harmonic(np.asarray(columns, np.float64).reshape(len(complete), len(KINDS)))
    return table


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of first − second over the same cases, in percent, with its standard error."""
    if len(first) != len(second):
        raise ValueError(
            f"a paired difference needs the same cases on both sides, not {len(first)} and "
            f"{len(second)}; compare systems from one run folder."
        )
    return estimate([a - b for a, b in zip(first, second, strict=True)])


def _wanted_first(kind: str, new, true):
    if kind not in KINDS:
        raise ValueError(f"unknown kind of prompt {kind!r}; known: {', '.join(KINDS)}")
    return (true, new) if kind == "neighbourhood" else (new, true)


def _pairs(index: int, kind: str, case: Mapping) -> Float[np.ndarray, "P 2"]:
    pairs = np.asarray(case.get(kind, ()), np.float64)
    if pairs.size == 0:
        return np.zeros((0, 2))
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.isfinite(pairs).all():
        raise UnusableScore(
            f"case number {index}, {kind}: every prompt needs two finite scores, ℓ(new) and "
            f"ℓ(true), but the record holds {case[kind]}. A NaN here means the model's logits "
            "overflowed: run it in float32, or check the checkpoint it was loaded from."
        )
    return pairs


# Token F1, for streams of edits


def answer_tokens(text: str, most: int | None = None) -> list[str]:
    """The words of an answer, `most` of them at the most, without the marks that end it there: a decoder
    goes on with "Rome. It is" as well as with "Rome"."""
    words = text.split()[:most]
    return " ".join(words).rstrip(".,;:!?").split()


def token_f1(generated: Sequence, gold: Sequence) -> float:
    """SQuAD's F1 in [0, 1]: overlap of the two multisets of tokens.

    Two empty answers agree (1); one empty answer scores 0.
    """
    if not generated or not gold:
        return float(len(generated) == len(gold))
    shared = sum((Counter(generated) & Counter(gold)).values())
    return _f1(shared, len(generated), len(gold))


def token_f1_grace(generated: Sequence, gold: Sequence) -> float:
    """GRACE's F1 in [0, 1]: overlap of the two *sets*, divided by the lengths with repeats.

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
