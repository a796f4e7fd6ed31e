"""Where arrays live: a mesh, one table of rules for parameters, and the batch.

Models never see any of this. Axes: `data` splits the batch, `fsdp` splits batch and parameters,
`tensor` splits the matrices of attention and MLPs. Episodes are independent, so everything that the
memory computes is split along the batch by the same annotation, without a collective.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# (regex, spec) by precedence. Layers are stacked, so their kernels have a leading axis L. What reads
# the residual stream is split along its output, what writes to it along its input: then one
# all-reduce per attention and per MLP is all that `tensor` costs.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # The prior memory: every episode writes its own posterior from it, wherever that episode is. The
    # lexicon: small, and read as a whole by every row.
    (r"^(memory|lexicon)/", P()),
    (r"layers/.*(output|down)/kernel$", P(None, "tensor", "fsdp")),
    (r"layers/.*kernel$", P(None, "fsdp", "tensor")),
    (r"/embedding$", P("tensor", "fsdp")),
    (r"/kernel$", P("fsdp", "tensor")),
    (r"/(bias|scale|tokens|directions)$", P()),
)

log = logging.getLogger(__name__)


class ShardingRuleError(ValueError):
    """Rules and parameters do not fit: a rule without parameter, or a parameter without rule."""


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, tensor) mesh.

    Args:
        shape: devices along each axis; one of them may be -1 for all that remain.
        devices: what to lay out; default every device of every process.
    Raises:
        ValueError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = list(shape)
    if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise ValueError(f"a mesh is {AXES}, at most one of them -1; got {tuple(shape)}")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // math.prod(n for n in sizes if n != -1))
    needed = math.prod(sizes)
    if needed > len(devices) or (needed < len(devices) and jax.process_count() > 1):
        raise ValueError(
            f"the mesh {dict(zip(AXES, sizes, strict=True))} needs {needed} devices and there are "
            f"{len(devices)} ({devices[0].platform}). Change train.mesh, or start with more."
        )
    if needed < len(devices):
        log.info("the mesh takes %d of %d devices", needed, len(devices))
    # Auto axes: XLA propagates the annotations of inputs and outputs; nothing inside names a mesh.
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed]
    )


def match(rules: Sequence[tuple[str, PartitionSpec]], names: Sequence[str]) -> dict[str, P]:
    """The spec of each parameter: the first rule whose regex is found in its path.

    Args:
        rules: (regex, spec) in order of precedence.
        names: '/'-joined parameter paths.
    Raises:
        ShardingRuleError: naming every rule that matches no parameter and every parameter that no
            rule matches. A rule behind another that takes all its parameters counts as matching:
            order is how exceptions are written.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]
    idle = [regex.pattern for regex, _ in compiled if not any(map(regex.search, names))]
    found = {
        name: next((spec for regex, spec in compiled if regex.search(name)), None) for name in names
    }
    orphans = sorted(name for name, spec in found.items() if spec is None)
    if idle or orphans:
        lines = [f"rule {pattern!r} matches no parameter" for pattern in idle]
        lines += [f"parameter {name} is matched by no rule" for name in orphans]
        raise ShardingRuleError(
            "Sharding rules and parameters do not fit:\n  "
            + "\n  ".join(lines)
            + "\nThe table is RULES in train/sharding.py; order counts, the first match wins."
        )
    return found


def shardings(
    mesh: Mesh,
    parameters: Mapping[str, Any],
    rules: Sequence[tuple[str, PartitionSpec]] | None = None,
) -> dict[str, NamedSharding]:
    """A NamedSharding for each parameter.

    An axis of the mesh that does not divide a dimension is dropped there, and the log says so: a
    vocabulary of 50,260 words on 8 devices is replicated rather than padded.

    Args:
        parameters: arrays or ShapeDtypeStructs by '/'-joined path.
        rules: (regex, spec) in order; default `RULES`.
    Raises:
        ShardingRuleError: as `match`, or a spec with more axes than the parameter.
    """
    specs = match(RULES if rules is None else rules, list(parameters))
    too_long = [n for n, spec in specs.items() if len(spec) > len(parameters[n].shape)]
    if too_long:
        raise ShardingRuleError(
            "These parameters have fewer axes than the rule that matches them: "
            + ", ".join(f"{n} {parameters[n].shape} by {specs[n]}" for n in sorted(too_long))
        )
    return {
        name: NamedSharding(mesh, _fit(mesh, name, parameters[name].shape, spec))
        for name, spec in specs.items()
    }


def where(
    mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] | None = None
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """`shardings` for one parameter at a time: a function of its path and shape.

    For loading, which knows a tower and not yet the model; it can't see that a rule is idle.

    Raises (when called):
        ShardingRuleError: no rule matches the parameter.
    """
    table = RULES if rules is None else rules

    def one(name: str, shape: tuple[int, ...]) -> NamedSharding:
        fitting = [spec for pattern, spec in table if re.search(pattern, name)]
        if not fitting:
            raise ShardingRuleError(f"parameter {name} is matched by no sharding rule")
        return NamedSharding(mesh, _fit(mesh, name, shape, fitting[0]))

    return one


def _fit(mesh: Mesh, name: str, shape: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    kept = []
    for size, axes in zip(shape, spec, strict=False):  # a spec may be shorter
        ways = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
        if size % ways:
            log.info("%s: %d does not divide over %s, kept whole there", name, size, axes)
            axes = None
        kept.append(axes)
    return P(*kept)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis (episodes B) over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def place(tree: Any, where: Any) -> Any:
    """Puts a pytree onto devices: `where` is one sharding, or a pytree of them."""
    return jax.device_put(tree, where)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process' episodes [B / processes, …] as its part of the global batch [B, …]."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, local)
        for name, local in batch.items()
    }
