"""What a training step needs and costs on devices that are not there yet, from compiling it.

Memory is read off the compiled program, collectives off its HLO text.
"""

import dataclasses
import math
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from larimar_jax import config as configs
from larimar_jax import model
from larimar_jax.config import Config
from larimar_jax.layers import Remat
from larimar_jax.train import sharding
from larimar_jax.train.collectives import KINDS, Collective, read_collectives
from larimar_jax.train.flops import count_flops
from larimar_jax.train.step import TrainStep

# The share of a device's memory that a step may take: the rest is the driver's, the communication
# library's, and lost between buffers.
USABLE = 0.92
# The program compiled here is read and never run: its machine code need not be good. Buffers and
# collectives are decided before machine code is generated.
_NEVER_RUN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run would run on.

    memory: bytes of a device. flops: FLOP/s of a device at its peak. mfu: the share of them that a
    step reaches. node: devices of a host. link: bytes/s that a device sends to another of its host,
    network: that a host sends to others. disk: bytes/s at which a checkpoint is written.
    """

    memory: float
    flops: float
    mfu: float
    node: int
    link: float
    network: float
    disk: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """One training step on each of `devices`, for the largest episode size.

    parameters: their number, by part of the model. bytes, per device: parameters, optimizer (with
    averages), batch, temporaries (activations, gradients and gathered parameters). flops: of a step,
    on all devices together, with what remat computes again; model_flops: without. checkpoint: bytes.
    """

    config: Config
    devices: int
    parameters: dict[str, int]
    bytes: dict[str, int]
    collectives: list[Collective]
    flops: int
    model_flops: int
    checkpoint: int

    @property
    def total(self) -> int:
        """Bytes per device."""
        return sum(self.bytes.values())

    def fits(self, memory: float) -> bool:
        """Return whether a device with so many bytes can hold the step."""
        return self.total <= USABLE * memory

    def sent(self) -> dict[str, tuple[int, int]]:
        """Return by kind of collective (how many, bytes that a device sends)."""
        by_kind = {k: [c for c in self.collectives if c.kind == k] for k in KINDS}
        return {
            k: (sum(c.times for c in cs), sum(c.moved for c in cs))
            for k, cs in by_kind.items()
            if cs
        }

    def seconds(self, machine: Machine) -> tuple[float, float, float]:
        """Return seconds of (computing, sending within hosts, sending between hosts).

        A step takes their maximum where they overlap fully, and their sum where they do not.
        """
        inside = sum(c.moved for c in self.collectives) / machine.link
        between = sum(c.leaving(machine.node) for c in self.collectives) / machine.network
        return self.flops / self.devices / (machine.flops * machine.mfu), inside, between


def plan(config: Config) -> Plan:
    """Compile the real step of a run for the devices of its mesh, without creating a parameter.

    The step is compiled for CPU, which computes bfloat16 products in float32: for those, temporaries
    and sent bytes are upper bounds, up to twice the true value.

    Raises:
        ValueError: fewer (virtual) devices than the mesh needs, or a batch that does not divide.
        FileNotFoundError: a tower's sizes are neither in the config nor in its source.
    """
    mesh, episode = sharding.make_mesh(config.train.mesh), max(config.data.episode)
    abstract = model.AbstractModel(model.abstract(config))
    train_step = TrainStep(config, abstract, mesh)
    arguments = train_step.arguments(episode)
    compiled = train_step.step.lower(*arguments).compile(_NEVER_RUN)
    used = compiled.memory_analysis()
    state, frozen, batch = arguments
    sizes = {
        "parameters": _device_bytes((state.params, frozen)),
        "optimizer": _device_bytes((state.optimizer, state.average, state.loss, state.step)),
        "batch": _device_bytes(batch),
        "temporaries": used.temp_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes,
    }
    parts: Counter[str] = Counter()
    for name, leaf in abstract.parameters.items():
        part = name.split("/")[0]
        parts["projections" if part.startswith("to_") else part] += math.prod(leaf.shape)
    return Plan(
        config,
        mesh.size,
        dict(parts),
        sizes,
        read_collectives(compiled.as_text()),
        count_flops(train_step.step, *arguments),
        train_step.flops(episode),
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
    )


def _device_bytes(tree: Any) -> int:
    """Return the bytes of a pytree of ShapeDtypeStructs on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def changes(config: Config) -> Iterator[tuple[dict[str, str], Config]]:
    """Yield settings to change where a step does not fit, each on top of those before.

    They come in order of what they cost: nothing, time, and at last the optimiser's quality.

    Returns:
        ({key: value} as `--set` takes them, all up to here; the config with them)
    """
    settings: dict[str, str] = {}

    def change(section: str, **values: Any) -> tuple[dict[str, str], Config]:
        nonlocal config
        changed = dataclasses.replace(getattr(config, section), **values)
        config = dataclasses.replace(config, **{section: changed})
        for key, value in values.items():
            text = str(list(value)) if isinstance(value, tuple) else str(value)
            settings[f"{section}.{key}"] = text.replace(" ", "")
        return dict(settings), config

    data, fsdp, tensor = config.train.mesh
    ways, levels = data * fsdp, typing.get_args(Remat)
    if data > 1:
        yield change("train", mesh=(1, ways, tensor))
    if config.train.layout != "zero3" and ways > 1:
        yield change("train", layout="zero3")
    if config.model.dtype != "bfloat16":
        yield change("model", dtype="bfloat16")
    for remat in levels[levels.index(config.model.remat) + 1 :]:
        yield change("model", remat=remat)
    while config.data.batch % (2 * config.train.accumulate * ways) == 0:
        yield change("train", accumulate=2 * config.train.accumulate)
    if config.train.optimizer != "adafactor":
        yield change("train", optimizer="adafactor")


