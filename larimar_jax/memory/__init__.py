"""Episodic memories. A file here that defines a `Memory` is a variant, named by the file."""

import dataclasses

from larimar_jax import registry
from larimar_jax.memory import addressing
from larimar_jax.memory.base import Memory, MemoryParams, Prepared, Reading

__all__ = ["Memory", "MemoryParams", "Prepared", "Reading", "UnknownVariant", "build", "variants"]


class UnknownVariant(ValueError):
    """A variant that does not exist, or a setting that the variant does not have."""


def variants() -> dict[str, type[Memory]]:
    """Return every variant of this folder, {file name: class}, without a list to edit.

    Raises:
      ValueError: a file defines two variants.
    """
    classes: dict[str, type[Memory]] = {}
    for name, cls in registry.defined_classes(__name__):
        if issubclass(cls, Memory) and cls is not Memory:
            if name in classes:
                raise ValueError(
                    f"memory/{name}.py defines two variants, {classes[name].__name__} and "
                    f"{cls.__name__}: give each a file, whose name is the variant's name."
                )
            classes[name] = cls
    return classes


def build(name: str, **settings) -> Memory:
    """Build the variant of that name, e.g. build('streaming', slots=512, latent=768, ridge=0.1).

    `addressing` may be an `Addressing`, or what a config holds (`addressing.build`).

    Raises:
      UnknownVariant: naming the known variants, or the settings that the variant has.
      addressing.UnknownAddressing: naming the known kinds, or the numbers that the kind has.
    """
    known = variants()
    if name not in known:
        raise UnknownVariant(
            f"there is no memory variant {name!r}; known: {', '.join(sorted(known))}. A new one is "
            "a file in larimar_jax/memory/."
        )
    fields = sorted(field.name for field in dataclasses.fields(known[name]))
    if unknown := sorted(set(settings) - set(fields)):
        raise UnknownVariant(
            f"the memory {name!r} has no setting {', '.join(unknown)}; it has {', '.join(fields)}."
        )
    if "addressing" in settings:
        settings["addressing"] = addressing.build(settings["addressing"])
    return known[name](**settings)
