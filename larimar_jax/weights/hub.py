"""Models of the Hugging Face hub, as folders: fetched once, then from its cache."""

import pathlib
import re

# What a folder of ours needs, and never two formats of the same weights.
_ALWAYS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "modules.json",
    "1_Pooling/config.json",
)
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?:@[\w./-]+)?")


def is_id(source: str) -> bool:
    """Whether a source is written as `org/name` or `org/name@revision`."""
    return _ID.fullmatch(source) is not None


def fetch(source: str) -> pathlib.Path:
    """The folder of a hub id's files. Without a network, or with HF_HUB_OFFLINE=1, the cache's.

    Raises:
      FileNotFoundError: no such model on the hub, or no network and nothing cached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = source.partition("@")
    options = {"repo_id": name, "revision": revision or None}
    try:
        files = huggingface_hub.HfApi().list_repo_files(name, revision=revision or None)
        safe = any(file.endswith(".safetensors") and "/" not in file for file in files)
        patterns = [*_ALWAYS, *(_SAFETENSORS if safe else _TORCH)]
        return pathlib.Path(huggingface_hub.snapshot_download(**options, allow_patterns=patterns))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"the Hugging Face hub has no {source!r}, or it asks for a login (`hf auth login`)"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        cause = error
    try:
        found = huggingface_hub.snapshot_download(**options, local_files_only=True)
    except (errors.LocalEntryNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{source!r} is not in the hub's cache, and the hub cannot be reached"
            f" ({type(cause).__name__}). Fetch it where there is a network (`hf download {name}`), or"
            " give the path of a folder"
        ) from error
    return pathlib.Path(found)
