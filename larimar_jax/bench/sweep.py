"""Sweeps memories: variant x addressing x slots x facts x settings x noise x rephrasings x seed.

Everything that is a real number is an axis of one `vmap`, so that a variant is compiled once for
each shape (slots, latent size, a bucket of facts, rephrasings), and all its cells run in that
program, `CHUNK` at a time on each device. Facts are padded to their bucket with zero rows, which are
padding to every memory.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from larimar_jax import memory, schema
from larimar_jax.bench import sweep_data
from larimar_jax.bench.runner import Record
from larimar_jax.memory.addressing import UnknownAddressing, from_prompts

# Cells computed together; a multiple of it for each device.
CHUNK = 16
# What may be said of a variant beside its own settings: what M_ref is.
REFERENCES = ("prior", "prompts")
# Settings that are part of what a cell is drawn from, beside the variant's own real numbers.
DRAWN = ("noise", "seed")


class SweepError(ValueError):
    """A sweep's config that does not fit; names every offence."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """What to sweep.

    latent: C of the synthetic facts, 0 for none. paired: whether their values are their prompts
    themselves, as in Algorithm 1, instead of unrelated. zsre: a ZsRE file whose prompts are encoded,
    beside the synthetic ones; "" for none. variants: names with their settings, each a value or a list
    of them, and with `reference="prompts"` where M_ref is to be the facts' first wordings, known before
    they are written (Table 3), and not M₀. slots, facts, rephrasings, noises, seeds: what they are
    multiplied with.
    """

    name: str
    latent: int
    paired: bool
    zsre: str
    variants: Mapping[str, Mapping[str, Any]]
    slots: tuple[int, ...]
    facts: tuple[int, ...]
    rephrasings: tuple[int, ...]
    noises: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the sweep. label: the variant's name in the config. fixed, real: its settings that
    are compiled in, and those that are numbers."""

    case_id: str
    label: str
    variant: str
    source: str
    slots: int
    facts: int
    rephrasings: int
    noise: float
    seed: int
    fixed: tuple[tuple[str, Any], ...]
    real: tuple[tuple[str, float], ...]

    @property
    def shape(self) -> tuple:
        """What is compiled for; cells of one shape differ in numbers alone."""
        names = tuple(name for name, _ in self.real)
        size = bucket(self.facts)
        return (self.variant, self.fixed, names, self.source, self.slots, size, self.rephrasings)


def bucket(facts: int) -> int:
    """The number of facts that is compiled for: the next power of two."""
    return 1 << max(0, facts - 1).bit_length()


def parse(values: Mapping[str, Any]) -> SweepConfig:
    """The config of a sweep.

    Raises:
        SweepError: naming at once every unknown or missing key, wrong type, variant and setting.
    """
    problems: list[str] = []
    config = schema.read(SweepConfig, values, "", problems, {})
    variants = values.get("variants")
    if not isinstance(variants, Mapping) or not variants:
        problems.append("variants: expected a section with at least one")
        variants = {}
    for label, settings in variants.items():
        problems += _offences(label, settings)
    if problems:
        raise SweepError("The sweep's config does not fit:\n  " + "\n  ".join(problems))
    return config


def _offences(label: str, settings: Any) -> list[str]:
    if not isinstance(settings, Mapping) or settings.get("variant") not in memory.variants():
        known = ", ".join(sorted(memory.variants()))
        return [f"variants.{label}.variant: must be one of {known}"]
    found = []
    for chosen in _choices({k: v for k, v in settings.items() if k != "variant"}):
        reference = chosen.pop("reference", REFERENCES[0])
        if reference not in REFERENCES:
            found.append(f"variants.{label}.reference: must be one of {', '.join(REFERENCES)}")
        try:
            _built(settings["variant"], 2, 2, chosen)
        except (memory.UnknownVariant, UnknownAddressing, TypeError) as error:
            found.append(f"variants.{label}: {' '.join(str(error).split())}")
    return list(dict.fromkeys(found))


