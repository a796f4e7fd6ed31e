"""A tower as a model folder laid out as on Hugging Face: what `folder` reads, and transformers too."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers as hf
from flax import nnx
from tokenizers import processors

from larimar_jax.weights import fill
from larimar_jax.weights.fill import WeightsError
from larimar_jax.weights.tokenizers import Tokenizer

SHARD_BYTES = 5_000_000_000  # as transformers itself cuts


def encoder(
    folder: pathlib.Path, module: nnx.Module, family: type, tokenizer: Tokenizer
) -> None:
    """Writes an encoder of `encoders.family(…)` into a folder that exists and is empty.

    A mean-pooling encoder gets the files by which sentence-transformers says so.

    Raises:
      WeightsError: a pooling that such a folder cannot say; a parameter the family's table lacks.
    """
    config = module.config
    if config.pooling == "cls" and config.normalize:
        raise WeightsError(
            "this encoder normalises its [CLS] pooling, which a folder of Hugging Face cannot say"
        )
    roles = {"cls_token": tokenizer.bos, "sep_token": tokenizer.eos, "pad_token": tokenizer.pad}
    _tower(folder, module, family, tokenizer, roles)
    if config.pooling == "mean":
        kinds = {"": "Transformer", "1_Pooling": "Pooling"}
        kinds |= {"2_Normalize": "Normalize"} if config.normalize else {}
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ]
        _json(folder / "modules.json", modules)
        _json(
            folder / "1_Pooling" / "config.json",
            {"word_embedding_dimension": config.width, "pooling_mode_mean_tokens": True},
        )


def decoder(
    folder: pathlib.Path, module: nnx.Module, family: type, tokenizer: Tokenizer
) -> None:
    """Writes a decoder of `decoders.family(…)` into a folder that exists and is empty.

    Raises:
      WeightsError: a parameter that the family's key table lacks.
    """
    roles = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    _tower(folder, module, family, tokenizer, roles)


def tensors(
    folder: pathlib.Path, named: Iterable[tuple[str, np.ndarray]], limit: int = SHARD_BYTES
) -> None:
    """Writes model.safetensors, or shards of at most `limit` bytes with their index.

    `named` is read once, and no more of it than a shard is held. A tensor that is larger than
    `limit` has a shard of its own.
    """
    # Here and not on top: half a second that only a caller who writes weights should pay.
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def part(number: int) -> pathlib.Path:
        return folder / f"{number}.part"

    def write() -> None:
        save_file(held, part(len(shards)), metadata={"format": "pt"})
        # The library makes it for its owner alone; a folder that others may read says so itself.
        part(len(shards)).chmod(0o644)
        shards.append(list(held))
        held.clear()

    for name, array in named:
        if held and sum(a.nbytes for a in held.values()) + array.nbytes > limit:
            write()
        held[name] = array
        total += array.nbytes
    write()
    if len(shards) == 1:
        part(0).rename(folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for number, file in enumerate(files):
        part(number).rename(folder / file)
    places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _json(folder / "model.safetensors.index.json", index)


def _tower(
    folder: pathlib.Path,
    module: nnx.Module,
    family: type,
    tokenizer: Tokenizer,
    roles: Mapping[str, int],
) -> None:
    # config.json knows no [CLS] and [SEP].
    ids = {f"{r}_id": i for r, i in roles.items() if r in ("bos_token", "eos_token", "pad_token")}
    said = module.config.to_huggingface() | {"torch_dtype": "float32"} | ids
    _json(folder / "config.json", said)
    tensors(folder, fill.to_source(module, family.hf_keys))
    text = _framing(tokenizer).to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    named = {role: tokenizer.backend.id_to_token(i) for role, i in roles.items()}
    _json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": module.config.max_length,
            **named,
        },
    )


def _framing(tokenizer: Tokenizer) -> hf.Tokenizer:
    """The backend, which itself puts prefix and suffix around a text."""
    backend = hf.Tokenizer.from_str(tokenizer.backend.to_str())
    plain = backend.encode("a", add_special_tokens=False).ids
    if backend.encode("a").ids != [*tokenizer.prefix, *plain, *tokenizer.suffix]:
        before, after = (
            [backend.id_to_token(i) for i in ids] for ids in (tokenizer.prefix, tokenizer.suffix)
        )
        around = {token: backend.token_to_id(token) for token in (*before, *after)}
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=list(around.items())
        )
    return backend


def _json(path: pathlib.Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