def load(path: Any, overrides: Sequence[str], devices: int) -> Config:
    """Return the config of a run on so many devices; a -1 in its mesh takes those that remain.

    Raises:
        ConfigError: as `config.load` and `config.override`, or a mesh of another number of devices.
    """
    config = configs.load(path, overrides)
    sizes = list(config.train.mesh)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, devices // -math.prod(sizes))
    if math.prod(sizes) != devices:
        raise configs.ConfigError(
            f"train.mesh is {list(config.train.mesh)}, which is not of {devices} devices; add for "
            f"example --set train.mesh=[1,{devices},1]"
        )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, mesh=tuple(sizes)))


def parse(text: str) -> float:
    """Return the bytes of "80GB", "40 GiB" or "24e9".

    Raises:
        ValueError: the text is no size.
    """
    units = {"gib": 2**30, "mib": 2**20, "gb": 1e9, "mb": 1e6, "": 1.0}
    plain = text.strip().lower().replace(" ", "")
    unit = next(u for u in units if plain.endswith(u))
    try:
        return float(plain.removesuffix(unit)) * units[unit]
    except ValueError as error:
        raise ValueError(f"{text!r} is no size; write 80GB, 40GiB or a number of bytes") from error


def show(plan: Plan, machine: Machine) -> str:
    """Return the plan as text for a person."""
    config, (computing, inside, between) = plan.config, plan.seconds(machine)

    def table(sizes: dict[str, float], unit: str = "") -> list[str]:
        rows = {**sizes, "together": sum(sizes.values())}.items()
        form = ",.2f" if unit else ",d"
        return [f"  {name:<20} {size:>16{form}}{unit}" for name, size in rows]

    def gb(sizes: dict[str, float]) -> dict[str, float]:
        return {name: size / 1e9 for name, size in sizes.items()}

    fits = "fits" if plan.fits(machine.memory) else f"does NOT fit {USABLE:.0%} of it"
    sent = {f"{kind} x {times}": moved for kind, (times, moved) in plan.sent().items()}
    least, most = max(computing, inside + between), computing + inside + between
    hours = [config.train.steps * step / 3600 for step in (least, most)]
    lines = [
        f"{config.name}: one step on {plan.devices} devices (data, fsdp, tensor) = "
        f"{config.train.mesh}, {config.train.layout}, {config.model.dtype}, remat "
        f"{config.model.remat}, accumulate {config.train.accumulate}",
        "\nparameters",
        *table(plan.parameters),
        f"\nmemory per device, of {machine.memory / 1e9:.1f} GB: {fits}",
        *table(gb(plan.bytes), " GB"),
        "\nsent per device and step",
        *table(gb(sent), " GB"),
        f"\nFLOPs per step      {plan.flops:.3e} ({plan.model_flops:.3e} without remat)",
        f"computing           {computing:.3f} s at {machine.mfu:.0%} of {machine.flops:.3g} FLOP/s",
        f"sending             {inside:.3f} s at {machine.link:.3g} bytes/s within a host, and "
        f"{between:.3f} s between hosts of {machine.node} at {machine.network:.3g}",
        f"expected per step   {least:.2f} s (sending overlaps) to {most:.2f} s (it does not)",
        f"expected for all    {hours[0]:.1f} to {hours[1]:.1f} h, {config.train.steps:,} steps",
        f"checkpoint          {plan.checkpoint / 1e9:.2f} GB, "
        f"{plan.checkpoint / machine.disk:.0f} s at {machine.disk:.3g} bytes/s, while steps go on",
    ]
    if config.model.dtype != "float32":
        lines.append(
            "(Compiled for CPU, which widens bfloat16: temporaries and sent bytes are upper bounds.)"
        )
    return "\n".join(lines)


def numbers(plan: Plan, machine: Machine) -> dict[str, Any]:
    """Return the plan as a program reads it: bytes, FLOPs, seconds.

    memory_collectives: names of those that gather or exchange inside the memory algebra;
    conditional_collectives: of those in a branch. Tests show that there are none.
    """
    values = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    sent: list[Collective] = values.pop("collectives")
    computing, inside, between = plan.seconds(machine)
    return {
        "name": values.pop("config").name,
        "fits": plan.fits(machine.memory),
        "bytes_per_device": {**values.pop("bytes"), "together": plan.total},
        "bytes_sent_per_device": {kind: moved for kind, (_, moved) in plan.sent().items()},
        "bytes_sent_per_host": sum(c.leaving(machine.node) for c in sent),
        "memory_collectives": [
            c.name for c in sent if c.kind != "all-reduce" and c.within("memory")
        ],
        "conditional_collectives": [c.name for c in sent if c.conditional],
        **values,
        "seconds_computing": computing,
        "seconds_sending": inside + between,
    }
