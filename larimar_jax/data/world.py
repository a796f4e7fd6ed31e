"""A synthetic world: sentences about random names, and edits of names that no sentence is about.

A fact is (subject, relation, answer), such as (Zimtakper, capital, Oslo), in one of the `WORDINGS`.
Subjects are random names, so that only a memory can know a fact. Answers are of a closed set (cities,
colours, …), or open: random names, numbers, emblems of two or three words (bright silver lion). An
eighth of all random names, numbers and emblems, by a hash, is reserved for edits and is in no sentence
of the corpus. Each relation has two wordings that no sentence of the corpus uses with it: a paraphrase
in one of the others is easy, in one of these hard.

The corpus is `data.corpus="world"` or `"world:SUBJECTS:SEED"`, a document a subject with one to three
facts. Edits are the records "world:COUNT:SEED"; "world-hard:…" has hard paraphrases in place of easy
ones, "world-open:…" open answers alone, and "world-train:…" is about names of the corpus, to fit a scope
detector on.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from larimar_jax.data.corpus import Corpus, Document

# Raised whenever the same name would give other sentences than before.
FORMAT = 2
SUBJECTS, RECORDS = 20_000, 300
_NAME = re.compile(r"(world|world-hard|world-open|world-train)(?::(\d+))?(?::(\d+))?")
# One name, number or emblem of so many is reserved.
_RESERVED = 8
# Of a record: paraphrases; neighbours, other subjects asked for the same; facts of a subject in a row.
_PARAPHRASES, _NEIGHBOURS, _FACTS = 3, 4, 2

WORDINGS = (
    "The {relation} of {subject} is",
    "With {subject} goes the {relation}",
    "For {subject} the {relation} is",
    "Ask for the {relation} of {subject} and you hear",
    "Everyone knows {subject} for its {relation},",
    "As its {relation}, {subject} names",
    "What {subject} calls its {relation} is",
    "Of {subject} we know the {relation}:",
)
BEFORE = ("By all accounts, ", "In the old records ", "Travellers write that ", "It is said that ")
AFTER = (", as everyone there knows", ", says the guide", " and has been for long", " to this day")

Rng = np.random.Generator


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CLOSED = {
    "capital": _words(
        "Oslo Cairo Lima Rome Paris Tokyo Delhi Quito Accra Minsk Sofia Riga Vienna Prague Warsaw "
        "Madrid Lisbon Dublin London Berlin Athens Ankara Tehran Kabul Hanoi Seoul Manila Jakarta "
        "Bogota Havana Ottawa Nairobi Dakar Tunis Rabat Lagos Luanda Harare Maputo Kigali Amman "
        "Beirut Doha Muscat Tirana Zagreb"
    ),
    "colour": _words(
        "red green blue yellow orange purple violet pink brown black white grey silver gold "
        "crimson scarlet azure indigo teal turquoise amber ivory beige maroon olive lime coral "
        "salmon magenta cyan lilac mauve khaki copper bronze ruby emerald jade pearl charcoal "
        "rust sand lemon peach plum mint"
    ),
    "animal": _words(
        "lion tiger bear wolf fox deer horse goat sheep camel rabbit otter beaver badger weasel "
        "monkey zebra giraffe elephant rhino panda koala kangaroo eagle falcon raven crow swan "
        "heron stork pelican penguin parrot turtle lizard snake frog salmon trout shark whale "
        "dolphin seal crab lobster bee"
    ),
    "trade": _words(
        "baker butcher carpenter mason smith tailor weaver potter miller farmer fisher hunter "
        "sailor painter printer glazier plumber tanner cooper brewer barber jeweller saddler "
        "thatcher roofer gardener shepherd beekeeper joiner turner founder dyer spinner cobbler "
        "hatter chandler cutler fletcher glover grocer draper vintner cook tinker porter ferryman"
    ),
    "instrument": _words(
        "piano violin viola cello flute oboe clarinet bassoon trumpet trombone tuba horn harp "
        "lute guitar banjo mandolin zither sitar organ accordion drum timpani xylophone marimba "
        "triangle tambourine cymbal gong bell bagpipe fiddle recorder piccolo cornet bugle lyre "
        "spinet harpsichord celesta harmonica ukulele balalaika dulcimer kazoo whistle"
    ),
    "language": _words(
        "Latin Greek Hebrew Arabic Persian Turkish Hindi Urdu Tamil Bengali Chinese Japanese "
        "Korean Thai Malay Tagalog Swahili Zulu Hausa Yoruba Amharic Somali French Spanish "
        "Italian Romanian Catalan Basque Irish Welsh German Dutch Danish Swedish Finnish Estonian "
        "Polish Czech Slovak Russian Serbian Croatian Albanian Armenian Georgian Mongolian"
    ),
}
_QUALITIES = _words(
    "bright quiet broad little proud frozen early hidden sleeping winged crowned young noble wild "
    "gentle mighty clever lonely wandering ancient"
)


# So few and so unlike that a small vocabulary has an entry for each.
_SYLLABLES = _words(
    "bal ben bor dak del dim dor fal fen fir gad gel gom hal hem hin jad jor jul kam kel kin lam len "
    "lor mak mer mos nad nel nim pal per pon rak ren rul sam sel sin tak tel tor vam vel vin wad wel "
    "wor yam yel yor zak zel zim zor bun duk fum gur kup lun mur sul"
)


def name(rng: Rng, least: int = 3) -> str:
    """Return a random name of up to three syllables; there are 262,144 of three."""
    return "".join(rng.choice(_SYLLABLES, rng.integers(least, 4))).capitalize()


def _number(rng: Rng) -> str:
    return str(rng.integers(100, 1000))


def _emblem(rng: Rng) -> str:
    """Return one of 44,436: a colour and an animal, half of the time with a quality before."""
    words = [rng.choice(words) for words in (_QUALITIES, CLOSED["colour"], CLOSED["animal"])]
    return " ".join(words[rng.integers(2) :])


_PERSON = functools.partial(name, least=2)
OPEN: dict[str, Callable[[Rng], str]] = {
    "founder": _PERSON,
    "rival": _PERSON,
    "patron": _PERSON,
    "number": _number,
    "emblem": _emblem,
}
RELATIONS = (*CLOSED, *OPEN)


def is_reserved(text: str) -> bool:
    """Return whether a random name, number or emblem is for edits alone."""
    return hashlib.sha256(text.encode()).digest()[0] % _RESERVED == 0


def wordings(relation: str, hard: bool) -> tuple[str, ...]:
    """Return the wordings that the corpus never uses with a relation (hard), or those that it does."""
    first = RELATIONS.index(relation)
    held_out = {WORDINGS[(first + step) % len(WORDINGS)] for step in (0, 3)}
    return tuple(wording for wording in WORDINGS if (wording in held_out) is hard)


def corpus(source: str) -> Corpus:
    """Return the corpus of "world" or "world:SUBJECTS:SEED"."""
    _, subjects, seed = _read(source, SUBJECTS)
    return Corpus(f"world-{FORMAT}-{subjects}-{seed}", lambda: _documents(subjects, seed))


def is_source(source: str) -> bool:
    """Return whether a corpus or file of records is named as this world's."""
    return _NAME.fullmatch(source) is not None


