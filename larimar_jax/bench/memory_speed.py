"""Speed of the memory alone, each against the plain way to the same numbers, in one run.

    stream     one fact into a memory of many, against solving for all of them again
    episode    exact write and read of episodes of 16 facts, against 15 Newton–Schulz steps on K x C:
               as the released code takes them, (X A) X with M₀† anew for each episode, and as our
               variant does, with the shorter product first and one M₀† for all episodes
    scan       10,000 facts one by one in one compiled scan
    tenants    a fact and a query for each of many memories under one `vmap`, against a Python loop
               of the memory's functions, and of one program for each write and each read

All sides of a case run in turns within one process, so that they see the same machine load.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from larimar_jax import memory
from larimar_jax.bench.task import Metric, Pivot, Task, option
from larimar_jax.linalg import dot
from larimar_jax.memory import rls
from larimar_jax.memory.base import MemoryParams

EPISODE = 16
# What a ratio compares: (name, the plain side, our side).
RATIOS = (
    ("one fact streamed, against all solved again", "solve again", "stream"),
    ("one fact streamed, against the pseudo-inverse of all", "pseudo-inverse", "stream"),
    *(
        (
            f"{count} of {EPISODE} facts{more}, against Newton–Schulz {how}",
            f"{side} {kind}",
            f"exact {kind}",
        )
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
LONG_STREAM = "one long stream"
# Seconds that a side is run for in its turn: the median of what fits. Once is not enough, for what ran
# before has emptied the caches.
TURN = 0.1

Sides = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One timing of every side."""

    case_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorySpeed(Task):
    """Speed of the memory alone, each against the plain way to the same numbers, in one run."""

    name: ClassVar = "memory"
    metrics: ClassVar = {
        "ratio": Metric("ratio", 1.0, median=True),
        "plain": Metric("plain, ms", 1e3, 2, lower=True, median=True),
        "here": Metric("here, ms", 1e3, 2, lower=True, median=True),
        "facts_per_second": Metric("facts/s", 1.0, 0, median=True),
    }
    tables: ClassVar = (Pivot(("kind",), None, caption="medians", labels=("comparison",)),)
    quoted: ClassVar = False
    plots: ClassVar = ()

    slots: int = option("K", default=512)
    latent: int = option("C", default=768)
    facts: int = option("facts in the memory that is streamed to", default=1000)
    scan: int = option("facts of the long stream", default=10_000)
    tenants: int = option("memories beside each other", default=64)
    repeats: int = option("timings of each side", default=5)
    chunk: int = option("timings computed together", default=1)

    def cases(self, systems) -> Sequence[Turn]:
        return [Turn(number) for number in range(self.repeats)]

    def evaluate(self, systems, cases: Sequence[Turn]) -> Iterator[dict[str, Any]]:
        """Yield each ratio of two sides of one turn."""
        for case in cases:
            seconds = {name: _seconds(side) for name, side in self._compiled.items()}
            seconds["stream"] /= rls.MAX_PENDING
            shared = {"case": case.case_id, "system": "larimar"}
            for name, plain, ours in RATIOS:
                yield {
                    **shared,
                    "kind": name,
                    "ratio": seconds[plain] / seconds[ours],
                    "plain": seconds[plain],
                    "here": seconds[ours],
                }
            rate = self.scan / seconds["scan"]
            yield {**shared, "kind": LONG_STREAM, "here": seconds["scan"], "facts_per_second": rate}

    @functools.cached_property
    def _compiled(self) -> Sides:
        """What is timed, by name; each side has run once. `stream` writes `rls.MAX_PENDING` facts, with
        the factorisation that comes with so many."""
        rng = np.random.default_rng(0)

        def unit(*shape: int) -> jax.Array:
            rows = rng.standard_normal((*shape, self.latent), dtype=np.float32)
            return jnp.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))

        build = functools.partial(memory.build, slots=self.slots, latent=self.latent)
        streaming = build("streaming")
        # Near the identity, and not it: a pseudo-inverse of the identity could be known beforehand.
        size = self.slots, self.latent
        near = np.eye(*size) + 0.01 * rng.standard_normal(size)
        params = MemoryParams(jnp.asarray(near, jnp.float32), jnp.zeros(()))
        prepared = streaming.prepare(params)
        sides = {
            **_streams(streaming, build("direct", query="prior"), prepared, self.facts, unit),
            **_scan(streaming, prepared, unit(self.scan), unit(self.scan)),
            **_episodes(build, params, unit),
            **_tenants(build("dual"), prepared, *(unit(self.tenants, 1) for _ in range(3))),
        }
        for side in sides.values():
            jax.block_until_ready(side())
        return sides


