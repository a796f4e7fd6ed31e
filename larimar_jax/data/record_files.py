"""Raw records of editing benchmarks: from files of JSON as programs write them, the hub or the world."""

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
from typing import Any

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
