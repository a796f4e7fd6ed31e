"""Corpora of Hugging Face `datasets` and of TensorFlow Datasets (without TensorFlow)."""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from larimar_jax.config import cache_folder
from larimar_jax.data.corpus import Corpus, Document

# A column of this name holds a document's title; without one, its text stands in for it.
_TITLE = "title"
_NAME = re.compile(
    r"(?P<path>[^#]+?):(?P<split>[\w.-]+(\[[^\]#]*\])?(\+[\w.-]+(\[[^\]#]*\])?)*)(#(?P<column>.+))?"
)
# What `datasets` calls the readers of single files; all others are plain text.
_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# WikiText's rows are lines: an article begins under a heading between single equals signs, its sections
# under more. Rows that are looked at to recognise it: an article is shorter than this many lines.
_ARTICLE = re.compile(r"\s*= (?!=)(.*\S) =\s*")
_SECTION = re.compile(r"\s*= =.*= =\s*")
_RECOGNISED_WITHIN = 1000


class CorpusError(ValueError):
    """A corpus that is named wrongly, cannot be opened, or holds no text where it should."""


class Name(NamedTuple):
    """path[,config]:split[#column]"""

    path: str
    config: str | None
    split: str
    column: str


class _LibraryRows(NamedTuple):
    """What a library opened. rows: mappings, as often as they are iterated over."""

    rows: Iterable[Any]
    columns: tuple[str, ...]
    identity: str


def open_library(prefix: str, rest: str) -> Corpus:
    """Return the corpus `prefix:rest`.

    "hf" takes a hub id, a folder that `save_to_disk` wrote, a folder of data files, or a .json,
    .jsonl, .parquet, .csv or text file; "tfds" a name, or the folder of a prepared dataset. Either is
    read row by row from disk. WikiText's lines are put together by article.

    Raises:
        CorpusError: no split in the name, nothing that the library can open (with its reason), or
            a column that is not there; later, a row whose column holds no text.
    """
    label = f"{prefix}:{rest}"
    return _open(label, _parse(label, rest), _hugging_face if prefix == "hf" else _tensorflow)


def open_file(path: str) -> Corpus:
    """Return the corpus of a file of rows (as `hf:PATH:train`), or of plain text by paragraphs."""
    return _open(path, Name(path, None, "train", "text"), _hugging_face)


def _open(label: str, name: Name, library: Callable[[Name], _LibraryRows]) -> Corpus:
    try:
        source = library(name)
    except CorpusError:
        raise
    except Exception as error:  # The libraries raise of every kind.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise CorpusError(
            f"the corpus is {label}, which could not be opened ({type(error).__name__}: {reason}). "
            "Are the name and the split right, is every file whole, and is it downloaded or a network "
            "there?"
        ) from error
    if name.column not in source.columns:
        raise CorpusError(
            f"the corpus is {label}, and its rows have no column {name.column!r}; they have "
            f"{', '.join(sorted(source.columns))}. Name one of text after a #."
        )

    def texts() -> Iterator[tuple[str, str]]:
        for index, row in enumerate(source.rows):
            title = row.get(_TITLE) if name.column != _TITLE else None
            where = f"the corpus is {label}, and row {index}"
            title = _text(title, where) if isinstance(title, str | bytes) else ""
            yield title, _text(row[name.column], where)

    judges = re.match(r"(validation|test)\b", name.split) is not None
    identity = source.identity + (" held out" if judges else "")
    if Path(name.path).is_file() and Path(name.path).suffix not in _READERS:
        return Corpus(identity, lambda: _paragraphs(text for _, text in texts()), judges)
    head = (text for _, text in itertools.islice(texts(), _RECOGNISED_WITHIN))
    # Not by the corpus's name, which a copy on disk need not keep.
    if _TITLE not in source.columns and any(title for title, _ in _headed_lines(head)):
        return Corpus(identity, lambda: _articles(text for _, text in texts()), judges)
    return Corpus(identity, lambda: _documents(texts()), judges)


