"""Tensors of a file into a module, strictly: every name accounted for, on both sides.

A family's `hf_keys` is a table of `(source, target, transform)`:

- `source`: the name in the file. `{layer}` is the number of a layer, which says what row of the
  stacked parameter the tensor fills; `[x]` may be missing; of `(x|y)` one is there; a `*`, in a row
  without target, stands for anything. A file of ours is written with `[x]`, and with the first of
  `(x|y)`.
- `target`: the parameter's path, joined with dots. None: known, and not a parameter. A trailing
  `?`: some configurations have no such parameter because it repeats another one, and the tensor is
  then left out.
- `transform`: a name of `TRANSFORMS`.

One source tensor may match several rows, as GPT-2's fused projection does.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

Keys = Sequence[tuple[str, str | None, str]]
# The sharding of a parameter, by its '/'-joined path and shape.
Where = Callable[[str, tuple[int, ...]], Sharding]

# How a source tensor becomes a parameter. All are views, so that a shape can be transformed too.
TRANSFORMS = {
    "copy": lambda a: a,
    "transpose": lambda a: a.swapaxes(-1, -2),
    "third_0": lambda a: np.split(a, 3, axis=-1)[0],
    "third_1": lambda a: np.split(a, 3, axis=-1)[1],
    "third_2": lambda a: np.split(a, 3, axis=-1)[2],
}


class WeightsError(ValueError):
    """Weights that cannot be read, or that do not fit the model they are meant for."""


@runtime_checkable
class Source(Protocol):
    """A file of named tensors, read one at a time."""

    path: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, from the header alone."""

    def read(self, name: str) -> np.ndarray:
        """One tensor."""


class _Use(NamedTuple):
    name: str
    target: tuple[str, ...]
    layer: int | None
    transform: str


def fill(
    abstract: nnx.Module,
    keys: Keys,
    source: Source,
    *,
    where: Where | None = None,
    more_rows: int = 0,
) -> nnx.Module:
    """The module with its parameters read from `source`.

    All names and shapes are checked before any tensor is read; then tensors stream through one at a
    time onto the devices that hold them, so that a host never has more than one parameter (a stack
    of layers counts as one) beside what its own devices keep. A process reads what its devices need.

    Args:
      abstract: the module from `nnx.eval_shape`; its dtypes are those of the result.
      keys: its family's `hf_keys`.
      source: where the tensors are.
      where: each parameter's sharding; None is the default device.
      more_rows: vocabulary that the module has beyond the file's, for special tokens of ours (§2).
        Their embeddings and head rows start as the mean of the file's.

    Raises:
      WeightsError: naming at once every tensor that nothing uses, parameter that nothing fills,
        parameter filled twice, and shape that does not fit.
    """
    graph, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    wanted = {tuple(map(str, path)): leaf for path, leaf in flat}
    grown = {path: _vocabulary_axis(path) for path in wanted if more_rows}
    shapes = source.shapes()
    uses, problems = _match(keys, shapes, wanted)
    problems += _check(uses, shapes, wanted, grown, more_rows)
    if problems:
        raise WeightsError(
            f"{source.path} does not fit the model; either the configuration is another model's"
            f" or the family's key table lacks something:\n  " + "\n  ".join(problems)
        )
    by_target: dict[tuple[str, ...], list[_Use]] = {}
    for use in uses:
        by_target.setdefault(use.target, []).append(use)

    def read(path: tuple[str, ...], leaf: nnx.Variable) -> jax.Array:
        sharding = None if where is None else where("/".join(path), leaf.shape)
        return _read(by_target[path], leaf, source, sharding, grown.get(path), more_rows)

    # The largest first: what is held beside the parameters is then least when most are there.
    order = sorted(flat, key=lambda item: -math.prod(item[1].shape))
    filled = {path: leaf.replace(read(tuple(map(str, path)), leaf)) for path, leaf in order}
    return nnx.merge(graph, nnx.from_flat_state([(path, filled[path]) for path, _ in flat]))


