"""The metrics and the summaries of rows against plain loops that share no code with them."""

import dataclasses
import math
import statistics
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax.bench import metrics, summary
from larimar_jax.bench.counterfact import CounterFact
from larimar_jax.bench.task import Metric, Task

# A few values only, so that ties happen often.
LOSS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, 12.0])
PROMPTS = st.lists(st.tuples(LOSS, LOSS), min_size=0, max_size=3)
CASE = st.fixed_dictionaries({kind: PROMPTS for kind in metrics.KINDS})
TASK = CounterFact(data="")


def rows_of(cases, system="base"):
    """The rows of {kind: [(ℓ(new), ℓ(true))]} of each case."""
    return [
        {"case": number, "system": system, "kind": kind}
        | metrics.rewrite_columns({"kind": kind}, np.asarray(pair))
        for number, case in enumerate(cases)
        for kind, pairs in case.items()
        for pair in pairs
    ]


def entries_of(rows, task=TASK):
    return {(entry["system"], entry["kind"]): entry for entry in summary.summarise(task, rows)}


def plain(cases, kind):
    """S and M of every case, by loops over the formulas as they are written down."""
    means = []
    for case in cases:
        hits, gaps = [], []
        for new, true in case[kind]:
            sign = -1 if kind == "neighbourhood" else 1
            hits.append(1 if sign * true > sign * new else 0)
            gaps.append(sign * (math.exp(-new) - math.exp(-true)))
        if hits:
            means.append((statistics.fmean(hits), statistics.fmean(gaps)))
    return means


def agrees(estimate, values):
    assert estimate["cases"] == len(values)
    assert estimate["mean"] == pytest.approx(100 * statistics.fmean(values), abs=1e-9)
    if len(values) == 1:
        assert estimate["standard_error"] is None
    else:
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert estimate["standard_error"] == pytest.approx(100 * error, abs=1e-9)


@settings(max_examples=60)
@given(st.lists(CASE, max_size=6))
def test_counterfact_equals_plain_loops(cases):
    entries = entries_of(rows_of(cases))
    for kind in metrics.KINDS:
        values = plain(cases, kind)
        assert (("base", kind) in entries) == bool(values)
        if values:
            agrees(entries["base", kind]["S"], [s for s, _ in values])
            agrees(entries["base", kind]["M"], [m for _, m in values])
    complete = [case for case in cases if all(case[kind] for kind in metrics.KINDS)]
    if complete:
        score = entries["base", "score"]["S"]
        rates = [statistics.fmean(s for s, _ in plain(complete, kind)) for kind in metrics.KINDS]
        assert score["cases"] == len(complete)
        assert score["mean"] == pytest.approx(100 * statistics.harmonic_mean(rates), abs=1e-9)


def test_a_kind_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="known: edit, paraphrase, neighbourhood"):
        metrics.success("rewrite", 0.0, 1.0)


def test_the_scores_error_matches_resampling():
    rng = np.random.default_rng(0)
    columns = (rng.random((400, 1)) * 0.5 + rng.random((400, 3)) * 0.5 < [0.45, 0.5, 0.6]) * 1.0
    estimate = metrics.harmonic(columns)
    resampled = [
        statistics.harmonic_mean(columns[rng.integers(0, 400, 400)].mean(axis=0).tolist())
        for _ in range(2000)
    ]
    assert estimate.standard_error == pytest.approx(100 * statistics.stdev(resampled), rel=0.1)


def test_a_perplexity_and_its_error_match_resampling():
    """exp of the mean over tokens; the error by the delta method."""
    rng = np.random.default_rng(0)
    nats, tokens = rng.normal(2.0, 0.5, 400), rng.integers(5, 30, 400).astype(float)
    estimate = metrics.weighted(nats, tokens, exponential=True)
    assert estimate.mean == pytest.approx(math.exp((nats * tokens).sum() / tokens.sum()))
    resampled = []
    for _ in range(2000):
        rows = rng.integers(0, 400, 400)
        resampled.append(math.exp((nats[rows] * tokens[rows]).sum() / tokens[rows].sum()))
    assert estimate.standard_error == pytest.approx(statistics.stdev(resampled), rel=0.1)
    assert metrics.weighted(nats[:1], tokens[:1], exponential=True).standard_error is None