def _parse(label: str, rest: str) -> Name:
    """Return the parts of a name; its split may be a slice, such as train[:10%]."""
    parts = _NAME.fullmatch(rest)
    if parts is None:
        raise CorpusError(
            f"the corpus is {label}, which names no split; write "
            f"{label.partition(':')[0]}:PATH:SPLIT#COLUMN, such as "
            "hf:Salesforce/wikitext,wikitext-103-raw-v1:train#text"
        )
    path, config = parts["path"], None
    if not Path(path).exists():  # A folder may have a comma in its name.
        path, _, config = path.partition(",")
    return Name(path, config or None, parts["split"], parts["column"] or "text")


def _hugging_face(name: Name) -> _LibraryRows:
    import datasets

    path = Path(name.path)
    if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(name.path)
        if not isinstance(saved, datasets.DatasetDict):
            # Alone, a split may be saved without its name.
            saved = {str(saved.split or name.split): saved}
        if name.split not in saved:
            raise CorpusError(
                f"the corpus asks for the split {name.split!r} of {name.path}, which was saved with "
                f"{', '.join(saved)}. Slices are for files and for the hub."
            )
        dataset = saved[name.split]
    elif path.is_file():
        cache = str(cache_folder() / "datasets")
        options = dict(data_files=name.path, split=name.split, cache_dir=cache)
        dataset = datasets.load_dataset(_READERS.get(path.suffix, "text"), **options)
    else:
        dataset = datasets.load_dataset(name.path, name.config, split=name.split)
    # A local file's fingerprint has its path and its time inside, which differ between hosts.
    version = _content(path) if path.exists() else dataset._fingerprint
    columns = tuple(dataset.column_names)
    wanted = [column for column in (name.column, _TITLE) if column in columns]
    return _LibraryRows(dataset.select_columns(wanted), columns, _identity("hf", name, version))


def _tensorflow(name: Name) -> _LibraryRows:
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
    rows = builder.as_data_source(split=name.split)
    return _LibraryRows(rows, tuple(builder.info.features), _identity("tfds", name, version))


def _identity(prefix: str, name: Name, version: str) -> str:
    """Return a hash that is equal only where split, column and content are."""
    parts = "\0".join([version, name.config or "", name.split, name.column])
    return f"{prefix}-{hashlib.sha256(parts.encode('utf-8')).hexdigest()}"


def _content(path: Path) -> str:
    """Return a hash of a file, or of the names and contents of a folder's files."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    total = hashlib.sha256()
    for file in files:
        # `datasets` keeps what it computes from a saved folder inside that folder.
        if not file.name.startswith((".", "cache-")):
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
            raise CorpusError(f"{where} is not UTF-8 ({error}). Is it a column of text?") from None
    if not isinstance(value, str):
        raise CorpusError(
            f"{where} holds no text but a {type(value).__name__}. Name a column of text after a #."
        )
    return value


def _documents(texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
    for title, text in texts:
        if text := text.strip():
            yield Document(title or text, text)


def _paragraphs(lines: Iterable[str]) -> Iterator[Document]:
    """Yield the paragraphs of plain text, between lines without words."""
    words: list[str] = []
    for line in itertools.chain(lines, [""]):
        words += line.split()
        if words and not line.strip():
            text, words = " ".join(words), []
            yield Document(text, text)


def _articles(lines: Iterable[str]) -> Iterator[Document]:
    """Yield WikiText's articles without their headings.

    Of an article that began before the first line, as in a slice of a split, the text stands in for
    the title.
    """
    title, body = "", []
    for heading, line in itertools.chain(_headed_lines(lines), [("end", "")]):
        if heading:
            if body:
                text = "\n".join(body)
                yield Document(title or text, text)
            title, body = heading, []
        elif line.strip() and not _SECTION.fullmatch(line):
            body.append(line.strip())


def _headed_lines(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (the title that a line gives, or "", and the line).

    A title stands between blank lines: one that does not is a formula or a table's row.
    """
    padded = itertools.chain([""], lines, [""])
    before, line = next(padded), next(padded)
    for after in padded:
        heading = _ARTICLE.fullmatch(line) if not before.strip() and not after.strip() else None
        yield heading[1] if heading else "", line
        before, line = line, after
