"""Models as Hugging Face has them: folders with config.json, weights and tokenizer, and ids of its hub.

A file that is not there is a FileNotFoundError with all that were looked for; one that is damaged, or of
a kind that is not computed here, a WeightsError. transformers is imported where it is needed and nowhere
else: that takes a second or more.
"""

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

from larimar_jax.weights.key_table import Source, WeightsError, require_file
from larimar_jax.weights.safetensors_files import Safetensors, Shards, read_json
from larimar_jax.weights.tokenizer import Tokenizer, library_errors
from larimar_jax.weights.torch_checkpoint import TorchCheckpoint

_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json")
# What a folder of ours needs beside the weights.
SETTINGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt")
SETTINGS += ("modules.json", "1_Pooling/config.json", *_TOKENIZERS)
# Counts that transformers makes lists of, and that no model has so many of.
_LISTED, _MOST = ("num_hidden_layers", "n_layer", "num_labels"), 1 << 12
# What a sentence-transformers model may do, one step after the other.
_STEPS = ("Transformer", "Pooling", "Normalize")


class Folder:
    """A model folder laid out as on Hugging Face; its methods raise as the head of this file says."""

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)

    def config(self) -> dict[str, Any]:
        """Return the settings of config.json, those that it leaves out included."""
        if self._transformers_config is None:
            raise FileNotFoundError(
                f"{self.path} has no config.json; a model folder is laid out as on Hugging Face"
            )
        return self._transformers_config.to_dict()

    @functools.cached_property
    def _transformers_config(self) -> Any:
        values = self.json("config.json")
        if values is None:
            return None
        if not isinstance(values.get("model_type"), str):
            raise WeightsError(f"{self.path / 'config.json'} does not say its model_type")
        for name in _LISTED:
            if isinstance(values.get(name), int) and values[name] > _MOST:
                raise WeightsError(f"{self.path}/config.json: {name} is {values[name]}; damaged")
        auto = _transformers().AutoConfig
        with _transformers_errors(f"{self.path / 'config.json'} describes no model"):
            config = auto.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        # No tensor's shape tells the number of heads, so that the library's default would go unnoticed.
        heads = "num_attention_heads"
        if not {heads, config.attribute_map.get(heads, heads)} & values.keys():
            raise WeightsError(f"{self.path / 'config.json'} does not say its {heads}")
        return config

    def tensors(self) -> Source:
        """Return the folder's weights: safetensors or torch's, in one file or in shards."""
        for name, opened in _WEIGHTS.items():
            if (self.path / name).is_file():
                return opened(self.path / name)
        raise FileNotFoundError(f"{self.path} has none of {', '.join(_WEIGHTS)}")

    def tokenizer(self) -> Tokenizer:
        """Return the folder's tokenizer, with the special tokens that its configuration names."""
        files = [path for name in _TOKENIZERS if (path := self.path / name).is_file()]
        for path in files:
            require_file(path)
        if not files:
            hint = (
                ". Its tokenizer.model is SentencePiece's; save it once with transformers:"
                " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
            hint = hint if (self.path / "tokenizer.model").is_file() else ""
            raise FileNotFoundError(
                f"there is no tokenizer in {self.path}: no {', no '.join(_TOKENIZERS)}{hint}"
            )
        self.json("tokenizer_config.json")
        auto = _transformers().AutoTokenizer
        # A folder that holds a tokenizer alone has no config.json.
        config = self._transformers_config or _transformers().PreTrainedConfig()
        with library_errors(self.path), _transformers_errors(f"the tokenizer of {self.path}"):
            tokenizer = auto.from_pretrained(
                self.path, config=config, local_files_only=True, trust_remote_code=False
            )
            backend = tokenizer.backend_tokenizer
        return Tokenizer.from_backend(
            backend,
            self.path,
            bos=tokenizer.bos_token or tokenizer.cls_token,
            eos=tokenizer.eos_token or tokenizer.sep_token,
            pad=tokenizer.pad_token,
        )

    def pooling(self) -> dict[str, Any]:
        """Return how a sentence-transformers folder pools, as settings of an encoder; else nothing.

        Only the mean, without further steps: its [CLS] lacks the tanh layer of the paper's.
        """
        steps = self.json("modules.json", list) or []
        types = (step.get("type", "") if isinstance(step, dict) else step for step in steps)
        kinds = [str(kind).rpartition(".")[2] for kind in types]
        if odd := [kind[:40] for kind in kinds if kind not in _STEPS]:
            raise WeightsError(
                f"{self.path / 'modules.json'} has steps {', '.join(odd)[:200]}, which are not computed"
                f" here; {', '.join(_STEPS)} are. Take a model without them"
            )
        pooling = self.json("1_Pooling/config.json")
        if pooling is None:
            return {}
        modes = [k for k, on in pooling.items() if k.startswith("pooling_mode_") and on is True]
        if modes != ["pooling_mode_mean_tokens"]:
            raise WeightsError(
                f"{self.path} pools by {', '.join(modes) or 'nothing'}; mean_tokens is supported"
            )
        return {"pooling": "mean", "normalize": "Normalize" in kinds}

    def json(self, name: str, kind: type = dict) -> Any:
        """Return the content of a JSON file of the folder, a `kind`; None without one."""
        path = self.path / name
        value = read_json(path) if path.is_file() else None
        if value is not None and not isinstance(value, kind):
            raise WeightsError(
                f"{path} holds a {type(value).__name__} where a {kind.__name__} belongs; damaged"
            )
        return value


# In order of preference: one file before several, safetensors before torch's.
_WEIGHTS: Mapping[str, Callable[[pathlib.Path], Source]] = {
    "model.safetensors": Safetensors,
    "model.safetensors.index.json": lambda index: Shards(index, Safetensors),
    "pytorch_model.bin": TorchCheckpoint,
    "pytorch_model.bin.index.json": lambda index: Shards(index, TorchCheckpoint),
}


def _transformers() -> ModuleType:
    # It would report that there is no torch, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


@contextlib.contextmanager
def _transformers_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises for a bad file into a WeightsError that begins with `what`."""
    try:
        yield
    except Exception as error:  # Of a dozen types, from as many files of its.
        raise WeightsError(f"{what} ({error}); it is damaged or of another format") from error


# The hub -----------------------------------------------------------------------------------------

_PART = r"[A-Za-z0-9_](?:[\w.-]*\w)?"
_ID = re.compile(rf"(?!.*(\.\.|--))(?P<name>{_PART}/{_PART})(?:@[\w./-]+)?", re.ASCII)
_LONGEST = 96  # the hub's own limit


def is_id(source: str) -> bool:
    """Whether a source is written as `org/name` or `org/name@revision`."""
    match = _ID.fullmatch(source)
    return match is not None and len(match["name"]) <= _LONGEST


def fetch(source: str) -> pathlib.Path:
    """Return the folder of a hub id's files. Without a network, or with HF_HUB_OFFLINE=1, the cache's.

    Raises:
      FileNotFoundError: no such model on the hub, one without weights that are read here, or no
        network and nothing cached, or only a part of it.
    """
    # Here and not on top: it takes a second, and most sources are no hub ids.
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = source.partition("@")
    options = {"repo_id": name, "revision": revision or None}
    try:
        # One request, which is not repeated for half a minute where there is no network.
        info = huggingface_hub.HfApi().model_info(name, revision=revision or None)
        patterns = [*SETTINGS, *_best({file.rfilename for file in info.siblings or ()}, source)]
        return pathlib.Path(huggingface_hub.snapshot_download(**options, allow_patterns=patterns))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"there is no file or folder {source!r}, and the Hugging Face hub has no such model or"
            " revision, or wants a login for it: `hf auth login`"
        ) from error
    # The HTTP client's own errors (no route, no answer, a proxy that refuses) are of this base.
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        cause = error
    state = "is not"
    with contextlib.suppress(errors.LocalEntryNotFoundError):
        options |= {"allow_patterns": list(SETTINGS), "local_files_only": True}
        folder = pathlib.Path(huggingface_hub.snapshot_download(**options))
        if any((folder / file).is_file() for file in _WEIGHTS):
            return folder
        state = "is without weights"  # Another program may have fetched the tokenizer alone.
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    raise FileNotFoundError(
        f"there is no file or folder {source!r}; as a model of the Hugging Face hub it {state} in the"
        f" hub's cache, and the hub cannot be reached ({type(cause).__name__}). Fetch it where there is"
        f" a network (`{command}`), or give the path of a folder"
    ) from cause


def _best(files: Collection[str], source: str) -> tuple[str, ...]:
    """Return patterns of one format: a hub model often has the same weights in several."""
    for name in _WEIGHTS:
        if name in files:
            shards = name.removesuffix(".index.json")
            stem, dot, suffix = shards.rpartition(".")
            return (name,) if name == shards else (name, f"{stem}-*{dot}{suffix}")
    hint = ""
    if any(file.endswith(".gguf") for file in files):
        hint = "; fetch one of its GGUF files (`hf download`) and give its path"
    raise FileNotFoundError(
        f"{source!r} on the Hugging Face hub has none of {', '.join(_WEIGHTS)}{hint}"
    )
