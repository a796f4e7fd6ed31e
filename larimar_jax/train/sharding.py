"""Where arrays live: a mesh, the table of rules for parameters, and the batch.

Models know no mesh: they name the axes of a batch's rows (`layers.ROW_AXES`). Axes: `data` splits the
batch, `fsdp` splits batch and parameters, `tensor` splits the matrices of attention and MLPs. Episodes
are independent, so everything that the memory computes is mapped over them device by device, without
a collective.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from larimar_jax.config import Config
from larimar_jax.layers import ROW_AXES
from larimar_jax.model import AbstractModel

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
# A batch [B, …] of episodes, and a batch in parts [parts, B / parts, …].
BATCH, PARTS = P(ROW_AXES), P(None, ROW_AXES)

log = logging.getLogger(__name__)


class ShardingRuleError(ValueError):
    """Rules and parameters that do not fit: a rule without parameter, or a parameter without rule."""


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the (data, fsdp, tensor) mesh.

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
    # Auto axes: XLA propagates the annotations of inputs and outputs; nothing inside names a mesh.
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed]
    )


def parameter_shardings(
    config: Config, abstract: AbstractModel, mesh: Mesh
) -> dict[str, NamedSharding]:
    """Return where each parameter of a run is split, before `train.layout` is applied.

    The first rule whose regex is found in a parameter's path counts: a Larimar's own rules, then those
    of each tower's family. An axis of the mesh that does not divide a dimension is dropped there, with
    a line in the log: a vocabulary of 50,260 words on 8 devices is replicated rather than padded.

    Raises:
        ShardingRuleError: naming every rule that matches no parameter (and is not optional), every
            parameter that no rule matches, and every one with fewer axes than its rule. A rule behind
            another that takes all its parameters counts as matching: order is how exceptions are
            written.
    """
    # M₀ split by its K rows is gathered once a step, so that every episode still writes its own
    # posterior where it is.
    slots = P("fsdp") if config.train.memory_layout == "slots" else P()
    table: list[tuple[str, P, bool]] = [
        (r"^memory/(prior_memory|variance_by_memory)$", slots, False),
        (r"^memory/", P(), False),
        # Not over tensor as well: XLA's partitioner (jaxlib 0.10) then computes a wrong gradient through
        # the slots' heads where a device has one episode. tests/test_layouts.py would see it.
        (r"^to_(latent|slots|embedding)/kernel$", P("fsdp"), False),
    ]
    for name in ("encoder", "decoder"):
        for pattern, axes, *optional in getattr(abstract.module, name).sharding_rules:
            # Every name of a tower begins with it; the pattern's own start is behind that.
            start = f"^{name}/" if pattern.startswith("^") else f"^{name}/.*"
            table.append((start + pattern.removeprefix("^"), P(*axes), bool(optional)))
    shapes = {name: leaf.shape for name, leaf in abstract.parameters.items()}
    problems = [
        f"rule {pattern!r} matches no parameter"
        for pattern, _, optional in table
        if not optional and not any(re.search(pattern, name) for name in shapes)
    ]
    specs = {
        name: next((spec for pattern, spec, _ in table if re.search(pattern, name)), None)
        for name in shapes
    }
    for name, spec in sorted(specs.items()):
        if spec is None:
            problems.append(f"parameter {name} is matched by no rule")
        elif len(spec) > len(shapes[name]):
            problems.append(
                f"parameter {name} {shapes[name]} has fewer axes than the rule that matches it: {spec}"
            )
    if problems:
        raise ShardingRuleError(
            "Sharding rules and parameters do not fit:\n  "
            + "\n  ".join(problems)
            + "\nThe table of a tower is its family's `sharding_rules`; order counts, the first match"
            " wins."
        )

    def fit(name: str, axes: list[Any]) -> NamedSharding:
        for i, axis in enumerate(axes):
            size = shapes[name][i]
            names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
            if size % math.prod(mesh.shape[a] for a in names):
                log.info("%s: %d does not divide over %s, kept whole there", name, size, axis)
                axes[i] = None
        return NamedSharding(mesh, P(*axes))

    return {name: fit(name, list(spec)) for name, spec in specs.items()}


def whole_along(where: Mapping[str, NamedSharding], axis: str) -> dict[str, NamedSharding]:
    """Return the same shardings, whole along one axis of the mesh."""
    return {
        name: NamedSharding(place.mesh, P(*(None if a == axis else a for a in place.spec)))
        for name, place in where.items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding in which every device holds the whole array."""
    return NamedSharding(mesh, P())


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return this process' episodes [B / processes, …] as its part of the global batch [B, …]."""
    where = NamedSharding(mesh, BATCH)
    return {n: jax.make_array_from_process_local_data(where, local) for n, local in batch.items()}
