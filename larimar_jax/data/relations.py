"""Relations of things, each in many English wordings: what a scope detector tells questions apart by.

`relations.txt` has a relation a line: its nouns, then sentences of its own, X being the subject. `FORMS`
puts each noun into the sentences that any noun fits.
"""

import functools
import re
from pathlib import Path

FORMS = (
    "The {} of X is",
    "X's {} is",
    "What is the {} of X?",
    "X {}",
    "The name of the {} of X is",
    "What is X's {}?",
)


@functools.cache
def wordings() -> tuple[tuple[str, ...], ...]:
    """Return the wordings of each relation, in the file's order; none is twice in a relation."""
    text = Path(__file__).with_name("relations.txt").read_text(encoding="utf-8")
    relations = []
    for line in text.splitlines():
        nouns, *own = (part.strip() for part in line.split("|"))
        formed = [form.format(noun) for noun in nouns.split(", ") for form in FORMS]
        relations.append(tuple(dict.fromkeys([*formed, *own])))
    return tuple(relations)


@functools.cache
def vocabulary() -> frozenset[str]:
    """Return the words of all wordings, in lower case."""
    return frozenset(re.findall(r"[a-z]+", " ".join(sum(wordings(), ())).lower()))
