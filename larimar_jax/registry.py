"""Implementations found by their file name: a new family is one new file, with no list to edit."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType, ModuleType


@functools.cache
def scan(package: str, *required: str) -> MappingProxyType[str, ModuleType]:
    """Modules of `package` that define every attribute in `required`, by file name.

    Files that define none of them (helpers) are left out. A file that defines only some is an
    unfinished family, and an error: leaving it out would hide the slip.

    Raises:
      TypeError: a file defines some of the required attributes and lacks others.
    """
    found = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        missing = [name for name in required if not hasattr(module, name)]
        if not missing:
            found[info.name] = module
        elif len(missing) < len(required):
            raise TypeError(
                f"{package}.{info.name} looks like a family but does not define"
                f" {', '.join(missing)}; every family file defines {', '.join(required)}"
            )
    return MappingProxyType(dict(sorted(found.items())))


def by_type(found: Mapping[str, ModuleType]) -> Mapping[str, ModuleType]:
    """Modules by the names in their MODEL_TYPES, or by file name where they have none."""
    return MappingProxyType(
        {
            kind: module
            for name, module in found.items()
            for kind in getattr(module, "MODEL_TYPES", (name,))
        }
    )


def lookup(found: Mapping[str, ModuleType], name: str, kind: str) -> ModuleType:
    """`found[name]`, with an error that lists the known names.

    Raises:
      ValueError: no file of that name.
    """
    if name not in found:
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(found) or 'none'}")
    return found[name]
