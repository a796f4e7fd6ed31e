"""Corpora of Hugging Face `datasets` and of TensorFlow Datasets (without TensorFlow)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from larimar_jax.data.corpus import Corpus, Document

# A column of this name holds a document's title; without one, its text stands in for it.
_TITLE = "title"
# WikiText gives an article line by line, under a heading between single equals signs.
_ARTICLE = re.compile(r"^\s*= (?!=)(.*\S) =\s*$")
_HEADING = re.compile(r"^\s*=.*=\s*$")


class CorpusNameError(ValueError):
    """A name that does not say what to read, or a column that is not there or holds no text."""


class Name(NamedTuple):
    """path[,config]:split[#column]"""

    path: str
    config: str | None
    split: str
    column: str


def parse(prefix: str, rest: str) -> Name:
    """The parts of a name, without its prefix.

    Raises:
        CorpusNameError: no split.
    """
    before, _, column = rest.partition("#")
    path, separator, split = before.rpartition(":")
    if not separator or not path or not split:
        raise CorpusNameError(
            f"data.corpus is {prefix}:{rest}, which names no split; write {prefix}:PATH:SPLIT#COLUMN, "
            "such as hf:Salesforce/wikitext,wikitext-103-raw-v1:train#text"
        )
    path, _, config = path.partition(",")
    return Name(path, config or None, split, column or "text")


def open_library(prefix: str, rest: str) -> Corpus:
    """The corpus of a name: "hf" is by hub id or by the path of a saved dataset, "tfds" by its name.

    A `tfds` name may be the folder of a prepared dataset; its files are array_record.

    Raises:
        CorpusNameError: as `parse`, or a column that is not there or holds no text.
        FileNotFoundError: the library does not find it; says what the library said.
    """
    name = parse(prefix, rest)
    try:
        rows, identity = (_hugging_face if prefix == "hf" else _tensorflow)(name)
    except (OSError, ValueError, ImportError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"data.corpus is {prefix}:{rest}, which could not be opened ({type(error).__name__}: "
            f"{reason}). Is the name right, and is it downloaded or a network there?"
        ) from error
    first = next(iter(rows), None)
    if first is not None and not isinstance(_text(first.get(name.column)), str):
        raise CorpusNameError(
            f"data.corpus is {prefix}:{rest}, and its rows have no text in a column {name.column!r}; "
            f"they have {', '.join(sorted(first))}"
        )
    make = _articles if "wikitext" in name.path.lower() else _documents
    return Corpus(identity, lambda: make(iter(rows), name.column))


def _hugging_face(name: Name) -> tuple[Any, str]:
    import datasets

    if (Path(name.path) / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(name.path)[name.split]
    elif (Path(name.path) / "dataset_info.json").is_file():
        found = datasets.load_from_disk(name.path)
    else:
        found = datasets.load_dataset(name.path, name.config, split=name.split)
    return found, f"hf-{found._fingerprint}"


def _tensorflow(name: Name) -> tuple[Any, str]:
    import tensorflow_datasets as tfds

    path = f"{name.path}/{name.config}" if name.config else name.path
    if (Path(path) / "dataset_info.json").is_file():
        builder = tfds.builder_from_directory(path)
    else:
        builder = tfds.builder(path, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
    info = builder.info
    identity = f"tfds-{info.full_name}-{name.split}-{info.splits[name.split].num_bytes}"
    return builder.as_data_source(split=name.split), identity


def _text(value: Any) -> Any:
    # TensorFlow Datasets gives texts as bytes.
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _documents(rows: Iterator[Any], column: str) -> Iterator[Document]:
    for row in rows:
        text = (_text(row[column]) or "").strip()
        if text:
            title = _text(row.get(_TITLE))
            yield Document(title if isinstance(title, str) and title else text, text)


def _articles(rows: Iterator[Any], column: str) -> Iterator[Document]:
    """WikiText's lines as articles; headings are no text."""
    title, lines = "", []
    for row in rows:
        line = _text(row[column]) or ""
        article = _ARTICLE.match(line)
        if article and lines:
            yield Document(title, "\n".join(lines))
            lines = []
        if article:
            title = article[1]
        elif line.strip() and not _HEADING.match(line):
            lines.append(line.strip())
    if lines:
        yield Document(title, "\n".join(lines))