@pytest.mark.parametrize(
    ("ours", "lookup", "verbatim", "note"),
    [
        ([1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0], None),
        ([1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], "does not beat the lookup"),
        ([1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], "does not beat verbatim lookup"),
        ([0] * 4, [0, 1, 1, 0], [1] * 4, "does not beat the lookup or verbatim lookup"),
    ],
)
def test_a_memory_that_does_not_beat_a_lookup_is_marked(ours, lookup, verbatim, note):
    cases = dict(larimar=ours, lookup=lookup, verbatim=verbatim)
    rows = [
        row
        for system, hits in cases.items()
        for row in rows_of([{"edit": [(1.0, 2.0) if hit else (2.0, 1.0)]} for hit in hits], system)
    ]
    entries = entries_of(rows)
    estimate = entries["larimar", "edit"]["S"]
    assert estimate.get("note") == note and "note" not in entries["lookup", "edit"]["S"]
    for name, hits in (("lookup", lookup), ("verbatim", verbatim)):
        agrees(estimate[f"versus_{name}"], [a - b for a, b in zip(ours, hits, strict=True)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed(Task):
    """A task with factors, a metric whose less is better, and a median."""

    metrics: ClassVar = {
        "nats": Metric("perplexity", 1.0, lower=True, weight="tokens", exponential=True),
        "seconds": Metric("seconds", 1.0, median=True),
    }
    factors = ("size",)


def test_a_control_without_a_factor_stands_for_all_its_values_and_weights_count():
    rows = [
        dict(case=n, system=system, kind="x", size=size, nats=nats, tokens=tokens, seconds=n**2)
        for system, size, losses in (
            ("lookup", None, (1.0, 2.0, 4.0)),
            ("open", 8, (2.0, 1.0, 2.0)),
            ("open", 16, (2.0, 2.0, None)),
        )
        for n, (nats, tokens) in enumerate(zip(losses, (1, 2, 3), strict=True))
    ]
    entries = {(e["system"], e["size"]): e for e in summary.summarise(Timed(), rows)}
    first, second = entries["open", 8]["nats"], entries["open", 16]["nats"]
    assert first["mean"] == pytest.approx(math.exp((2 + 2 + 6) / 6)) and first["cases"] == 3
    # Less is better: (−1·1 + 1·2 + 2·3) / 2 over three cases.
    assert first["versus_lookup"]["mean"] == pytest.approx((-1 + 2 + 6) / 2 / 3)
    assert "note" not in first and second["cases"] == 2
    assert second["note"] == "does not beat the lookup"
    assert entries["open", 8]["seconds"] == {"mean": 1.0, "standard_error": None, "cases": 3}
    assert summary.group_label(Timed(), ("open", "x", 8)) == "Larimar without scope, x, size = 8"
    assert [e["size"] for e in summary.select(list(entries.values()), {"size": "last"})] == [16]


def plain_f1(generated, gold, repeats):
    remaining, shared = list(gold), 0
    for token in generated if repeats else sorted(set(generated)):
        if token in remaining:
            remaining.remove(token)
            shared += 1
    if not generated or not gold:
        return 1.0 if not generated and not gold else 0.0
    return 2 * shared / (len(generated) + len(gold))


WORDS = st.lists(st.sampled_from("abc"), max_size=5)


@settings(max_examples=100)
@given(WORDS, WORDS)
def test_token_f1_both_ways(generated, gold):
    assert metrics.token_f1(generated, gold) == pytest.approx(plain_f1(generated, gold, True))
    grace = metrics.token_f1_grace(generated, gold)
    assert grace == pytest.approx(plain_f1(generated, gold, False))


def test_an_answer_is_the_first_line_with_words_without_its_end_marks():
    assert metrics.answer_words("Paris, France.\n") == ["Paris,", "France"]
    assert metrics.answer_words(".\n") == [] and metrics.answer_words("a b. c", 2) == ["a", "b"]
    assert metrics.first_line("\n \n Orion.\nNot this") == " Orion."
    assert metrics.first_line("\n") == ""
