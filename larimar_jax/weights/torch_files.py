"""torch's `.bin`, `.pt` and `.ckpt` files without torch, tensor by tensor."""

import mmap
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from larimar_jax.weights import torch_pickle
from larimar_jax.weights.fill import WeightsError
from larimar_jax.weights.torch_pickle import Opaque, Storage, Tensor

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
_PIECE = 1 << 22
# torch compresses nothing. A pickle that another program compressed is a tenth of itself at least.
_PICKLE_RATIO = 100


class TorchFile:
    """A `fill.Source` over a file that `torch.save` wrote; nothing in it is run.

    Tensors are those of the state dict: the entry `state_dict` or `model` of a training checkpoint,
    else the file's own mapping. Both of torch's formats are read.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: a file that torch did not write, that is damaged, or that asks for more than
        tensors (see `torch_pickle`).
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = str(path)
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"there is no weights file at {path}")
        with open(path, "rb") as file:
            opened = _Zip if file.read(4) == b"PK\x03\x04" else _Legacy
        self._file = opened(self.path)
        self.tree: Any = self._file.tree
        self._tensors = {
            name: value for name, value in self._state().items() if isinstance(value, Tensor)
        }
        self._held: tuple[str, np.ndarray] | None = None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape; no numbers are read."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def release(self) -> None:
        """Forgets the storage that was read last, which may be as large as a tensor."""
        self._held = None

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file.

        Raises:
          WeightsError: its storage is missing, too short, or not what its checksum says.
        """
        tensor = self._tensors[name]
        storage = tensor.storage
        if self._held is not None and self._held[0] == storage.key:
            raw = self._held[1]
        else:
            self._held = None
            raw = self._file.read(storage)
            # Parts of one storage are mostly asked for one after the other.
            if int(np.prod(tensor.shape)) * tensor.dtype.itemsize < raw.nbytes:
                self._held = (storage.key, raw)
        whole = raw[: raw.nbytes // tensor.dtype.itemsize * tensor.dtype.itemsize].view(tensor.dtype)
        if self._file.big_endian:
            whole = whole.view(tensor.dtype.newbyteorder(">")).astype(tensor.dtype)
        step = tensor.dtype.itemsize
        return np.lib.stride_tricks.as_strided(
            whole[tensor.offset :], tensor.shape, [step * s for s in tensor.strides], writeable=False
        )

    @property
    def hyper_parameters(self) -> dict[str, Any] | None:
        """What a Lightning checkpoint was trained with, or None."""
        found = self.tree.get("hyper_parameters") if isinstance(self.tree, dict) else None
        if isinstance(found, Opaque):  # a Namespace has a state, an AttributeDict items
            found = found.items or found.state
        return found if isinstance(found, dict) else None

    def _state(self) -> dict[Any, Any]:
        found = self.tree
        for key in ("state_dict", "model"):
            if isinstance(found, dict) and isinstance(found.get(key), dict):
                found = found[key]
                break
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise WeightsError(
                f"{self.path} holds no state dict but a {type(found).__name__}; a whole module that"
                " was saved has to be saved again as module.state_dict()"
            )
        return found


class _Zip:
    """torch ≥ 1.6: a zip of a pickle and one entry for each storage, most often stored as they are."""

    def __init__(self, path: str):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                names = [entry.filename for entry in entries]
                pickles = [name for name in names if name.endswith("/data.pkl")]
                if len(pickles) != 1 or len(set(names)) != len(names):
                    raise WeightsError(
                        f"{path} is a zip of {len(names)} entries with {len(pickles)} data.pkl in"
                        " folders, or with entries of the same name; torch.save writes exactly one,"
                        " and no name twice"
                    )
                self._prefix = pickles[0].removesuffix("data.pkl")
                entry = archive.getinfo(pickles[0])
                most = min(torch_pickle.LIMIT, _PICKLE_RATIO * entry.compress_size + 4096)
                if entry.file_size > most:
                    raise WeightsError(
                        f"{path}: its data.pkl says {entry.file_size} bytes, over {most}; no model's"
                        " is as large, or it was compressed in order to grow. Do not use the file"
                    )
                content = archive.read(_packed(entry))
                order = self._prefix + "byteorder"
                self.big_endian = False
                if order in names:
                    with archive.open(_packed(archive.getinfo(order))) as file:
                        self.big_endian = file.read(8) == b"big"
        except _BROKEN as error:
            raise self._damaged(error) from error
        self.tree = torch_pickle.load(content, path)

    def read(self, storage: Storage) -> np.ndarray:
        """A storage's bytes; their checksum is compared on the way."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                entry = archive.getinfo(f"{self._prefix}data/{storage.key}")
                width = 1 if storage.dtype is None else storage.dtype.itemsize
                if entry.file_size != storage.count * width:
                    raise self._damaged(
                        f"storage {storage.key} has {entry.file_size} bytes, not the"
                        f" {storage.count * width} that it says"
                    )
                # A compressed entry can say any size; no file is a thousandth of what it holds.
                if entry.file_size > 1032 * (entry.compress_size + 1):
                    raise self._damaged(f"storage {storage.key} says an impossible size")
                raw = np.empty(entry.file_size, np.uint8)
                at = 0
                with archive.open(_packed(entry)) as file:
                    while piece := file.read(_PIECE):
                        raw[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                        at += len(piece)
        except KeyError as error:
            raise self._damaged(f"storage {storage.key} is missing") from error
        except _BROKEN as error:
            raise self._damaged(error) from error
        if at != raw.nbytes:
            raise self._damaged(f"storage {storage.key} ends early")
        return raw

    def _damaged(self, reason: object) -> WeightsError:
        return _damaged(self.path, reason)


class _Legacy:
    """torch < 1.6: five pickles, then every storage's length and bytes."""

    def __init__(self, path: str):
        self.path = path
        if not os.path.getsize(path):
            raise _damaged(path, "it is empty")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            if view[:1] not in (b"\x80", b"\x8a"):
                raise WeightsError(
                    f"{path} is no torch file: neither a zip nor a pickle. If it is safetensors or"
                    " GGUF, give it the suffix that says so"
                )
            magic, protocol = (torch_pickle.load(view, path) for _ in range(2))
            if magic != _MAGIC or protocol != _PROTOCOL:
                raise WeightsError(f"{path} is a pickle, but not one that torch.save wrote")
            system = torch_pickle.load(view, path)
            self.big_endian = isinstance(system, dict) and system.get("little_endian") is False
            self.tree = torch_pickle.load(view, path)
            keys = torch_pickle.load(view, path)
            self._places = self._find(view, keys)

    def _find(self, view: mmap.mmap, keys: Any) -> dict[str, tuple[int, int]]:
        """Where each storage's bytes begin, and how many there are."""
        known = _storages(self.tree)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise _damaged(self.path, "its list of storages is none")
        places, at = {}, view.tell()
        for key in keys:
            if at + 8 > len(view):
                raise _damaged(self.path, f"it ends before storage {key[:40]!r}")
            (count,) = struct.unpack_from(">q" if self.big_endian else "<q", view, at)
            storage = known.get(key)
            if storage is None or count != storage.count or storage.dtype is None:
                raise _damaged(self.path, f"storage {key[:40]!r} is not the one its tensors mean")
            places[key] = (at + 8, count * storage.dtype.itemsize)
            at += 8 + places[key][1]
        if at > len(view):
            raise _damaged(self.path, "its last storage ends after the file does")
        return places

    def read(self, storage: Storage) -> np.ndarray:
        """A storage's bytes."""
        if storage.key not in self._places:
            raise _damaged(self.path, f"storage {storage.key[:40]!r} is missing")
        at, size = self._places[storage.key]
        raw = np.fromfile(self.path, np.uint8, size, offset=at)
        if raw.nbytes != size:
            raise _damaged(self.path, "it was cut short since it was opened")
        return raw


# What zipfile and its decompressors raise for content that is not as it should be.
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError,
           struct.error, ValueError)


def _packed(entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """The entry, where it is stored or deflated: what else there is asks for memory by itself."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"an entry compressed by method {entry.compress_type}")
    return entry


def _storages(tree: Any) -> dict[str, Storage]:
    """Storages by key, of every tensor in nested containers."""
    found, todo, seen = {}, [tree], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[value.storage.key] = value.storage
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif isinstance(value, Opaque):
            todo += [value.arguments, value.state, value.items]
    return found


def _damaged(path: str, reason: object) -> WeightsError:
    if isinstance(reason, WeightsError):  # it says so already
        return reason
    return WeightsError(
        f"{path} cannot be read as a torch file ({reason}); it is damaged or was cut short while"
        " being fetched. Fetch it again"
    )
