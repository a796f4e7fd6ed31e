"""Settings by dataclass: types with checks, and nested dicts read strictly, all offences at once."""

import ast
import copy
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

T = TypeVar("T")
# Reads what is not read field by field: (value, path, problems) → object, or None after a problem.
Reader = Callable[[Any, str, list[str]], Any]


class ConfigError(ValueError):
    """Settings with unknown or missing keys, or with values of a wrong type or out of range."""


def suggestion(name: Any, known: Iterable[str]) -> str:
    """Return "did you mean …? known: …", for an error about a name that does not exist."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    likely = f"did you mean {close[0]}? " if close else ""
    return f"{likely}known: {', '.join(known) or 'none'}"


def named(
    value: Any, key: str, known: Mapping[str, Any], path: str, problems: list[str]
) -> tuple[str, dict[str, Any]] | None:
    """Return the known name under `key` of a section, and its other settings. A text alone is a name.

    None where there is no such name, which is then appended to `problems`.
    """
    settings = dict(value) if isinstance(value, Mapping) else {key: value}
    name = settings.pop(key, None)
    if isinstance(name, str) and name in known:
        return name, settings
    problems.append(f"{path}.{key}: no {name!r}; {suggestion(name, known)}")
    return None


# Checks of values of the right type: functions from a value to what is wrong with it ("": nothing).


def _check(test: Callable[[Any], Any], message: str) -> Callable[[Any], str]:
    return lambda value: "" if test(value) else message.format(value)


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        return f"{value!r} is no regular expression ({error})"
    return ""


_POSITIVE = _check(lambda value: value > 0, "must be above 0, got {!r}")
_NOT_NEGATIVE = _check(lambda value: value >= 0, "must be at least 0, got {!r}")
_BELOW_ONE = _check(lambda value: 0 <= value < 1, "must be at least 0 and below 1, got {!r}")
NOT_EMPTY = _check(bool, "needs at least one")
TWO_OR_MORE = _check(lambda value: value >= 2, "must be at least 2, got {}")
MULTIPLE_OF_32 = _check(lambda value: value % 32 == 0, "must be a multiple of 32, got {}")

Count = Annotated[int, _POSITIVE]
Natural = Annotated[int, _NOT_NEGATIVE]
Positive = Annotated[float, _POSITIVE]
NonNegative = Annotated[float, _NOT_NEGATIVE]
Fraction = Annotated[float, _BELOW_ONE]
Regex = Annotated[str, _pattern]


def from_dict(
    kind: type[T], values: Any, readers: Mapping[Any, Reader] = MappingProxyType({})
) -> T:
    """Return a dataclass from a nested dict; a key that is not there means the field's default.

    Args:
      kind: its fields are numbers, texts, bools, Literals, tuples, mappings or dataclasses of these,
        one of them or None, or `Annotated` with checks.
      readers: for types that are not read field by field.
    Raises:
      ConfigError: naming every unknown key, missing key and wrong value.
    """
    problems: list[str] = []
    result = read(kind, values, "", problems, readers)
    refuse(problems)
    return result


def refuse(problems: Iterable[str]) -> None:
    """Raise one ConfigError of all problems, each once, where there are any."""
    if problems := list(dict.fromkeys(problems)):
        raise ConfigError("The config does not fit:\n  " + "\n  ".join(problems))


def fields(
    kind: type,
    values: Any,
    path: str,
    problems: list[str],
    readers: Mapping[Any, Reader],
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the value of every field of a dataclass but those in `without`; as `read` otherwise."""
    if not isinstance(values, Mapping):
        problems.append(f"{path or 'config'}: expected a section, got {values!r}")
        return {}
    hints = typing.get_type_hints(kind, include_extras=True)
    known = {field.name: field for field in dataclasses.fields(kind) if field.name not in without}
    prefix = f"{path}." if path else ""
    problems += [
        f"{prefix}{key}: unknown key; {suggestion(key, known)}"
        for key in values
        if key not in known
    ]
    result = {}
    for name, field in known.items():
        if name in values:
            result[name] = read(hints[name], values[name], prefix + name, problems, readers)
        elif field.default is not dataclasses.MISSING:
            result[name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            result[name] = field.default_factory()
        else:
            problems.append(f"{prefix}{name}: missing")
    return result


def read(
    kind: Any, value: Any, path: str, problems: list[str], readers: Mapping[Any, Reader]
) -> Any:
    """Return `value` as a `kind`, or None where `path: what is wrong` was appended to `problems`."""
    origin, arguments, before = typing.get_origin(kind), typing.get_args(kind), len(problems)
    if kind in readers:
        return readers[kind](value, path, problems)
    if dataclasses.is_dataclass(kind):
        result = fields(kind, value, path, problems, readers)
        try:
            return kind(**result) if len(problems) == before else None
        except ValueError as error:
            problems.append(f"{path or 'config'}: {error}")
            return None
    if origin is Annotated:
        result = read(arguments[0], value, path, problems, readers)
        checks = arguments[1:] if len(problems) == before else ()
        problems += [f"{path}: {wrong}" for check in checks if (wrong := check(result))]
        return result
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        # A hyperparameter is annotated "float or a traced array"; a file holds the float.
        kind = next(part for part in arguments if part is not type(None))
        return read(kind, value, path, problems, readers)
    if origin is tuple:
        size = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, tuple | list) or (size is not None and len(value) != size):
            problems.append(f"{path}: expected {size or 'a list of'} values, got {value!r}")
            return None
        items = enumerate(value)
        return tuple(read(arguments[0], v, f"{path}[{i}]", problems, readers) for i, v in items)
    if origin is abc.Mapping and isinstance(value, Mapping):
        items = value.items()
        return {k: read(arguments[1], v, f"{path}.{k}", problems, readers) for k, v in items}
    return value if kind is Any else _scalar(kind, value, path, problems)


def _scalar(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """As `read`, for a Literal, a number, a text or a bool."""
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            expected = ", ".join(map(repr, choices))
            problems.append(f"{path}: must be one of {expected}, got {value!r}")
        return value
    expected = typing.get_origin(kind) or kind
    # An int is a valid float; a bool is valid as a bool only, although Python calls it an int.
    valid = isinstance(value, (int, float) if kind is float else expected)
    if not valid or (isinstance(value, bool) and kind in (int, float)):
        name = "a section" if expected is abc.Mapping else expected.__name__
        problems.append(f"{path}: expected {name}, got {value!r}")
    elif kind is float and not math.isfinite(value):
        problems.append(f"{path}: must be finite, got {value}")
    return float(value) if kind is float and valid else value


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return a nested dict with `section.key=value` assignments; `from_dict` then names unknown keys.

    A value is JSON or a Python literal (true, True, null, None, [1, 2], "text"), or else a text.

    Raises:
      ConfigError: an assignment without a value, or into what is no section.
    """
    result = copy.deepcopy(dict(values))
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        *parents, leaf = path.split(".")
        section: Any = result
        for parent in parents:
            if isinstance(section, dict) and section.get(parent) is None:
                section[parent] = {}
            section = section[parent] if isinstance(section, dict) else None
        if not separator or not isinstance(section, dict):
            raise ConfigError(
                f"The override {assignment!r} names no setting of a section. Write it as "
                "section.key=value, for example train.steps=100."
            )
        section[leaf] = _literal(text)
    return result


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
