"""Sweep memories: variant x addressing x slots x facts x settings x noise x rephrasings x seed.

A variant is a pytree whose leaves are its real numbers, so that cells which differ in numbers alone are
stacked and run in one `vmap`: a program is compiled for each shape (structure of the variant, a bucket
of facts, rephrasings), and all its cells run in it, a chunk at a time on each device. Facts are padded
to their bucket with zero rows, which are padding to every memory.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from larimar_jax import memory, schema
from larimar_jax.bench import runner, sweep_data, sweep_plots
from larimar_jax.bench.task import Metric, Pivot, Task
from larimar_jax.memory.addressing import from_prompts

# M_ref of a variant: M₀, or the facts' first wordings, known before they are written (Table 3).
REFERENCES = ("prior", "prompts")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the sweep. settings: those of its variant; parameters: its real numbers."""

    case_id: str
    label: str
    source: str
    variant: memory.Memory
    settings: Mapping[str, Any]
    slots: int
    facts: int
    rephrasings: int
    noise: float
    seed: int

    @property
    def shape(self) -> tuple:
        """What is compiled for; cells of one shape differ in numbers alone."""
        structure = jax.tree.structure(self.variant)
        prompts = self.settings.get("reference") == "prompts"
        return structure, prompts, self.source, bucket(self.facts), self.rephrasings


def bucket(facts: int) -> int:
    """Return the number of facts that is compiled for: the next power of two."""
    return 1 << max(0, facts - 1).bit_length()


def _check_variants(variants: Mapping[str, Any]) -> str:
    """Return what is wrong with the section of variants."""
    problems = [] if variants else ["needs at least one"]
    for label, settings in variants.items():
        if not isinstance(settings, Mapping):
            problems.append(f"{label}: expected a section, got {settings!r}")
            continue
        for choice in choices(settings):
            reference = choice.get("reference", REFERENCES[0])
            if reference not in REFERENCES:
                problems.append(f"{label}.reference: must be one of {', '.join(REFERENCES)}")
            try:
                build(choice, slots=2, latent=2)
            except (ValueError, TypeError) as error:
                problems.append(f"{label}: {' '.join(str(error).split())}")
    return "; ".join(dict.fromkeys(problems))


