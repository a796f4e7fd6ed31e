"""Pretrained towers, loaded strictly and without torch."""

import dataclasses
import hashlib
import pathlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from larimar_jax import decoders, encoders, layers, registry
from larimar_jax.weights import fill, folder, gguf, hub, packages, safetensors, tokenizers
from larimar_jax.weights.fill import Source, WeightsError, Where
from larimar_jax.weights.tokenizers import TextTooLong, TokenBatch, Tokenizer

__all__ = [
    "PACKAGED",
    "Source",
    "TextTooLong",
    "TokenBatch",
    "Tokenizer",
    "WeightsError",
    "Where",
    "describe",
    "fill",
    "fingerprint",
    "folder",
    "gguf",
    "hub",
    "load_decoder",
    "load_encoder",
    "load_tokenizer",
    "locate",
    "packages",
    "sizes",
    "safetensors",
    "tokenizers",
]

# Names that need no path, and where their files are.
PACKAGED = {"minilm": packages.minilm, "smollm2": packages.smollm2}


def load_encoder(
    source: str,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: layers.Remat = "none",
    where: Where | None = None,
) -> tuple[nnx.Module, Tokenizer]:
    """A pretrained encoder and its tokenizer.

    Args:
      source: 'minilm', the path of a folder laid out as on Hugging Face, or a hub id. A
        sentence-transformers folder says how it pools; any other gets the paper's tanh pooler (§2).
      dtype: what the tower computes in.
      param_dtype: what its parameters are kept in; bfloat16 halves their memory, for a tower that
        is not trained.
      remat: what the backward pass computes again (`layers.scan_layers`).
      where: each parameter's sharding, by its '/'-joined path and shape; None is one device.

    Raises:
      FileNotFoundError: files that are not there; for a packaged name, with the command to install.
      WeightsError: files that are damaged or do not fit; a family that is no encoder.
    """
    return _load(source, encoders, dtype, param_dtype, remat, where)


