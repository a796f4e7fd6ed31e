"""Where arrays live: a mesh, the table of rules for parameters, and the batch.

Models never see any of this. Axes: `data` splits the batch, `fsdp` splits batch and parameters,
`tensor` splits the matrices of attention and MLPs. Episodes are independent, so everything that the
memory computes is mapped over them device by device, without a collective.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from larimar_jax.layers import ROW_AXES

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
BATCH = P(ROW_AXES)

# A regex on '/'-joined parameter paths, where what it finds is split, and whether a model may lack it.
Rule = tuple[str, PartitionSpec, bool]

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


def rules(model: Any, memory_layout: str = "replicated") -> list[Rule]:
    """The table for a Larimar, in order of precedence: its own parameters, then each tower's family's.

    Args:
        model: a Larimar, abstract or not.
        memory_layout: "slots" splits M₀ over fsdp by its K rows. It is gathered once a step, so that
            every episode still writes its own posterior where it is.
    """
    slots = P("fsdp") if memory_layout == "slots" else P()
    own: list[Rule] = [
        (r"^memory/(prior_memory|variance_by_memory)$", slots, False),
        (r"^memory/", P(), False),
        # Not over tensor as well: XLA's partitioner (jaxlib 0.10) then computes a wrong gradient through
        # the slots' heads where a device has one episode. tests/test_layouts.py would see it.
        (r"^to_(latent|slots|embedding)/kernel$", P("fsdp"), False),
    ]
    for name in ("encoder", "decoder"):
        for pattern, axes, *optional in getattr(model, name).sharding_rules:
            # Every name of a tower begins with it; the pattern's own start is behind that.
            start = f"^{name}/" if pattern.startswith("^") else f"^{name}/.*"
            own.append((start + pattern.removeprefix("^"), P(*axes), bool(optional)))
    return own


def match(table: Sequence[Rule], names: Sequence[str]) -> dict[str, P]:
    """The spec of each parameter: the first rule whose regex is found in its path.

    Args:
        table: rules in order of precedence.
        names: '/'-joined parameter paths.
    Raises:
        ShardingRuleError: naming every rule that matches no parameter (and is not optional) and every
            parameter that no rule matches. A rule behind another that takes all its parameters counts
            as matching: order is how exceptions are written.
    """
    compiled = [(re.compile(pattern), spec, optional) for pattern, spec, optional in table]
    idle = [
        regex.pattern
        for regex, _, optional in compiled
        if not optional and not any(map(regex.search, names))
    ]
    found = {
        name: next((spec for regex, spec, _ in compiled if regex.search(name)), None)
        for name in names
    }
    orphans = sorted(name for name, spec in found.items() if spec is None)
    if idle or orphans:
        lines = [f"rule {pattern!r} matches no parameter" for pattern in idle]
        lines += [f"parameter {name} is matched by no rule" for name in orphans]
        raise ShardingRuleError(
            "Sharding rules and parameters do not fit:\n  "
            + "\n  ".join(lines)
            + "\nThe table of a tower is its family's `sharding_rules`; order counts, the first match"
            " wins."
        )
    return found


def shardings(
    mesh: Mesh, parameters: Mapping[str, Any], table: Sequence[Rule]
) -> dict[str, NamedSharding]:
    """A NamedSharding for each parameter.

    An axis of the mesh that does not divide a dimension is dropped there, and the log says so: a
    vocabulary of 50,260 words on 8 devices is replicated rather than padded.

    Args:
        parameters: arrays or ShapeDtypeStructs by '/'-joined path.
        table: rules in order.
    Raises:
        ShardingRuleError: as `match`, or a spec with more axes than the parameter.
    """
    specs = match(table, list(parameters))
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


def without(where: NamedSharding, axis: str) -> NamedSharding:
    """The same sharding, whole along one axis of the mesh."""
    return NamedSharding(where.mesh, P(*(None if part == axis else part for part in where.spec)))


def fitting(where: NamedSharding, shape: tuple[int, ...], like: tuple[int, ...]) -> NamedSharding:
    """`where`, for state of a parameter of shape `like` that lacks some of its axes.

    Adafactor's statistics are rows and columns of a parameter: they are small, and whole everywhere.
    """
    return where if shape == like else replicated(where.mesh)


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


def part_sharding(mesh: Mesh) -> NamedSharding:
    """Parts of a batch, one after the other, each with its episodes over data and fsdp."""
    return NamedSharding(mesh, P(None, *BATCH))


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
