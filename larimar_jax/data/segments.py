"""Documents → pieces: sentences, or chunks of whole words that fill a tower's length."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator

from larimar_jax.data.corpus import Document

# A full stop ends a sentence when a capital, a digit or an opening quote follows, and not after an
# initial ("J. Smith"), a dotted abbreviation ("U.S."), or one of these.
_ABBREVIATIONS = frozenset(
    "Mr Mrs Ms Dr Prof Rev Gen Col Capt Lt Sgt St Mt Ft Jr Sr Gov Sen Rep Hon Pres vs etc e.g i.e "
    "cf ca c approx No Nos Vol vol pp Fig Inc Ltd Co Corp lit b d r fl est Jan Feb Mar Apr Jun Jul "
    "Aug Sep Sept Oct Nov Dec".split()
)
_BOUNDARY = re.compile(r"""([.!?]['")\]”’]*)\s+(?=['"(\[“‘]*[A-Z0-9À-Ý])""")


def sentences(text: str) -> list[str]:
    """Split a text into sentences, by rules alone."""
    parts, start = [], 0
    for boundary in _BOUNDARY.finditer(text):
        if boundary.group(1).startswith("."):
            word = re.split(r"[\s(\[“‘'\"]", text[start : boundary.start()])[-1]
            initial = len(word) == 1 and word.isupper()
            dotted = "." in word and all(len(part) <= 2 for part in word.split("."))
            if initial or dotted or word in _ABBREVIATIONS:
                continue
        parts.append(text[start : boundary.end(1)].strip())
        start = boundary.end()
    parts.append(text[start:].strip())
    return [sentence for sentence in parts if sentence]


def chunks(text: str, tokens: int, count: Callable[[str], int]) -> list[str]:
    """Split a text into runs of whole words of at most `tokens` tokens each, in order.

    Whole words, so that a chunk is the same text for two towers with different tokenizers. A word
    that alone is longer than `tokens` is left out.

    Args:
        count: tokens of a text; called for every word, mostly with a blank before it.
    """
    parts: list[str] = []
    current: list[str] = []
    used = 0
    for word in text.split():
        cost = count(" " + word)
        if current and used + cost > tokens:
            parts.append(" ".join(current))
            current, used = [], 0
        if not current:
            # Without a blank before it a word is another token, or several.
            cost = count(word)
        if cost <= tokens:
            current.append(word)
            used += cost
    return parts + ([" ".join(current)] if current else [])


def distinct_pieces(
    source: Iterable[Document], unit: str, tokens: int, count: Callable[[str], int]
) -> Iterator[str]:
    """Yield the distinct pieces of documents: each "sentence", or "chunk" of at most `tokens` tokens.

    Distinct, because an episode that holds one text twice teaches the memory that two equal keys
    are common. A hash of 8 bytes stands for each piece, so that millions of them fit in memory.
    """
    digests: set[bytes] = set()
    cost = functools.lru_cache(1 << 18)(count)  # A corpus has few distinct words.
    for document in source:
        if unit == "sentence":
            split = sentences(document.text)
        else:
            split = chunks(document.text, tokens, cost)
        for piece in split:
            digest = hashlib.blake2b(piece.encode("utf-8"), digest_size=8).digest()
            if digest not in digests:
                digests.add(digest)
                yield piece