def choices(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of settings that are lists, those of sections within included."""
    listed = []
    for value in settings.values():
        if isinstance(value, Mapping):
            listed.append(choices(value))
        else:
            listed.append(value if isinstance(value, list | tuple) else [value])
    return [dict(zip(settings, values, strict=True)) for values in itertools.product(*listed)]


def build(settings: Mapping[str, Any], **sizes: int) -> memory.Memory:
    """Return the variant of a combination of settings."""
    rest = {name: value for name, value in settings.items() if name not in ("variant", "reference")}
    return memory.build(settings.get("variant", ""), **sizes, **rest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Task):
    """A sweep over memories; the fields are its config.

    latent: C of the synthetic facts, 0 for none. paired: whether their values are their prompts
    themselves, as in Algorithm 1, instead of unrelated. zsre: a ZsRE file whose prompts are encoded,
    beside the synthetic facts; "" for none. variants: by label, each with its variant's name, its
    settings, which are values or lists of them, and `reference`. slots, facts, rephrasings, noises,
    seeds: what they are multiplied with.
    """

    listed: ClassVar = False
    metrics: ClassVar = {
        "recall": Metric("recall, held out"),
        "recall_written": Metric("recall, written"),
        "error": Metric("error", 1.0, 3, lower=True),
        "error_written": Metric("error, written", 1.0, 3, lower=True),
        "bytes": Metric("kB", 1e-3, 0, lower=True),
        "seconds": Metric("ms", 1e3, 2, lower=True),
        "not_finite": Metric("not finite", 1.0, 2, lower=True),
    }
    tables: ClassVar = (Pivot(("kind", "system"), None, title="mean over the cells of a variant"),)
    plots: ClassVar = ()

    latent: int = 96
    paired: bool = False
    zsre: str = ""
    variants: Annotated[Mapping[str, Any], _check_variants]
    slots: tuple[int, ...] = (64,)
    facts: tuple[int, ...]
    rephrasings: tuple[int, ...] = (0,)
    noises: tuple[float, ...] = (0.0,)
    seeds: tuple[int, ...] = (0,)
    chunk: schema.Count = 16  # cells computed together

    def __post_init__(self):
        super().__post_init__()
        if not (self.latent or self.zsre):
            raise ValueError(
                "the sweep has no cells: latent is 0, that is, no synthetic facts, and zsre names no "
                "file. Give --set zsre=FILE, or a latent size."
            )

    def options(self) -> dict[str, Any]:
        """Return all fields: a sweep is its config."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def _encodings(self) -> sweep_data.RealFacts:
        encodings = sweep_data.encode(self.zsre)
        have, need = len(encodings.prompts), bucket(max(self.facts))
        if have < need:
            raise ValueError(
                f"{self.zsre} has {have} records with a rephrasing, and cells of so many facts need "
                f"{need}. Give a larger file, or fewer facts in the sweep's config."
            )
        return encodings

    def cases(self, systems=None) -> Sequence[Cell]:
        """Return every cell, those of one shape beside each other."""
        shapes: dict[tuple, list[Cell]] = {}
        sources = {"synthetic": self.latent} if self.latent else {}
        if self.zsre:
            sources["zsre"] = self._encodings.prompts.shape[1]
        for label, section in self.variants.items():
            for settings in choices(section):
                grid = itertools.product(
                    sources, self.slots, self.facts, self.rephrasings, self.noises, self.seeds
                )
                for source, slots, *rest in grid:
                    own = [value for key, value in settings.items() if key != "variant"]
                    variant = build(settings, slots=slots, latent=sources[source])
                    name = "/".join(map(str, [label, source, slots, *rest, *own]))
                    cell = Cell(name, label, source, variant, settings, slots, *rest)
                    shapes.setdefault(cell.shape, []).append(cell)
        return list(itertools.chain(*shapes.values()))

    @functools.cached_property
    def programs(self) -> dict[tuple, Any]:
        """The compiled function of each shape: numbers [cells] each → measures [cells, …] each."""
        return {}

    def evaluate(self, systems, cases: Sequence[Cell]) -> Iterator[dict[str, Any]]:
        """Yield the measures of each cell; those of one shape are computed together."""
        for _, group in itertools.groupby(cases, key=lambda cell: cell.shape):
            yield from self._rows(list(group))

    def _rows(self, cells: list[Cell]) -> Iterator[dict[str, Any]]:
        shape = cells[0].shape
        # Filled up with the last one, so that every call has one shape, and devices as many cells each.
        size = self.chunk + -self.chunk % jax.device_count()
        padded = cells + [cells[-1]] * (-len(cells) % size)
        numbers = {
            "variant": jax.tree.map(
                lambda *leaves: jnp.asarray(leaves, jnp.float32), *(cell.variant for cell in padded)
            ),
            "facts": jnp.int32([cell.facts for cell in padded]),
            "noise": jnp.float32([cell.noise for cell in padded]),
            "seed": jnp.int32([cell.seed for cell in padded]),
        }
        if shape not in self.programs:
            self.programs[shape] = self._compile(cells[0])
            jax.block_until_ready(self.programs[shape](numbers))
        start = time.perf_counter()
        measures = jax.device_get(self.programs[shape](numbers))
        seconds = (time.perf_counter() - start) / len(padded)
        state_bytes = self._bytes(cells[0])
        for row, cell in enumerate(cells):
            yield {
                "case": cell.case_id,
                "system": cell.label,
                "kind": cell.source,
                "slots": cell.slots,
                "facts": cell.facts,
                "rephrasings": cell.rephrasings,
                "noise": cell.noise,
                "seed": cell.seed,
                "settings": dict(cell.settings),
                **{name: np.asarray(value[row]).tolist() for name, value in measures.items()},
                "bytes": state_bytes,
                "seconds": seconds,
            }

    def _bytes(self, cell: Cell) -> int:
        """Return the bytes of the state after writing."""
        variant, rows = cell.variant, cell.facts * (1 + cell.rephrasings)

        def written():
            prepared = variant.prepare(variant.init(jax.random.key(0)))
            facts = jnp.zeros((rows, variant.latent), jnp.float32)
            return variant.write(prepared, variant.empty(prepared), facts, facts)

        leaves = jax.tree.leaves(jax.eval_shape(written))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    def _compile(self, cell: Cell):
        measure = jax.vmap(functools.partial(self._measure, cell))
        # Each device maps its own cells: a partitioner would gather what LAPACK's loops read.
        axis = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((jax.device_count(),), ("cells",), axis_types=axis)
        split = jax.P("cells")
        specs = dict(in_specs=split, out_specs=split)
        return jax.jit(jax.shard_map(measure, mesh=mesh, **specs, check_vma=False))

    def _measure(self, cell: Cell, numbers: Mapping[str, Any]) -> dict[str, Any]:
        variant, count, noise, seed = map(numbers.get, ("variant", "facts", "noise", "seed"))
        size, rephrasings = bucket(cell.facts), cell.rephrasings
        draws = jax.random.split(jax.random.key(seed))
        if cell.source == "synthetic":
            facts = sweep_data.synthetic(
                draws[0], size, self.latent, rephrasings, noise, paired=self.paired
            )
        else:
            facts = sweep_data.real(draws[0], self._encodings, size, rephrasings, noise)
        params, present = variant.init(draws[1]), jnp.arange(size) < count
        prompts = facts.keys[:: 1 + rephrasings]
        if cell.settings.get("reference") == "prompts":
            params = with_known_prompts(params, prompts, present)
        prepared = variant.prepare(params)
        rows = jnp.repeat(present, 1 + rephrasings)[:, None]
        keys, values = (jnp.where(rows, array, 0.0) for array in (facts.keys, facts.values))
        state = variant.write(prepared, variant.empty(prepared), keys, values)
        queries = jnp.concatenate([prompts, facts.queries])
        latent = variant.read(prepared, state, queries).latent.reshape(2, size, -1)
        written, held_out = (recall(side, facts.targets, present) for side in latent)
        finite = jnp.isfinite(latent).all(axis=(0, 2)) | ~present
        return {
            "not_finite": jnp.sum(~finite).astype(jnp.int32),
            "recall_written": written[0],
            "error_written": written[1],
            "recall": held_out[0],
            "error": held_out[1],
            "recall_by_age": by_quarter(held_out[2], count),
        }


def run(values: Mapping[str, Any], folder: str | Path, *, quiet: bool = False) -> list[Path]:
    """Run or resume the sweep of a config's nested dict; return the paths of its pictures.

    Raises:
        ConfigError: naming at once every unknown or missing key, wrong type, variant and setting.
    """
    runner.run(schema.from_dict(Sweep, values), folder, quiet=quiet)
    return sweep_plots.draw(runner.read_rows(folder), folder)


def with_known_prompts(params: memory.MemoryParams, prompts, present) -> memory.MemoryParams:
    """Return the parameters with the prompts that are present as M_ref."""
    slots = params.prior_memory.shape[0]
    count = min(slots, len(prompts))
    rows = jnp.where(present[:count, None], prompts[:count], params.prior_memory[:count])
    reference = from_prompts(rows, slots, params.prior_memory)
    return dataclasses.replace(params, reference_memory=reference)


def recall(latent, targets, present):
    """Return (share of facts whose own value is the nearest, relative error, each fact's hit). What is
    not finite counts as nothing read; `not_finite` counts how often."""
    latent = jnp.where(jnp.isfinite(latent), latent, 0.0)
    likeness = latent @ targets.T / jnp.maximum(jnp.linalg.norm(targets, axis=1), 1e-9)[None, :]
    best = jnp.argmax(jnp.where(present[None, :], likeness, -jnp.inf), axis=1)
    hit = jnp.where(present, (best == jnp.arange(present.shape[0])).astype(jnp.float32), 0.0)
    apart = jnp.where(present[:, None], latent - targets, 0.0)
    size = jnp.where(present[:, None], targets, 0.0)
    error = jnp.sqrt(jnp.sum(jnp.square(apart)) / jnp.sum(jnp.square(size)))
    return jnp.sum(hit) / jnp.sum(present).astype(jnp.float32), error, hit


def by_quarter(hit, count):
    """Return the recall of the first, second, third and last quarter of the facts in their order."""
    quarter = jnp.minimum(4 * jnp.arange(hit.shape[0]) // jnp.maximum(count, 1), 3)
    inside = jnp.arange(hit.shape[0]) < count
    members = (quarter[None, :] == jnp.arange(4)[:, None]) & inside[None, :]
    number = jnp.maximum(jnp.sum(members, axis=1), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(members, hit[None, :], 0.0), axis=1) / number
