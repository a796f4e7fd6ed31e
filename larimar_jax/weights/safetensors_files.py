"""Safetensors files, and weights in several files with an index, as Hugging Face lays them out."""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from larimar_jax.weights.key_table import Source, WeightsError, require_file

_NUMBERS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
# The name of a file in the same folder, which any file system takes.
_FILE = re.compile(r"(?!\.{1,2}$)[^/\\\0]{1,200}\.(safetensors|bin)")


class Safetensors:
    """A `key_table.Source` over a `.safetensors` file; several with an index are `Shards`.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: a file that is no safetensors file, is cut short (seen here, or when a tensor is
        read), or holds numbers of a kind that is not read here.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = str(path)
        require_file(path)
        with self._opened() as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            self._shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        if odd := [f"{name} ({kind})" for name, kind in kinds.items() if kind not in _NUMBERS]:
            raise WeightsError(
                f"{path} holds tensors of kinds that are not read here: {', '.join(odd)[:300]}."
                " Take the model's unquantised file"
            )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return every tensor's shape, from the header alone."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, in the dtype of the file."""
        with self._opened() as file:
            return file.get_tensor(name)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        import safetensors

        try:
            # Read and not mapped: pages of a mapped file would count beside what is made of them.
            with safetensors.safe_open(self.path, framework="numpy", backend="pread") as file:
                yield file
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"{self.path} cannot be read as safetensors ({error}); it is damaged or was cut short"
                " while being fetched. Fetch it again"
            ) from error


class Shards:
    """A `key_table.Source` over the files that an index names.

    Args:
      index: a JSON file with a `weight_map` of tensor names to files beside it.
      open_file: the reader of one of them.

    Raises:
      FileNotFoundError: naming every file that is not there.
      WeightsError: an index that is none, one that leads outside its folder, or files that do not
        hold what it says: naming at once every tensor that is not where the index has it, and every
        one that a file holds beside those.
    """

    def __init__(self, index: pathlib.Path, open_file: Callable[[pathlib.Path], Source]):
        self.path = str(index)
        values = read_json(index)
        self._places = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(self._places, dict) or not self._places:
            raise WeightsError(
                f"{index} is no index of weights: it has no weight_map of names to files"
            )
        files = sorted({str(file) for file in self._places.values()})
        if astray := [file for file in files if not _FILE.fullmatch(file)]:
            raise WeightsError(
                f"{index} leads outside its folder or nowhere: {', '.join(astray)[:200]}. Files of an"
                " index lie beside it; do not use this one"
            )
        if missing := [file for file in files if not (index.parent / file).is_file()]:
            raise FileNotFoundError(
                f"{index} names files that are not beside it: {', '.join(missing)}. Fetch them, or"
                " the whole folder, again"
            )
        self._files = {file: open_file(index.parent / file) for file in files}
        shapes = {file: source.shapes() for file, source in self._files.items()}
        indexed = {name: f"the index has it in {file}" for name, file in self._places.items()}
        problems = [
            f"{name}: in {file}, {indexed.get(name, 'not indexed')}"
            for file in files
            for name in shapes[file]
            if self._places.get(name) != file
        ]
        problems += [
            f"{name}: not in {file}, where the index has it"
            for name, file in self._places.items()
            if name not in shapes[file]
        ]
        if problems:
            raise WeightsError(
                f"{index} and its files do not fit; they are of different versions:\n  "
                + "\n  ".join(problems)
            )
        self._shapes = {name: shape for held in shapes.values() for name, shape in held.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return every tensor's shape, from the files' headers."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, as its file's reader gives it."""
        return self._files[self._places[name]].read(name)


def read_json(path: pathlib.Path) -> Any:
    """Return the content of a JSON file; WeightsError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error}); damaged. Fetch it again") from error
