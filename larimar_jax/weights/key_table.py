"""Key tables: which tensor of a file fills which parameter, strictly in both directions.

A family's table is a sequence of rows `(source, target, transform)`:

- `source`: the tensor's name in the file. `{layer}` is a layer's number, the row of the stacked
  parameter; `[x]` may be absent; `(x|y)` is one of both; `*`, in a row without target, is any text.
  A file of ours is written with `[x]`, and with the first of `(x|y)`.
- `target`: the parameter's path, joined with dots. None: a known tensor that is no parameter. A
  trailing `?`: a parameter that some configurations lack; its tensor is then left out.
- `transform`: a name of `TRANSFORMS`, or a function that makes a view.

One source tensor may match several rows, as GPT-2's fused projection does.
"""

import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

Transform = Callable[[np.ndarray], np.ndarray]
Keys = Sequence[tuple[str, str | None, str | Transform]]
# The sharding of a parameter, by its '/'-joined path and shape.
Where = Callable[[str, tuple[int, ...]], Sharding]

# Views, so that a shape can be transformed too.
TRANSFORMS: Mapping[str, Transform] = {
    "copy": lambda a: a,
    "transpose": lambda a: a.swapaxes(-1, -2),
    **{f"third_{i}": lambda a, i=i: np.split(a, 3, axis=-1)[i] for i in range(3)},
}
# The axis of each parameter that tokens appended to the vocabulary lengthen.
_VOCABULARY_AXIS = {"word.embedding": 0, "head.kernel": 1, "head.bias": 0}
# What Git LFS leaves in the place of a file that was not fetched.
LFS_START = b"version https://git-lfs"
LFS_POINTER = "is Git LFS's pointer to a file, and not the file: fetch that with `git lfs pull`"


class WeightsError(ValueError):
    """Weights that cannot be read, or that do not fit the model they are meant for."""


def require_file(path: str | pathlib.Path) -> None:
    """Raise FileNotFoundError where there is no file, WeightsError where Git LFS left its pointer."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"there is no weights file at {path}")
    with open(path, "rb") as file:
        if file.read(len(LFS_START)) == LFS_START:
            raise WeightsError(f"{path} {LFS_POINTER}")


@runtime_checkable
class Source(Protocol):
    """A file of named tensors, read one at a time."""

    path: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return every tensor's shape, from the header alone."""

    def read(self, name: str) -> np.ndarray:
        """Return one tensor."""


class _Use(NamedTuple):
    name: str
    transform: Transform


# Parameter → layer (None for a parameter that is not stacked) → the tensor that fills it.
_Uses = Mapping[str, dict[int | None, _Use]]


def fill(
    abstract: nnx.Module,
    keys: Keys,
    source: Source,
    *,
    where: Where | None = None,
    more_rows: int = 0,
) -> nnx.Module:
    """Return the module with its parameters read from `source`.

    All names and shapes are checked before any tensor is read. Tensors then stream one at a time
    onto the devices that hold them: a host never has more than one parameter (a stack of layers
    counts as one) beside what its own devices keep. A process reads what its devices need.

    Args:
      abstract: the module from `nnx.eval_shape`; its dtypes are those of the result.
      keys: its family's key table.
      source: the tensors.
      where: each parameter's sharding; None is the default device.
      more_rows: vocabulary that the module has beyond the file's, for special tokens of ours (§2).
        Their embeddings and head rows start as the mean of the file's.

    Raises:
      WeightsError: naming at once every tensor that nothing uses, parameter that nothing fills,
        parameter filled twice, and shape that does not fit.
    """
    graph, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    wanted = {".".join(map(str, path)): leaf for path, leaf in flat}
    uses, problems = _match(keys, source.shapes(), wanted, more_rows)
    if problems:
        raise WeightsError(
            f"{source.path} does not fit the model; either the configuration is another model's"
            f" or the family's key table lacks a row:\n  " + "\n  ".join(problems)
        )
    filled = {}
    # The largest first: the buffers beside the parameters are then least when most are there.
    for name in sorted(wanted, key=lambda name: -math.prod(wanted[name].shape)):
        leaf = wanted[name]
        sharding = None if where is None else where(name.replace(".", "/"), leaf.shape)
        axis = _VOCABULARY_AXIS.get(name)
        filled[name] = leaf.replace(_read(uses[name], leaf, source, sharding, axis, more_rows))
    return nnx.merge(
        graph, nnx.from_flat_state((path, filled[".".join(map(str, path))]) for path, _ in flat)
    )