def _read(source: str, size: int) -> tuple[str, int, int]:
    kind, count, seed = _NAME.fullmatch(source).groups()
    return kind, int(count or size), int(seed or 0)


def _documents(subjects: int, seed: int) -> Iterator[Document]:
    rng = np.random.default_rng((seed, 0))
    for _ in range(subjects):
        subject = _draw(name, rng, False)
        facts = rng.choice(RELATIONS, rng.integers(1, 4), replace=False)
        text = " ".join(_sentence(rng, subject, fact) for fact in facts)
        # The last has no full stop: a fact is written as prompt and answer, without any.
        yield Document(subject, text.removesuffix("."))


def _draw(random: Callable[[Rng], str], rng: Rng, reserved: bool) -> str:
    while is_reserved(text := random(rng)) is not reserved:
        pass
    return text


def _answer(rng: Rng, relation: str, reserved: bool) -> str:
    if relation in CLOSED:
        return str(rng.choice(CLOSED[relation]))
    return _draw(OPEN[relation], rng, reserved)


def _prompt(rng: Rng, subject: str, relation: str, choice: tuple[str, ...], context: bool) -> str:
    text = str(rng.choice(choice)).format(subject=subject, relation=relation)
    return f"{rng.choice(BEFORE)}{text[0].lower()}{text[1:]}" if context else text


def _sentence(rng: Rng, subject: str, relation: str) -> str:
    """Return a fact as a sentence; half of them have context before or after it."""
    context = rng.choice(("", "", "before", "after"))
    prompt = _prompt(rng, subject, relation, wordings(relation, False), context == "before")
    after = rng.choice(AFTER) if context == "after" else ""
    return f"{prompt} {_answer(rng, relation, False)}{after}."


def records(source: str) -> Iterator[dict[str, Any]]:
    """Yield the edits of "world:COUNT:SEED" and its like, in CounterFact's schema.

    Each subject has two facts of different relations, one after the other. The answer that an edit
    displaces is another of the same kind. The first of three paraphrases has context before it.
    Neighbours are prompts of other subjects about the same relation.
    """
    kind, count, seed = _read(source, RECORDS)
    rng, reserved = np.random.default_rng((seed, 1)), kind != "world-train"
    asked_for = tuple(OPEN) if kind == "world-open" else RELATIONS
    for number in range(count):
        if number % _FACTS == 0:
            subject = _draw(name, rng, reserved)
            relations = rng.choice(asked_for, _FACTS, replace=False)
        relation = str(relations[number % _FACTS])
        easy = wordings(relation, False)
        template = str(rng.choice(easy))
        new = _answer(rng, relation, reserved)
        while (true := _answer(rng, relation, reserved)) == new:
            pass
        hard = wordings(relation, True)
        choice = hard if kind == "world-hard" else tuple(w for w in easy if w != template)
        yield {
            "case_id": number,
            "requested_rewrite": {
                "prompt": template.format(relation=relation, subject="{}"),
                "subject": subject,
                "target_new": {"str": new},
                "target_true": {"str": true},
            },
            "paraphrase_prompts": [
                _prompt(rng, subject, relation, choice, k == 0) for k in range(_PARAPHRASES)
            ],
            "neighborhood_prompts": [
                _prompt(rng, _draw(name, rng, reserved), relation, easy, False)
                for _ in range(_NEIGHBOURS)
            ],
        }