def _seconds(side: Callable[[], Any]) -> float:
    """Return the median of one run, over those that fit into a turn."""
    runs: list[float] = []
    while not runs or sum(runs) < TURN:
        start = time.perf_counter()
        jax.block_until_ready(side())
        runs.append(time.perf_counter() - start)
    return statistics.median(runs)


def _streams(streaming, direct, prepared, facts: int, unit) -> Sides:
    keys, values = unit(facts), unit(facts)

    @jax.jit
    def again(keys, values):
        return streaming.write(prepared, streaming.empty(prepared), keys, values).solution

    @jax.jit
    def inverse(keys, values):
        return direct.matrix(prepared, direct.write(prepared, direct.empty(prepared), keys, values))

    @functools.partial(jax.jit, donate_argnums=0)
    def stream(state, keys, values):
        return rls.stream(streaming, prepared, state, keys, values)[0]

    written = jax.jit(streaming.write)(prepared, streaming.empty(prepared), keys, values)
    state = [jax.jit(functools.partial(rls.init, streaming))(prepared, written)]
    new = (unit(rls.MAX_PENDING), unit(rls.MAX_PENDING))

    def advance():
        state[0] = stream(state[0], *new)
        return state[0].pending

    return {
        "solve again": lambda: again(keys, values),
        "pseudo-inverse": lambda: inverse(keys, values),
        "stream": advance,
    }


def _scan(streaming, prepared, keys, values) -> Sides:
    @jax.jit
    def scan(keys, values):
        start = rls.init(streaming, prepared, streaming.empty(prepared))
        return rls.stream(streaming, prepared, start, keys, values)[0].pending

    return {"scan": lambda: scan(keys, values)}


def _episodes(build, params: MemoryParams, unit) -> Sides:
    def read_back(variant, m0, episodes):
        prepared = variant.prepare(MemoryParams(m0, params.log_variance), few_encodings=True)

        def recall(facts):
            state = variant.write(prepared, variant.empty(prepared), facts, facts)
            return variant.read(prepared, state, facts).latent

        return jax.vmap(recall)(episodes)

    sides: Sides = {}
    for name, forward in (
        ("exact", functools.partial(read_back, build("direct"))),
        ("newton-schulz", functools.partial(read_back, build("newton_schulz"))),
        ("released", released),
    ):

        def loss(m0, episodes, forward=forward):
            return jnp.sum(jnp.sin(forward(m0, episodes)))

        read, backward = jax.jit(forward), jax.jit(jax.grad(loss, argnums=(0, 1)))
        m0 = params.prior_memory
        for count in (1, 4):
            # Of norm 10, as the released code's latents: Newton–Schulz cannot invert much less (§3).
            episodes = 10.0 * unit(count, EPISODE)
            sides[f"{name} x{count}"] = functools.partial(read, m0, episodes)
            sides[f"{name} gradient x{count}"] = functools.partial(backward, m0, episodes)
    return sides


def released(m0: Float[Array, "K C"], episodes: Float[Array, "E N C"]) -> Float[Array, "E N C"]:
    """Return Algorithm 1 with the order of the released code's products (§3), the plain side."""

    def pinv(a):
        start = min(math.exp(-5.0), 5e-4) * a.mT
        return jax.lax.fori_loop(0, 15, lambda _, x: 2.0 * x - dot(dot(x, a), x), start)

    each = jnp.broadcast_to(m0, (episodes.shape[0], *m0.shape))
    posterior = dot(pinv(dot(episodes, pinv(each))), episodes)
    return dot(dot(episodes, pinv(posterior)), posterior)


def _tenants(variant, prepared, keys, values, queries) -> Sides:
    """Return sides in which each tenant has a memory of its own: a fact is written into it, a query
    read from it, and the answer fetched; side by side under `vmap`, or a tenant after the other, by
    programs made for it or by the memory's own functions."""

    def write(prepared, keys, values):
        return variant.write(prepared, variant.empty(prepared), keys, values)

    def read(prepared, state, queries):
        return variant.read(prepared, state, queries).latent

    single_write, single_read = jax.jit(write), jax.jit(read)
    many_write, many_read = (jax.jit(jax.vmap(side, (None, 0, 0))) for side in (write, read))

    def answer(key, value, query, write=single_write, read=single_read):
        return np.asarray(read(prepared, write(prepared, key, value), query))

    def all_of_them():
        return np.asarray(many_read(prepared, many_write(prepared, keys, values), queries))

    each = list(zip(keys, values, queries, strict=True))
    return {
        "tenants": all_of_them,
        "loop": lambda: [answer(*facts) for facts in each],
        "plain loop": lambda: [answer(*facts, write, read) for facts in each],
    }
