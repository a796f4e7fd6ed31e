"""A tower as a folder of Hugging Face: `huggingface.Folder` reads it, and transformers too."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers as hf
from flax import nnx
from tokenizers import processors

from larimar_jax.weights import key_table
from larimar_jax.weights.key_table import WeightsError
from larimar_jax.weights.tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000  # as transformers itself cuts


def write_tower(folder: pathlib.Path, module: nnx.Module, tokenizer: Tokenizer) -> None:
    """Write an encoder or a decoder into a folder that exists and is empty.

    A mean-pooling encoder gets the files of sentence-transformers that name the pooling.

    Raises:
      WeightsError: a pooling that such a folder cannot name; a parameter that its key table lacks.
    """
    config = module.config
    pooling = getattr(config, "pooling", None)  # of an encoder
    if pooling == "cls" and config.normalize:
        raise WeightsError(
            "this encoder normalises its [CLS] pooling, which a folder of Hugging Face cannot say"
        )
    begin, end = ("bos_token", "eos_token") if pooling is None else ("cls_token", "sep_token")
    roles = {begin: tokenizer.bos, end: tokenizer.eos, "pad_token": tokenizer.pad}
    # config.json knows no [CLS] and [SEP].
    ids = {f"{r}_id": i for r, i in roles.items() if r in ("bos_token", "eos_token", "pad_token")}
    _json(folder / "config.json", config.to_huggingface() | {"torch_dtype": "float32"} | ids)
    write_tensors(folder, key_table.to_source(module, module.hf_keys))
    text = _framing(tokenizer).to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    named = {role: tokenizer.backend.id_to_token(i) for role, i in roles.items()}
    settings = {"model_max_length": config.max_length, **named}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _json(folder / "tokenizer_config.json", settings)
    if pooling == "mean":
        kinds = {"": "Transformer", "1_Pooling": "Pooling"}
        kinds |= {"2_Normalize": "Normalize"} if config.normalize else {}
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ]
        _json(folder / "modules.json", modules)
        pooling = {"word_embedding_dimension": config.width, "pooling_mode_mean_tokens": True}
        _json(folder / "1_Pooling" / "config.json", pooling)


def write_tensors(
    folder: pathlib.Path, named: Iterable[tuple[str, np.ndarray]], limit: int = SHARD_BYTES
) -> None:
    """Write model.safetensors, or shards of at most `limit` bytes with their index.

    `named` is read once, and no more of it than a shard is held. A tensor that is larger than
    `limit` has a shard of its own.
    """
    # Here and not on top: half a second that only a caller who writes weights should pay.
    from safetensors.numpy import save_file

    shards: list[dict[str, int]] = []
    held: dict[str, np.ndarray] = {}

    def write() -> None:
        part = folder / f"{len(shards)}.part"
        save_file(held, part, metadata={"format": "pt"})
        # The library makes it for its owner alone; who may read it is the folder's matter.
        part.chmod(0o644)
        shards.append({name: array.nbytes for name, array in held.items()})
        held.clear()

    for name, array in named:
        if held and sum(a.nbytes for a in held.values()) + array.nbytes > limit:
            write()
        held[name] = array
    write()
    count = len(shards)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    files = ["model.safetensors"] if count == 1 else files
    for number, file in enumerate(files):
        (folder / f"{number}.part").rename(folder / file)
    if count > 1:
        total = sum(size for shard in shards for size in shard.values())
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _json(folder / "model.safetensors.index.json", index)


def push(folder: str | pathlib.Path, repository: str) -> str:
    """Upload a folder to a repository of Hugging Face, which is made private where it is new.

    Raises:
      ConnectionError: without a network, or a token that may write there.
    """
    # Here and not on top, as in huggingface.py.
    import huggingface_hub
    from huggingface_hub import errors

    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder))
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalTokenNotFoundError) as error:
        raise ConnectionError(
            f"{folder} is written, and was not uploaded to {repository} ({str(error)[:300]}). Is there a"
            " network, and a token that may write there? `hf auth login` takes one"
        ) from error


def _framing(tokenizer: Tokenizer) -> hf.Tokenizer:
    """Return the backend, which itself puts prefix and suffix around a text."""
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
