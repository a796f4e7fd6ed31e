"""Causal language models: one family a file, a subclass of `decoders/decoder.py`'s `Decoder`."""

import functools

from larimar_jax import registry

# Those of this folder, all by file name, and that of a Hugging Face model type.
families = functools.partial(registry.families, __name__)
family = functools.partial(registry.family, __name__)
