"""Detection against plain counting, and the scope benchmark on a tiny model."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bench import cases

from larimar_jax import scope as detector
from larimar_jax.bench import report, runner, scope

scores = st.lists(st.integers(0, 12).map(lambda n: n / 4), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(scores, scores)
def test_detection_is_what_counting_gives(positive, negative):
    positive, negative = np.array(positive), np.array(negative)
    found = scope.detection(positive, negative)
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert found.auroc == pytest.approx(np.mean(wins))
    missed = np.mean(positive < found.threshold)
    passed = np.mean(negative >= found.threshold)
    assert found.error == pytest.approx((missed + passed) / 2)
    for other in [*positive, *negative, np.inf]:
        gap = abs(np.mean(positive < other) - np.mean(negative >= other))
        assert abs(missed - passed) <= gap + 1e-12
    right, wrong = (positive >= found.threshold).sum(), (negative >= found.threshold).sum()
    f1 = 2 * right / (2 * right + wrong + (len(positive) - right)) if right else 0.0
    assert found.f1 == pytest.approx(f1)


def test_detection_at_the_ends():
    perfect = scope.detection(np.array([0.9, 0.8]), np.array([0.1, 0.2, 0.3]))
    assert (perfect.error, perfect.f1, perfect.auroc) == (0.0, 1.0, 1.0)
    assert scope.detection(np.array([0.1]), np.array([0.9])).auroc == 0.0
    with pytest.raises(ValueError, match="at least one of each"):
        scope.detection(np.array([]), np.array([1.0]))


def test_scores_are_those_of_one_query_at_a_time(tiny, tmp_path):
    records = [
        dataclasses.replace(case, paraphrases=(f"Says. Something of {n}:", case.prompt)[: n % 3])
        for n, case in enumerate(cases(5))
    ]
    made = scope.Scope(tiny, records, data={})
    summary = runner.run(made, tmp_path / "run", quiet=True)
    assert report.sections([report.read(tmp_path / "run")])[0].items
    prompts = [record.prompt for record in records]
    written = tiny.encode(prompts).embedding
    everything = {name: {kind: [] for kind in scope.KINDS} for name in scope.STORES}
    for number, line in enumerate(runner.read_cases(tmp_path / "run")):
        asked = dict(zip(scope.KINDS, (records[number].paraphrases, records[number].neighbourhood),
                         strict=True))
        for kind, queries in asked.items():
            assert line[kind]["queries"] == list(queries)
            for row, query in enumerate(queries):
                sentences, owners = detector.parts([query])
                embedded = tiny.encode(sentences).embedding
                alone = detector.match(embedded, owners, written[[number]])
                among = detector.match(embedded, owners, written)
                for name, match in (("pairwise", alone), ("store", among)):
                    assert line[kind][name][row] == pytest.approx(match.score[0], abs=1e-5)
                    everything[name][kind].append(line[kind][name][row])
    for name, found in everything.items():
        want = scope.detection(*(np.array(found[kind]) for kind in scope.KINDS))
        assert summary["results"][name]["auroc"] == pytest.approx(want.auroc)
        assert summary["results"][name]["error"] == pytest.approx(want.error)
    assert summary["results"]["found_own"]["cases"] == 3
