"""What a training step will need and cost on devices that are not there yet, from compiling it."""

import dataclasses
import math
import typing
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from larimar_jax import config as configs
from larimar_jax import model
from larimar_jax.config import Config
from larimar_jax.layers import Remat
from larimar_jax.train import flops, hlo, sharding
from larimar_jax.train.step import TrainStep

# Of a device's memory, what a step may take: the rest is the driver's, the communication library's,
# and lost between buffers.
USABLE = 0.92
# What is compiled here is looked at and never run: its machine code need not be good. Buffers and
# collectives are decided before it is made.
_UNRUN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One training step on each of `devices`, for the largest episode size.

    parameters: how many numbers, by part of the model. bytes, per device: parameters, optimizer
    (with averages), batch, temporaries (activations, gradients and what is gathered). collectives:
    by kind, (how many, bytes that a device sends). flops: of a step, on all devices together, with
    what remat computes again; model_flops: without. memory_collectives: those that gather or exchange
    inside the memory algebra, by name: there are none, and a test says so.
    """

    config: Config
    devices: int
    parameters: dict[str, int]
    bytes: dict[str, int]
    collectives: dict[str, tuple[int, int]]
    memory_collectives: list[str]
    flops: int
    model_flops: int

    @property
    def total(self) -> int:
        """Bytes per device."""
        return sum(self.bytes.values())

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a step."""
        return sum(moved for _, moved in self.collectives.values())

    def fits(self, memory: float) -> bool:
        """Whether a device with so many bytes can hold it."""
        return self.total <= USABLE * memory

    def seconds(self, rate: float, link: float) -> tuple[float, float]:
        """(computing, sending) of a step at `rate` FLOP/s and `link` bytes/s per device.

        A step takes their maximum where they overlap fully, and their sum where they do not.
        """
        return self.flops / self.devices / rate, self.sent / link


def plan(config: Config) -> Plan:
    """Compiles the real step of a run for the devices of its mesh, without making a parameter.

    Compiled for CPU, which computes bfloat16 products in float32: for those, temporaries and what is
    sent are at most what is said, and up to half of it.

    Raises:
        ValueError: there are fewer (virtual) devices than the mesh wants, or the batch does not divide.
        FileNotFoundError: a tower's sizes are neither in the config nor found by its source.
    """
    mesh = sharding.make_mesh(config.train.mesh)
    skeleton = model.AbstractModel(model.abstract(config))
    stepper = TrainStep(config, skeleton, mesh)
    arguments = stepper.arguments(max(config.data.episode))
    compiled = stepper.step.lower(*arguments).compile(_UNRUN)
    used = compiled.memory_analysis()
    state, frozen, batch = arguments
    remembered = (state.optimizer, state.average, state.loss, state.step)
    held = {
        "parameters": _held((state.params, frozen)),
        "optimizer": _held(remembered),
        "batch": _held(batch),
    }
    temporary = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    sent = hlo.collectives(compiled.as_text())
    kinds, moved = Counter(), Counter()
    for one in sent:
        kinds[one.kind] += one.times
        moved[one.kind] += one.moved
    return Plan(
        config,
        mesh.size,
        _parts(skeleton.parameters),
        {**held, "temporaries": temporary},
        {kind: (kinds[kind], moved[kind]) for kind in hlo.KINDS if kind in kinds},
        [one.name for one in sent if _in_memory(one)],
        flops.count(stepper.traced, *arguments),
        stepper.flops(max(config.data.episode)),
    )


def changes(config: Config) -> Iterator[tuple[dict[str, str], Config]]:
    """Settings to change where a step does not fit, each on top of those before.

    In order of what they cost: nothing, time, and at last the optimiser's quality.

    Returns:
        ({key: value} as `--set` takes them, all up to here; the config with them)
    """
    said: dict[str, str] = {}

    def say(section: str, **settings: Any) -> tuple[dict[str, str], Config]:
        nonlocal config
        changed = dataclasses.replace(getattr(config, section), **settings)
        config = dataclasses.replace(config, **{section: changed})
        said.update({f"{section}.{key}": _json(value) for key, value in settings.items()})
        return dict(said), config

    data, fsdp, tensor = config.train.mesh
    if data > 1:
        yield say("train", mesh=(1, data * fsdp, tensor))
    if config.train.layout != "zero3" and max(data, fsdp) > 1:
        yield say("train", layout="zero3")
    if config.model.dtype != "bfloat16":
        yield say("model", dtype="bfloat16")
    levels = typing.get_args(Remat)
    for remat in levels[levels.index(config.model.remat) + 1 :]:
        yield say("model", remat=remat)
    ways = data * fsdp
    while config.data.batch % (2 * config.train.accumulate * ways) == 0:
        yield say("train", accumulate=2 * config.train.accumulate)
    if config.train.optimizer != "adafactor":
        yield say("train", optimizer="adafactor")


