"""How free text reads: does it repeat itself, and is it about what its reference is about?

Both see words in lower case and punctuation marks, as `words` cuts them.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Words and single punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngram_entropy(text: str) -> float:
    """½(⅔·H₂ + 4/3·H₃) in bits, H_n the entropy of the text's own n-grams; 0 of one without any.

    A text that repeats itself is low. Its number of words bounds it: compare texts of one length.
    """
    found = words(text)
    return 0.5 * (2 / 3 * _entropy(found, 2) + 4 / 3 * _entropy(found, 3))


def _entropy(found: Sequence[str], size: int) -> float:
    counts = Counter(zip(*(found[start:] for start in range(size)), strict=False)).values()
    total = sum(counts)
    return math.fsum(count / total * math.log2(total / count) for count in counts)


def reference_scores(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """The TF-IDF cosine in [0, 1] of each text to its own reference; 0 where they share no word.

    A word's weight is its count times ln((1 + n)/(1 + d)) + 1, for d of the n references that have it.
    """
    has = Counter(word for reference in references for word in set(words(reference)))
    size = len(references)

    def weighed(text: str) -> dict[str, float]:
        counts = Counter(words(text))
        return {w: c * (math.log((1 + size) / (1 + has[w])) + 1) for w, c in counts.items()}

    def cosine(one: dict[str, float], other: dict[str, float]) -> float:
        shared = math.fsum(value * other.get(word, 0.0) for word, value in one.items())
        lengths = (math.sqrt(math.fsum(v * v for v in side.values())) for side in (one, other))
        return shared / math.prod(lengths) if shared else 0.0

    return [
        cosine(weighed(text), weighed(reference))
        for text, reference in zip(texts, references, strict=True)
    ]
