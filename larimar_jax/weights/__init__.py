"""Pretrained towers: `load_encoder` and `load_decoder`, and what they share with other files."""

from larimar_jax.weights.key_table import Source, WeightsError, Where
from larimar_jax.weights.load import (
    fingerprint,
    load_decoder,
    load_encoder,
    load_tokenizer,
    open_checkpoint,
    sizes,
)
from larimar_jax.weights.packaged import PACKAGED
from larimar_jax.weights.tokenizer import TextTooLong, TokenBatch, Tokenizer

__all__ = [
    "PACKAGED",
    "Source",
    "TextTooLong",
    "TokenBatch",
    "Tokenizer",
    "WeightsError",
    "Where",
    "fingerprint",
    "load_decoder",
    "load_encoder",
    "load_tokenizer",
    "open_checkpoint",
    "sizes",
]
