"""Long context (§7): a memory for each chunk of a text, and a read that recurses over their readouts.

A text of N facts is cut into chunks of `fan_in`, each written into a memory of its own. A query is read
from all of them; their readouts are facts in turn, `fan_in` of them to a memory of the next level, which
is read by the same query, and so on until one readout is left. A decoder is conditioned on that.

    memories = write(memory, prepared, keys, values, fan_in=16)
    reading = read(memory, prepared, memories, queries)
    reading.latent, reading.chunk

Any variant of `memory/` serves for chunks. Further levels are memories of the same variant, which read
several facts under one key as their mean by weight (least squares: streaming, dual, direct addressed by
the prior) or as the nearest one's value (a list).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from larimar_jax.memory.base import Memory, Prepared
from larimar_jax.memory.pytrees import Latents, pytree

# About how much memory states and readouts take: chunks are taken in blocks, one after the other.
BYTES = 64 * 2**20

By = Literal["readout", "confidence", "surest"]
# The power of a chunk's confidence, relative to the highest, that its readout is weighted by: a chunk
# that knows nothing of a query still explains fan_in / C of it by chance, and there are thousands.
SHARPNESS = 4


@pytree
class Memories:
    """n memories of chunks. states: the variant's, each leaf with a leading n. keys, values: what is in
    them, zero rows where nothing is: a chunk is written anew when a fact of it changes."""

    states: Any
    keys: Float[Array, "n E C"]
    values: Float[Array, "n E C"]


@pytree
class ChunkReading:
    """What Q queries read. latent: the last readout. confidences: of every chunk, as the variant defines
    it. chunk, confidence: the chunk whose own readout had the highest, and that."""

    latent: Float[Array, "Q C"]
    chunk: Int[Array, "Q"]
    confidence: Float[Array, "Q"]
    confidences: Float[Array, "Q n"]


@functools.partial(jax.jit, static_argnames="fan_in")
def write(
    memory: Memory, prepared: Prepared, keys: Latents, values: Latents, fan_in: int = 16
) -> Memories:
    """Write N facts into ⌈N / fan_in⌉ memories, in their order.

    Raises:
      ValueError: fan_in below 2, with which nothing would get fewer, or no facts.
    """
    if fan_in < 2 or not keys.shape[0]:
        raise ValueError(
            f"fan_in is {fan_in} for {keys.shape[0]} facts: take at least 2, and at least one fact"
        )
    keys, values = (_grouped(a, fan_in) for a in (keys, values))
    return _memories(memory, prepared, keys, values)


def change(
    memory: Memory,
    prepared: Prepared,
    memories: Memories,
    at: Int[Array, ""] | int,
    key: Float[Array, "C"],
    value: Float[Array, "C"],
) -> Memories:
    """Put a fact in place number `at`, counted over all chunks: a new one, another, or none (zeros,
    which forget what was there). Only its chunk is solved again.

    Raises:
      ValueError: `at` is a Python int beyond the last chunk's last place; `room` makes more.
    """
    count, size = memories.keys.shape[:2]
    if isinstance(at, int) and not 0 <= at < count * size:
        raise ValueError(f"there are {count * size} places, from 0, and {at} was asked for")
    return _change(memory, prepared, memories, jnp.asarray(at, jnp.int32), key, value)


@jax.jit
def _change(memory: Memory, prepared: Prepared, memories: Memories, at, key, value) -> Memories:
    chunk, row = jnp.divmod(at, memories.keys.shape[1])
    keys = memories.keys.at[chunk, row].set(key.astype(jnp.float32))
    values = memories.values.at[chunk, row].set(value.astype(jnp.float32))
    state = _state(memory, prepared, keys[chunk], values[chunk])
    states = jax.tree.map(lambda old, new: old.at[chunk].set(new), memories.states, state)
    return Memories(states, keys, values)


@functools.partial(jax.jit, static_argnames="chunks")
def room(memory: Memory, prepared: Prepared, memories: Memories, chunks: int) -> Memories:
    """Return the same memories and `chunks` empty ones after them."""
    blank = jnp.zeros((chunks, *memories.keys.shape[1:]), jnp.float32)
    more = _memories(memory, prepared, blank, blank)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), memories, more)


@functools.partial(jax.jit, static_argnames=("fan_in", "by"))
def read(
    memory: Memory,
    prepared: Prepared,
    memories: Memories,
    queries: Float[Array, "Q C"],
    fan_in: int | None = None,
    *,
    by: By = "confidence",
) -> ChunkReading:
    """Read queries recursively.

    Args:
      fan_in: readouts to a memory of the next level; default that of the chunks.
      by: the facts of the next levels. "readout" is the paper's: a readout is key and value, so that
        the query finds the readouts that are like it. "confidence" writes each readout under the query
        itself, both weighted by the chunk's confidence: the answer is their mean by that weight.
        "surest" is the readout of the chunk with the highest confidence, without levels.

    Raises:
      ValueError: fan_in below 2.
    """
    fan_in = memories.keys.shape[1] if fan_in is None else fan_in
    if fan_in < 2:
        raise ValueError(f"fan_in is {fan_in}: nothing would get fewer; take at least 2")
    queries = queries.astype(jnp.float32)

    def chunk(state) -> tuple[Array, Array]:
        reading = memory.read(prepared, state, queries)
        return reading.latent, reading.confidence

    latent, confidences = _in_blocks(chunk, memories.states)
    best = jnp.argmax(confidences, axis=0).astype(jnp.int32)
    if by == "surest":
        latent = latent[best, jnp.arange(len(queries))]
    else:
        reduce = functools.partial(_reduced, memory, prepared, fan_in, by)
        rows = (queries, latent.swapaxes(0, 1), confidences.T)
        latent = jax.lax.map(lambda row: reduce(*row), rows)
    return ChunkReading(latent, best, jnp.max(confidences, axis=0), confidences.T)


def _reduced(memory: Memory, prepared: Prepared, fan_in: int, by: By, query, latent, confidence):
    """Return a query's [C] readouts of n chunks [n, C], reduced level by level to one [C]."""
    while latent.shape[0] > 1:
        keys, values = _grouped(latent, fan_in), _grouped(latent, fan_in)
        grouped = _grouped(confidence[:, None], fan_in)
        highest = jnp.max(grouped, axis=(1, 2))
        if by == "confidence":
            # Key and value alike: least squares then gives the mean by the squares of these.
            weight = (grouped / jnp.maximum(highest[:, None, None], 1e-9)) ** SHARPNESS
            there = jnp.any(values != 0, axis=2, keepdims=True)
            keys, values = jnp.where(there, weight * query, 0.0), weight * values

        def level(facts, query=query) -> Array:
            return memory.read(prepared, _state(memory, prepared, *facts), query[None]).latent[0]

        latent, confidence = _in_blocks(level, (keys, values)), highest
    return latent[0]


def _state(memory: Memory, prepared: Prepared, keys: Latents, values: Latents) -> Any:
    return memory.write(prepared, memory.empty(prepared), keys, values)


def _memories(memory: Memory, prepared: Prepared, keys, values) -> Memories:
    states = _in_blocks(lambda facts: _state(memory, prepared, *facts), (keys, values))
    return Memories(states, keys, values)


def _grouped(rows: Float[Array, "N *c"], size: int) -> Float[Array, "n size *c"]:
    fill = -rows.shape[0] % size
    rows = jnp.pad(rows.astype(jnp.float32), ((0, fill), *((0, 0) for _ in rows.shape[1:])))
    return rows.reshape(-1, size, *rows.shape[1:])


def _in_blocks(function: Callable[[Any], Any], rows: Any) -> Any:
    """Map `function` over the leading axis, as many rows at a time as fit `BYTES` with their results."""
    row = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rows)
    leaves = jax.tree.leaves((row, jax.eval_shape(function, row)))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    total = jax.tree.leaves(rows)[0].shape[0]
    return jax.lax.map(function, rows, batch_size=max(1, min(total, BYTES // max(size, 1))))
