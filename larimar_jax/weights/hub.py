"""Models of the Hugging Face hub, as folders: fetched once, then from its cache."""

import pathlib
import re
from collections.abc import Collection

# What a folder of ours needs beside the weights.
_SETTINGS = (
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
# The file that says a format is there → all that belongs to it, in the order that `folder.tensors`
# looks in. One is fetched: a hub model often has the same weights in several.
_FORMATS = {
    "model.safetensors": ("model.safetensors",),
    "model.safetensors.index.json": ("model.safetensors.index.json", "model-*.safetensors"),
    "pytorch_model.bin": ("pytorch_model.bin",),
    "pytorch_model.bin.index.json": ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
}
_PART = r"[A-Za-z0-9_](?:[\w.-]*\w)?"
_ID = re.compile(rf"(?P<name>{_PART}/{_PART})(?:@[\w./-]+)?", re.ASCII)
_LONGEST = 96  # the hub's own limit


def is_id(source: str) -> bool:
    """Whether a source is written as `org/name` or `org/name@revision`."""
    found = _ID.fullmatch(source)
    if found is None:
        return False
    name = found["name"]
    return len(name) <= _LONGEST and ".." not in name and "--" not in name


def fetch(source: str) -> pathlib.Path:
    """The folder of a hub id's files. Without a network, or with HF_HUB_OFFLINE=1, the cache's.

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
        patterns = [*_SETTINGS, *_best({file.rfilename for file in info.siblings or ()}, source)]
        return pathlib.Path(huggingface_hub.snapshot_download(**options, allow_patterns=patterns))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"there is no file or folder {source!r}, and the Hugging Face hub has no such model or"
            " revision, or wants a login for it: `hf auth login`"
        ) from error
    # The HTTP client's own errors (no route, no answer, a proxy that refuses) are of this base.
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        cause = error
    try:
        found = huggingface_hub.snapshot_download(
            **options, allow_patterns=list(_SETTINGS), local_files_only=True
        )
    except errors.LocalEntryNotFoundError as error:
        raise _uncached(source, "is not", cause) from error
    folder = pathlib.Path(found)
    if not any((folder / file).is_file() for file in _FORMATS):
        # Something else may have fetched the tokenizer alone.
        raise _uncached(source, "is without weights", cause) from cause
    return folder


def _best(files: Collection[str], source: str) -> tuple[str, ...]:
    for name, patterns in _FORMATS.items():
        if name in files:
            return patterns
    hint = ""
    if any(file.endswith(".gguf") for file in files):
        hint = "; fetch one of its GGUF files (`hf download`) and give its path"
    raise FileNotFoundError(
        f"{source!r} on the Hugging Face hub has none of {', '.join(_FORMATS)}{hint}"
    )


def _uncached(source: str, how: str, cause: Exception) -> FileNotFoundError:
    name, _, revision = source.partition("@")
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    return FileNotFoundError(
        f"there is no file or folder {source!r}; as a model of the Hugging Face hub it {how} in the"
        f" hub's cache, and the hub cannot be reached ({type(cause).__name__}). Fetch it where there is"
        f" a network (`{command}`), or give the path of a folder"
    )