def _choices(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of settings; those of a section have names such as addressing.width."""
    flat = {}
    for name, value in settings.items():
        section = value if isinstance(value, Mapping) else {"": value}
        flat |= {f"{name}.{key}".strip("."): item for key, item in section.items()}
    listed = [v if isinstance(v, (list, tuple)) else [v] for v in flat.values()]
    return [dict(zip(flat, chosen, strict=True)) for chosen in itertools.product(*listed)]


def _built(variant: str, slots: int, latent: int, settings: Mapping[str, Any]) -> memory.Memory:
    """Return the memory of settings as `_choices` names them."""
    sections: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        if key:
            sections.setdefault(section, {})[key] = value
        else:
            sections[name] = value
    return memory.build(variant, slots=slots, latent=latent, **sections)


def _is_real(variant: type[memory.Memory], name: str) -> bool:
    """Return whether a setting is a real number, an axis of the `vmap`."""
    section, _, key = name.partition(".")
    if section == "addressing":
        return key not in ("", "kind")
    field = variant.__dataclass_fields__.get(name)
    return field is not None and not field.metadata.get("static")


def cells(config: SweepConfig) -> list[Cell]:
    """Every cell, those of one shape beside each other."""
    found = []
    sources = [n for n, on in (("synthetic", config.latent), ("zsre", config.zsre)) if on]
    for label, settings in config.variants.items():
        variant = memory.variants()[settings["variant"]]
        for chosen in _choices({k: v for k, v in settings.items() if k != "variant"}):
            real = {n: v for n, v in chosen.items() if _is_real(variant, n)}
            fixed = {n: v for n, v in chosen.items() if n not in real}
            grid = itertools.product(
                sources, config.slots, config.facts, config.rephrasings, config.noises, config.seeds
            )
            for source, slots, facts, rephrasings, noise, seed in grid:
                said = [label, source, slots, facts, rephrasings, noise, seed, *chosen.values()]
                found.append(
                    Cell(
                        "/".join(map(str, said)),
                        label,
                        settings["variant"],
                        source,
                        slots,
                        facts,
                        rephrasings,
                        noise,
                        seed,
                        tuple(sorted(fixed.items())),
                        tuple(sorted((n, float(v)) for n, v in real.items())),
                    )
                )
    return sorted(found, key=lambda cell: (repr(cell.shape), cell.case_id))


class Sweep:
    """See the head of this file; an experiment as in `runner.Experiment`.

    Attributes:
        compiled: how many programs were compiled so far.
    """

    name = "sweep"

    def __init__(self, config: SweepConfig):
        self.config, self.cases = config, cells(config)
        if not self.cases:
            raise SweepError(
                "The sweep has no cells: latent is 0, that is, no synthetic facts, and zsre names "
                "no file. Give --set zsre=FILE, or a latent size."
            )
        self.chunk = CHUNK * jax.device_count()
        self.settings: Mapping[str, Any] = dataclasses.asdict(config) | {"chunk": self.chunk}
        self.compiled = 0
        self._programs: dict[tuple, Any] = {}
        self._encodings: sweep_data.Encodings | None = None

    def run(self, cases: Sequence[Cell]) -> list[Record]:
        """What each cell measures; those of one shape in one call."""
        records: dict[str, Record] = {}
        for _, group in itertools.groupby(cases, key=lambda cell: cell.shape):
            for record in self._run(list(group)):
                records[record["case_id"]] = record
        return [records[cell.case_id] for cell in cases]

    def _run(self, group: list[Cell]) -> list[Record]:
        shape = group[0].shape
        begin = time.perf_counter()
        fresh = shape not in self._programs
        if fresh:
            self._programs[shape] = self._program(group[0])
        # Filled up with the last one, so that every call has one shape.
        rows = group + [group[-1]] * (-len(group) % self.chunk)
        numbers = {
            "facts": jnp.int32([cell.facts for cell in rows]),
            "noise": jnp.float32([cell.noise for cell in rows]),
            "seed": jnp.int32([cell.seed for cell in rows]),
            **{
                name: jnp.float32([dict(cell.real)[name] for cell in rows])
                for name, _ in group[0].real
            },
        }
        if fresh:
            jax.block_until_ready(self._programs[shape](numbers))
        compiled = time.perf_counter()
        found = jax.device_get(self._programs[shape](numbers))
        seconds = (time.perf_counter() - compiled) / len(rows)
        size = self._bytes(group[0])
        return [
            {
                **{n: v for n, v in dataclasses.asdict(cell).items() if n not in ("fixed", "real")},
                **{n: v for n, v in (*cell.fixed, *cell.real) if n not in DRAWN},
                **{name: np.asarray(value[i]).tolist() for name, value in found.items()},
                "bytes": size,
                "seconds": seconds,
                "seconds_compiling": (compiled - begin) / len(group) if fresh else 0.0,
            }
            for i, cell in enumerate(group)
        ]

    def _variant(self, cell: Cell, real: Mapping[str, Any]) -> memory.Memory:
        fixed = {name: value for name, value in cell.fixed if name != "reference"}
        return _built(cell.variant, cell.slots, self._latent(cell), fixed | real)

    def _latent(self, cell: Cell) -> int:
        return self.config.latent if cell.source == "synthetic" else self._real().prompts.shape[1]

    def _real(self) -> sweep_data.Encodings:
        if self._encodings is None:
            self._encodings = sweep_data.encode(self.config.zsre)
            have, want = (
                len(self._encodings.prompts),
                max(bucket(cell.facts) for cell in self.cases),
            )
            if have < want:
                raise ValueError(
                    f"{self.config.zsre} has {have} records with a rephrasing, and cells of so many "
                    f"facts need {want}. Give a larger file, or fewer facts in the sweep's config."
                )
        return self._encodings

    def _bytes(self, cell: Cell) -> int:
        """Of the state after writing."""
        variant, latent = self._variant(cell, dict(cell.real)), self._latent(cell)
        rows = cell.facts * (1 + cell.rephrasings)

        def written():
            prepared = variant.prepare(variant.init(jax.random.key(0)))
            facts = jnp.zeros((rows, latent), jnp.float32)
            return variant.write(prepared, variant.empty(prepared), facts, facts)

        leaves = jax.tree.leaves(jax.eval_shape(written))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    def _program(self, cell: Cell):
        """The compiled function of a shape: numbers [chunk] each → measures [chunk, …] each."""
        real = self._real() if cell.source == "zsre" else None
        one = functools.partial(self._measure, cell, real)

        def many(numbers):
            self.compiled += 1
            return jax.vmap(one)(numbers)

        # Each device maps its own cells: a partitioner would gather what LAPACK's loops read.
        mesh = jax.make_mesh(
            (jax.device_count(),), ("cells",), axis_types=(jax.sharding.AxisType.Auto,)
        )
        split = jax.P("cells")
        return jax.jit(
            jax.shard_map(many, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        )

    def _measure(self, cell: Cell, encodings, numbers: Mapping[str, Any]) -> dict[str, Any]:
        numbers = dict(numbers)
        count, noise, seed = (numbers.pop(name) for name in ("facts", "noise", "seed"))
        size, rephrasings = bucket(cell.facts), cell.rephrasings
        draws = jax.random.split(jax.random.key(seed))
        if encodings is None:
            sizes = (size, self.config.latent, rephrasings)
            facts = sweep_data.synthetic(draws[0], *sizes, noise, paired=self.config.paired)
        else:
            facts = sweep_data.real(draws[0], encodings, size, rephrasings, noise)
        variant = self._variant(cell, numbers)
        params, there = variant.init(draws[1]), jnp.arange(size) < count
        if dict(cell.fixed).get("reference") == "prompts":
            params = _known(params, facts.keys[:: 1 + rephrasings], there)
        prepared = variant.prepare(params)
        rows = jnp.repeat(there, 1 + rephrasings)[:, None]
        keys, values = (jnp.where(rows, a, 0.0) for a in (facts.keys, facts.values))
        state = variant.write(prepared, variant.empty(prepared), keys, values)
        asked = jnp.concatenate([facts.keys[:: 1 + rephrasings], facts.queries])
        latent = variant.read(prepared, state, asked).latent.reshape(2, size, -1)
        written, held_out = (_recall(side, facts.targets, there) for side in latent)
        finite = jnp.isfinite(latent).all(axis=(0, 2)) | ~there
        return {
            "not_finite": jnp.sum(~finite).astype(jnp.int32),
            "recall_written": written[0],
            "error_written": written[1],
            "recall": held_out[0],
            "error": held_out[1],
            "recall_by_age": _quarters(held_out[2], count),
        }

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """By variant and source: mean recall and error at the held-out wordings; and what it cost."""
        table: dict[str, Any] = {}
        for (source, label), rows in _grouped(records, "source", "label").items():
            table.setdefault(source, {})[label] = {
                name: float(np.mean([row[name] for row in rows]))
                for name in ("recall_written", "recall", "error", "bytes", "seconds")
            } | {"cells": len(rows), "not_finite": sum(row["not_finite"] > 0 for row in rows)}
        shapes = len({cell.shape for cell in self.cases})
        return {
            "means": table,
            "shapes": shapes,
            "compiled_in_this_run": self.compiled,
            "seconds_measuring": sum(record["seconds"] for record in records),
            "seconds_compiling": sum(record["seconds_compiling"] for record in records),
        }

    @staticmethod
    def tables(summary: Mapping[str, Any]) -> list[Table | str]:
        """A row a variant."""
        results, shown = summary["results"], []
        for source, means in results["means"].items():
            table = Table(
                source, "cells", "recall, written", "recall, held out", "error", "kB", "ms"
            )
            for label, found in sorted(means.items(), key=lambda item: -item[1]["recall"]):
                broken = f", {found['not_finite']} not finite" if found["not_finite"] else ""
                table.add_row(
                    label,
                    f"{found['cells']}{broken}",
                    f"{found['recall_written']:.3f}",
                    f"{found['recall']:.3f}",
                    f"{found['error']:.3f}",
                    f"{found['bytes'] / 1e3:.0f}",
                    f"{1e3 * found['seconds']:.2f}",
                )
            shown.append(table)
        note = (
            f"{results['shapes']} shapes, {results['compiled_in_this_run']} compiled now; "
            f"{results['seconds_measuring']:.0f} s of measuring, "
            f"{results['seconds_compiling']:.0f} s of compiling"
        )
        return [*shown, note]


def _known(params: memory.MemoryParams, prompts, there) -> memory.MemoryParams:
    """The parameters with the prompts that are there as M_ref."""
    slots = params.prior_memory.shape[0]
    most = min(slots, len(prompts))
    rows = jnp.where(there[:most, None], prompts[:most], params.prior_memory[:most])
    return dataclasses.replace(
        params, reference_memory=from_prompts(rows, slots, params.prior_memory)
    )


def _recall(latent, targets, there):
    """(share of facts whose own value is the nearest, relative error, each fact's hit). What is not
    finite counts as nothing read; `not_finite` says how often."""
    found = jnp.where(jnp.isfinite(latent), latent, 0.0)
    likeness = found @ targets.T / jnp.maximum(jnp.linalg.norm(targets, axis=1), 1e-9)[None, :]
    best = jnp.argmax(jnp.where(there[None, :], likeness, -jnp.inf), axis=1)
    hit = jnp.where(there, (best == jnp.arange(there.shape[0])).astype(jnp.float32), 0.0)
    apart = jnp.where(there[:, None], found - targets, 0.0)
    size = jnp.where(there[:, None], targets, 0.0)
    error = jnp.sqrt(jnp.sum(jnp.square(apart)) / jnp.sum(jnp.square(size)))
    return jnp.sum(hit) / jnp.sum(there).astype(jnp.float32), error, hit


def _quarters(hit, count):
    """The recall of the first, second, third and last quarter of the facts in their order."""
    quarter = jnp.minimum(4 * jnp.arange(hit.shape[0]) // jnp.maximum(count, 1), 3)
    inside = jnp.arange(hit.shape[0]) < count
    members = (quarter[None, :] == jnp.arange(4)[:, None]) & inside[None, :]
    number = jnp.maximum(jnp.sum(members, axis=1), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(members, hit[None, :], 0.0), axis=1) / number


def _grouped(records: Sequence[Record], *names: str) -> dict[tuple, list[Record]]:
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in names), []).append(record)
    return found
