"""How free text reads: does it repeat itself, and is it about what its reference is about?

A text is here what `words` makes of it: words in lower case, and punctuation marks.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Words and single punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


# Words below which a text has no n-gram of the longest kind.
LEAST = 3


def ngram_entropy(text: Sequence[str]) -> float:
    """½(⅔·H₂ + 4/3·H₃) in bits, H_n the entropy of the text's own n-grams.

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


def reference_scores(
    texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> list[float]:
    """The TF-IDF cosine in [0, 1] of each text to its own reference; 0 where they share no word.

    A word's weight is its count times ln((1 + n)/(1 + d)) + 1, for d of the n references that have it.
    """
    has = Counter(word for reference in references for word in set(reference))
    size = len(references)

    def weighed(text: Sequence[str]) -> dict[str, float]:
        counts = Counter(text)
        return {w: c * (math.log((1 + size) / (1 + has[w])) + 1) for w, c in counts.items()}

    def cosine(one: dict[str, float], other: dict[str, float]) -> float:
        shared = math.fsum(value * other.get(word, 0.0) for word, value in one.items())
        lengths = (math.sqrt(math.fsum(v * v for v in side.values())) for side in (one, other))
        return shared / math.prod(lengths) if shared else 0.0

    return [
        cosine(weighed(text), weighed(reference))
        for text, reference in zip(texts, references, strict=True)
    ]
