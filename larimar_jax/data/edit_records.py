"""The one record type of every editing benchmark, and the checks that its readers share."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn


@dataclasses.dataclass(frozen=True)
class EditRecord:
    """One edit and the prompts that judge it, whatever benchmark it comes from.

    Attributes:
        case_id: the benchmark's own number, or the record's index where it has none.
        prompt: the edit prompt, with its subject filled in.
        subject: what the fact is about.
        target_new: the answer to be written, without a leading space.
        target_true: the answer it displaces ("" where the benchmark gives none).
        paraphrases: other wordings of the prompt, which must change with it.
        neighbourhood: prompts that must *not* change.
        neighbourhood_targets: the right answer to each of `neighbourhood`, in its order.
        answers: every accepted spelling of `target_new`, the first of them `target_new` itself.
        generation: prompts for free generation, where the benchmark has them.
        portability: (prompt, answer) pairs that follow from the edit, where the benchmark has them.
    """

    case_id: int
    prompt: str
    subject: str
    target_new: str
    target_true: str
    paraphrases: tuple[str, ...]
    neighbourhood: tuple[str, ...]
    neighbourhood_targets: tuple[str, ...]
    answers: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    portability: tuple[tuple[str, str], ...] = ()


class MalformedRecord(ValueError):
    """A benchmark file holds a record that its schema does not allow."""


class Field:
    """Reads the fields of one raw record; an error names file, record, line and field."""

    def __init__(self, raw: Any, source: str, place: str, trail: str = ""):
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

    def _get(self, name: str) -> Any:
        if name not in self.raw:
            self.fail(name, f"is missing (the record has {', '.join(sorted(self.raw)) or 'none'})")
        return self.raw[name]

    def _checked(self, name: str, value: Any, empty: bool) -> str:
        if not isinstance(value, str):
            self.fail(name, f"must be text, not {type(value).__name__}")
        if not empty and not value.strip():
            self.fail(name, "is empty")
        return value.strip()

    def text(self, name: str, *, empty: bool = False) -> str:
        """A string without the blanks around it; `empty` allows "" ."""
        return self._checked(name, self._get(name), empty)

    def texts(self, name: str) -> tuple[str, ...]:
        """A string or a list of strings, as a tuple; a list may be empty."""
        value = self._get(name)
        if isinstance(value, str):
            return (self._checked(name, value, False),)
        if not isinstance(value, list):
            self.fail(name, f"must be text or a list of texts, not {type(value).__name__}")
        return tuple(self._checked(f"{name}[{i}]", item, False) for i, item in enumerate(value))

    def first(self, name: str) -> str:
        """The first of a non-empty list of strings (or the string itself)."""
        values = self.texts(name)
        if not values:
            self.fail(name, "is an empty list")
        return values[0]

    def integer(self, name: str) -> int:
        """A whole number."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(name, f"must be a whole number, not {value!r}")
        return value

    def inside(self, name: str) -> "Field":
        """The object under `name`, itself a Field."""
        value = self._get(name)
        if not isinstance(value, dict):
            self.fail(name, f"must be an object, not {type(value).__name__}")
        return Field(value, self._source, self._place, ".".join(filter(None, (self._trail, name))))

    def groups(self, name: str) -> list["Field"]:
        """Every item of every list in the object `name`: {group: [{…}, …], …}."""
        found = []
        for group, items in self.inside(name).raw.items():
            if not isinstance(items, list):
                self.fail(f"{name}.{group}", f"must be a list, not {type(items).__name__}")
            for i, item in enumerate(items):
                trail = ".".join(filter(None, (self._trail, f"{name}.{group}[{i}]")))
                found.append(Field(item, self._source, self._place, trail))
        return found


def read_raw(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Where each record of a JSON list, a JSONL file or a Hugging Face data set is, and the raw record;
    of a line that is not JSON, the error in its place.

    Args:
        source: a path, or a data set's id ("owner/name", its train split) where there is a network.
    Returns:
        "record 3 (line 17)" and the record; the line is the one that it begins in. A data set's records
        have none.
    Raises:
        FileNotFoundError: neither a file nor something that looks like a data set's id.
        MalformedRecord: the file is a list, but not of JSON.
    """
    path = Path(source)
    if not path.is_file():
        for index, raw in enumerate(_read_hub(str(source))):
            yield f"record {index}", raw
        return
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            found = _items(text)
        except json.JSONDecodeError as error:
            raise MalformedRecord(
                f"{path}: not valid JSON at line {error.lineno}, column {error.colno} "
                f"({error.msg}). The file may be cut short; fetch it again."
            ) from error
        for index, (line, raw) in enumerate(found):
            yield f"record {index} (line {line})", raw
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


_BLANKS = re.compile(r"[ \t\n\r]*")


def _items(text: str) -> list[tuple[int, Any]]:
    """The line that each item of a JSON list begins in, and the item.

    Raises:
        json.JSONDecodeError: where and what `json.loads` would say.
    """

    def beyond(place: int) -> int:
        """Behind the blanks from here on."""
        return _BLANKS.match(text, place).end()

    decode, found = json.JSONDecoder().raw_decode, []
    place, line, counted = beyond(text.index("[") + 1), 1, 0
    if not text.startswith("]", place):
        while True:
            line, counted = line + text.count("\n", counted, place), place
            item, place = decode(text, place)
            found.append((line, item))
            place = beyond(place)
            if not text.startswith(",", place):
                break
            place = beyond(place + 1)
    if not text.startswith("]", place):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    if (end := beyond(place + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return found


def _read_hub(source: str) -> Iterable[Any]:
    if source.count("/") != 1 or source.startswith((".", "/")) or source.endswith((".json", "l")):
        raise FileNotFoundError(
            f"no such file: {source}. Give the path of a JSON or JSONL file, or a Hugging Face "
            "data set's id such as owner/name."
        )
    try:
        import datasets  # Optional, and only this branch needs it.

        return datasets.load_dataset(source, split="train")
    except Exception as error:
        raise FileNotFoundError(
            f"{source} is neither a file nor a data set that could be loaded from the Hugging Face "
            f"hub ({type(error).__name__}: {error}). Check the path, the network, and that the "
            "package datasets is installed."
        ) from error


def provenance(source: str | Path) -> dict[str, str | None]:
    """What tells one source of records from another: its name and sha256 (None of a data set's id)."""
    path = Path(source)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {"name": path.name, "sha256": digest}


def load(
    source: str | Path,
    parse: Callable[[Field, int], EditRecord],
    limit: int | None,
    skipped: list[str] | None = None,
) -> list[EditRecord]:
    """The first `limit` records of `source` (None: all), each through `parse(field, index)`.

    Args:
        skipped: where it is given, a malformed record does not raise: what is wrong with it is appended
            here, and it does not count for `limit`.
    """
    records: list[EditRecord] = []
    for index, (place, raw) in enumerate(read_raw(source)):
        if limit is not None and len(records) >= limit:
            break
        try:
            if isinstance(raw, MalformedRecord):
                raise raw
            records.append(parse(Field(raw, str(source), place), index))
        except MalformedRecord as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    if not records and limit != 0:
        more = f" that can be read; of the first: {skipped[0]}" if skipped else "."
        raise MalformedRecord(f"{source}: holds no record{more}")
    return records
