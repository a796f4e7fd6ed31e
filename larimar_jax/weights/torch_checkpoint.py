"""torch's `.bin`, `.pt` and `.ckpt` files without torch, and without running anything in them.

`torch.save` (since 1.6) writes a zip: a pickle of the object, and one entry for each storage of
numbers. A pickle is a program for a stack machine that imports and calls whatever it names.
`_Unpickler` looks each name up in a short list instead, and hands out functions, classes and dtypes
of this module alone: tensors become `_Tensor`s, other listed objects inert `Record`s, and any other
name is an error.
"""

import io
import math
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from larimar_jax.weights.key_table import WeightsError, require_file

# The pickle of a 70B model in one file with its optimiser is a megabyte. Each byte of a hostile
# one can make an object of a hundred bytes.
_LONGEST_PICKLE = 1 << 23
_PIECE = 1 << 22
_AXES = 64  # NumPy's own limit

# torch's names of storages → its names of dtypes, which are NumPy's.
_DTYPES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
    **{"Bool": "bool", "Untyped": "uint8"},
}
# Names of what a checkpoint may hold beside tensors.
_RECORDED = re.compile(
    r"(argparse|lightning(_fabric|_utilities)?|omegaconf|pathlib|pytorch_lightning)\..+"
    r"|(torch\.optim|transformers)\..+"
    r"|builtins\.(bool|bytearray|complex|dict|float|frozenset|int|list|object|range|set|slice)"
    r"|builtins\.(str|tuple)|collections\.(Counter|defaultdict|deque)"
    r"|copyreg\._reconstructor|_codecs\.encode"
    r"|numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
    r"|torch\.(Size|Tensor|device|dtype)|torch\._tensor\.Tensor|torch\.nn\.parameter\.(Parameter|Buffer)"
    r"|torch\.serialization\._get_layout|torch\.storage\.TypedStorage"
)
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# Instructions that torch does not write: they name things by number, or ask for memory.
_UNUSED = b"".join((pickle.PERSID, pickle.DICT, pickle.EXT1, pickle.EXT2, pickle.EXT4))
_UNUSED += b"".join((pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER))


