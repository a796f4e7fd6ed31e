"""The scope detector: what a query asks, best cosine over written keys, detection by plain counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import scope


@pytest.mark.parametrize(
    "query, question",
    [
        ("The old mill is a sight. Its owner was late. The lake lies near", "The lake lies near"),
        ("I like Lutha. The mayor of Korsk is", "The mayor of Korsk is"),
        ("I like Lutha; the mayor of Korsk is", "the mayor of Korsk is"),
        ("We saw the mill; it belongs to", "We saw the mill; it belongs to"),
        ("Who owns the mill? It belongs to", "Who owns the mill? It belongs to"),
        ("I saw the mill. The town it stands in is", "I saw the mill. The town it stands in is"),
        ("Which horn does Ada Lind play? The", "Which horn does Ada Lind play? The"),
        ("I saw the mill. My cat slept. She ate her", "My cat slept. She ate her"),
        ("I saw the mill. The king said that he owns", "The king said that he owns"),
        ("Q: Who owns the mill? A: Ada. Q: Who swims? A:", "Who swims?"),
        ("Human: Who owns the mill?\n\nAssistant:", "Who owns the mill?"),
        ("### Question:\nWho owns\nthe mill?\n\n### Answer:\n", "Who owns\nthe mill?"),
        (
            "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nThe mill belongs to [/INST]",
            "The mill belongs to",
        ),
        (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWho owns it?<|im_end|>\n"
            "<|im_start|>assistant\n",
            "Be kind. Who owns it?",
        ),
        ("Korsk: north\nLutha: south\nBrenn:", "Brenn:"),
        ("</s>", "</s>"),
        ("", ""),
    ],
)
def test_what_is_asked_is_the_last_sentence_with_what_it_refers_to(query, question):
    assert scope.question(query) == question


def test_a_query_that_ends_with_a_written_prompt_asks_for_that_one():
    written = [
        "Q: Who swims? A:",
        "It rains. The lake is",
        "Korsk is",
        "Ada sings; Per plays",
        "korsk Is",
    ]
    written = scope.by_words(written)
    assert scope.question("We met. Q: Who swims? A:", written) == "Q: Who swims? A:"
    assert scope.question("We met. It rains.  The lake\nis ", written) == "It rains. The lake is"
    assert scope.question("Ada sings; per plays", written) == "Ada sings; Per plays"
    assert [scope.question(q, written) for q in ("Korsk is", "KORSK IS")] == [
        "Korsk is",
        "korsk Is",
    ]
    assert scope.question("The mayor of Korsk is", written) == "The mayor of Korsk is"


def test_the_best_key_decides():
    written = np.asarray([[1, 0, 0], [0, 2, 0]], np.float32)
    match = scope.nearest_key(np.asarray([[3, 1, 0], [0, 1, 1]], np.float32), written)
    np.testing.assert_allclose(match.score, [3 / 10**0.5, 0.5**0.5], rtol=1e-6)
    assert match.key.tolist() == [0, 1] and match.within(0.9).tolist() == [True, False]


def test_nothing_written_nothing_in_scope():
    embeddings = np.ones((2, 3), np.float32)
    match = scope.nearest_key(embeddings, np.zeros((0, 3), np.float32))
    assert match.score.tolist() == [-1, -1] and not match.within(-2.0).any()
    nothing = scope.nearest_key(embeddings, embeddings, np.zeros((2, 2), bool))
    assert nothing.key.tolist() == [-1, -1]


def test_a_key_that_is_not_allowed_does_not_match():
    same = np.eye(2, dtype=np.float32)
    match = scope.nearest_key(same, same, ~np.eye(2, dtype=bool))
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
