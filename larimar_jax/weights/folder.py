"""A model folder laid out as on Hugging Face: config.json, weights, tokenizer.json."""

import json
import pathlib
from typing import Any

from larimar_jax.weights.fill import WeightsError
from larimar_jax.weights.safetensors import Safetensors
from larimar_jax.weights.tokenizers import Tokenizer


def config(folder: pathlib.Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
      FileNotFoundError: no config.json.
      WeightsError: it is not JSON, or does not say which family the model is of.
    """
    values = _json(folder / "config.json")
    if values is None:
        raise FileNotFoundError(
            f"{folder} has no config.json; a model folder is laid out as on Hugging Face"
        )
    if "model_type" not in values:
        raise WeightsError(f"{folder / 'config.json'} does not say its model_type")
    return values


def tensors(folder: pathlib.Path) -> Safetensors:
    """The folder's weights, in one file or in shards.

    Raises:
      FileNotFoundError: no safetensors there.
      WeightsError: as `Safetensors`.
    """
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / name).is_file():
            return Safetensors(folder / name)
    raise FileNotFoundError(f"{folder} has no model.safetensors")


def tokenizer(folder: pathlib.Path) -> Tokenizer:
    """The folder's tokenizer, with the special tokens that its configuration names. Raises as
    `Tokenizer.from_file`."""
    named = {
        **(_json(folder / "tokenizer_config.json") or {}),
        **(_json(folder / "special_tokens_map.json") or {}),
    }

    def token(*roles: str) -> str | None:
        for role in roles:
            value = named.get(role)
            if value:
                return value["content"] if isinstance(value, dict) else value
        return None

    return Tokenizer.from_file(
        folder / "tokenizer.json",
        bos=token("bos_token", "cls_token"),
        eos=token("eos_token", "sep_token"),
        pad=token("pad_token"),
    )


def pooling(folder: pathlib.Path) -> dict[str, Any]:
    """How a sentence-transformers folder pools, as settings of an encoder; else nothing.

    Raises:
      WeightsError: a pooling other than the mean.
    """
    said = _json(folder / "1_Pooling" / "config.json")
    if said is None:
        return {}
    modes = [key for key, on in said.items() if key.startswith("pooling_mode_") and on is True]
    if modes != ["pooling_mode_mean_tokens"]:
        raise WeightsError(f"{folder} pools by {', '.join(modes)}; mean_tokens is supported")
    steps = _json(folder / "modules.json") or []
    normalize = any(step.get("type", "").endswith("Normalize") for step in steps)
    return {"pooling": "mean", "normalize": normalize}


def _json(path: pathlib.Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}); it is damaged") from error