def load_decoder(
    source: str,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: layers.Remat = "none",
    where: Where | None = None,
) -> tuple[nnx.Module, Tokenizer]:
    """A pretrained decoder and its tokenizer.

    A GPT-2 or GPT-J whose tokenizer lacks `<PAD>`, `<BOS>` and `<EOS>` gets them appended (§2):
    three ids after the vocabulary, whose embeddings start as the mean of the others.

    Args:
      source: 'smollm2', a GGUF file, a folder laid out as on Hugging Face, or a hub id.
      dtype, param_dtype, remat, where: as in `load_encoder`.

    Raises:
      FileNotFoundError: files that are not there; for a packaged name, with the command to install.
      WeightsError: files that are damaged or do not fit; a family that is no decoder.
    """
    return _load(source, decoders, dtype, param_dtype, remat, where)


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of what `load_encoder` and `load_decoder` load, without its parameters.

    Raises:
      FileNotFoundError, WeightsError: as they do.
    """
    path = locate(source)
    if path.is_dir():
        found, said = folder.tokenizer(path), folder.config(path)
    else:
        said = _gguf(path).config()
        found = Tokenizer.from_gguf(path)
    family = registry.by_model_type(decoders.__name__).get(said["model_type"])
    added = getattr(family, "added_tokens", ())
    return found.with_specials(added) if added else found


def locate(source: str) -> pathlib.Path:
    """The folder or GGUF file of a source; a hub id's is fetched where the cache does not have it.

    Raises:
      FileNotFoundError: there is none, or none that can be fetched; says what was looked for.
    """
    path = PACKAGED[source]() if source in PACKAGED else pathlib.Path(source)
    if path.exists():
        return path
    if hub.is_id(source):
        return hub.fetch(source)
    raise FileNotFoundError(
        f"there are no weights {source!r}: it is neither a packaged name"
        f" ({', '.join(PACKAGED)}) nor a folder, a GGUF file, or a hub id written as org/name"
    )


def fingerprint(source: str) -> str:
    """Return a sha256 that tells towers apart: of file names, sizes and safetensors headers alone.

    Raises:
      FileNotFoundError: as `load_decoder`.
    """
    path = locate(source)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()) or [path]:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        if file.suffix == ".safetensors":
            with file.open("rb") as opened:
                digest.update(opened.read(int.from_bytes(opened.read(8), "little")))
    return digest.hexdigest()


def describe(path: pathlib.Path, kind: ModuleType) -> tuple[type, Any, Source]:
    """The family, the sizes and the tensors of a folder or GGUF file; no tensor is read.

    Args:
      kind: `encoders` or `decoders`.

    Raises:
      FileNotFoundError, WeightsError: as `load_decoder`.
    """
    if path.is_dir():
        said, extra, tensors = folder.config(path), folder.pooling(path), folder.tensors(path)
    else:
        tensors = _gguf(path)
        said, extra = tensors.config(), {}
    try:
        family = kind.family(said["model_type"])
        # Only a sentence encoder's folder speaks of pooling.
        config = dataclasses.replace(family.CONFIG.from_huggingface(said), **extra)
    except KeyError as error:
        raise WeightsError(f"the configuration of {path} does not say its {error}") from error
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        # A setting that is not computed; or a text, a null or a 0 where a size belongs.
        raise WeightsError(f"{path}: {error}") from error
    folder.check_sizes(path, config)
    return family, config, tensors


def _gguf(path: pathlib.Path) -> gguf.Gguf:
    if path.suffix in (".safetensors", ".bin", ".pt", ".ckpt", ".json"):
        raise WeightsError(
            f"{path} is one file of a model and does not hold all of it; give the folder that it is"
            " in, with its config.json and tokenizer, or a GGUF file"
        )
    return gguf.open_gguf(str(path))


def sizes(source: str, kind: ModuleType) -> tuple[type, Any]:
    """The family and the sizes of what `load_encoder` and `load_decoder` make; no tensor is read.

    Args:
      kind: `encoders` or `decoders`.

    Raises:
      FileNotFoundError, WeightsError: as they do.
    """
    path = locate(source)
    family, config, _ = describe(path, kind)
    return family, _with_added(path, family, config, load_tokenizer(str(path)))


def _with_added(path: pathlib.Path, family: type, config: Any, tokenizer: Tokenizer) -> Any:
    """The sizes with rows for tokens that were added to the tokenizer (§2)."""
    more = max(tokenizer.vocab_size - config.vocab_size, 0)
    if more > len(getattr(family, "added_tokens", ())):
        raise WeightsError(
            f"{path}: the tokenizer has ids up to {tokenizer.vocab_size - 1} and the embedding table"
            f" {config.vocab_size} rows; they are of different models, or tokens were added to the"
            " tokenizer alone"
        )
    return dataclasses.replace(config, vocab_size=config.vocab_size + more)


def _load(
    source: str,
    kind: ModuleType,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    remat: layers.Remat,
    where: Where | None,
) -> tuple[nnx.Module, Tokenizer]:
    path = locate(source)
    family, config, tensors = describe(path, kind)
    # Of the path: a hub id could by now mean another revision.
    tokenizer = load_tokenizer(str(path))
    rows = config.vocab_size
    config = _with_added(path, family, config, tokenizer)
    more = config.vocab_size - rows
    abstract = nnx.eval_shape(
        lambda: family(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
    )
    _keep_in(abstract, jnp.dtype(param_dtype))
    return fill.fill(abstract, family.hf_keys, tensors, where=where, more_rows=more), tokenizer


def _keep_in(abstract: nnx.Module, dtype: jnp.dtype) -> None:
    """Declares the dtype of an abstract module's parameters, in place."""
    nnx.update(
        abstract,
        nnx.from_flat_state(
            (path, leaf.replace(jax.ShapeDtypeStruct(leaf.shape, dtype)))
            for path, leaf in nnx.to_flat_state(nnx.state(abstract, nnx.Param))
        ),
    )