def to_source(module: nnx.Module, keys: Keys) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a file that `fill` would read into the same module, one at a time.

    Raises:
      WeightsError: naming every parameter that no row of the table writes.
    """
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    values = {".".join(map(str, path)): leaf for path, leaf in state}
    rows: dict[str, list[tuple[str, str | Transform]]] = {}
    for template, target, transform in keys:
        if target is not None and target.removesuffix("?") in values:
            rows.setdefault(template, []).append((target.removesuffix("?"), transform))
    written = {target for row in rows.values() for target, _ in row}
    if unwritten := sorted(values.keys() - written):
        raise WeightsError(f"no row of the key table writes {', '.join(unwritten)}")
    for template, row in rows.items():
        name = re.sub(r"\[(.*?)\]|\(([^|)]*).*?\)", lambda m: m[1] or m[2], template)
        stacked = [np.asarray(values[target][...]) for target, _ in row]
        for layer in range(len(stacked[0])) if "{layer}" in name else (None,):
            parts = [array if layer is None else array[layer] for array in stacked]
            # Thirds stand side by side; the other transforms undo themselves.
            whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
            whole = whole.swapaxes(-1, -2) if row[0][1] == "transpose" else whole
            yield name.replace("{layer}", str(layer)), np.ascontiguousarray(whole)


def pattern(template: str) -> re.Pattern[str]:
    """Return the regex of a `source` of the table."""
    marks = {"[": "(?:", "]": ")?", "(": "(?:", ")": ")", "|": "|", "*": ".*"}
    marks["{layer}"] = "(?P<layer>[0-9]{1,9})"
    pieces = re.split(r"(\{layer\}|[\[\]()|*])", template)
    return re.compile("".join(marks.get(piece, re.escape(piece)) for piece in pieces))


def _match(
    keys: Keys,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, nnx.Variable],
    more_rows: int,
) -> tuple[_Uses, list[str]]:
    table = [(pattern(source), target, TRANSFORMS.get(how, how)) for source, target, how in keys]
    uses: _Uses = {name: {} for name in wanted}
    problems = []
    for name, shape in shapes.items():
        hits = [(m, target, how) for p, target, how in table if (m := p.fullmatch(name))]
        if not hits:
            problems.append(f"unused: {name} (no row of the key table matches it)")
        for match, row_target, transform in hits:
            target = (row_target or "?").removesuffix("?")
            if target not in wanted:
                if row_target is not None and not row_target.endswith("?"):
                    problems.append(f"unused: {name} (the model has no {target})")
                continue
            layer, want = match.groupdict().get("layer"), wanted[target].shape
            if layer is not None:
                layer, depth, want = int(layer), want[0], want[1:]
                if layer >= depth:
                    problems.append(f"unused: {name} (the model has {depth} layers)")
                    continue
            if more_rows and target in _VOCABULARY_AXIS:
                axis = _VOCABULARY_AXIS[target]
                want = (*want[:axis], want[axis] - more_rows, *want[axis + 1 :])
            if layer in uses[target]:
                problems.append(f"filled twice: {target}, by {uses[target][layer].name} and {name}")
            uses[target][layer] = _Use(name, transform)
            if (row := _transformed(shape, transform)) != want:
                problems.append(f"misshapen: {name} gives {row}, {target} is {want}")
    for name, filled in uses.items():
        if not filled:
            problems.append(f"missing: {name} (nothing fills it)")
        elif None not in filled and (lacking := set(range(wanted[name].shape[0])) - set(filled)):
            problems.append(f"missing: {name}, layers {sorted(lacking)}")
    return uses, problems


def _transformed(shape: tuple[int, ...], transform: Transform) -> tuple[int, ...]:
    try:
        # A stand-in of the right shape that owns one number.
        return transform(np.broadcast_to(np.zeros((), np.int8), shape)).shape
    # Not divisible, too few axes, or more than NumPy has.
    except (ValueError, IndexError, OverflowError):
        return shape


def _read(
    uses: Mapping[int | None, _Use],
    leaf: nnx.Variable,
    source: Source,
    sharding: Sharding | None,
    axis: int | None,
    more_rows: int,
) -> jax.Array:
    """Fill one parameter's part of every device of this process row by row, and send it."""
    shape, dtype = leaf.shape, np.dtype(leaf.dtype)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    bounds = {
        device: tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    # Devices that hold the same part share one buffer.
    parts = {b: _aligned([stop - start for start, stop in b], dtype) for b in bounds.values()}
    for layer, use in uses.items():
        if layer is not None and not any(b[0][0] <= layer < b[0][1] for b in parts):
            continue  # another process' layer
        tensor = _finite(use, source, dtype)
        if axis is not None and more_rows:
            # Neither likely nor unlikely, and the same wherever it is computed.
            mean = tensor.mean(axis=axis, keepdims=True, dtype=np.float64)
            tensor = np.concatenate([tensor, *[mean.astype(tensor.dtype)] * more_rows], axis=axis)
        for b, part in parts.items():
            if layer is None:
                part[...] = tensor[tuple(slice(*ends) for ends in b)]
            elif b[0][0] <= layer < b[0][1]:
                part[layer - b[0][0]] = tensor[tuple(slice(*ends) for ends in b[1:])]
        del tensor
    # Nothing else refers to the buffers, so a device that can use host memory need not copy them.
    arrays = [jax.device_put(parts[b], device, may_alias=True) for device, b in bounds.items()]
    array = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
    # Copies run behind; without waiting, the next parameter's buffers would join this one's.
    return array.block_until_ready()


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Return an empty array at a multiple of 64 bytes, which CPU devices take over uncopied."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype).reshape(shape)


def _finite(use: _Use, source: Source, dtype: np.dtype) -> np.ndarray:
    """Read one tensor; raise WeightsError unless it is finite, in its own dtype and in `dtype`."""
    tensor = use.transform(source.read(use.name))
    if not tensor.size:
        return tensor
    # NaN is the least and the largest of what it is in, and rounding keeps the order.
    ends = np.stack([tensor.min(), tensor.max()])
    # A damaged file often still parses; what it then holds seldom stays finite.
    if not np.isfinite(ends).all():
        raise WeightsError(
            f"{source.path}: tensor {use.name} holds values that are not finite; the file is"
            " damaged or its quantisation was misread. Fetch it again"
        )
    with np.errstate(over="ignore"):
        rounded = ends.astype(dtype)
    if not np.isfinite(rounded).all():
        raise WeightsError(
            f"{source.path}: tensor {use.name} holds {ends[abs(ends).argmax()]}, which {dtype} cannot"
            " hold; the file is damaged, or its parameters have to be stored in a wider type (float32)"
        )
    return tensor
