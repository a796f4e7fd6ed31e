"""Safetensors files: one, or the shards that an index names."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from larimar_jax.weights.fill import WeightsError


class Safetensors:
    """A `fill.Source` over a `.safetensors` file or a `.safetensors.index.json`.

    Raises:
      FileNotFoundError: no such file, or a shard that is not there.
      WeightsError: a file that is no safetensors file, or is cut short.
    """

    def __init__(self, path: str | pathlib.Path):
        # Here and not on top: half a second that only a caller who reads weights should pay.
        import safetensors

        path = pathlib.Path(path)
        self.path = str(path)
        self._files = {}
        for shard in _shards(path):
            if not shard.is_file():
                raise FileNotFoundError(f"there is no weights file at {shard}")
            try:
                # Flax's reader and not numpy's, which has no bfloat16.
                file = safetensors.safe_open(str(shard), framework="flax")
            except (safetensors.SafetensorError, OSError) as error:
                raise WeightsError(
                    f"{shard} cannot be read as safetensors ({error}); it is damaged or was cut"
                    " short while being fetched. Fetch it again"
                ) from error
            for name in file.keys():
                self._files[name] = file

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, from the header alone."""
        return {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file."""
        return np.asarray(self._files[name].get_tensor(name))


def _shards(path: pathlib.Path) -> list[pathlib.Path]:
    if path.suffix != ".json":
        return [path]
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is no index of safetensors files ({error!r})") from error
    return [path.parent / name for name in sorted(names)]
