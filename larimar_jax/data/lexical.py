"""What a sentence names: its names, numbers and negation, by rules alone; and the rest of it, its frame.

An encoder puts "room 101" beside "room 102", and "is open" beside "is not open". Words tell them apart.
"""

import collections
import dataclasses
import functools
import itertools
import operator
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from larimar_jax.data import relations

# Stands for the names of a sentence in `Evidence.frame`, as in the wordings of `relations`.
PLACEHOLDER = "X"

_CLITICS = frozenset("s t d re ll ve m".split())
_FUNCTION_WORDS = frozenset(
    "a an the this that these those of in on at by for from to with as into about between among after "
    "before since until during over under and or but nor so if then than because while although it its "
    "he him his she her hers they their them we our us i my me you your one who whom whose which what "
    "where when why how is are was were be been being am do does did done has have had having can could "
    "will would shall should may might must there here not no never none neither without please tell "
    "name say according also just both each any some all".split()
)
# Between two words of one name: "Duke of the Alps", "Lena van der Meer".
_PARTICLES = frozenset(
    "of and the a in on at to for de la von van du der di del della y e da dos mac ben bin ibn al el le "
    "les des den ter zu".split()
)
_NEGATIONS = frozenset("not never none neither nor without nobody nothing nowhere cannot".split())
_CARDINALS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBERS = {word: n for words in (_CARDINALS, _ORDINALS) for n, word in enumerate(words, 1)}
_NUMBERS |= {word: 10 * n for n, word in enumerate(_TENS, 2)}
_NUMBERS |= {word[:-1] + "ieth": 10 * n for n, word in enumerate(_TENS, 2)}
_NUMBERS |= {"hundred": 10**2, "hundredth": 10**2, "thousand": 10**3, "million": 10**6}
# "2.1", "9:15" and "twenty-first" are single numbers.
_WORD = re.compile(
    rf"\d+(?:[.,:]\d+)+|\b(?:{'|'.join(_TENS)})[- ](?:{'|'.join(_CARDINALS[:9] + _ORDINALS[:9])})\b"
    r"|[^\W_]+",
    re.IGNORECASE,
)
_DIGITS = re.compile(r"(\d[\d.,:]*)(?:st|nd|rd|th)?")
_ROMAN = re.compile(r"(?=[IVXLC]{2}|[VX])C{0,3}(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})")
# What may stand between two words of one name.
_WITHIN_NAME = re.compile(r"[\w \-–'’.&]*")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a sentence names, in folded words: no accents, no capitals, no plural s.

    names: words with a capital or a digit; where no word has a capital, those that no wording of
    `relations` has. strict: numbers, negation, symbols such as emoji, and the whole text where it is in
    a script that is not Latin: what is to be the very same in two wordings of one question. frame: the
    sentence with `PLACEHOLDER` for its names and numbers. proper: those of the names that nothing but
    their capital can explain. sequence: all words, in order. poles: those of `contraries.txt` that its
    words without capitals are of, and contraries: the others of the same lines.
    """

    sequence: tuple[str, ...]
    words: frozenset[str]
    names: frozenset[str]
    proper: frozenset[str]
    strict: tuple[str, ...]
    frame: str
    poles: frozenset[str]
    contraries: frozenset[str]


@functools.cache
def _poles() -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]]]:
    """Return the poles of each word of `contraries.txt`, and the others on the line of each pole.

    A line has words that exclude each other, such as north and south; words of one pole are between two
    slashes. Words with a capital count with it alone.
    """
    of_word, others = collections.defaultdict(frozenset), {}
    text = Path(__file__).with_name("contraries.txt").read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines()):
        poles = {f"{number}/{place}": pole.split() for place, pole in enumerate(line.split("/"))}
        for name, words in poles.items():
            others[name] = frozenset(poles) - {name}
            for word in words:
                of_word[word] |= {name}
    return dict(of_word), others


@functools.lru_cache(1 << 16)
def evidence(text: str) -> Evidence:
    """Return what a sentence names."""
    text = unicodedata.normalize("NFKC", text)
    matches = [
        match
        for match in _WORD.finditer(text)
        if not (match[0] in _CLITICS and text[: match.start()].endswith(("'", "’")))
    ]
    words = [match[0] for match in matches]
    lower = [word.casefold() for word in words]
    numbers = [_number(word) for word in words]
    for place in range(1, len(words)):
        # "I" is a number after a name only.
        follows_name = words[place - 1].istitle() and lower[place - 1] not in _FUNCTION_WORDS
        if words[place] == "I" and follows_name:
            numbers[place] = "1"
    known = _FUNCTION_WORDS | relations.vocabulary()
    # Of a text all in capitals they say nothing.
    has_capitals = not text.isupper()
    is_name = [
        ((has_capitals and word != word.lower()) or any(map(str.isdigit, word)))
        and number is None
        and low not in _FUNCTION_WORDS
        for word, low, number in zip(words, lower, numbers, strict=True)
    ]
    # A sentence begins with a capital, whatever its first word is.
    if lower and lower[0] in known and not any(is_name[1:2]):
        is_name[0] = False
    if not any(is_name):
        pairs = zip(lower, numbers, strict=True)
        is_name = [low not in known and number is None for low, number in pairs]
    strict = sorted({number for number in numbers if number is not None})
    if not _NEGATIONS.isdisjoint(lower) or re.search(r"n['’]t\b|\b[Nn]o (?!\d)", text):
        strict.append("not")
    if any(map(_is_foreign, text)):
        # All but punctuation and blanks: vowels may be marks, which are no letters.
        strict.append(
            "".join(c for c in text if unicodedata.category(c)[0] not in "CPZ").casefold()
        )
    else:
        strict += sorted({c for c in text if not c.isascii() and unicodedata.category(c)[0] == "S"})
    folded = tuple(map(_fold, words))
    proper = [
        name and has_capitals and word != low and low not in known
        for word, low, name in zip(words[1:], lower[1:], is_name[1:], strict=True)
    ]
    of_word, others = _poles()
    small = [n == 0 or not has_capitals or word == word.lower() for n, word in enumerate(words)]
    looked_up = (*words, *itertools.compress(folded, small))
    poles = frozenset().union(*(of_word.get(word, ()) for word in looked_up))
    return Evidence(
        folded,
        frozenset(folded),
        frozenset(itertools.compress(folded, is_name)),
        frozenset(itertools.compress(folded[1:], proper)),
        tuple(strict),
        _frame(text, matches, [a or b is not None for a, b in zip(is_name, numbers, strict=True)]),
        poles,
        frozenset().union(*map(others.get, poles)) - poles,
    )


def _frame(text: str, matches: list[re.Match], hidden: list[bool]) -> str:
    """Return the text with a placeholder for each run of hidden words and what may be inside a name."""
    parts, end, place = [], 0, 0
    while place < len(matches):
        if not hidden[place]:
            place += 1
            continue
        parts += [text[end : matches[place].start()], PLACEHOLDER]
        following = place
        while following is not None:
            place = following
            end, beyond = matches[place].end(), place + 1
            while beyond < min(place + 3, len(matches)) and (
                not hidden[beyond] and matches[beyond][0].casefold() in _PARTICLES
            ):
                beyond += 1
            is_one = (
                beyond < len(matches)
                and hidden[beyond]
                and _WITHIN_NAME.fullmatch(text[end : matches[beyond].start()])
            )
            following = beyond if is_one else None
        place += 1
    return "".join([*parts, text[end:]])


def _number(word: str) -> str | None:
    """Return the number that a word is, as digits or Roman: None where it is none."""
    if digits := _DIGITS.fullmatch(word):
        return re.sub(r",(?=\d{3}\b)", "", digits[1]).lstrip("0") or "0"
    if _ROMAN.fullmatch(word):
        values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}[letter] for letter in word]
        pairs = zip(values, [*values[1:], 0], strict=True)
        return str(sum(-value if value < after else value for value, after in pairs))
    values = [_NUMBERS.get(part, 0) for part in re.split("[- ]", word.casefold())]
    # "one" and "first" are mostly none: "the one who first sang".
    return str(sum(values)) if all(values) and values != [1] else None


def _is_foreign(letter: str) -> bool:
    return letter.isalpha() and ord(letter) >= 0x250 and not 0x1E00 <= ord(letter) < 0x1F00


def _fold(word: str) -> str:
    letters = unicodedata.normalize("NFKD", word)
    word = "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def comparable(queries: Sequence[str], keys: Sequence[str]) -> Bool[np.ndarray, "Q N"]:
    """Return which queries may mean which keys.

    A query names something else than a key where `Evidence.strict` is not the same;
    where it has half or less of the key's names; where each has a name that the other lacks; where
    one that the key lacks comes after all of the key's ("Ada's boat is red and Per's car is"); or where
    each has a contrary of the other's words ("the oldest", "the youngest").
    """
    query_side, written = [*map(evidence, queries)], [*map(evidence, keys)]

    def shared(of_queries: Callable, of_keys: Callable) -> Int[np.ndarray, "Q N"]:
        return _shared([*map(of_queries, query_side)], [*map(of_keys, written)])

    get = operator.attrgetter
    words, named, poles, contraries = map(get, ("words", "names", "poles", "contraries"))
    names, key_names = (
        np.array([len(e.names) for e in side], int) for side in (query_side, written)
    )
    absent, beyond = key_names - shared(words, named), names[:, None] - shared(named, words)
    is_other = (absent > 0) & ((2 * absent >= key_names) | (beyond > 0))
    for query, key in zip(*np.nonzero((absent <= 0) & (beyond > 0)), strict=True):
        is_other[query, key] = _turns_to_another(query_side[query], written[key])
    is_other |= (shared(contraries, poles) > 0) & (shared(poles, contraries) > 0)
    strict, key_strict = (
        np.array([hash(e.strict) for e in side], int) for side in (query_side, written)
    )
    return ~is_other & (strict[:, None] == key_strict)


def _shared(
    queries: Sequence[frozenset[str]], keys: Sequence[frozenset[str]]
) -> Int[np.ndarray, "Q N"]:
    """Count what each query has in common with each key."""
    places = {word: place for place, word in enumerate(frozenset().union(*queries))}
    if not places:
        return np.zeros((len(queries), len(keys)), int)
    has = np.zeros((len(queries), len(places)), int)
    for row, words in zip(has, queries, strict=True):
        row[[places[word] for word in words]] = 1
    columns = [[places[word] for word in words if word in places] for words in keys]
    ends = np.cumsum([0, *map(len, columns)])
    sums = np.zeros((len(queries), ends[-1] + 1), int)
    np.cumsum(has[:, [*itertools.chain(*columns)]], axis=1, out=sums[:, 1:])
    return np.diff(sums[:, ends])


def _turns_to_another(query: Evidence, key: Evidence) -> bool:
    """Return whether a name that the key lacks comes after all of its own."""
    own = [place for place, word in enumerate(query.sequence) if word in key.names]
    rest = query.sequence[max(own, default=-1) + 1 :]
    return any(word in query.proper and word not in key.words for word in rest)
