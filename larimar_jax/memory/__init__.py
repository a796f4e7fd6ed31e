"""Episodic memories. A file here that defines a `Memory` is a variant, named by the file."""

import importlib
import pkgutil

from larimar_jax.memory.base import Memory, MemoryParams, Prepared, Reading

__all__ = ["Memory", "MemoryParams", "Prepared", "Reading", "UnknownVariant", "build", "variants"]


class UnknownVariant(ValueError):
    """There is no memory of that name, or it has no such setting."""


def variants() -> dict[str, type[Memory]]:
    """Every variant in this folder, {file name: class}; found by looking: no list to edit."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue  # What variants share.
        names = vars(importlib.import_module(f"{__name__}.{module.name}"))
        for value in names.values():
            own = isinstance(value, type) and value.__module__ == f"{__name__}.{module.name}"
            if own and issubclass(value, Memory) and value is not Memory:
                if module.name in found:
                    raise ValueError(
                        f"memory/{module.name}.py defines two variants, "
                        f"{found[module.name].__name__} and {value.__name__}: give each a file, "
                        "whose name is the variant's name."
                    )
                found[module.name] = value
    return found


def build(name: str, **settings) -> Memory:
    """The variant of that name with these settings, e.g. build('streaming', slots=512, latent=768).

    Raises UnknownVariant naming the known variants, or the settings that the variant has.
    """
    known = variants()
    if name not in known:
        raise UnknownVariant(
            f"there is no memory variant {name!r}; known: {', '.join(sorted(known))}. A new one is "
            "a file in larimar_jax/memory/."
        )
    fields = set(known[name].__dataclass_fields__)
    if unknown := sorted(set(settings) - fields):
        raise UnknownVariant(
            f"the memory {name!r} has no setting {', '.join(unknown)}; it has "
            f"{', '.join(sorted(fields))}."
        )
    return known[name](**settings)
