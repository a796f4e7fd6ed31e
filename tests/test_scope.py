"""The scope detector: best cosine over sentences and written keys."""

import numpy as np

from larimar_jax import scope


def test_every_query_has_its_sentences():
    texts, owners = scope.parts(["One thing. Another thing is", "Alone", ""])
    assert texts == ["One thing. Another thing is", "One thing.", "Another thing is", "Alone", ""]
    assert owners == [0, 0, 0, 1, 2]


def test_the_best_sentence_and_key_decide():
    written = np.asarray([[1, 0, 0], [0, 2, 0]], np.float32)
    sentences = np.asarray([[0, 0, 1], [3, 1, 0], [0, 1, 1]], np.float32)
    found = scope.match(sentences, [0, 0, 1], written)
    np.testing.assert_allclose(found.score, [3 / 10**0.5, 0.5**0.5], rtol=1e-6)
    assert found.key.tolist() == [0, 1] and found.sentence.tolist() == [1, 2]
    assert found.within(0.9).tolist() == [True, False]


def test_nothing_written_nothing_in_scope():
    found = scope.match(np.ones((2, 3), np.float32), [0, 1], np.zeros((0, 3), np.float32))
    assert found.score.tolist() == [-1, -1] and not found.within(-2.0).any()


def test_a_key_that_is_not_allowed_does_not_match():
    same = np.eye(2, dtype=np.float32)
    found = scope.match(same, [0, 1], same, ~np.eye(2, dtype=bool))
    assert found.score.tolist() == [0, 0] and found.key.tolist() == [1, 0]
