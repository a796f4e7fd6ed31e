"""GGUF as a container: metadata and dequantised tensors; every length is checked first.

The `gguf` package dequantises. The header is parsed here because the package's reader makes a NumPy
view of each vocabulary entry, which takes thirty times as long, and trusts the file's own counts.
"""

import functools
import itertools
import math
import mmap
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from larimar_jax.weights.key_table import WeightsError

# GGUF's value types as `struct` codes.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NESTED = 3  # real files hold arrays of scalars and strings, and none deeper than this
_AXES = 4  # GGML's own limit
# The largest vocabularies bring a million texts and numbers in twenty megabytes. A damaged count can
# be far larger and still within a file of gigabytes; it would be parsed for minutes.
_VALUES, _LARGEST = 1 << 22, 1 << 27


class TensorInfo(NamedTuple):
    """shape: slowest axis first. kind: GGML's type. begin, size: its bytes in the file."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    size: int


def read_header(path: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return metadata and tensors of a GGUF file of version 2 or 3, by llama.cpp's names.

    Raises:
      WeightsError: a file of another kind, cut short or damaged, or with tensors of an unknown kind.
    """
    try:
        with open(path, "rb") as file:
            if (size := file.seek(0, 2)) < 24:
                raise ValueError(f"{size} bytes are fewer than a header has")
            # Mapped no longer than this takes: mapped pages count beside what is made of them.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                reader = _HeaderReader(data)
                metadata, entries = reader.header()
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in (1 << n for n in range(3, 21)):
            raise ValueError(f"an alignment of {alignment!r}")
        start = -(-reader.at // alignment) * alignment
        tensors = {n: _located(path, n, *entry, start, alignment) for n, entry in entries.items()}
        places = sorted((t.begin, t.begin + t.size, name) for name, t in tensors.items())
        for _, end, name in places:
            if end > size:
                raise ValueError(f"tensor {name} ends after the file does")
        for (_, end, name), (begin, _, following) in itertools.pairwise(places):
            if begin < end:
                raise ValueError(f"tensors {name} and {following} overlap")
    except ValueError as error:
        raise error if isinstance(error, WeightsError) else damaged(path, error) from error
    return metadata, tensors


def read_tensor(path: str, tensor: TensorInfo) -> np.ndarray:
    """Return one tensor, float32, slowest axis first.

    Raises:
      WeightsError: the file was cut short since its header was read.
    """
    import gguf

    # Read and not mapped, as above.
    data = np.fromfile(path, np.uint8, tensor.size, offset=tensor.begin)
    if data.size != tensor.size:
        raise damaged(path, "it is shorter than when it was opened")
    # The package goes by 16 rows, which are short here; longer ones, of whole blocks still, take
    # half the time.
    rows = math.prod(tensor.shape[:-1])
    data = data.reshape(rows // math.gcd(rows, 32), -1)
    values = gguf.dequantize(data, gguf.GGMLQuantizationType(tensor.kind))
    return np.asarray(values, np.float32).reshape(tensor.shape)


def damaged(path: str, reason: object) -> WeightsError:
    """Return the error for a file that cannot be what it was."""
    return WeightsError(
        f"{path} cannot be read as GGUF ({reason}); it is damaged or was cut short while"
        " being fetched. Fetch it again"
    )


def _located(
    path: str, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, alignment: int
) -> TensorInfo:
    if kind not in _blocks():
        raise WeightsError(
            f"{path}: tensor {name} is of kind {kind}, which is not read here; it"
            " is damaged, or quantised in another way. Take an F16, Q8_0, Q4_0, Q4_1 or"
            " K-quant file of the model"
        )
    block, width = _blocks()[kind]
    if not shape or shape[-1] % block or 0 in shape:
        raise ValueError(f"tensor {name} of shape {shape} in blocks of {block}")
    if offset % alignment:
        raise ValueError(f"tensor {name} begins at {offset}, no multiple of {alignment}")
    return TensorInfo(shape, kind, start + offset, math.prod(shape) // block * width)


@functools.cache
def _blocks() -> Mapping[int, tuple[int, int]]:
    """Return the kinds that are read here → (numbers of a block, bytes of a block)."""
    import gguf  # Here and not on top: a quarter of a second that only a GGUF file should cost.

    kinds = {*gguf.quants._type_traits}  # what `gguf.dequantize` knows
    kinds |= {gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}
    return {int(kind): gguf.GGML_QUANT_SIZES[kind] for kind in kinds}


class _HeaderReader:
    """A place in the bytes, and how to read on from there."""

    def __init__(self, data: mmap.mmap):
        self._data, self.at, self._left = data, 0, _VALUES

    def header(self) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]]]:
        """Return metadata and tensors (shape, kind, offset); `at` is then where the header ends."""
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        version = self._scalar("I")
        if version in (2 << 24, 3 << 24):
            raise ValueError("its numbers are big-endian; convert it for this kind of machine")
        if version not in (2, 3):
            raise ValueError(f"version {version}, where 2 and 3 are known")
        count, entries = self._scalar("Q"), self._scalar("Q")
        metadata, tensors = {}, {}
        # An entry has a name's length, a type and a byte at least.
        for _ in range(self._count(entries, 13, "metadata entries")):
            name = self._new_name(metadata, "metadata")
            metadata[name] = self._value(self._scalar("I"), 0)
        for _ in range(self._count(count, 24, "tensors")):
            name = self._new_name(tensors, "tensor")
            if (axes := self._scalar("I")) > _AXES:
                raise ValueError(f"the tensor {name[:60]!r} has {axes} axes")
            # GGUF names the fastest axis first.
            shape = tuple(self._scalar("Q") for _ in range(axes))[::-1]
            tensors[name] = shape, self._scalar("I"), self._scalar("Q")
        return metadata, tensors

    def _new_name(self, names: dict[str, Any], what: str) -> str:
        name = self._string()
        if name in names:
            raise ValueError(f"the {what} {name[:60]!r} is there twice")
        return name

    def _count(self, count: int, least: int, what: str) -> int:
        if count * least > len(self._data) - self.at:
            raise ValueError(f"it names {count} {what}, more than it has room for")
        self._left -= count
        if self._left < 0:
            raise ValueError(f"it names {count} {what}, more than the header of any model has")
        return count

    def _bytes(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self._data):
            raise ValueError("its header ends after the file does")
        if end > _LARGEST:
            raise ValueError("its header is longer than that of any model")
        piece, self.at = self._data[self.at : end], end
        return piece

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode("utf-8")  # UnicodeDecodeError: a ValueError

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY or depth == _NESTED:
            raise ValueError(f"a value of type {kind}" + (" nested too deep" if depth else ""))
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[inner])
            code = f"<{self._count(count, width, 'numbers')}{_SCALARS[inner]}"
            return list(struct.unpack(code, self._bytes(count * width)))
        entries = range(self._count(count, 8, "texts or arrays"))
        return [self._value(inner, depth + 1) for _ in entries]
