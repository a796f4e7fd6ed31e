"""Text encoders, one family per file: each defines CONFIG, MODEL, KEYS and from_huggingface."""

from collections.abc import Mapping
from types import ModuleType

from larimar_jax import registry


def families() -> Mapping[str, ModuleType]:
    """Every encoder family in this folder, by file name."""
    return registry.scan(__name__, "CONFIG", "MODEL", "KEYS", "from_huggingface")


def family(name: str) -> ModuleType:
    """The family file of that name; ValueError lists the known ones."""
    return registry.lookup(families(), name, "encoder family")
