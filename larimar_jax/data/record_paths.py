"""Values of raw records by their paths, with errors that name the field."""

from collections.abc import Iterator
from typing import Any, NoReturn

from larimar_jax.data.record_files import MalformedRecord


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
