"""Nested dicts → frozen dataclasses, strictly: unknown and missing keys and wrong types are named."""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

# What builds the sections whose keys depend on their content, by their dataclass.
Special = Mapping[Any, Callable[[Any, str, list[str]], Any]]


def build(kind: Any, value: Any, path: str, problems: list[str], special: Special) -> Any:
    """`value` as a `kind`; each offence is appended to `problems` as `path: what is wrong`.

    Args:
      kind: a dataclass, or the annotation of a field: int, float, str, bool, a Literal, a tuple of
        these, or one of them or None.
      special: builders for dataclasses that are not read by their fields.
    """
    if kind in special:
        return special[kind](value, path, problems)
    if dataclasses.is_dataclass(kind):
        return section(kind, value, path, problems, special)
    return _scalar(kind, value, path, problems, special)


def section(
    kind: Any,
    value: Any,
    path: str,
    problems: list[str],
    special: Special,
    given: tuple[str, ...] = (),
) -> Any:
    """A dataclass from its section; with `given` fields left out, the dict of the others."""
    if not isinstance(value, Mapping):
        problems.append(f"{path or 'config'}: expected a section, got {value!r}")
        return None
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in given]
    prefix = f"{path}." if path else ""
    problems += [
        f"{prefix}{key}: unknown key; known: {', '.join(names)}"
        for key in value
        if key not in names
    ]
    problems += [f"{prefix}{name}: missing" for name in names if name not in value]
    built = {
        name: build(hints[name], value[name], prefix + name, problems, special)
        for name in names
        if name in value
    }
    if given:
        return built
    # With an offence somewhere nothing is built: the caller raises at its end.
    return None if problems else kind(**built)


def _scalar(kind: Any, value: Any, path: str, problems: list[str], special: Special) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        # A real hyperparameter is annotated "float or a traced array"; a file gives the float.
        kind = next(a for a in arguments if _of_a_file(a))
        return build(kind, value, path, problems, special)
    if origin is tuple:
        size = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, (tuple, list)) or (size is not None and len(value) != size):
            problems.append(f"{path}: expected {size or 'a list of'} values, got {value!r}")
            return None
        return tuple(
            _scalar(arguments[0], item, f"{path}[{i}]", problems, special)
            for i, item in enumerate(value)
        )
    if origin is typing.Literal:
        if value not in arguments:
            problems.append(
                f"{path}: must be one of {', '.join(map(repr, arguments))}, got {value!r}"
            )
        return value
    # An int is a valid float; a bool is a valid nothing but bool, although Python says it is an int.
    wanted = (int, float) if kind is float else kind if isinstance(kind, type) else object
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind in (int, float)):
        problems.append(f"{path}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
        return None
    return float(value) if kind is float else value


def _of_a_file(kind: Any) -> bool:
    """Whether a config file can hold it: a number, a text, a choice, a section."""
    simple = kind in (int, float, str, bool) or typing.get_origin(kind) is typing.Literal
    return simple or dataclasses.is_dataclass(kind)
