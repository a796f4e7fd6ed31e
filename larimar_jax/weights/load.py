"""Pretrained towers by name, path or hub id, loaded strictly and without torch.

What takes a source raises FileNotFoundError where files are not there (for a packaged name with the
command to install, else with what was looked for), and WeightsError where they are damaged, do not fit,
or are of a family of the other kind.
"""

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
from larimar_jax.weights import gguf, huggingface, key_table
from larimar_jax.weights.key_table import WeightsError, Where
from larimar_jax.weights.packaged import PACKAGED, PINNED
from larimar_jax.weights.tokenizer import Tokenizer

# A model of a trillion parameters has fewer of everything, and of layers far fewer: each misfit is
# reported layer by layer.
LARGEST, DEEPEST = 1 << 24, 1 << 12
_FINITE = 1e15  # beyond every base of rotary positions, which are the largest numbers with a point
_LARGEST_HEADER = 100_000_000  # safetensors' own


# A model as it was published.
Checkpoint = huggingface.Folder | gguf.Gguf


def load_encoder(source: str, **options: Any) -> tuple[nnx.Module, Tokenizer]:
    """Load a pretrained encoder and its tokenizer.

    Args:
      source: 'minilm', the path of a folder laid out as on Hugging Face, or a hub id. A
        sentence-transformers folder says how it pools; any other gets the paper's tanh pooler (§2).
      options: as of `load_tower`.
    """
    return load_tower(source, encoders, **options)


def load_decoder(source: str, **options: Any) -> tuple[nnx.Module, Tokenizer]:
    """Load a pretrained decoder and its tokenizer.

    A GPT-2 or GPT-J whose tokenizer lacks `<PAD>`, `<BOS>` and `<EOS>` gets them (§2). GPT-J's
    vocabulary has tokens without a use, which become these three; GPT-2's is extended by three ids,
    whose embeddings start as the mean of the others.

    Args:
      source: 'smollm2', a GGUF file, a folder laid out as on Hugging Face, or a hub id.
      options: as of `load_tower`.
    """
    return load_tower(source, decoders, **options)


def load_tokenizer(source: str) -> Tokenizer:
    """Return the tokenizer of what `load_encoder` and `load_decoder` load, without its parameters."""
    checkpoint = open_checkpoint(source)
    family = registry.by_model_type(decoders.__name__).get(checkpoint.config()["model_type"])
    return _tokenizer(checkpoint, family)


def open_checkpoint(source: str) -> Checkpoint:
    """Return the folder or GGUF file of a source; a hub id's is fetched if the cache lacks it."""
    if source in PACKAGED:
        return PACKAGED[source]()
    path = pathlib.Path(source)
    if not path.exists():
        if not huggingface.is_id(source):
            raise FileNotFoundError(
                f"there are no weights {source!r}: it is neither a packaged name"
                f" ({', '.join(PACKAGED)}) nor a folder, a GGUF file, or a hub id written as org/name"
            )
        path = huggingface.fetch(source)
    if path.is_dir():
        return huggingface.Folder(path)
    if path.suffix in (".safetensors", ".bin", ".pt", ".ckpt", ".json"):
        raise WeightsError(
            f"{path} is one file of a model and does not hold all of it; give the folder that it is"
            " in, with its config.json and tokenizer, or a GGUF file"
        )
    return gguf.Gguf(path)


def sizes(source: str, kind: ModuleType) -> tuple[type, Any]:
    """Return the family and the sizes of what `load_encoder` and `load_decoder` make, unread; kind is
    `encoders` or `decoders`."""
    family, config, _, _ = _with_tokenizer(open_checkpoint(source), kind)
    return family, config


def fingerprint(source: str) -> str:
    """Return a sha256 that tells towers apart: of file names, sizes and safetensors headers alone.

    A packaged tower's is that of its pinned content. No file is read whole.
    """
    if source in PINNED:
        return PINNED[source]
    path = pathlib.Path(open_checkpoint(source).path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) or [path]
    digest = hashlib.sha256()
    for file in files:
        name = "" if file == path else file.relative_to(path).as_posix()
        digest.update(f"{name} {file.stat().st_size}\n".encode())
        if file.suffix == ".safetensors":
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                digest.update(opened.read(min(size, _LARGEST_HEADER)))
    return digest.hexdigest()


