"""A model folder laid out as on Hugging Face: config.json, weights, a tokenizer."""

import dataclasses
import json
import pathlib
from typing import Any

from larimar_jax.weights import tokenizer_files
from larimar_jax.weights.fill import Source, WeightsError
from larimar_jax.weights.safetensors import Safetensors
from larimar_jax.weights.shards import Shards
from larimar_jax.weights.tokenizers import Tokenizer
from larimar_jax.weights.torch_files import TorchFile

# In order of preference: one file before several, safetensors before torch's.
_WEIGHTS = {
    "model.safetensors": Safetensors,
    "model.safetensors.index.json": lambda index: Shards(index, Safetensors),
    "pytorch_model.bin": TorchFile,
    "pytorch_model.bin.index.json": lambda index: Shards(index, TorchFile),
}
# A model of a trillion parameters has fewer of everything, and of layers far fewer: each misfit is
# told layer by layer.
LARGEST, DEEPEST = 1 << 24, 1 << 12
_FINITE = 1e15  # beyond every base of rotary positions, which are the largest numbers with a point
# What a sentence-transformers model may do, one after the other.
_STEPS = ("Transformer", "Pooling", "Normalize")
# What tokenizer_config.json switches on or off in a tokenizer that is made from a vocabulary.
_SWITCHES = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")


def config(folder: pathlib.Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
      FileNotFoundError: no config.json.
      WeightsError: it is not JSON, or does not say which family the model is of.
    """
    values = _table(folder / "config.json")
    if values is None:
        raise FileNotFoundError(
            f"{folder} has no config.json; a model folder is laid out as on Hugging Face"
        )
    if not isinstance(values.get("model_type"), str):
        raise WeightsError(f"{folder / 'config.json'} does not say its model_type")
    return values


def check_sizes(path: object, config: Any) -> None:
    """Refuses a family's config whose numbers no model has: files are read into such shapes.

    Raises:
      WeightsError: naming every one that is no number, a size with a fraction (33.0 too: it is no
        shape), negative, not finite or beyond all models.
    """
    kinds = {int: (int, LARGEST), float: (int | float, _FINITE)}
    odd = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type not in kinds:
            continue
        kind, limit = kinds[field.type]
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not number or not 0 <= value < (DEEPEST if field.name == "depth" else limit):
            odd.append(f"{field.name} = {str(value)[:40]!r}" if isinstance(value, str) else
                       f"{field.name} = {str(value)[:40]}")
    if odd:
        raise WeightsError(
            f"the configuration of {path} has sizes that no model has: {', '.join(odd)[:300]}; it is"
            " damaged or not a model's"
        )


def tensors(folder: pathlib.Path) -> Source:
    """The folder's weights: safetensors or torch's, in one file or in shards.

    Raises:
      FileNotFoundError: none of them; names all that were looked for.
      WeightsError: as the reader of the file that is there.
    """
    for name, opened in _WEIGHTS.items():
        if (folder / name).is_file():
            return opened(folder / name)
    raise FileNotFoundError(f"{folder} has none of {', '.join(_WEIGHTS)}")


def tokenizer(folder: pathlib.Path) -> Tokenizer:
    """The folder's tokenizer, with the special tokens that its configuration names.

    From tokenizer.json, or else from vocab.txt, or vocab.json with merges.txt.

    Raises:
      FileNotFoundError: none of these.
      WeightsError: a file that is no tokenizer, or a special token that it does not have.
    """
    # A null is how these files say that something is not set.
    said = _table(folder / "tokenizer_config.json") or {}
    said = {name: value for name, value in said.items() if value is not None}
    odd = [f"{n} = {said[n]!r}" for n in _SWITCHES if not isinstance(said.get(n, True), bool)]
    if odd:
        raise WeightsError(
            f"{folder}: its tokenizer_config.json has {', '.join(odd)[:300]}; true or false belong there"
        )
    named = {**said, **(_table(folder / "special_tokens_map.json") or {})}

    def token(*roles: str) -> str | None:
        for role in roles:
            value = named.get(role)
            value = value.get("content") if isinstance(value, dict) else value
            if value is not None and not isinstance(value, str):
                raise WeightsError(f"{folder}: {role} of its tokenizer is {value!r}, which is no text")
            if value:
                return value
        return None

    roles = {
        "bos": token("bos_token", "cls_token"),
        "eos": token("eos_token", "sep_token"),
        "pad": token("pad_token"),
    }
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(folder / "tokenizer.json", **roles)
    return Tokenizer.framing(tokenizer_files.from_folder(folder, said), str(folder), **roles)


def pooling(folder: pathlib.Path) -> dict[str, Any]:
    """How a sentence-transformers folder pools, as settings of an encoder; else nothing.

    Raises:
      WeightsError: a pooling other than the mean, or a step that is not computed here, such as a
        dense layer. ([CLS] as sentence-transformers takes it lacks the tanh layer that the paper's
        has.)
    """
    steps = _json(folder / "modules.json") or []
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise WeightsError(f"{folder / 'modules.json'} is no list of modules")
    kinds = [str(step.get("type", "")).rpartition(".")[2] for step in steps]
    if odd := [kind[:40] for kind in kinds if kind not in _STEPS]:
        raise WeightsError(
            f"{folder / 'modules.json'} has steps {', '.join(odd)[:200]}, which are not computed here;"
            f" {', '.join(_STEPS)} are. Take a model without them"
        )
    said = _table(folder / "1_Pooling" / "config.json")
    if said is None:
        return {}
    modes = [key for key, on in said.items() if key.startswith("pooling_mode_") and on is True]
    if modes != ["pooling_mode_mean_tokens"]:
        raise WeightsError(
            f"{folder} pools by {', '.join(modes) or 'nothing'}; mean_tokens is supported"
        )
    return {"pooling": "mean", "normalize": "Normalize" in kinds}


def _table(path: pathlib.Path) -> dict[str, Any] | None:
    found = _json(path)
    if found is not None and not isinstance(found, dict):
        raise WeightsError(f"{path} holds a {type(found).__name__} where settings belong; damaged")
    return found


def _json(path: pathlib.Path) -> Any:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        # JSON can escape half a character, which no tokenizer takes and no terminal prints.
        json.dumps(found, ensure_ascii=False).encode("utf-8")
        return found
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error}); it is damaged") from error
