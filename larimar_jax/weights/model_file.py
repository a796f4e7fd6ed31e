"""A trained model as one file: safetensors that hold what was trained and nothing else.

Frozen towers come from their own source, so an export of a model over a frozen LM is small. The
file carries what it was trained on (its config, in `meta`) and a digest of its content.
"""

import contextlib
import hashlib
import importlib.resources
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from larimar_jax.weights.key_table import LFS_POINTER, LFS_START

_FORMAT = "larimar-jax/1"
_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int32": np.dtype(np.int32),
    "bool": np.dtype(np.bool_),
}
_CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "BOOL": "bool"}
# What is taken for an export, by its first bytes.
_NO_EXPORTS = {
    LFS_START: LFS_POINTER,
    b"GGUF": "is a GGUF file, a decoder and no model: a config names it as model.decoder.source",
    b'{"crc": ': "holds a session and not a model: give it to --session",
}


class ExportError(ValueError):
    """An exported file that is damaged, half written, or of another model."""


def shipped() -> dict[str, Path]:
    """Return the checkpoints that ship with the package, by name: a file, or a folder of a model that
    has a tokenizer of its own."""
    folder = Path(str(importlib.resources.files("larimar_jax"))) / "checkpoints"
    own = {path.parent.name: path for path in folder.glob("*/model.safetensors")}
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))} | own


def locate(source: str | Path) -> Path:
    """Return the exported file of a shipped name, of a path, or of a training run's folder.

    Raises:
        FileNotFoundError: none of these; lists the names.
    """
    names = shipped()
    path = names.get(str(source), Path(source))
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no model {str(source)!r}: it is neither a shipped name "
            f"({', '.join(names) or 'none'}) nor an exported file or the folder of a finished run."
        )
    return path