def describe(checkpoint: Checkpoint, kind: ModuleType) -> tuple[type, Any]:
    """Return family (of `encoders` or `decoders`) and sizes of a checkpoint; no tensor is read."""
    settings, pooling = checkpoint.config(), checkpoint.pooling()
    try:
        family = kind.family(settings["model_type"])
        # Only a sentence encoder's folder pools.
        config = dataclasses.replace(family.CONFIG.from_huggingface(settings), **pooling)
    except KeyError as error:
        raise WeightsError(
            f"the configuration of {checkpoint.path} does not say its {error}"
        ) from error
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        # A setting that is not computed; or a text, a null or a 0 where a size belongs.
        raise WeightsError(f"{checkpoint.path}: {error}") from error
    check_sizes(checkpoint.path, config)
    return family, config


def check_sizes(path: object, config: Any) -> None:
    """Refuse a family's config whose numbers no model has: files are read into such shapes.

    Raises:
      WeightsError: naming every one that is no number, a size with a fraction (33.0 too: it is no
        shape), negative, not finite or beyond all models.
    """
    kinds = {int: (int, LARGEST), float: (int | float, _FINITE)}
    odd = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type in kinds:
            kind, limit = kinds[field.type]
            limit = DEEPEST if field.name == "depth" else limit
            if not isinstance(value, kind) or isinstance(value, bool) or not 0 <= value < limit:
                odd.append(f"{field.name} = {str(value)[:40]}")
    if odd:
        raise WeightsError(
            f"the configuration of {path} has sizes that no model has: {', '.join(odd)[:300]}; it is"
            " damaged or not a model's"
        )


def _tokenizer(checkpoint: Checkpoint, family: type | None) -> Tokenizer:
    tokenizer, added = checkpoint.tokenizer(), getattr(family, "added_tokens", ())
    spare = getattr(family, "spare_tokens", ())
    return tokenizer.with_specials(added, spare) if added else tokenizer


def _with_tokenizer(checkpoint: Checkpoint, kind: ModuleType) -> tuple[type, Any, int, Tokenizer]:
    """Return family, sizes, the rows in them for tokens that were added (§2), and the tokenizer."""
    family, config = describe(checkpoint, kind)
    tokenizer = _tokenizer(checkpoint, family)
    more = max(tokenizer.vocab_size - config.vocab_size, 0)
    if more > len(getattr(family, "added_tokens", ())):
        raise WeightsError(
            f"{checkpoint.path}: the tokenizer has ids up to {tokenizer.vocab_size - 1} and the"
            f" embedding table {config.vocab_size} rows; they are of different models, or tokens were"
            " added to the tokenizer alone"
        )
    config = dataclasses.replace(config, vocab_size=config.vocab_size + more)
    return family, config, more, tokenizer


def load_tower(
    source: str,
    kind: ModuleType,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: layers.Remat = "none",
    where: Where | None = None,
) -> tuple[nnx.Module, Tokenizer]:
    """Load a tower and its tokenizer.

    Args:
      dtype: the tower's compute dtype.
      param_dtype: its parameters' dtype; bfloat16 halves their memory, for a tower that is not
        trained.
      remat: what the backward pass computes again (`layers.scan_layers`).
      where: each parameter's sharding, by its '/'-joined path and shape; None is one device.
    """
    checkpoint = open_checkpoint(source)
    family, config, more, tokenizer = _with_tokenizer(checkpoint, kind)
    abstract = nnx.eval_shape(lambda: family(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    parameters = (
        (path, leaf.replace(jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(param_dtype))))
        for path, leaf in nnx.to_flat_state(nnx.state(abstract, nnx.Param))
    )
    nnx.update(abstract, nnx.from_flat_state(parameters))
    tensors = checkpoint.tensors()
    return key_table.fill(abstract, family.hf_keys, tensors, where=where, more_rows=more), tokenizer
