"""Safetensors files."""

import json
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from larimar_jax.weights.fill import WeightsError

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
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
            # Flax's reader and not numpy's, which has no bfloat16. It checks what lies where.
            self._file = safetensors.safe_open(self.path, framework="flax")
        except (safetensors.SafetensorError, OSError) as error:
            raise self._damaged(error) from error
        kinds = {name: said.get("dtype") for name, said in header.items()}
        strange = [f"{name} ({kind})" for name, kind in kinds.items() if kind not in _DTYPES]
        if strange:
            raise WeightsError(
                f"{path} holds tensors of kinds that are not read here: {', '.join(strange)[:300]}."
                " Take the model's unquantised file"
            )
        self._shapes = {name: tuple(said["shape"]) for name, said in header.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, from the header alone."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file."""
        return np.asarray(self._file.get_tensor(name))

    def _header(self) -> dict[str, Any]:
        """What the file says of each tensor. The library would keep the last of two of a name."""
        with open(self.path, "rb") as file:
            length = file.read(8)
            size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
            if not 2 <= size <= _HEADER_LIMIT:
                raise self._damaged(f"a header of {size} bytes")
            text = file.read(size)
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"duplicate keys: {', '.join(twice)[:200]}")
    return found
