"""Fits a model's lexicon in closed form: what its encoder makes of the decoder's words (§10).

The encoder is asked for the encoding of every word by itself. Of an edit, e(prompt + answer) −
e(prompt) points along the encoding of the answer's word; nothing is trained, and no pair of prompt
and answer is ever seen.
"""

import collections
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

from larimar_jax.weights.tokenizers import Tokenizer

# A word begins after a space and is written in letters: digits and punctuation say too little by
# themselves for their encoding to be a direction.
_WORD = re.compile(r" [^\W\d_]{2,}")


class LexiconError(ValueError):
    """A corpus that does not have as many words as the lexicon has entries."""


def words(
    tokenizer: Tokenizer, texts: Iterable[str], entries: int
) -> tuple[Int[np.ndarray, " R"], list[str]]:
    """The R most frequent words of a corpus that are one token of the decoder: (token ids, words).

    Frequency decides because rare tokens are mostly pieces of words, whose encodings are noise.

    Raises:
      LexiconError: the corpus has fewer.
    """
    pieces = {token: tokenizer.decode([token]) for token in range(tokenizer.vocab_size)}
    single = {piece[1:]: token for token, piece in pieces.items() if _WORD.fullmatch(piece)}
    counts = collections.Counter()
    for text in texts:
        counts.update(word for word in re.findall(r"[^\W\d_]{2,}", text) if word in single)
    if len(counts) < entries:
        raise LexiconError(
            f"The corpus has {len(counts):,} words that are one token of the decoder, and the lexicon "
            f"has {entries:,} entries. Take a larger corpus or set model.lexicon.entries to fewer."
        )
    # Ties by token id, so that the same corpus gives the same lexicon.
    chosen = sorted(counts, key=lambda word: (-counts[word], single[word]))[:entries]
    return np.asarray([single[word] for word in chosen], np.int32), chosen


def fit(
    encode: Callable[[Sequence[str]], Float[np.ndarray, "n C"]],
    tokenizer: Tokenizer,
    texts: Iterable[str],
    entries: int,
) -> dict[str, np.ndarray]:
    """The parameters of `model.Lexicon` by path: lexicon/tokens [R], lexicon/directions [R, C].

    Args:
      encode: texts → latents of the model that the lexicon is for.
      tokenizer: the decoder's.
      texts: the corpus whose words are taken.
      entries: R.
    """
    tokens, chosen = words(tokenizer, texts, entries)
    latents = encode(chosen)
    # What all words share says nothing about which word it is.
    centred = latents - latents.mean(axis=0)
    norms = np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
    return {"lexicon/tokens": tokens, "lexicon/directions": (centred / norms).astype(np.float32)}
