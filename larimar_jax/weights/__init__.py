"""Pretrained towers, loaded strictly and without torch."""

import dataclasses
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from larimar_jax import decoders, encoders
from larimar_jax.weights import fill, folder, gguf, packages, safetensors, tokenizers
from larimar_jax.weights.fill import WeightsError
from larimar_jax.weights.tokenizers import TextTooLong, TokenBatch, Tokenizer

__all__ = [
    "PACKAGED",
    "TextTooLong",
    "TokenBatch",
    "Tokenizer",
    "WeightsError",
    "fill",
    "folder",
    "gguf",
    "load_decoder",
    "load_encoder",
    "packages",
    "safetensors",
    "tokenizers",
]

# Names that need no path, and where their files are.
PACKAGED = {"minilm": packages.minilm, "smollm2": packages.smollm2}


def load_encoder(
    source: str, *, dtype: DTypeLike = jnp.float32, remat: bool = False
) -> tuple[nnx.Module, Tokenizer]:
    """A pretrained encoder and its tokenizer; parameters are float32.

    Args:
      source: 'minilm', or the path of a folder laid out as on Hugging Face. A sentence-transformers
        folder says how it pools; any other gets the paper's tanh pooler (§2).
      dtype: what the tower computes in.
      remat: recompute layers in the backward pass.

    Raises:
      FileNotFoundError: files that are not there; for a packaged name, with the command to install.
      WeightsError: files that are damaged or do not fit; a family that is no encoder.
    """
    return _load(source, encoders.families(), "encoder", dtype, remat)


def load_decoder(
    source: str, *, dtype: DTypeLike = jnp.float32, remat: bool = False
) -> tuple[nnx.Module, Tokenizer]:
    """A pretrained decoder and its tokenizer; parameters are float32.

    Args:
      source: 'smollm2', a GGUF file, or a folder laid out as on Hugging Face.
      dtype: what the tower computes in.
      remat: recompute layers in the backward pass.

    Raises:
      FileNotFoundError: files that are not there; for a packaged name, with the command to install.
      WeightsError: files that are damaged or do not fit; a family that is no decoder.
    """
    return _load(source, decoders.families(), "decoder", dtype, remat)


def _load(
    source: str, families: Mapping[str, ModuleType], kind: str, dtype: DTypeLike, remat: bool
) -> tuple[nnx.Module, Tokenizer]:
    path = PACKAGED[source]() if source in PACKAGED else pathlib.Path(source)
    said: dict[str, Any]
    extra: dict[str, Any] = {}
    if path.is_dir():
        said, extra = folder.config(path), folder.pooling(path)
    elif path.is_file():
        said = gguf.open_gguf(str(path)).config()
    else:
        raise FileNotFoundError(
            f"there is no {kind} {source!r}: it is neither a packaged name"
            f" ({', '.join(PACKAGED)}) nor a folder or GGUF file"
        )
    family = families.get(said["model_type"])
    if family is None:
        raise WeightsError(
            f"{path} holds a {said['model_type']!r} model, which is no {kind} family here; known:"
            f" {', '.join(families)}"
        )
    # Pooling is an encoder's matter; a decoder's folder says nothing of it.
    config = dataclasses.replace(family.from_huggingface(said), **extra)
    if path.is_dir():
        tensors, tokenizer = folder.tensors(path), folder.tokenizer(path)
    else:
        tensors, tokenizer = gguf.open_gguf(str(path)), Tokenizer.from_gguf(path)
    abstract = nnx.eval_shape(
        lambda: family.MODEL(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
    )
    return fill.fill(abstract, family.KEYS, tensors), tokenizer