def save_exported(
    path: str | Path,
    params: Mapping[str, Any],
    meta: Mapping[str, Any],
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Write arrays and meta to one file, whole or not at all.

    Args:
        path: the file to write; it is replaced only when the new one is on the disk.
        params: float32, int32 or bool arrays by '/'-joined path.
        meta: what JSON can hold.
        dtypes: regex on paths → "float16" or "bfloat16" to store those arrays in; the first match
            counts. They come back as float32.
    Raises:
        ValueError: a regex that matches nothing, or a value that float16 cannot hold.
    """
    path, dtypes = Path(path), dtypes or {}
    idle = [pattern for pattern in dtypes if not any(re.search(pattern, name) for name in params)]
    if idle:
        raise ValueError(f"no parameter matches {', '.join(map(repr, idle))} in dtypes")
    original, shapes, stored = {}, {}, {}
    for name in sorted(params):
        original[name] = np.dtype(params[name].dtype).name
        shapes[name] = tuple(params[name].shape)
        stored[name] = next((d for p, d in dtypes.items() if re.search(p, name)), original[name])
    described = json.dumps({"meta": meta, "dtypes": original}, sort_keys=True, ensure_ascii=False)
    # As long as the digest that takes its place when the content has been written.
    _, places = _header(described, stored, shapes, "0" * 64)
    digest = hashlib.sha256(described.encode("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        # One array at a time, so that no second copy of a large model is held.
        for name, place in places.items():
            array = _stored(name, np.asarray(params[name]), stored[name])
            _update(digest, name, array)
            file.seek(place)
            file.write(_bytes(array))
        file.seek(0)
        file.write(_header(described, stored, shapes, digest.hexdigest())[0])


def replace_file(path: Path, text: str) -> None:
    """Write a text file that is either the former one or the new one, never half of it."""
    with replaced(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` when it is on the disk, and is gone otherwise."""
    # In the same folder, since os.replace is atomic only within one file system; of a name that no
    # process has, on any machine that sees the folder.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            if path.exists():
                shutil.copymode(path, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def amend(
    source: str | Path,
    path: str | Path,
    more: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    without: Collection[str] = (),
    float16: Collection[str] = (),
) -> None:
    """Write what `source` holds, each array as it is stored there, with `more` arrays and another meta.

    Args:
        without: arrays that are left out, where they are there.
        float16: those of `more` to store so.

    Raises:
        FileNotFoundError, ExportError: as `load_exported`, of `source`.
    """
    stored, described = _read(Path(source))
    narrow = {
        f"^{re.escape(name)}$": array.dtype.name
        for name, array in stored.items()
        if name not in (*more, *without) and array.dtype.name != described["dtypes"][name]
    }
    narrow |= {f"^{re.escape(name)}$": "float16" for name in float16}
    arrays, _ = load_exported(source)
    arrays = {name: array for name, array in arrays.items() if name not in without}
    save_exported(path, {**arrays, **more}, meta, narrow)


def load_exported(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return what `save_exported` wrote: (arrays by path in their original dtype, meta).

    Raises:
        FileNotFoundError: no such file.
        ExportError: damaged, half written, or no export at all.
    """
    arrays, described = _read(Path(path))
    dtypes = described["dtypes"]
    arrays = {n: a.astype(_DTYPES[dtypes[n]], copy=False) for n, a in arrays.items()}
    return arrays, described["meta"]


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return arrays in the dtype of the file, and its meta with the original dtypes."""
    import safetensors  # Here and not on top: half a second that only a reader should pay.

    if not path.is_file():
        raise FileNotFoundError(f"there is no exported model at {path}")
    try:
        with safetensors.safe_open(path, framework="numpy", backend="pread") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ExportError(
                    f"{path} is a safetensors file and not an export of {_FORMAT} (its format is "
                    f"{header.get('format')!r}). Weights of a tower alone go through the config's "
                    "`source`."
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        with path.open("rb") as file:
            begin = file.read(len(LFS_START))
        for start, reason in _NO_EXPORTS.items():
            if begin.startswith(start):
                raise ExportError(f"{path} {reason}.") from error
        raise ExportError(
            f"{path} is damaged, half written or no safetensors file ({error}). Save, export or fetch "
            "it again, or take a copy of it."
        ) from error
    digest = hashlib.sha256(header.get("larimar", "").encode("utf-8"))
    for name in sorted(arrays):
        _update(digest, name, arrays[name])
    if digest.hexdigest() != header.get("sha256"):
        raise ExportError(f"{path} is damaged: its content does not have the digest that it names.")
    return arrays, json.loads(header["larimar"])


def _header(
    described: str, dtypes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], digest: str
) -> tuple[bytes, dict[str, int]]:
    """Return the head of a safetensors file, and where each array begins, by name in order."""
    codes = {dtype: code for code, dtype in _CODES.items()}
    metadata = {"format": _FORMAT, "larimar": described, "sha256": digest}
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    # Wide ones first: then each begins at a multiple of its width.
    for name in sorted(dtypes, key=lambda n: (-_DTYPES[dtypes[n]].itemsize, n)):
        begin, end = end, end + math.prod(shapes[name]) * _DTYPES[dtypes[name]].itemsize
        offsets = [begin, end]
        code = codes[dtypes[name]]
        entries[name] = {"dtype": code, "shape": shapes[name], "data_offsets": offsets}
    text = json.dumps(entries, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: start + entries[name]["data_offsets"][0] for name in sorted(dtypes)}
    return len(text).to_bytes(8, "little") + text, places


def _stored(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # Looked for below.
        stored = array.astype(_DTYPES[dtype], copy=False)
    overflown = stored is not array and not np.isfinite(stored.astype(np.float32)).all()
    if overflown and np.isfinite(array).all():
        raise ValueError(f"{name} holds values that {dtype} cannot; store it as bfloat16")
    return stored


def _update(digest: Any, name: str, array: np.ndarray) -> None:
    digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
    digest.update(_bytes(array))


def _bytes(array: np.ndarray) -> np.ndarray:
    """Return its bytes, not copied; bfloat16 has no buffer of its own."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
