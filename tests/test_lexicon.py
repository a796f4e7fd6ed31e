"""The closed-form lexicon."""

import numpy as np
import pytest

from larimar_jax import lexicon


def test_words_are_frequent_whole_tokens(tiny):
    tokens, words = lexicon.words(
        tiny.decoder_tokenizer, ["new new city", "city new zzzunknown", "a 1 2"], 2
    )
    assert words == ["new", "city"]
    assert [tiny.decoder_tokenizer.decode([token]) for token in tokens] == [" new", " city"]
    with pytest.raises(lexicon.LexiconError, match="has 2 words .* 3 entries"):
        lexicon.words(tiny.decoder_tokenizer, ["new city"], 3)


def test_directions_are_centred_and_of_unit_length(tiny):
    encode = lambda words: tiny.encode(words).latent  # noqa: E731
    found = lexicon.fit(encode, tiny.decoder_tokenizer, ["new city Japan France is of"], 6)
    directions, raw = (
        found["lexicon/directions"],
        encode(["new", "city", "Japan", "France", "is", "of"]),
    )
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-5)
    order = [tiny.decoder_tokenizer.decode([t])[1:] for t in found["lexicon/tokens"]]
    place = [["new", "city", "Japan", "France", "is", "of"].index(word) for word in order]
    centred = (raw - raw.mean(0))[place]
    cosine = (centred * directions).sum(1) / np.linalg.norm(centred, axis=1)
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)
