"""Safetensors files."""

import collections
import json
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from larimar_jax.weights.fill import WeightsError

_DTYPES = {
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{"BF16": np.dtype(ml_dtypes.bfloat16), "U8": np.dtype(np.uint8), "BOOL": np.dtype(bool)},
}
_HEADER_LIMIT = 100_000_000  # safetensors' own


class Safetensors:
    """A `fill.Source` over a `.safetensors` file; several with an index are `shards.Shards`.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: a file that is no safetensors file, is cut short, names a tensor twice, or holds
        numbers of a kind that is not read here.
    """

    def __init__(self, path: str | pathlib.Path):
        # Here and not on top: half a second that only a caller who reads weights should pay.
        import safetensors

        self.path = str(path)
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"there is no weights file at {path}")
        header = self._header()
        try:
            # It checks what lies where. It does not read: as numpy it has no bfloat16 of its own, as
            # Flax it puts a tensor on a device, where float64 and int64 lose half their digits.
            with safetensors.safe_open(self.path, framework="numpy"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise self._damaged(error) from error
        kinds = {name: said["dtype"] for name, said in header.items()}
        strange = [f"{name} ({kind})" for name, kind in kinds.items() if kind not in _DTYPES]
        if strange:
            raise WeightsError(
                f"{path} holds tensors of kinds that are not read here: {', '.join(strange)[:300]}."
                " Take the model's unquantised file"
            )
        self._tensors = header

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, from the header alone."""
        return {name: tuple(said["shape"]) for name, said in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file.

        Raises:
          WeightsError: the file was cut short since it was opened.
        """
        said = self._tensors[name]
        shape, begin = said["shape"], self._start + said["data_offsets"][0]
        # Read and not mapped: pages of a mapped file would count beside what is made of them.
        data = np.fromfile(self.path, _DTYPES[said["dtype"]], math.prod(shape), offset=begin)
        if data.size != math.prod(shape):
            raise self._damaged("it is shorter than when it was opened")
        return data.reshape(shape)

    def _header(self) -> dict[str, Any]:
        """What the file says of each tensor. The library would keep the last of two of a name."""
        with open(self.path, "rb") as file:
            length = file.read(8)
            size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
            if not 2 <= size <= _HEADER_LIMIT:
                raise self._damaged(f"a header of {size} bytes")
            text = file.read(size)
        self._start = len(length) + size
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise self._damaged(error) from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no table")
        header.pop("__metadata__", None)
        if not all(isinstance(said, dict) for said in header.values()):
            raise self._damaged("its header does not describe its tensors")
        return header

    def _damaged(self, reason: object) -> WeightsError:
        return WeightsError(
            f"{self.path} cannot be read as safetensors ({reason}); it is damaged or was cut short"
            " while being fetched. Fetch it again"
        )


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ, for `object_pairs_hook`; Python would keep the last value.

    Raises:
      ValueError: naming the keys that are there more than once.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = sorted(name for name, count in counts.items() if count > 1)
        raise ValueError(f"duplicate keys: {', '.join(twice)[:200]}")
    return found
