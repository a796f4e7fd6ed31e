"""Tensors of a file into a module, strictly: every name accounted for, on both sides.

A family's `KEYS` is a table of `(source, target, transform)`:

- `source`: a regex that must match the whole source name. A group `(?P<layer>\\d+)` says which row
  of the stacked parameter the tensor fills.
- `target`: the parameter's path, joined with dots. None: known, and not a parameter. A trailing
  `?`: some configurations lack this parameter, and the tensor is then left out.
- `transform`: a name of `TRANSFORMS`.

One source tensor may match several rows, as GPT-2's fused projection does.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx

Keys = Sequence[tuple[str, str | None, str]]

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


def fill(abstract: nnx.Module, keys: Keys, source: Source) -> nnx.Module:
    """The module with its parameters read from `source`.

    All names and shapes are checked before any tensor is read; then tensors stream through one at a
    time, so that the peak is the module and one stacked parameter.

    Args:
      abstract: the module from `nnx.eval_shape`.
      keys: its family's `KEYS`.
      source: where the tensors are.

    Raises:
      WeightsError: naming at once every tensor that nothing uses, parameter that nothing fills,
        parameter filled twice, and shape that does not fit.
    """
    graph, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    wanted = {tuple(map(str, path)): leaf for path, leaf in flat}
    shapes = source.shapes()
    uses, problems = _match(keys, shapes, wanted)
    problems += _check(uses, shapes, wanted)
    if problems:
        raise WeightsError(
            f"{source.path} does not fit the model; either the configuration is another model's"
            f" or the family's key table lacks something:\n  " + "\n  ".join(problems)
        )
    by_target: dict[tuple[str, ...], list[_Use]] = {}
    for use in uses:
        by_target.setdefault(use.target, []).append(use)
    filled = [
        (path, leaf.replace(_read(by_target[tuple(map(str, path))], leaf, source)))
        for path, leaf in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _match(
    keys: Keys, names: Iterable[str], wanted: Mapping[tuple[str, ...], nnx.Variable]
) -> tuple[list[_Use], list[str]]:
    table = [(re.compile(pattern), target, transform) for pattern, target, transform in keys]
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


def _check(
    uses: Sequence[_Use],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[tuple[str, ...], nnx.Variable],
) -> list[str]:
    problems = []
    filled: dict[tuple[tuple[str, ...], int | None], str] = {}
    for use in uses:
        shape, target = wanted[use.target].shape, ".".join(use.target)
        row = shape if use.layer is None else shape[1:]
        if use.layer is not None and use.layer >= shape[0]:
            problems.append(f"unused: {use.name} (the model has {shape[0]} layers)")
            continue
        if earlier := filled.get((use.target, use.layer)):
            problems.append(f"filled twice: {target}, by {earlier} and {use.name}")
        filled[use.target, use.layer] = use.name
        # A stand-in of the right shape that owns one number.
        blank = np.broadcast_to(np.zeros((), np.int8), shapes[use.name])
        try:
            got = TRANSFORMS[use.transform](blank).shape
        except ValueError:  # not divisible, or too few axes
            got = blank.shape
        if got != row:
            problems.append(f"misshapen: {use.name} gives {got}, {target} is {row}")
    for path, leaf in wanted.items():
        layers = {layer for target, layer in filled if target == path}
        if not layers:
            problems.append(f"missing: {'.'.join(path)} (nothing fills it)")
        elif None not in layers and (lacking := set(range(leaf.shape[0])) - layers):
            problems.append(f"missing: {'.'.join(path)}, layers {sorted(lacking)}")
    return problems


def _read(uses: Sequence[_Use], leaf: nnx.Variable, source: Source):
    dtype = np.dtype(leaf.dtype)
    if uses[0].layer is None:
        return jnp.asarray(_finite(uses[0], source).astype(dtype))
    stacked = np.empty(leaf.shape, dtype)
    for use in uses:
        stacked[use.layer] = _finite(use, source)
    return jnp.asarray(stacked)


def _finite(use: _Use, source: Source) -> np.ndarray:
    tensor = TRANSFORMS[use.transform](source.read(use.name))
    # A damaged file often still parses; what it then holds seldom stays finite.
    if not np.isfinite(tensor).all():
        raise WeightsError(
            f"{source.path}: tensor {use.name} holds values that are not finite; the file is"
            " damaged or its quantisation was misread. Fetch it again"
        )
    return tensor
