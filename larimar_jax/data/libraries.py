"""Corpora of Hugging Face `datasets` and of TensorFlow Datasets (without TensorFlow)."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from larimar_jax.data import wikitext
from larimar_jax.data.corpus import Corpus, Document

# A column of this name holds a document's title; without one, its text stands in for it.
_TITLE = "title"
_NAME = re.compile(
    r"(?P<path>[^#]+?):(?P<split>[\w.-]+(\[[^\]#]*\])?(\+[\w.-]+(\[[^\]#]*\])?)*)(#(?P<column>.+))?"
)
# What `datasets` calls the readers of single files.
_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class CorpusError(ValueError):
    """A corpus that is named wrongly, cannot be opened, or holds no text where it should."""


class Name(NamedTuple):
    """path[,config]:split[#column]"""

    path: str
    config: str | None
    split: str
    column: str


class _Rows(NamedTuple):
    """What a library found. rows: mappings, as often as they are asked for."""

    rows: Iterable[Any]
    columns: tuple[str, ...]
    identity: str


def parse(prefix: str, rest: str) -> Name:
    """The parts of a name, without its prefix. The split may be a slice, such as train[:10%].

    Raises:
        CorpusError: no split.
    """
    found = _NAME.fullmatch(rest)
    if found is None:
        raise CorpusError(
            f"the corpus is {prefix}:{rest}, which names no split; write {prefix}:PATH:SPLIT#COLUMN, "
            "such as hf:Salesforce/wikitext,wikitext-103-raw-v1:train#text"
        )
    path, config = found["path"], None
    if not Path(path).exists():  # A folder may have a comma in its name.
        path, _, config = path.partition(",")
    return Name(path, config or None, found["split"], found["column"] or "text")


def open_library(prefix: str, rest: str) -> Corpus:
    """The corpus of a name.

    "hf" takes a hub id, a folder that `save_to_disk` wrote, a folder of data files, or a .json,
    .jsonl, .parquet or .csv file; "tfds" a name, or the folder of a prepared dataset. Either is
    read row by row from disk. WikiText's lines are put together by article.

    Raises:
        CorpusError: no split in the name, nothing that the library can open (says what it said), or
            a column that is not there; later, a row whose column holds no text.
    """
    name = parse(prefix, rest)
    label = f"{prefix}:{rest}"
    try:
        found = (_hugging_face if prefix == "hf" else _tensorflow)(name)
    except CorpusError:
        raise
    except Exception as error:  # The libraries raise of every kind.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise CorpusError(
            f"the corpus is {label}, which could not be opened ({type(error).__name__}: {reason}). "
            "Are the name and the split right, is every file whole, and is it downloaded or a network "
            "there?"
        ) from error
    if name.column not in found.columns:
        raise CorpusError(
            f"the corpus is {label}, and its rows have no column {name.column!r}; they have "
            f"{', '.join(sorted(found.columns))}. Name one of text after a #."
        )

    def texts() -> Iterator[tuple[str, str]]:
        for index, row in enumerate(found.rows):
            title = row.get(_TITLE) if name.column != _TITLE else None
            where = f"the corpus is {label}, and row {index}"
            yield _text(title, where) if isinstance(title, str | bytes) else "", _text(
                row[name.column], where
            )

    head = itertools.islice(texts(), wikitext.ENOUGH)
    # Not by the corpus's name, which a copy on disk need not keep.
    if _TITLE not in found.columns and wikitext.recognise(text for _, text in head):
        return Corpus(found.identity, lambda: wikitext.articles(text for _, text in texts()))
    return Corpus(found.identity, lambda: _documents(texts()))


def _hugging_face(name: Name) -> _Rows:
    import datasets

    path = Path(name.path)
    saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if saved:
        found = datasets.load_from_disk(name.path)
        if isinstance(found, datasets.DatasetDict):
            splits = list(found)
        else:
            # Alone, a split may be saved without its name.
            splits = [str(found.split or name.split)]
            found = {splits[0]: found}
        if name.split not in splits:
            raise CorpusError(
                f"the corpus asks for the split {name.split!r} of {name.path}, which was saved with "
                f"{', '.join(splits)}. Slices are for files and for the hub."
            )
        found = found[name.split]
    elif path.is_file():
        if path.suffix not in _READERS:
            raise CorpusError(
                f"the corpus is hf:{name.path}, a file of a kind that is not read; known: "
                f"{', '.join(_READERS)}. Plain text is read without hf: and split."
            )
        found = datasets.load_dataset(
            _READERS[path.suffix], data_files=name.path, split=name.split
        )
    else:
        found = datasets.load_dataset(name.path, name.config, split=name.split)
    # A local file's fingerprint has its path and its time inside, which differ between hosts.
    version = _content(path) if path.exists() else found._fingerprint
    columns = tuple(found.column_names)
    wanted = [column for column in (name.column, _TITLE) if column in columns]
    return _Rows(found.select_columns(wanted), columns, _identity("hf", name, version))


def _tensorflow(name: Name) -> _Rows:
    import tensorflow_datasets as tfds

    path = Path(name.path)
    if (path / "dataset_info.json").is_file():
        builder = tfds.builder_from_directory(path)
        version = _content(path)
    else:
        full = f"{name.path}/{name.config}" if name.config else name.path
        builder = tfds.builder(full, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
        version = f"{builder.info.full_name} {builder.info.splits[name.split].num_bytes}"
    columns = tuple(builder.info.features)
    rows = builder.as_data_source(split=name.split)
    return _Rows(rows, columns, _identity("tfds", name, version))


def _identity(prefix: str, name: Name, version: str) -> str:
    """Equal only where split, column and content are."""
    parts = "\0".join([version, name.config or "", name.split, name.column])
    return f"{prefix}-{hashlib.sha256(parts.encode('utf-8')).hexdigest()}"


def _content(path: Path) -> str:
    """A hash of a file, or of the names and contents of a folder's files."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    total = hashlib.sha256()
    for file in files:
        # `datasets` keeps what it computes from a saved folder inside that folder.
        if file.name.startswith((".", "cache-")):
            continue
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        total.update(f"{file.relative_to(path)}\0{digest}\n".encode())
    return total.hexdigest()


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):  # As TensorFlow Datasets gives texts.
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(f"{where} is not UTF-8 ({error}). Is the column one of text?") from None
    if not isinstance(value, str):
        raise CorpusError(
            f"{where} holds no text but a {type(value).__name__}. Name a column of text after a #."
        )
    return value


def _documents(texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
    for title, text in texts:
        if text := text.strip():
            yield Document(title or text, text)
