"""Speed of the memory alone, each against the plain way to the same numbers, in one run.

    stream     one fact into a memory of many, against solving for all of them again
    episode    exact write and read of episodes of 16 facts, against 15 Newton–Schulz steps on K x C:
               as the released code takes them, (X A) X with M₀† anew for each episode, and as our
               variant does, with the shorter product first and one M₀† for all episodes
    scan       10,000 facts one by one in one compiled scan
    tenants    a fact and a query for each of many memories under one `vmap`, against a Python loop
               of the memory's functions, and of one program for each write and each read

All sides of a case run in turns within one process, so that a machine's moods hit all of them.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.table import Table

from larimar_jax import memory
from larimar_jax.bench.runner import Record
from larimar_jax.linalg import dot
from larimar_jax.memory import rls
from larimar_jax.memory.base import MemoryParams

# What a ratio compares: (name, the plain side, our side).
RATIOS = (
    ("one fact streamed, against all solved again", "solve again", "stream"),
    ("one fact streamed, against the pseudo-inverse of all", "pseudo-inverse", "stream"),
    *(
        (f"{count} of 16 facts{more}, against Newton–Schulz {how}", f"{side} {kind}", f"exact {kind}")
        for count, more, kind in (
            ("an episode", "", "x1"),
            ("4 episodes", "", "x4"),
            ("an episode", " and gradients", "gradient x1"),
            ("4 episodes", " and gradients", "gradient x4"),
        )
        for how, side in (("as released", "released"), ("as here", "newton-schulz"))
    ),
    ("tenants, a fact and a query each, against a compiled call each", "loop", "tenants"),
    ("tenants, against the memory's functions in a Python loop", "plain loop", "tenants"),
)
EPISODE = 16
# Seconds that a side is run for in its turn: the median of what fits. Once is not enough, for what ran
# before has emptied the caches.
_TURN = 0.1


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `larimar bench memory`."""
    parser.add_argument("--slots", type=int, default=512, help="K (512)")
    parser.add_argument("--latent", type=int, default=768, help="C (768)")
    parser.add_argument("--facts", type=int, default=1000, help="in the memory streamed to (1000)")
    parser.add_argument("--scan", type=int, default=10_000, help="facts of the long stream (10000)")
    parser.add_argument("--tenants", type=int, default=64, help="memories beside each other (64)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each (5)")


def experiment(args: argparse.Namespace) -> "MemorySpeed":
    """The experiment of a parsed command line."""
    sizes = (args.slots, args.latent, args.facts, args.scan, args.tenants)
    return MemorySpeed(*sizes, args.repeats)


@dataclasses.dataclass(frozen=True)
class Case:
    """One timing of every side."""

    case_id: str


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row a ratio."""
    results = summary["results"]
    table = Table("", "plain (ms)", "here (ms)", "ratio")
    for name, plain, ours in RATIOS:
        times = [f"{1e3 * results['seconds'][side]:.3g}" for side in (plain, ours)]
        table.add_row(name, *times, f"{results['ratios'][name]:.1f}")
    table.add_row("one long stream, facts/s", "", "", f"{results['facts_per_second']:,.0f}")
    return [table]


class MemorySpeed:
    """See the head of this file; an experiment as in `runner.Experiment`."""

    name = "memory"
    tables = staticmethod(tables)
    chunk = 1

    def __init__(self, slots: int, latent: int, facts: int, scan: int, tenants: int, repeats: int):
        self.cases = [Case(str(repeat)) for repeat in range(repeats)]
        self.settings: Mapping[str, Any] = {
            "slots": slots,
            "latent": latent,
            "facts": facts,
            "scan": scan,
            "tenants": tenants,
            "episode": EPISODE,
            "repeats": repeats,
            "seed": 0,
        }
        self._sides: dict[str, Callable[[], Any]] | None = None

    def run(self, cases: Sequence[Case]) -> list[Record]:
        """Seconds of each side; the first timing comes after an untimed run of each."""
        if self._sides is None:
            self._sides = sides(**{n: self.settings[n] for n in _SIZES})
            for side in self._sides.values():
                jax.block_until_ready(side())
        records = []
        for case in cases:
            seconds = {}
            for name, side in self._sides.items():
                seconds[name] = _seconds(side)
            records.append({"case_id": case.case_id, "seconds": seconds})
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Medians, and the ratios of `RATIOS`; facts per second of the long stream."""
        seconds = {
            name: statistics.median(record["seconds"][name] for record in records)
            for name in records[0]["seconds"]
        }
        seconds["stream"] /= rls.MAX_PENDING
        ratios = {name: seconds[plain] / seconds[ours] for name, plain, ours in RATIOS}
        rate = self.settings["scan"] / seconds["scan"]
        return {"seconds": seconds, "ratios": ratios, "facts_per_second": rate}


def _seconds(side: Callable[[], Any]) -> float:
    """The median of one run, over those that fit into a turn."""
    taken = []
    while sum(taken) < _TURN:
        begin = time.perf_counter()
        jax.block_until_ready(side())
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


_SIZES = ("slots", "latent", "facts", "scan", "tenants")


