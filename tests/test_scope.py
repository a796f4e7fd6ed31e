"""The scope detector: best cosine over sentences and written keys; detection against plain counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import scope


def test_every_query_has_its_sentences():
    texts, owners = scope.split_sentences(["One thing. Another thing is", "Alone", ""])
    assert texts == ["One thing. Another thing is", "One thing.", "Another thing is", "Alone", ""]
    assert owners == [0, 0, 0, 1, 2]


def test_the_best_sentence_and_key_decide():
    written = np.asarray([[1, 0, 0], [0, 2, 0]], np.float32)
    sentences = np.asarray([[0, 0, 1], [3, 1, 0], [3, 1, 0], [0, 1, 1]], np.float32)
    match = scope.nearest_key(sentences, [0, 0, 0, 1], written)
    np.testing.assert_allclose(match.score, [3 / 10**0.5, 0.5**0.5], rtol=1e-6)
    assert match.key.tolist() == [0, 1] and match.sentence.tolist() == [1, 3]
    assert match.within(0.9).tolist() == [True, False]


def test_nothing_written_nothing_in_scope():
    embeddings = np.ones((2, 3), np.float32)
    match = scope.nearest_key(embeddings, [0, 1], np.zeros((0, 3), np.float32))
    assert match.score.tolist() == [-1, -1] and not match.within(-2.0).any()
    nothing = scope.nearest_key(embeddings, [0, 1], embeddings, np.zeros((2, 2), bool))
    assert nothing.key.tolist() == [-1, -1] and nothing.sentence.tolist() == [0, 1]


def test_a_key_that_is_not_allowed_does_not_match():
    same = np.eye(2, dtype=np.float32)
    match = scope.nearest_key(same, [0, 1], same, ~np.eye(2, dtype=bool))
    assert match.score.tolist() == [0, 0] and match.key.tolist() == [1, 0]


scores = st.lists(st.integers(0, 12).map(lambda n: n / 4), min_size=1, max_size=30)


@settings(max_examples=60)
@given(scores, scores)
def test_detection_is_what_counting_gives(positive, negative):
    positive, negative = np.array(positive), np.array(negative)
    detection = scope.detection(positive, negative)
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert detection.auroc == pytest.approx(np.mean(wins))
    missed = np.mean(positive < detection.threshold)
    passed = np.mean(negative >= detection.threshold)
    assert detection.error == pytest.approx((missed + passed) / 2)
    for threshold in [*positive, *negative, np.inf]:
        gap = abs(np.mean(positive < threshold) - np.mean(negative >= threshold))
        assert abs(missed - passed) <= gap + 1e-12
    right, wrong = (positive >= detection.threshold).sum(), (negative >= detection.threshold).sum()
    f1 = 2 * right / (2 * right + wrong + (len(positive) - right)) if right else 0.0
    assert detection.f1 == pytest.approx(f1)


def test_detection_at_the_ends():
    perfect = scope.detection(np.array([0.9, 0.8]), np.array([0.1, 0.2, 0.3]))
    assert (perfect.error, perfect.f1, perfect.auroc) == (0.0, 1.0, 1.0)
    assert scope.detection(np.array([0.1]), np.array([0.9])).auroc == 0.0
    with pytest.raises(ValueError, match="at least one of each"):
        scope.detection(np.array([]), np.array([1.0]))


@settings(max_examples=60)
@given(scores, st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=30))
def test_a_weighted_crossing_is_that_of_negatives_as_often_as_they_weigh(positive, weighted):
    positive = np.array(positive)
    negative, counts = np.array([score / 4 for score, _ in weighted]), [n for _, n in weighted]
    often, whole = np.repeat(negative, counts), sum(counts)
    threshold = scope.equal_error_threshold(positive, negative, np.array(counts) / whole)

    def gap(threshold):
        return abs(np.mean(positive < threshold) - np.mean(often >= threshold))

    assert gap(threshold) <= gap(scope.equal_error_threshold(positive, often)) + 1e-9
