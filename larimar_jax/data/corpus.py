"""Corpora by name or path → documents → pieces, the short texts that episodes are made of."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from larimar_jax.data.records import Field
from larimar_jax.weights import packages

# Of 100 documents, these many are held out of training: enough for a stable perplexity on 10,000.
HELD_OUT_PERCENT = 4


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and the title that decides, by its hash, whether it is held out."""

    title: str
    text: str

    @property
    def held_out(self) -> bool:
        # Not hash(): that changes with the process. The title and not the text, so that a corrected
        # text stays on its side.
        digest = hashlib.sha256(self.title.encode("utf-8")).digest()
        return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def wikipedia_summaries() -> list[Document]:
    """10,033 English Wikipedia summaries from a PyPI package (text CC BY-SA 4.0).

    Raises:
        FileNotFoundError: the package is not installed; the message names the command.
    """
    entries = json.loads(packages.summaries().read_text(encoding="utf-8"))
    return [Document(title, entry["extract"]) for title, entry in entries.items()]


CORPORA: dict[str, Callable[[], list[Document]]] = {"wikipedia-summaries": wikipedia_summaries}


def documents(corpus: str) -> list[Document]:
    """All documents of a corpus, in its own order.

    Args:
        corpus: a name of `CORPORA`; a `.jsonl` path with one {"text": …, "title": … (optional)} a
            line; or another path, plain text with one document a paragraph (blank line between).
    Raises:
        FileNotFoundError: neither a known name nor a file.
        MalformedRecord: a JSONL line that is no such object; names file, record and field.
    """
    if corpus in CORPORA:
        return CORPORA[corpus]()
    path = Path(corpus)
    if not path.is_file():
        raise FileNotFoundError(
            f"data.corpus is {corpus!r}: no such file, and no corpus of that name. Known names: "
            f"{', '.join(CORPORA)}; or give the path of a .txt or .jsonl file."
        )
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return list(_jsonl(path, text))
    # Without titles a document's own text stands in for it.
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [Document(paragraph, paragraph) for paragraph in paragraphs if paragraph]


def _jsonl(path: Path, text: str) -> Iterator[Document]:
    lines = (line for line in text.split("\n") if line.strip())
    for index, line in enumerate(lines):
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            Field({}, str(path), index).fail("", f"is not JSON ({error.msg})")
        field = Field(raw, str(path), index)
        body = field.text("text")
        yield Document(field.text("title") if "title" in field.raw else body, body)


# A full stop ends a sentence when a capital, a digit or an opening quote follows, and not after an
# initial ("J. Smith"), a dotted abbreviation ("U.S."), or one of these.
_ABBREVIATIONS = frozenset(
    "Mr Mrs Ms Dr Prof Rev Gen Col Capt Lt Sgt St Mt Ft Jr Sr Gov Sen Rep Hon Pres vs etc e.g i.e "
    "cf ca c approx No Nos Vol vol pp Fig Inc Ltd Co Corp lit b d r fl est Jan Feb Mar Apr Jun Jul "
    "Aug Sep Sept Oct Nov Dec".split()
)
_BOUNDARY = re.compile(r"""([.!?]['")\]”’]*)\s+(?=['"(\[“‘]*[A-Z0-9À-Ý])""")


def sentences(text: str) -> list[str]:
    """Splits a text into sentences; deterministic, no model behind it."""
    found, start = [], 0
    for boundary in _BOUNDARY.finditer(text):
        if boundary.group(1).startswith("."):
            word = re.split(r"[\s(\[“‘'\"]", text[start : boundary.start()])[-1]
            initial = len(word) == 1 and word.isupper()
            dotted = "." in word and all(len(part) <= 2 for part in word.split("."))
            if initial or dotted or word in _ABBREVIATIONS:
                continue
        found.append(text[start : boundary.end(1)].strip())
        start = boundary.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def chunks(text: str, tokens: int, count: Callable[[str], int]) -> list[str]:
    """Splits a text into runs of whole words of at most `tokens` tokens each, in order.

    Whole words, so that a chunk is the same text for two towers with different tokenizers. A word
    that alone is longer than `tokens` is left out.

    Args:
        count: tokens of a text; called for every word, mostly with a blank before it.
    """
    found: list[str] = []
    current: list[str] = []
    used = 0
    for word in text.split():
        cost = count(" " + word)
        if current and used + cost > tokens:
            found.append(" ".join(current))
            current, used = [], 0
        if not current:
            # Without a blank before it a word is another token, or several.
            cost = count(word)
        if cost <= tokens:
            current.append(word)
            used += cost
    return found + ([" ".join(current)] if current else [])


def pieces(
    source: Iterable[Document], unit: str, tokens: int, count: Callable[[str], int]
) -> list[str]:
    """The distinct pieces of documents in order: "sentence", or "chunk" of at most `tokens` tokens.

    Distinct, because an episode that holds one text twice teaches the memory that two equal keys
    are common.

    Raises:
        ValueError: an unknown unit.
    """
    if unit not in ("sentence", "chunk"):
        raise ValueError(f"data.unit is {unit!r}; known: sentence, chunk")
    found: dict[str, None] = {}
    cost = functools.cache(count)  # A corpus has few distinct words.
    for document in source:
        whole = unit == "sentence"
        split = sentences(document.text) if whole else chunks(document.text, tokens, cost)
        found.update(dict.fromkeys(split))
    return list(found)
