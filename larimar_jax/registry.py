"""Families of towers: one class a file, found by the file's name; their names in Hugging Face's files.

A new family is one new file in `encoders/` or `decoders/`, with no list to edit.
"""

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

# What makes a class a family: the dataclass of its sizes (`HuggingFaceSizes`), the model types of
# Hugging Face that it computes, the table of tensor names (weights/key_table.py), and where its
# parameters are split (train/sharding.py). `added_tokens`: special tokens that its vocabulary gets (§2);
# `spare_tokens`: tokens of it that take their place.
FAMILY = ("CONFIG", "model_types", "hf_keys", "sharding_rules")

Keys = tuple[tuple[str, str | None, str], ...]


def defined_classes(package: str) -> Iterator[tuple[str, type]]:
    """Yield (file name, class) of every class that a package's files define; files of helpers, whose
    names begin with "_", are left out."""
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{package}.{info.name}")
            for cls in vars(module).values():
                if isinstance(cls, type) and cls.__module__ == module.__name__:
                    yield info.name, cls


@functools.cache
def families(package: str) -> Mapping[str, type]:
    """Return the family classes of a package by file name.

    Files without such a class (helpers) are left out. A class that defines only some of `FAMILY` is an
    unfinished family, and an error: leaving it out would hide the slip.

    Raises:
      TypeError: an unfinished family, or two families in one file.
    """
    classes = {}
    for name, cls in defined_classes(package):
        missing = [part for part in FAMILY if not hasattr(cls, part)]
        if 0 < len(missing) < len(FAMILY):
            raise TypeError(
                f"{package}.{name}.{cls.__name__} looks like a family but does not define"
                f" {', '.join(missing)}; every family defines {', '.join(FAMILY)}"
            )
        if not missing and name in classes:
            raise TypeError(f"{package}.{name} defines two families; give each its file")
        if not missing:
            classes[name] = cls
    return MappingProxyType(dict(sorted(classes.items())))


def by_model_type(package: str) -> Mapping[str, type]:
    """Return the family classes of a package by the model types of Hugging Face that they compute."""
    return MappingProxyType({t: cls for cls in families(package).values() for t in cls.model_types})


def family(package: str, model_type: str) -> type:
    """Return the family that computes a model type of Hugging Face.

    Raises:
      ValueError: no family computes it; lists the known ones.
    """
    known = by_model_type(package)
    if model_type not in known:
        kind = package.rpartition(".")[2].removesuffix("s")
        raise ValueError(f"unknown {kind} family {model_type!r}; known: {', '.join(known)}")
    return known[model_type]


class WholeHeads:
    """Sizes with heads that share the width evenly, each with its own key and value."""

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads: one for each query head."""
        return self.heads

    @property
    def head_size(self) -> int:
        """The width of one head."""
        return self.width // self.heads


class HuggingFaceSizes:
    """Sizes of a tower, a frozen dataclass, with their names in a Hugging Face config.json.

    hf_type: its model type and architecture. hf_names: the key of each field.
    hf_fixed: settings that are computed in one way only, with that way.
    """

    hf_type: ClassVar[tuple[str, str]]
    hf_names: ClassVar[Mapping[str, str]]
    hf_fixed: ClassVar[Mapping[str, Any]]

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "HuggingFaceSizes":
        """Return the sizes in a config.json of this family, with Hugging Face's defaults filled in.

        Raises:
          ValueError: a setting that this implementation does not compute.
          KeyError: a size is not there.
        """
        differing = [
            f"{key} is {config[key]!r}, and only {value!r} is computed"
            for key, value in cls.hf_fixed.items()
            if config.get(key, value) != value
        ]
        if differing:
            raise ValueError(
                f"this {config['model_type']} is not supported: {'; '.join(differing)}"
            )
        return cls(**{field: config[key] for field, key in cls.hf_names.items()})

    def to_huggingface(self) -> dict[str, Any]:
        """Return the config.json of a model of these sizes."""
        model_type, architecture = self.hf_type
        sizes = {key: getattr(self, field) for field, key in self.hf_names.items()}
        return {"model_type": model_type, "architectures": [architecture], **sizes, **self.hf_fixed}


def linear_keys(source: str, target: str, transform: str = "transpose") -> Keys:
    """Return the rows of a key table for the weight and bias of a linear map."""
    bias = "copy" if transform == "transpose" else transform
    weight = (f"{source}.weight", f"{target}.kernel", transform)
    return (weight, (f"{source}.bias", f"{target}.bias", bias))


def norm_keys(source: str, target: str, scale: str = "weight", bias: str = "bias") -> Keys:
    """Return the rows of a key table for the scale and bias of a LayerNorm."""
    return (
        (f"{source}.{scale}", f"{target}.scale", "copy"),
        (f"{source}.{bias}", f"{target}.bias", "copy"),
    )
