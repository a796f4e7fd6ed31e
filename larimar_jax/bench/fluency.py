"""How free text reads: does it repeat itself, and is it about what its reference is about?

A text is here what `words` makes of it: words in lower case, and punctuation marks.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

# Words below which a text has no n-gram of the longest kind.
LEAST = 3


def words(text: str) -> list[str]:
    """Return words and single punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngram_entropy(text: Sequence[str]) -> float:
    """Return ½(⅔·H₂ + 4/3·H₃) in bits, H_n the entropy of the text's own n-grams.

    A text that repeats itself is low. Its number of words bounds it: compare texts of one length.

    Raises:
        ValueError: fewer than `LEAST` words, which have no entropy.
    """
    if len(text) < LEAST:
        raise ValueError(f"{len(text)} words have no n-grams of {LEAST}")
    return 0.5 * (2 / 3 * _entropy(text, 2) + 4 / 3 * _entropy(text, 3))


def _entropy(text: Sequence[str], size: int) -> float:
    counts = Counter(zip(*(text[start:] for start in range(size)), strict=False)).values()
    total = sum(counts)
    return math.fsum(count / total * math.log2(total / count) for count in counts)


class TfIdf:
    """Cosines of texts, a word weighing its count times ln((1 + n)/(1 + d)) + 1, for d of the n
    references that have it."""

    def __init__(self, references: Sequence[Sequence[str]]):
        self._size = len(references)
        self._with = Counter(word for reference in references for word in set(reference))

    def _weigh(self, text: Sequence[str]) -> dict[str, float]:
        return {
            word: count * (math.log((1 + self._size) / (1 + self._with[word])) + 1)
            for word, count in Counter(text).items()
        }

    def cosine(self, text: Sequence[str], reference: Sequence[str]) -> float:
        """Return the likeness in [0, 1] of a text to a reference; 0 where they share no word."""
        left, right = self._weigh(text), self._weigh(reference)
        shared = math.fsum(value * right.get(word, 0.0) for word, value in left.items())
        norms = (math.sqrt(math.fsum(v * v for v in side.values())) for side in (left, right))
        return shared / math.prod(norms) if shared else 0.0
