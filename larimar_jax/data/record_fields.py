"""Raw records of a benchmark's file; an error names file, record, line and field."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn


class MalformedRecord(ValueError):
    """A benchmark file holds a record that its schema does not allow."""


class Field:
    """The fields of one raw record; an error names file, record, line and field.

    place: where the record is, such as "record 3 (line 17)", computed only for an error.
    """

    def __init__(self, raw: Any, source: str, place: Any, trail: str = ""):
        self._source, self._place, self._trail = source, place, trail
        if not isinstance(raw, dict):
            self.fail("", f"must be an object, not {type(raw).__name__}")
        self.raw = raw

    def fail(self, name: str, why: str) -> NoReturn:
        """Raise MalformedRecord about the field `name` of this record."""
        path = ".".join(part for part in (self._trail, name) if part)
        field = f"field {path!r} " if path else ""
        raise MalformedRecord(
            f"{self._source}, {self._place}: {field}{why}. The file may be cut short or of "
            "another schema; compare it with the benchmark's original."
        )

    def _get(self, name: str, kind: Any, what: str) -> Any:
        if name not in self.raw:
            self.fail(name, f"is missing (the record has {', '.join(sorted(self.raw)) or 'none'})")
        value = self.raw[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            self.fail(name, f"must be {what}, not {type(value).__name__}")
        return value

    def text(self, name: str, *, empty: bool = False) -> str:
        """Return a string without the blanks around it; `empty` allows ""."""
        value = self._get(name, str, "text").strip()
        if not (empty or value):
            self.fail(name, "is empty")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a string or a list of strings as a tuple; a list may be empty."""
        value = self._get(name, str | list, "text or a list of texts")
        if isinstance(value, str):
            return (self.text(name),)
        items = Field({f"{name}[{i}]": v for i, v in enumerate(value)}, *self._where(self._trail))
        return tuple(items.text(item) for item in items.raw)

    def first(self, name: str) -> str:
        """Return the first of a non-empty list of strings (or the string itself)."""
        values = self.texts(name)
        return values[0] if values else self.fail(name, "is an empty list")

    def integer(self, name: str) -> int:
        """Return a whole number."""
        return self._get(name, int, "a whole number")

    def inside(self, name: str) -> "Field":
        """Return the object under `name`, itself a Field."""
        return Field(self._get(name, dict, "an object"), *self._where(self._below(name)))

    def groups(self, name: str) -> list["Field"]:
        """Return every item of every list in the object `name`: {group: [{…}, …], …}."""
        groups = self.inside(name)
        return [
            Field(item, *self._where(groups._below(f"{group}[{i}]")))
            for group in groups.raw
            for i, item in enumerate(groups._get(group, list, "a list"))
        ]

    def _where(self, trail: str) -> tuple[str, Any, str]:
        return self._source, self._place, trail

    def _below(self, name: str) -> str:
        return ".".join(filter(None, (self._trail, name)))


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
    """Yield where each record is and the raw record; of a line that is not JSON, the error."""
    path = Path(source)
    if not path.is_file():
        for index, raw in enumerate(_read_hub(str(source))):
            yield f"record {index}", raw
        return
    text = path.read_text(encoding="utf-8")
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
            raw = MalformedRecord(
                f"{path}, {place}: not valid JSON ({error.msg}). The file must be a JSON "
                "list, or hold one JSON object a line."
            )
        yield place, raw


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