def to_source(module: nnx.Module, keys: Keys) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file that `fill` would read into the same module, one at a time.

    Raises:
      WeightsError: naming every parameter that no row of the table writes.
    """
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    values = {".".join(map(str, path)): leaf for path, leaf in state}
    rows: dict[str, list[tuple[str, str]]] = {}
    for template, target, transform in keys:
        if target is not None and target.removesuffix("?") in values:
            rows.setdefault(template, []).append((target.removesuffix("?"), transform))
    written = {target for row in rows.values() for target, _ in row}
    if unsaid := sorted(values.keys() - written):
        raise WeightsError(f"no row of the key table writes {', '.join(unsaid)}")
    for template, row in rows.items():
        name = re.sub(r"\[(.*?)\]|\(([^|)]*).*?\)", lambda m: m[1] or m[2], template)
        stacked = [np.asarray(values[target][...]) for target, _ in row]
        layers = range(len(stacked[0])) if "{layer}" in name else (None,)
        for layer in layers:
            parts = [array if layer is None else array[layer] for array in stacked]
            # Thirds stand side by side; the other transforms undo themselves.
            whole = parts[0] if parts[1:] == [] else np.concatenate(parts, axis=-1)
            if row[0][1] == "transpose":
                whole = whole.swapaxes(-1, -2)
            yield name.replace("{layer}", str(layer)), np.ascontiguousarray(whole)


def pattern(template: str) -> re.Pattern[str]:
    """The regex of a `source` of the table."""
    marks = {"[": "(?:", "]": ")?", "(": "(?:", ")": ")", "|": "|", "*": ".*"}
    pieces = re.split(r"(\{layer\}|[\[\]()|*])", template)
    return re.compile(
        "".join(
            r"(?P<layer>[0-9]{1,9})" if p == "{layer}" else marks.get(p, re.escape(p)) for p in pieces
        )
    )


def _match(
    keys: Keys, names: Iterable[str], wanted: Mapping[tuple[str, ...], nnx.Variable]
) -> tuple[list[_Use], list[str]]:
    table = [(pattern(template), target, transform) for template, target, transform in keys]
    uses, problems = [], []
    for name in names:
        hits = [(m, t, how) for p, t, how in table if (m := p.fullmatch(name))]
        if not hits:
            problems.append(f"unused: {name} (no row of the key table matches it)")
        for match, target, transform in hits:
            if target is None:
                continue
            path = tuple(target.removesuffix("?").split("."))
            if path not in wanted:
                if not target.endswith("?"):
                    problems.append(f"unused: {name} (the model has no {'.'.join(path)})")
                continue
            layer = match.groupdict().get("layer")
            uses.append(_Use(name, path, None if layer is None else int(layer), transform))
    return uses, problems


def _vocabulary_axis(path: tuple[str, ...]) -> int | None:
    """The axis that special tokens lengthen, of the parameters that have one."""
    return {("word", "embedding"): 0, ("head", "kernel"): 1, ("head", "bias"): 0}.get(path)


def _check(
    uses: Sequence[_Use],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[tuple[str, ...], nnx.Variable],
    grown: Mapping[tuple[str, ...], int | None],
    more_rows: int,
) -> list[str]:
    problems = []
    filled: dict[tuple[tuple[str, ...], int | None], str] = {}
    for use in uses:
        shape, target = wanted[use.target].shape, ".".join(use.target)
        row = shape if use.layer is None else shape[1:]
        if (axis := grown.get(use.target)) is not None:
            row = tuple(size - more_rows * (i == axis) for i, size in enumerate(row))
        if use.layer is not None and use.layer >= shape[0]:
            problems.append(f"unused: {use.name} (the model has {shape[0]} layers)")
            continue
        if earlier := filled.get((use.target, use.layer)):
            problems.append(f"filled twice: {target}, by {earlier} and {use.name}")
        filled[use.target, use.layer] = use.name
        try:
            # A stand-in of the right shape that owns one number.
            blank = np.broadcast_to(np.zeros((), np.int8), shapes[use.name])
            got = TRANSFORMS[use.transform](blank).shape
        except (ValueError, OverflowError):  # not divisible, too few axes, or such as NumPy lacks
            got = shapes[use.name]
        if got != row:
            problems.append(f"misshapen: {use.name} gives {got}, {target} is {row}")
    for path, leaf in wanted.items():
        layers = {layer for target, layer in filled if target == path}
        if not layers:
            problems.append(f"missing: {'.'.join(path)} (nothing fills it)")
        elif None not in layers and (lacking := set(range(leaf.shape[0])) - layers):
            problems.append(f"missing: {'.'.join(path)}, layers {sorted(lacking)}")
    return problems


def _read(
    uses: Sequence[_Use],
    leaf: nnx.Variable,
    source: Source,
    sharding: Sharding | None,
    axis: int | None,
    more_rows: int,
) -> jax.Array:
    """One parameter: its part on every device of this process is filled, row by row, and sent."""
    shape, dtype = leaf.shape, np.dtype(leaf.dtype)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = sharding.addressable_devices_indices_map(shape)
    # Devices that hold the same part share one buffer.
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    keys = {device: _bounds(index, shape) for device, index in places.items()}
    for bounds in keys.values():
        if bounds not in parts:
            parts[bounds] = _aligned([stop - start for start, stop in bounds], dtype)
    for use in uses:
        first = use.layer
        if use.layer is not None and not any(b[0][0] <= first < b[0][1] for b in parts):
            continue  # another process' layer
        tensor = _finite(use, source, dtype)
        if axis is not None:
            # Neither likely nor unlikely, and the same wherever it is computed.
            mean = tensor.mean(axis=axis, keepdims=True, dtype=np.float64)
            tensor = np.concatenate([tensor, *[mean.astype(tensor.dtype)] * more_rows], axis=axis)
        for bounds, part in parts.items():
            if use.layer is None:
                part[...] = tensor[tuple(slice(*b) for b in bounds)]
            elif bounds[0][0] <= first < bounds[0][1]:
                part[first - bounds[0][0]] = tensor[tuple(slice(*b) for b in bounds[1:])]
        del tensor
    # Nobody else knows the buffers, so a device that can use host memory need not copy them.
    arrays = [
        jax.device_put(parts[bounds], device, may_alias=True) for device, bounds in keys.items()
    ]
    made = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
    # Copies run behind; without waiting, the next parameter's buffers would join this one's.
    return made.block_until_ready()


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, as CPU devices want memory that they take over."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype).reshape(shape)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _finite(use: _Use, source: Source, dtype: np.dtype) -> np.ndarray:
    tensor = TRANSFORMS[use.transform](source.read(use.name))
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
        kept = ends.astype(dtype)
    if not np.isfinite(kept).all():
        raise WeightsError(
            f"{source.path}: tensor {use.name} holds {ends[abs(ends).argmax()]}, which {dtype} cannot"
            " hold; the file is damaged, or its parameters have to be kept in a wider type (float32)"
        )
    return tensor
