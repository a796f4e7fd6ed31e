"""The header of a GGUF file: metadata, and where each tensor lies; every length checked first.

It is parsed here because the `gguf` package's reader makes a numpy view per vocabulary entry, which
takes seconds where this takes a fraction of one, and trusts the file's own counts.
"""

import math
import mmap
import struct
from typing import Any, NamedTuple

# GGUF's value types as `struct` codes.
_SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
    **{10: "Q", 11: "q", 12: "d"},
}
_STRING, _ARRAY = 8, 9
_NESTED = 3  # real files hold arrays of scalars and strings, and none deeper than this
_AXES = 4  # GGML's own limit
# The largest vocabularies bring a million texts and numbers in twenty megabytes. A damaged count can
# be far larger and still within a file of gigabytes; it would be parsed for minutes.
_VALUES, _LARGEST = 1 << 22, 1 << 27


class TensorInfo(NamedTuple):
    """shape: slowest axis first. kind: GGML's type. offset: bytes from where tensors begin."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """start: where tensors begin; alignment: of each; size: of the whole file. All are bytes."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    start: int
    alignment: int
    size: int


class BadHeader(ValueError):
    """What is wrong with a header, in words that go into an error about its file."""


def read(path: str) -> Header:
    """Parses the header of the file at `path`, which stays mapped no longer than that takes.

    Raises:
      BadHeader: a file of another kind, cut short, or with lengths and names that cannot be.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            raise BadHeader(f"{size} bytes are fewer than a header has")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()


class _Reader:
    """A place in the bytes, and what can be read there."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at, self._left = data, 0, _VALUES

    def header(self) -> Header:
        """The whole of it."""
        if self._bytes(4) != b"GGUF":
            raise BadHeader("it does not begin with 'GGUF'")
        version = self._scalar("I")
        if version not in (2, 3):
            swapped = version in (2 << 24, 3 << 24)
            raise BadHeader(
                "its numbers are big-endian; convert it for this kind of machine"
                if swapped
                else f"version {version}, where 2 and 3 are known"
            )
        count, entries = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        # An entry has a name's length, a type and a byte at least.
        for _ in range(self._count(entries, 13, "metadata entries")):
            name = self._string()
            if name in metadata:
                raise BadHeader(f"the metadata {name[:60]!r} is there twice")
            metadata[name] = self._value(self._scalar("I"), 0)
        tensors: dict[str, TensorInfo] = {}
        for _ in range(self._count(count, 24, "tensors")):
            name = self._string()
            if name in tensors:
                raise BadHeader(f"the tensor {name[:60]!r} is there twice")
            axes = self._scalar("I")
            if axes > _AXES:
                raise BadHeader(f"the tensor {name[:60]!r} has {axes} axes")
            # GGUF names the fastest axis first.
            shape = tuple(self._scalar("Q") for _ in range(axes))[::-1]
            tensors[name] = TensorInfo(shape, self._scalar("I"), self._scalar("Q"))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in (1 << n for n in range(3, 21)):
            raise BadHeader(f"an alignment of {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return Header(metadata, tensors, start, alignment, len(self._data))

    def _count(self, count: int, least: int, what: str) -> int:
        if count * least > len(self._data) - self._at:
            raise BadHeader(f"it says {count} {what}, more than it has room for")
        self._left -= count
        if self._left < 0:
            raise BadHeader(f"it says {count} {what}, more than the header of any model has")
        return count

    def _bytes(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise BadHeader("its header ends after the file does")
        if end > _LARGEST:
            raise BadHeader("its header is longer than that of any model")
        piece, self._at = self._data[self._at : end], end
        return piece

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        size = self._scalar("Q")
        try:
            return self._bytes(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadHeader(f"a text that is no UTF-8 ({error.reason})") from error

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY or depth == _NESTED:
            raise BadHeader(f"a value of type {kind}" + (" nested too deep" if depth else ""))
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in _SCALARS:
            code = f"<{self._count(count, struct.calcsize(_SCALARS[inner]), 'numbers')}{_SCALARS[inner]}"
            return list(struct.unpack(code, self._bytes(struct.calcsize(code))))
        return [
            self._value(inner, depth + 1) for _ in range(self._count(count, 8, "texts or arrays"))
        ]


def elements(tensor: TensorInfo) -> int:
    """How many numbers a tensor has."""
    return math.prod(tensor.shape)