def sides(slots: int, latent: int, facts: int, scan: int, tenants: int) -> dict[str, Callable]:
    """What is timed, by name; all compiled by their first call. `stream` does `rls.MAX_PENDING` facts, with
    the factorisation that comes with so many."""
    draw = np.random.default_rng(0)

    def unit(*shape: int) -> jax.Array:
        found = draw.standard_normal((*shape, latent), dtype=np.float32)
        return jnp.asarray(found / np.linalg.norm(found, axis=-1, keepdims=True))

    build = functools.partial(memory.build, slots=slots, latent=latent)
    streaming = build("streaming")
    # Near the identity, and not it: a pseudo-inverse of the identity could be known beforehand.
    near = np.eye(slots, latent) + 0.01 * draw.standard_normal((slots, latent))
    params = MemoryParams(jnp.asarray(near, jnp.float32), jnp.zeros(()))
    prepared = streaming.prepare(params)
    keys, values = unit(facts), unit(facts)
    return {
        **_streams(streaming, build("direct", query="prior"), prepared, keys, values, unit),
        **_scan(streaming, prepared, unit(scan), unit(scan)),
        **_episodes(build, params, unit),
        **_tenants(build("dual"), prepared, unit(tenants, 1), unit(tenants, 1), unit(tenants, 1)),
    }


def _streams(streaming, direct, prepared, keys, values, unit) -> dict[str, Callable]:
    @jax.jit
    def again(keys, values):
        return streaming.write(prepared, streaming.empty(prepared), keys, values).solution

    @jax.jit
    def inverse(keys, values):
        return direct.matrix(prepared, direct.write(prepared, direct.empty(prepared), keys, values))

    @functools.partial(jax.jit, donate_argnums=0)
    def stream(now, keys, values):
        return rls.stream(streaming, prepared, now, keys, values)[0]

    written = jax.jit(streaming.write)(prepared, streaming.empty(prepared), keys, values)
    now = [jax.jit(functools.partial(rls.init, streaming))(prepared, written)]
    new = (unit(rls.MAX_PENDING), unit(rls.MAX_PENDING))

    def advance():
        now[0] = stream(now[0], *new)
        return now[0].pending

    return {
        "solve again": lambda: again(keys, values),
        "pseudo-inverse": lambda: inverse(keys, values),
        "stream": advance,
    }


def _scan(streaming, prepared, keys, values) -> dict[str, Callable]:
    @jax.jit
    def scan(keys, values):
        start = rls.init(streaming, prepared, streaming.empty(prepared))
        return rls.stream(streaming, prepared, start, keys, values)[0].pending

    return {"scan": lambda: scan(keys, values)}


def _episodes(build, params, unit) -> dict[str, Callable]:
    def read_back(variant, m0, episodes):
        prepared = variant.prepare(MemoryParams(m0, params.log_variance), few_encodings=True)

        def one(facts):
            state = variant.write(prepared, variant.empty(prepared), facts, facts)
            return variant.read(prepared, state, facts).latent

        return jax.vmap(one)(episodes)

    found = {}
    for name, forward in (
        ("exact", functools.partial(read_back, build("direct"))),
        ("newton-schulz", functools.partial(read_back, build("newton_schulz"))),
        ("released", released),
    ):

        def loss(m0, episodes, forward=forward):
            return jnp.sum(jnp.sin(forward(m0, episodes)))

        read, backward = jax.jit(forward), jax.jit(jax.grad(loss, argnums=(0, 1)))
        for count in (1, 4):
            # Of norm 10, as the released code's latents: Newton–Schulz cannot invert much less (§3).
            episodes = 10.0 * unit(count, EPISODE)
            found[f"{name} x{count}"] = functools.partial(read, params.prior_memory, episodes)
            found[f"{name} gradient x{count}"] = functools.partial(backward, params.prior_memory, episodes)
    return found


def released(
    m0: Float[Array, "K C"], episodes: Float[Array, "E N C"]
) -> Float[Array, "E N C"]:
    """Algorithm 1 with the order of the released code's products (§3): the plain side of a ratio."""

    def pinv(a):
        start = min(math.exp(-5.0), 5e-4) * a.mT
        return jax.lax.fori_loop(0, 15, lambda _, x: 2.0 * x - dot(dot(x, a), x), start)

    each = jnp.broadcast_to(m0, (episodes.shape[0], *m0.shape))
    posterior = dot(pinv(dot(episodes, pinv(each))), episodes)
    return dot(dot(episodes, pinv(posterior)), posterior)


def _tenants(variant, prepared, keys, values, queries) -> dict[str, Callable]:
    """Each tenant has a memory of its own: a fact is written into it, a query read from it, and the
    answer fetched; side by side under `vmap`, or a tenant after the other: by programs made for it, or
    by the memory's own functions."""

    def write(prepared, keys, values):
        return variant.write(prepared, variant.empty(prepared), keys, values)

    def read(prepared, state, queries):
        return variant.read(prepared, state, queries).latent

    single_write, single_read = jax.jit(write), jax.jit(read)
    many_write, many_read = (
        jax.jit(jax.vmap(side, in_axes=(None, *[0] * count)))
        for side, count in ((write, 2), (read, 2))
    )

    def one(key, value, query, write=single_write, read=single_read):
        return np.asarray(read(prepared, write(prepared, key, value), query))

    def all_of_them():
        return np.asarray(many_read(prepared, many_write(prepared, keys, values), queries))

    each = list(zip(keys, values, queries, strict=True))
    return {
        "tenants": all_of_them,
        "loop": lambda: [one(*facts) for facts in each],
        "plain loop": lambda: [one(*facts, write, read) for facts in each],
    }
