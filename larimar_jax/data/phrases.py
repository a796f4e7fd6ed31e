"""Phrases after prompts: what a reader (decoders/reader.py) learns to say, from the text of any corpus.

A block is the beginning of a sentence, or a question of its words, and phrases that stand after it. The
first phrase is what follows in the text; the others are drawn, so that only a memory can know them:
names, words and runs of words of the corpus, numbers, dates, and new names, put together from words
or from letters of old ones. A reader learns a few phrases by heart, whatever prompts they stand after.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from larimar_jax.data.corpus import Corpus
from larimar_jax.data.segments import sentences

# Words of a prompt, at least and at most; the most words of a phrase of the text.
PROMPT_WORDS, PHRASE_WORDS = (3, 12), 4
# How often a prompt is a question, and its first word then.
_QUESTIONS, _ASKING = 0.25, ("What", "Which", "Who", "Where", "When", "How")
# How often a drawn phrase is a name, a word, a run of words, a number, a date, a new name of old words,
# or of new words; each of a new word's letters follows as many before it as in some old one.
_SHARES = (0.18, 0.14, 0.1, 0.03, 0.07, 0.28, 0.2)
# How often the words of a new name have one of these between them.
_JOINED, _BETWEEN = 0.2, ("of", "of the", "and", "de")
_LETTERS, _LONGEST = 3, 14
_MONTHS = "January February March April May June July August September October November December"
_EDGES = ".,;:!?()[]\"“”'‘’"


class Block(NamedTuple):
    """A prompt, another one, and the phrases that stand after either of them."""

    prompt: str
    other: str
    phrases: tuple[str, ...]


class Phrases:
    """The phrases of a corpus.

    Args:
        held_out: whether they are of the documents that are held out, or of the others.
        vocabulary: words to draw beside those of the corpus, such as a tokenizer's tokens: what a reader
          is to say it must have met.
    Raises:
        ValueError: its documents have no sentence that is long enough.
    """

    def __init__(self, corpus: Corpus, held_out: bool, vocabulary: Sequence[str] = ()):
        documents = list(corpus.side(held_out))
        texts = [text.split() for document in documents for text in sentences(document.text)]
        self._sentences = [words for words in texts if len(words) > PROMPT_WORDS[0] + PHRASE_WORDS]
        if not self._sentences:
            raise ValueError("the corpus has no sentence of seven words to take prompts from")
        names = {re.sub(r" \(.*", "", document.title): None for document in documents}
        words: dict[str, None] = {}
        for sentence in self._sentences:
            # A sentence's first word has a capital whatever it is.
            names.update(dict.fromkeys(_names(sentence[1:])))
            plain = (word.strip(_EDGES) for word in sentence[1:])
            words.update(dict.fromkeys(word for word in plain if word.islower() and len(word) > 2))
        self._names = [name for name in names if 1 < len(name) <= 40]
        self._words = list(words | dict.fromkeys(word for word in vocabulary if word.islower()))
        parts = dict.fromkeys(part for name in self._names for part in name.split())
        parts |= dict.fromkeys(vocabulary)
        self._parts = [part for part in parts if part.isalpha() and part.istitle()]
        self._next: dict[str, list[str]] = {}
        for part in self._parts:
            text = " " * _LETTERS + part + " "
            for at in range(len(part) + 1):
                self._next.setdefault(text[at : at + _LETTERS], []).append(text[at + _LETTERS])

    def blocks(self, phrases: int, seed: int, first: int = 0) -> Iterator[Block]:
        """Yield blocks of so many phrases without end; block i of a seed is always the same."""
        for number in itertools.count(first):
            rng = np.random.default_rng((seed, number))
            (prompt, follows), (other, _) = self._prompt(rng), self._prompt(rng)
            drawn = dict.fromkeys([follows, *(self._phrase(rng) for _ in range(phrases - 1))])
            yield Block(_question(rng, prompt), _question(rng, other), tuple(drawn))

    def _prompt(self, rng: np.random.Generator) -> tuple[str, str]:
        """Return the beginning of a sentence, and the phrase that follows."""
        words = _choose(rng, self._sentences)
        least, most = PROMPT_WORDS
        cut = int(rng.integers(least, min(most, len(words) - PHRASE_WORDS) + 1))
        end = cut + int(rng.integers(1, PHRASE_WORDS + 1))
        return " ".join(words[:cut]), " ".join(words[cut:end]).rstrip(_EDGES) or words[cut]

    def _phrase(self, rng: np.random.Generator) -> str:
        kind = int(rng.choice(len(_SHARES), p=_SHARES))
        if kind in (5, 6) and self._parts:
            part = self._word if kind == 6 else functools.partial(_choose, items=self._parts)
            between = f" {_choose(rng, _BETWEEN)} " if rng.random() < _JOINED else " "
            return between.join(part(rng) for _ in range(rng.integers(1, 4 if kind == 5 else 3)))
        if kind == 0 and self._names:
            return _choose(rng, self._names)
        if kind == 2:
            return self._prompt(rng)[1]
        if kind == 3:
            return str(rng.integers(10 ** rng.integers(1, 5)))
        if kind == 4:
            day, year = rng.integers(1, 29), rng.integers(1000, 2030)
            month = _choose(rng, _MONTHS.split())
            return _choose(rng, (f"{day} {month} {year}", f"{month} {day}, {year}", str(year)))
        return _choose(rng, self._words)

    def _word(self, rng: np.random.Generator) -> str:
        text = " " * _LETTERS
        while len(text) < _LETTERS + _LONGEST:
            text += _choose(rng, self._next[text[-_LETTERS:]])
            if text[-1] == " ":
                break
        return text.strip()


def _question(rng: np.random.Generator, prompt: str) -> str:
    """Return the prompt, or a question of its words."""
    if rng.random() >= _QUESTIONS:
        return prompt
    return f"{_choose(rng, _ASKING)} {' '.join(prompt.split()[1:]).rstrip(_EDGES)}?"


def _names(words: Sequence[str]) -> Iterator[str]:
    """Yield runs of words with capitals, of at most PHRASE_WORDS words; punctuation ends one."""
    run: list[str] = []
    for word in [*words, ""]:
        bare = word.strip(_EDGES).removesuffix("'s").removesuffix("’s")
        capital = bare[:1].isupper()
        if run and (not capital or word[:1] in _EDGES or len(run) == PHRASE_WORDS):
            yield " ".join(run)
            run = []
        if capital:
            run.append(bare)
            if word[-1:] in _EDGES:
                yield " ".join(run)
                run = []


def _choose(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]
