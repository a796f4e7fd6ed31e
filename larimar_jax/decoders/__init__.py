"""Causal language models: one family a file, a subclass of `decoders/decoder.py`'s `Decoder`."""

from collections.abc import Mapping

from larimar_jax import registry


def families() -> Mapping[str, type]:
    """Return every decoder family in this folder, by file name."""
    return registry.families(__name__)


def family(model_type: str) -> type:
    """Return the decoder family that computes a Hugging Face model type; as `registry.family`."""
    return registry.family(__name__, model_type)
