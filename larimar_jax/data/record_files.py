"""Raw records of editing benchmarks: from files of JSON as programs write them, the hub or the world;
and their values by path, with errors that name the field."""

import codecs
import contextlib
import dataclasses
import functools
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from larimar_jax.data import world


class MalformedRecord(ValueError):
    """A benchmark file holds a record that its schema does not allow."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """The place of item `index` of a JSON list, for messages: the line in which it begins."""

    text: str
    index: int

    def __str__(self) -> str:
        return f"record {self.index} (line {_item_lines(self.text)[self.index]})"


@functools.lru_cache(1)
def _item_lines(text: str) -> list[int]:
    """Return the line in which each item of a JSON list begins."""
    blanks, decode = re.compile(r"[ \t\n\r,]*"), json.JSONDecoder().raw_decode
    lines, line, counted, place = [], 1, 0, text.index("[") + 1
    while not text.startswith("]", place := blanks.match(text, place).end()):
        line, counted = line + text.count("\n", counted, place), place
        lines.append(line)
        _, place = decode(text, place)
    return lines


def raw_records(source: str | Path) -> Iterator[tuple[Any, Any]]:
    """Yield where each record is, and it; of a line that is not JSON, the error."""
    path = Path(source)
    if not path.is_file():
        read = world.records if world.is_source(str(source)) else _read_hub
        yield from ((f"record {index}", raw) for index, raw in enumerate(read(str(source))))
        return
    text = _text(path)
    if text.lstrip().startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):  # of one object a line
            whole = json.loads(text)
            if isinstance(items := whole.get("data"), list):
                yield from ((f"record {index}", raw) for index, raw in enumerate(items))
                return
            if whole and all(key.isdigit() for key in whole):
                yield from ((f"record {key!r}", raw) for key, raw in whole.items())
                return
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise MalformedRecord(
                f"{path}: not valid JSON at line {error.lineno}, column {error.colno} "
                f"({error.msg}). The file may be cut short; fetch it again."
            ) from error
        yield from ((_Place(text, index), raw) for index, raw in enumerate(items))
        return
    # Not splitlines(): JSON text may hold U+2028 and its like unescaped.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for index, (number, line) in enumerate(lines):
        place = f"record {index} (line {number})"
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            why = "The file must be a JSON list, or hold one JSON object a line."
            raw = MalformedRecord(f"not valid JSON ({error.msg}). {why}")
        yield place, raw


def _text(path: Path) -> str:
    """Return the text of a file: UTF-8, or UTF-16 with its mark, as it is or compressed by gzip."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MalformedRecord(
            f"{path}: no text in UTF-8 or UTF-16, nor one compressed by gzip ({error}). Convert it, as "
            "with `iconv -t utf-8`, or fetch it again."
        ) from error


def _read_hub(source: str) -> Iterable[Any]:
    if source.count("/") != 1 or source.startswith((".", "/")) or source.endswith((".json", "l")):
        raise FileNotFoundError(
            f"no such file: {source}. Give the path of a JSON or JSONL file, or a Hugging Face "
            "data set's id such as owner/name."
        )
    import datasets  # Takes a second, and only this branch needs it.

    try:
        return datasets.load_dataset(source, split="train")
    except Exception as error:
        raise FileNotFoundError(
            f"{source} is neither a file nor a data set that could be loaded from the Hugging Face "
            f"hub ({type(error).__name__}: {error}). Check the path and the network."
        ) from error


def get(record: Any, path: str) -> Any:
    """Return the value at a path of a raw record, such as "requested_rewrite.target_new.str:text".

    "*" stands for every item of a list, and for every value in an object, or every item of those that
    are lists, {group: [item, …], …}; it gives a tuple. "!" is the only item of a list. "?" allows that a
    name is missing, which gives (). After the colon is what the value must be: a "number"; "text", whose
    outer blanks go; "blank", text that may be empty; "texts", a string or a list of strings, as a tuple;
    "filled", texts of which there are any; "first", the first of these; "answer", the first text of
    lists and of objects with a "value", however deep, "" where there is none; "group", the name of the
    object's value that it is in.

    Raises:
        MalformedRecord: of a missing field or a wrong type; names the field.
    """
    names, kind = path.split(":")
    values = tuple(_read(value, place, kind) for place, value in _walk(record, names.split(".")))
    return values[0] if values and "*" not in path else values


def _walk(value: Any, names: list[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value that a path leads to, after its own path."""
    if not names:
        yield path, value
        return
    name, *inner = names
    if name in ("*", "!") and isinstance(value, list):
        if name == "!" and len(value) != 1:
            fail(path, f"has {len(value)} items, and a record of one edit is read")
        for i, item in enumerate(value):
            yield from _walk(item, inner, f"{path}[{i}]")
        return
    require(value, path, "an object", dict)
    if name == "*":
        for group, items in value.items():
            place = f"{path}.{group}".removeprefix(".")
            if isinstance(items, dict):
                yield from _walk(items, inner, place)
                continue
            for i, item in enumerate(require(items, place, "a list", list)):
                yield from _walk(item, inner, f"{place}[{i}]")
    elif (key := name.removesuffix("?")) in value:
        yield from _walk(value[key], inner, f"{path}.{key}".removeprefix("."))
    elif key == name:
        present = ", ".join(sorted(value)) or "none"
        fail(f"{path}.{key}".removeprefix("."), f"is missing (the record has {present})")


def _read(value: Any, path: str, kind: str) -> Any:
    if kind == "number":
        return require(value, path, "a whole number", int)
    if kind == "group":
        return path.split(".")[1].partition("[")[0]
    if kind == "answer":
        while isinstance(value, list | dict):
            value = value.get("value") if isinstance(value, dict) else next(iter(value), "")
        kind = "blank"
    if kind in ("text", "blank"):
        text = require(value, path, "text", str).strip()
        return text if text or kind == "blank" else fail(path, "is empty")
    single = type(require(value, path, "text or a list of texts", str, list)) is str
    items = [(path, value)] if single else ((f"{path}[{i}]", v) for i, v in enumerate(value))
    texts = tuple(_read(item, place, "text") for place, item in items)
    if kind != "texts" and not texts:
        fail(path, "is an empty list")
    return texts[0] if kind == "first" else texts


def require(value: Any, path: str, what: str, *types: type) -> Any:
    # Not isinstance(): True is an int.
    if type(value) not in types:
        fail(path, f"must be {what}, not {type(value).__name__}")
    return value


def fail(path: str, why: str) -> NoReturn:
    """Raise MalformedRecord about the field at `path`; about the whole record where that is empty."""
    raise MalformedRecord(
        f"{f'field {path!r} ' if path else ''}{why}. The file may be cut short or of another schema; "
        "compare it with the benchmark's original."
    )