def _json(value: Any) -> str:
    return str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)


def _held(tree: Any) -> int:
    """Bytes of a pytree of ShapeDtypeStructs on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _parts(parameters: dict[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, leaf in parameters.items():
        part = name.split("/")[0]
        found["projections" if part.startswith("to_") else part] += math.prod(leaf.shape)
    return dict(found)


def _in_memory(one: hlo.Collective) -> bool:
    return one.kind != "all-reduce" and one.within("memory")


def parse(text: str) -> float:
    """Bytes of "80GB", "40 GiB" or "24e9".

    Raises:
        ValueError: none of these.
    """
    units = {"gib": 2**30, "mib": 2**20, "gb": 1e9, "mb": 1e6, "": 1.0}
    plain = text.strip().lower().replace(" ", "")
    unit = next(u for u in units if plain.endswith(u))
    try:
        return float(plain.removesuffix(unit)) * units[unit]
    except ValueError as error:
        raise ValueError(f"{text!r} is no size; write 80GB, 40GiB or a number of bytes") from error


def show(found: Plan, memory: float, rate: float, link: float) -> str:
    """The plan as text for a person."""
    gb = 1e9
    lines = [
        f"{found.config.name}: one step on {found.devices} devices "
        f"(data, fsdp, tensor) = {found.config.train.mesh}, {found.config.train.layout}, "
        f"{found.config.model.dtype}, remat {found.config.model.remat}, "
        f"accumulate {found.config.train.accumulate}",
        "",
        "parameters",
        *(f"  {name:<12} {number:>16,}" for name, number in found.parameters.items()),
        f"  {'together':<12} {sum(found.parameters.values()):>16,}",
        "",
        f"memory per device, of {memory / gb:.1f} GB",
        *(f"  {name:<12} {size / gb:>10.2f} GB" for name, size in found.bytes.items()),
        f"  {'together':<12} {found.total / gb:>10.2f} GB   "
        + ("fits" if found.fits(memory) else f"does NOT fit {USABLE:.0%} of it"),
        "",
        "sent per device and step",
        *(
            f"  {kind:<18} {times:>6} x {moved / gb:>10.2f} GB"
            for kind, (times, moved) in found.collectives.items()
        ),
        "",
        f"FLOPs per step      {found.flops:.3e} ({found.model_flops:.3e} without remat)",
    ]
    computing, sending = found.seconds(rate, link)
    lines.append(
        f"expected per step   {max(computing, sending):.2f} to {computing + sending:.2f} s: computing "
        f"{computing:.2f} s at {rate:.3g} FLOP/s, sending {sending:.2f} s at {link:.3g} bytes/s"
    )
    hours = found.config.train.steps * (computing + sending) / 3600
    lines.append(f"expected for all     {hours:.1f} h at most, {found.config.train.steps:,} steps")
    if found.config.model.dtype != "float32":
        lines.append(
            "(Compiled for CPU, which widens bfloat16: temporaries and what is sent are upper bounds.)"
        )
    return "\n".join(lines)


def numbers(found: Plan, memory: float, rate: float, link: float) -> dict[str, Any]:
    """The plan as a program reads it: bytes, FLOPs, seconds."""
    computing, sending = found.seconds(rate, link)
    return {
        "name": found.config.name,
        "devices": found.devices,
        "fits": found.fits(memory),
        "parameters": found.parameters,
        "bytes_per_device": {**found.bytes, "together": found.total},
        "bytes_sent_per_device": {kind: moved for kind, (_, moved) in found.collectives.items()},
        "memory_collectives": found.memory_collectives,
        "flops": found.flops,
        "model_flops": found.model_flops,
        "seconds_computing": computing,
        "seconds_sending": sending,
    }


def load(path: Any, overrides: list[str], devices: int) -> Config:
    """The config of a run for so many devices; a -1 in its mesh takes those that remain.

    Raises:
        ConfigError: as `config.load`, or a mesh of another number of devices.
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