class TorchCheckpoint:
    """A `key_table.Source` over a file that `torch.save` wrote; nothing in it is run.

    Tensors are those of the state dict: the entry `state_dict` or `model` of a training checkpoint,
    else the file's own mapping. `tree` is the whole object.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: a file that torch did not write, that torch before 1.6 wrote, that is damaged (seen
        here, or when a tensor is read), or that asks for more than tensors.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = str(path)
        require_file(path)
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise WeightsError(
                    f"{path} is no torch file since 1.6: it is no zip. It is damaged, was cut short, or"
                    " is of another format (safetensors, GGUF: give it the suffix of that). An older"
                    " torch file has to be loaded with torch and saved again"
                )
        try:
            self.tree: Any = _Unpickler(self._pickle(), self.path).load()
        except Exception as error:  # What a pickle does wrong has any of a dozen types.
            raise self._damaged(error) from error
        self._tensors = {n: t for n, t in self._state_dict().items() if isinstance(t, _Tensor)}
        self._buffer: tuple[str, np.ndarray] | None = None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return every tensor's shape; no numbers are read."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, in the dtype of the file."""
        storage, offset, shape, strides = self._tensors[name]
        width = storage.dtype.itemsize
        raw = self._raw(storage)
        # A buffer of many tensors is read once for those that follow each other.
        self._buffer = (storage.key, raw) if math.prod(shape) < storage.count else None
        values = raw[: storage.count * width].view(storage.dtype)[offset:]
        steps = [width * step for step in strides]
        return np.lib.stride_tricks.as_strided(values, shape, steps, writeable=False)

    def _raw(self, storage: "_Storage") -> np.ndarray:
        """Return the bytes of a storage."""
        if self._buffer is not None and self._buffer[0] == storage.key:
            if self._buffer[1].nbytes == storage.bytes:
                return self._buffer[1]
        self._buffer = None  # Two would be in memory at once.
        try:
            with zipfile.ZipFile(self.path) as archive:
                entry = _stored(archive, f"{self._prefix}data/{storage.key}")
                if entry.file_size != storage.bytes:
                    raise ValueError(
                        f"storage {storage.key} has {entry.file_size} bytes, not the {storage.bytes}"
                        " that its tensors mean"
                    )
                raw = np.empty(entry.file_size, np.uint8)
                with archive.open(entry) as file:  # which compares the checksum at the end
                    for at in range(0, raw.nbytes, _PIECE):
                        raw[at : at + _PIECE] = np.frombuffer(file.read(_PIECE), np.uint8)
        except Exception as error:
            raise self._damaged(error) from error
        return raw

    @property
    def hyper_parameters(self) -> dict[str, Any] | None:
        """The settings that a Lightning checkpoint was trained with, or None."""
        settings = self.tree.get("hyper_parameters") if isinstance(self.tree, dict) else None
        if isinstance(settings, Record):  # a Namespace has a state, an AttributeDict items
            settings = settings or settings.state
        return settings if isinstance(settings, dict) else None

    def _pickle(self) -> bytes:
        with zipfile.ZipFile(self.path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if len(pickles) != 1 or len(set(names)) != len(names):
                raise ValueError(
                    f"{len(pickles)} data.pkl in folders, or entries of the same name; torch.save"
                    " writes exactly one, and no name twice"
                )
            self._prefix = pickles[0].removesuffix("data.pkl")
            entry = _stored(archive, pickles[0])
            if entry.file_size > _LONGEST_PICKLE:
                raise ValueError(f"a data.pkl of {entry.file_size} bytes; no model's is as large")
            order = self._prefix + "byteorder"
            if order in names and archive.open(_stored(archive, order)).read(8) == b"big":
                raise ValueError("big-endian numbers; save it again on this kind of machine")
            return archive.read(entry)

    def _state_dict(self) -> dict[str, Any]:
        tree = self.tree
        for key in ("state_dict", "model"):
            if isinstance(tree, dict) and isinstance(tree.get(key), dict):
                tree = tree[key]
                break
        if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
            raise WeightsError(
                f"{self.path} holds no state dict but a {type(tree).__name__}; a whole module that"
                " was saved has to be saved again as module.state_dict()"
            )
        return tree

    def _damaged(self, error: Exception) -> WeightsError:
        if isinstance(error, WeightsError):
            return error
        return WeightsError(
            f"{self.path} cannot be read as a torch file ({str(error) or type(error).__name__}); it is"
            " damaged or was cut short while being fetched. Fetch it again"
        )


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return an entry as torch writes it: not compressed, so that it is no larger than the file."""
    if name not in archive.NameToInfo:
        raise ValueError(f"{name} is missing")
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"the entry {name!r} is compressed, which torch does not do")
    return entry


class _Storage(NamedTuple):
    """Numbers of one dtype in an entry of the zip, whose size is `bytes`."""

    key: str
    dtype: np.dtype
    count: int
    bytes: int


class _Tensor(NamedTuple):
    """A strided view of a storage, all in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Table(dict):
    """A dict whose keys hash at once; those of a hostile file could be nested without end."""

    def __setitem__(self, key: Any, value: Any) -> None:
        parts = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
        kinds = str | bytes | float | None | Record
        if not all(isinstance(part, kinds) or _is_small(part) for part in parts):
            raise ValueError(f"an entry named by a {type(key).__name__}")
        if key in self:
            name = key[:80] if isinstance(key, str) else f"of a {type(key).__name__}"
            raise ValueError(f"the entry {name!r} twice")
        super().__setitem__(key, value)


class Record(_Table):
    """An object of a listed class that was not built: its items, its state, and nothing else."""

    state: Any = None
    __hash__, __eq__ = object.__hash__, object.__eq__

    def __init__(self, *_: Any):
        super().__init__()

    def extend(self, items: Any) -> None:
        """Drop the items of a list or a set."""

    append = add = extend


class _Instructions(dict):
    def __missing__(self, code: int):
        raise ValueError(f"instruction {code}, which torch does not write")


class _Unpickler(pickle._Unpickler):
    """The unpickler of Python's library, in its implementation in Python.

    The one in C allocates as much memory as the number of a memo says.
    """

    dispatch = _Instructions(
        {code: load for code, load in pickle._Unpickler.dispatch.items() if code not in _UNUSED}
    )

    def __init__(self, content: bytes, path: str):
        super().__init__(io.BytesIO(content))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands here for a listed name; any other is a WeightsError."""
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        if full in _REBUILD:
            return _REBUILD[full]
        kind = name if name in _DTYPES.values() else _DTYPES.get(name.removesuffix("Storage"))
        if module in ("torch", "torch.cuda", "torch.storage") and kind is not None:
            return np.dtype(getattr(ml_dtypes, kind, kind))
        if _RECORDED.fullmatch(full):
            return Record
        raise WeightsError(
            f"{self._path} asks for {module[:80]}.{name[:80]}, which a file of weights has no use"
            " for; nothing of it was run. If you trust where it is from, load it with torch and"
            " save its state_dict as safetensors"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a reference names."""
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or not isinstance(key, str) or not _is_count(count) or any(view):
            raise ValueError("a reference to something that is no storage with its name and size")
        if not isinstance(dtype, np.dtype):
            raise ValueError(f"a storage of a {type(dtype).__name__}")
        return _Storage(key, dtype, count, count * dtype.itemsize)

    def _build(self) -> None:
        """Note the state of a record; attributes of a dict or a tensor are no weights."""
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, Record):
            built.state = state
        elif not isinstance(built, _Table | _Tensor):
            raise ValueError(f"a state for a {type(built).__name__}")

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(_Table())
    dispatch[pickle.EMPTY_SET[0]] = lambda self: self.append(Record())
    dispatch[pickle.FROZENSET[0]] = lambda self: self.append(Record(self.pop_mark()))


def _is_small(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 1 << 63


def _is_count(value: Any) -> bool:
    return _is_small(value) and not isinstance(value, bool) and value >= 0


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """`torch._utils._rebuild_tensor_v2`."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    fits = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    # The axes first, since a product of many or of large numbers takes for ever.
    if not fits or len(shape) > _AXES or not all(map(_is_count, (offset, *shape, *strides))):
        raise ValueError("a tensor whose place, shape or strides are no counts")
    size = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    # As many numbers at most as there are: a stride of 0 could ask for any amount of memory.
    if size and (last >= storage.count or size > storage.count):
        raise ValueError(f"a tensor of shape {shape} at {offset} in a storage of {storage.count}")
    return _Tensor(storage, offset, shape, strides)


def _typed_tensor(storage: Any, *place: Any) -> _Tensor:
    """`torch._utils._rebuild_tensor_v3`: a dtype of the tensor's own over an untyped storage."""
    dtype = place[5]
    if not isinstance(storage, _Storage) or not isinstance(dtype, np.dtype):
        raise ValueError("a tensor without a storage, or of an unknown kind of number")
    count = storage.bytes // dtype.itemsize
    return _tensor(storage._replace(dtype=dtype, count=count), *place)


_REBUILD = {
    # Without arguments, as torch writes it: items that came as one would not be looked at.
    "collections.OrderedDict": lambda: _Table(),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    # Parameters, and subclasses of tensors: whatever they are in Python, tensors are what is read.
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, _, arguments, *__: rebuild(*arguments),
}
