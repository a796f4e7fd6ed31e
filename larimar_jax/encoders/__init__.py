"""Text encoders: one family a file."""

from collections.abc import Mapping

from larimar_jax import registry


def families() -> Mapping[str, type]:
    """Return every encoder family in this folder, by file name."""
    return registry.families(__name__)


def family(model_type: str) -> type:
    """Return the encoder family that computes a Hugging Face model type; as `registry.family`."""
    return registry.family(__name__, model_type)
