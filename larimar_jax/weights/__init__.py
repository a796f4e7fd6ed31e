"""Pretrained towers, loaded strictly and without torch."""

import dataclasses
import pathlib
from collections.abc import Mapping
from types import ModuleType

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
    "load_tokenizer",
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


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of what `load_encoder` and `load_decoder` load, without its parameters.

    Raises:
      FileNotFoundError, WeightsError: as they do.
    """
    path = _locate(source)
    return folder.tokenizer(path) if path.is_dir() else Tokenizer.from_gguf(path)


def _locate(source: str) -> pathlib.Path:
    path = PACKAGED[source]() if source in PACKAGED else pathlib.Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"there are no weights {source!r}: it is neither a packaged name"
            f" ({', '.join(PACKAGED)}) nor a folder or GGUF file"
        )
    return path


def _load(
    source: str, families: Mapping[str, ModuleType], kind: str, dtype: DTypeLike, remat: bool
) -> tuple[nnx.Module, Tokenizer]:
    path = _locate(source)
    if path.is_dir():
        said, extra, tensors = folder.config(path), folder.pooling(path), folder.tensors(path)
    else:
        tensors = gguf.open_gguf(str(path))
        said, extra = tensors.config(), {}
    family = families.get(said["model_type"])
    if family is None:
        raise WeightsError(
            f"{path} holds a {said['model_type']!r} model, which is no {kind} family here; known:"
            f" {', '.join(families)}"
        )
    # Only a sentence encoder's folder speaks of pooling.
    config = dataclasses.replace(family.from_huggingface(said), **extra)
    abstract = nnx.eval_shape(
        lambda: family.MODEL(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
    )
    return fill.fill(abstract, family.KEYS, tensors), load_tokenizer(source)
