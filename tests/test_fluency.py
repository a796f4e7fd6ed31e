"""Entropy and likeness of free text, by hand and by what must hold."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from larimar_jax.bench import fluency
from larimar_jax.bench.fluency import words

WORDS = st.sampled_from(["a", "b", "rome", "is", ",", "."])
TEXT = st.lists(WORDS, max_size=12)


def test_words_are_cut_at_marks():
    assert words("Rome, the City's 2nd.") == ["rome", ",", "the", "city", "'", "s", "2nd", "."]


def test_entropy_by_hand():
    # Pairs: ab ×2, ba; threes: aba, bab.
    two = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert fluency.ngram_entropy("abab") == pytest.approx(0.5 * (2 / 3 * two + 4 / 3 * 1.0))
    assert fluency.ngram_entropy(["go", "on"] * 4) < fluency.ngram_entropy("abcdefgh")
    assert fluency.ngram_entropy("abc") == 0.5 * 2 / 3  # Two pairs, one three.
    for short in ([], ["one"], ["one", "two"]):
        with pytest.raises(ValueError, match=f"{len(short)} words have no n-grams of 3"):
            fluency.ngram_entropy(short)


def test_likeness_by_hand():
    """Of two references both have "city" and one has "port"."""
    rare = math.log(3 / 2) + 1
    (found, other) = fluency.reference_scores(
        [["city"], ["hill"]], [["city", "port"], ["city", "city"]]
    )
    assert found == pytest.approx(1 / math.hypot(1, rare)) and other == 0.0


@given(st.lists(TEXT, min_size=1, max_size=5))
def test_likeness_is_one_to_itself_and_within_bounds(texts):
    assert fluency.reference_scores(texts, texts) == pytest.approx([float(bool(t)) for t in texts])
    turned = fluency.reference_scores(texts, texts[::-1])
    assert all(0.0 <= score <= 1.0 + 1e-12 for score in turned)


@given(st.lists(WORDS, min_size=fluency.LEAST, max_size=12))
def test_entropy_is_at_most_that_of_n_grams_that_never_recur(text):
    pairs, threes = (len(text) - n for n in (1, 2))
    most = 0.5 * (2 / 3 * math.log2(pairs) + 4 / 3 * math.log2(threes))
    assert -1e-12 <= fluency.ngram_entropy(text) <= most + 1e-12
