"""Text encoders, one family per file: each defines what FAMILY names."""

from collections.abc import Mapping
from types import ModuleType

from larimar_jax import registry

# Sizes, module, names in Hugging Face's files, where its parameters are split, and sizes from and to
# Hugging Face's config.json.
# A file may add MODEL_TYPES, if it computes other model types than the one it is called
# after.
FAMILY = ("CONFIG", "MODEL", "KEYS", "SHARDING", "from_huggingface", "to_huggingface")


def families() -> Mapping[str, ModuleType]:
    """Every encoder family in this folder, by file name."""
    return registry.scan(__name__, *FAMILY)


def family(name: str) -> ModuleType:
    """The family of that file name or Hugging Face model type; ValueError lists the known ones."""
    return registry.lookup(registry.by_type(families()), name, "encoder family")
