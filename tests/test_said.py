"""Entropy and likeness of free text, by hand and by what must hold."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from larimar_jax.bench import said

TEXT = st.lists(st.sampled_from(["a", "b", "Rome", "is", ",", "."]), max_size=12).map(" ".join)


def test_words_are_cut_at_marks():
    assert said.words("Rome, the City's 2nd.") == ["rome", ",", "the", "city", "'", "s", "2nd", "."]


def test_entropy_by_hand():
    # Pairs: ab ×2, ba; threes: aba, bab.
    two = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert said.ngram_entropy("a b a b") == pytest.approx(0.5 * (2 / 3 * two + 4 / 3 * 1.0))
    assert said.ngram_entropy("go on go on go on go on") < said.ngram_entropy("a b c d e f g h")
    assert said.ngram_entropy("") == said.ngram_entropy("one") == 0.0


def test_likeness_by_hand():
    """Of two references both have "city" and one has "port"."""
    rare = math.log(3 / 2) + 1
    (found, other) = said.reference_scores(["City", "hill"], ["city port", "city city"])
    assert found == pytest.approx(1 / math.hypot(1, rare)) and other == 0.0


@given(st.lists(TEXT, min_size=1, max_size=5))
def test_likeness_is_one_to_itself_and_within_bounds(texts):
    assert said.reference_scores(texts, texts) == pytest.approx([float(bool(t)) for t in texts])
    turned = said.reference_scores(texts, texts[::-1])
    assert all(0.0 <= score <= 1.0 + 1e-12 for score in turned)


@given(TEXT)
def test_entropy_is_at_most_that_of_n_grams_that_never_recur(text):
    pairs, threes = (max(1, len(said.words(text)) - n) for n in (1, 2))
    most = 0.5 * (2 / 3 * math.log2(pairs) + 4 / 3 * math.log2(threes))
    assert -1e-12 <= said.ngram_entropy(text) <= most + 1e-12
