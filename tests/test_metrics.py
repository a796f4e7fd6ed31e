"""The metrics against plain loops that share no code with them."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax.bench import metrics

# A few values only, so that ties happen often.
LOSS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, 12.0])
PROMPTS = st.lists(st.tuples(LOSS, LOSS), min_size=0, max_size=3)
CASE = st.fixed_dictionaries({kind: PROMPTS for kind in metrics.KINDS})


def plain(cases, kind):
    """S and M of every case, by loops over the formulas as they are written down."""
    found = []
    for case in cases:
        hits, gaps = [], []
        for new, true in case[kind]:
            if kind == "neighbourhood":
                hits.append(1 if true < new else 0)
                gaps.append(math.exp(-true) - math.exp(-new))
            else:
                hits.append(1 if true > new else 0)
                gaps.append(math.exp(-new) - math.exp(-true))
        if hits:
            found.append((statistics.fmean(hits), statistics.fmean(gaps)))
    return found


def agrees(estimate, values):
    assert estimate.cases == len(values)
    if not values:
        assert estimate.mean is None and estimate.standard_error is None
        return
    assert estimate.mean == pytest.approx(100 * statistics.fmean(values), abs=1e-9)
    if len(values) == 1:
        assert estimate.standard_error is None
    else:
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert estimate.standard_error == pytest.approx(100 * error, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(CASE, max_size=6))
def test_counterfact_equals_plain_loops(cases):
    table = metrics.counterfact(cases)
    for kind in metrics.KINDS:
        values = plain(cases, kind)
        agrees(table[kind]["S"], [s for s, _ in values])
        agrees(table[kind]["M"], [m for _, m in values])
    complete = [case for case in cases if all(case[kind] for kind in metrics.KINDS)]
    assert table["score"].cases == len(complete)
    if complete:
        rates = [statistics.fmean(s for s, _ in plain(complete, kind)) for kind in metrics.KINDS]
        expected = 100 * statistics.harmonic_mean(rates)
        assert table["score"].mean == pytest.approx(expected, abs=1e-9)


def test_ties_fail_everywhere():
    table = metrics.counterfact([{kind: [[1.0, 1.0]] for kind in metrics.KINDS}])
    assert [table[kind]["S"].mean for kind in metrics.KINDS] == [0.0, 0.0, 0.0]
    assert [table[kind]["M"].mean for kind in metrics.KINDS] == [0.0, 0.0, 0.0]
    assert table["score"].mean == 0.0 and table["score"].standard_error is None


def test_prompts_are_averaged_inside_a_case_first():
    """Nine good prompts in one case weigh as much as the one bad prompt of another."""
    good, bad = [[0.0, 5.0]], [[5.0, 0.0]]
    cases = [
        {"edit": good, "paraphrase": good * 9, "neighbourhood": bad},
        {"edit": good, "paraphrase": bad, "neighbourhood": bad},
    ]
    table = metrics.counterfact(cases)
    assert table["paraphrase"]["S"].mean == 50.0
    assert table["neighbourhood"]["S"].mean == 100.0
    assert table["paraphrase"]["S"].standard_error == pytest.approx(50.0)


def test_the_magnitudes_sign_is_flipped_for_the_neighbourhood():
    case = {kind: [[math.log(2.0), math.log(4.0)]] for kind in metrics.KINDS}
    table = metrics.counterfact([case])
    assert table["edit"]["M"].mean == pytest.approx(25.0)
    assert table["paraphrase"]["M"].mean == pytest.approx(25.0)
    assert table["neighbourhood"]["M"].mean == pytest.approx(-25.0)


def test_the_scores_error_matches_resampling():
    rng = np.random.default_rng(0)
    columns = (rng.random((400, 1)) * 0.5 + rng.random((400, 3)) * 0.5 < [0.45, 0.5, 0.6]) * 1.0
    estimate = metrics.harmonic(columns)
    resampled = [
        statistics.harmonic_mean(columns[rng.integers(0, 400, 400)].mean(axis=0).tolist())
        for _ in range(2000)
    ]
    assert estimate.standard_error == pytest.approx(100 * statistics.stdev(resampled), rel=0.1)


@pytest.mark.parametrize("broken", [[[math.nan, 1.0]], [[math.inf, 1.0]], [[1.0]], [1.0, 2.0]])
def test_an_unusable_score_is_an_error_and_not_a_failure(broken):
    case = {"edit": [[1.0, 2.0]], "paraphrase": broken, "neighbourhood": [[1.0, 2.0]]}
    with pytest.raises(metrics.UnusableScore, match="case number 0, paraphrase"):
        metrics.counterfact([case])


def test_unknown_kinds_and_unpaired_differences_are_errors():
    with pytest.raises(ValueError, match="known: edit, paraphrase, neighbourhood"):
        metrics.success("rewrite", np.zeros(1), np.ones(1))
    with pytest.raises(ValueError, match="2 and 1"):
        metrics.paired_difference([1.0, 0.0], [1.0])
    difference = metrics.paired_difference([1.0, 0.0, 1.0], [0.0, 0.0, 1.0])
    assert difference.mean == pytest.approx(100 / 3)


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


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS)
def test_token_f1_both_ways(generated, gold):
    assert metrics.token_f1(generated, gold) == pytest.approx(plain_f1(generated, gold, True))
    assert metrics.token_f1_grace(generated, gold) == pytest.approx(
        plain_f1(generated, gold, False)
    )


def test_the_two_f1_differ_on_repeats_only():
    assert metrics.token_f1(["a", "a"], ["a", "a"]) == 1.0
    assert metrics.token_f1_grace(["a", "a"], ["a", "a"]) == 0.5
    assert metrics.answer_tokens("Paris, France.\n") == ["Paris,", "France"]
    assert metrics.answer_tokens(".\n") == []
