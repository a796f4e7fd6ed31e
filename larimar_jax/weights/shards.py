"""Weights in several files with an index, as Hugging Face lays them out."""

import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from larimar_jax.weights.fill import Source, WeightsError
from larimar_jax.weights.safetensors import once

_LONGEST = 255  # bytes of a file's name, on any file system


class Shards:
    """A `fill.Source` over the files that an index names.

    Args:
      index: a JSON file with a `weight_map` of tensor names to files beside it.
      open_file: what reads one of them.

    Raises:
      FileNotFoundError: naming every file that is not there.
      WeightsError: an index that is none, one that leads outside its folder, or files that do not
        hold what it says: naming at once every tensor that is not where the index has it, and every
        one that a file holds beside those.
    """

    def __init__(self, index: pathlib.Path, open_file: Callable[[pathlib.Path], Source]):
        self.path = str(index)
        where = _weight_map(index)
        missing = [file for file in sorted(set(where.values())) if not (index.parent / file).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{index} names files that are not beside it: {', '.join(missing)}. Fetch them, or"
                " the whole folder, again"
            )
        files = {file: open_file(index.parent / file) for file in sorted(set(where.values()))}
        self._shapes, self._files = {}, {}
        self._last: Source | None = None
        problems = []
        for file, source in files.items():
            for name, shape in source.shapes().items():
                if where.get(name) != file:
                    said = f"the index has it in {where[name]}" if name in where else "not indexed"
                    problems.append(f"{name}: in {file}, {said}")
                self._shapes[name], self._files[name] = shape, source
        problems += [
            f"{name}: not in {file}, where the index has it"
            for name, file in where.items()
            if name not in files[file].shapes()
        ]
        if problems:
            raise WeightsError(
                f"{index} and its files do not fit; they are of different versions:\n  "
                + "\n  ".join(problems)
            )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, from the files' headers."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """One tensor, as its file's reader gives it."""
        file = self._files[name]
        if self._last not in (None, file) and hasattr(self._last, "release"):
            self._last.release()  # else every file would keep a storage for its next tensor
        self._last = file
        return file.read(name)


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        said = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{index} is not JSON ({error}); it is damaged. Fetch it again") from error
    where = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(where, dict) or not where:
        raise WeightsError(f"{index} is no index of weights: it has no weight_map of names to files")
    astray = sorted({str(f) for f in where.values() if not isinstance(f, str) or f != _plain(f)})
    if astray:
        raise WeightsError(
            f"{index} leads outside its folder or nowhere: {', '.join(astray)[:200]}. Files of an"
            " index lie beside it; do not use this one"
        )
    return where


def _plain(file: str) -> str | None:
    """The name where it is that of a file in the same folder."""
    path = pathlib.PurePosixPath(file)
    plain = len(path.parts) == 1 and path.name not in ("", "..") and "\\" not in file
    plain = plain and len(file.encode("utf-8", "surrogatepass")) <= _LONGEST and "\0" not in file
    return path.name if plain else None
