"""Long context (§7): a memory for each chunk of a text, and a read that recurses over their answers.

A text of N facts is cut into chunks of `fan_in`, each written into a memory of its own. A query is read
from all of them; their readouts are facts in turn, `fan_in` of them to a memory of the next level, which
is read by the same query, and so on until one readout is left. A decoder is conditioned on that.

    memories = write(memory, prepared, keys, values, fan_in=16)
    found = read(memory, prepared, memories, queries)
    found.latent, found.chunk

Any variant of `memory/` serves for chunks. Further levels are memories of the same variant, so that they
say what it says of several facts under one key: their mean by weight for least squares (streaming,
dual, direct addressed by the prior), the nearest one's value for a list. What chunks need on the way
to their readouts is bounded by `BYTES`: they are taken in blocks of that size, one after the other.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from larimar_jax.memory.base import Memory, Prepared, pytree

# Of states and readouts of a block, about.
BYTES = 64 * 2**20

By = Literal["readout", "confidence", "surest"]
# The power of a chunk's confidence, relative to the surest, that its readout is weighted by: a chunk
# that knows nothing of a query still explains fan_in / C of it by chance, and there are thousands.
SHARP = 4


@pytree
class Memories:
    """n memories. states: the variant's state, each leaf with a leading n. keys, values: what is in
    them, [n, fan_in, C], zero rows where nothing is: a chunk is written anew when a fact of it changes.
    """

    states: Any
    keys: Float[Array, "n E C"]
    values: Float[Array, "n E C"]


@pytree
class Found:
    """What Q queries found. latent: the last readout. chunk: the chunk whose own readout was the surest;
    confidence: how sure it was, as the variant says. sure: every chunk's."""

    latent: Float[Array, "Q C"]
    chunk: Int[Array, "Q"]
    confidence: Float[Array, "Q"]
    sure: Float[Array, "Q n"]


@functools.partial(jax.jit, static_argnames="fan_in")
def write(
    memory: Memory,
    prepared: Prepared,
    keys: Float[Array, "N C"],
    values: Float[Array, "N C"],
    fan_in: int = 16,
) -> Memories:
    """N facts in ⌈N / fan_in⌉ memories, in their order.

    Raises:
      ValueError: fan_in below 2, with which nothing would get fewer, or no facts.
    """
    if fan_in < 2 or not keys.shape[0]:
        raise ValueError(
            f"fan_in is {fan_in} for {keys.shape[0]} facts: take at least 2, and at least one fact"
        )
    keys, values = (_grouped(a, fan_in) for a in (keys, values))
    return Memories(_states(memory, prepared, keys, values), keys, values)


def change(
    memory: Memory,
    prepared: Prepared,
    memories: Memories,
    at: Int[Array, ""] | int,
    key: Float[Array, "C"],
    value: Float[Array, "C"],
) -> Memories:
    """Puts a fact in place number `at`, counted over all chunks: a new one, another, or none (zeros,
    which forget what was there). Only its chunk is solved again.

    Raises:
      ValueError: `at` is known now and beyond the last chunk's last place; `room` makes more.
    """
    count, size = memories.keys.shape[:2]
    if isinstance(at, int) and not 0 <= at < count * size:
        raise ValueError(f"there are {count * size} places, from 0, and {at} was asked for")
    return _change(memory, prepared, memories, jnp.asarray(at, jnp.int32), key, value)


@jax.jit
def _change(
    memory: Memory,
    prepared: Prepared,
    memories: Memories,
    at: Int[Array, ""],
    key: Float[Array, "C"],
    value: Float[Array, "C"],
) -> Memories:
    chunk, row = jnp.divmod(at, memories.keys.shape[1])
    keys = memories.keys.at[chunk, row].set(key.astype(jnp.float32))
    values = memories.values.at[chunk, row].set(value.astype(jnp.float32))
    state = _state(memory, prepared, keys[chunk], values[chunk])
    states = jax.tree.map(lambda all, one: all.at[chunk].set(one), memories.states, state)
    return Memories(states, keys, values)


@functools.partial(jax.jit, static_argnames="chunks")
def room(memory: Memory, prepared: Prepared, memories: Memories, chunks: int) -> Memories:
    """The same memories and `chunks` empty ones after them."""
    size, latent = memories.keys.shape[1:]
    blank = jnp.zeros((chunks, size, latent), jnp.float32)
    more = Memories(_states(memory, prepared, blank, blank), blank, blank)
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
) -> Found:
    """The recursive read.

    Args:
      fan_in: readouts to a memory of the next level; default that of the chunks.
      by: the facts of the next levels. "readout" is the paper's: a readout is key and value, so that
        the query finds the readouts that are like it. "confidence" writes each readout under the query
        itself, both weighted by how sure its chunk was: the answer is their mean by that weight. With
        "surest" the answer is the readout of the surest chunk alone, and there are no levels.
    """
    fan_in = memories.keys.shape[1] if fan_in is None else fan_in
    if fan_in < 2:
        raise ValueError(f"fan_in is {fan_in}: nothing would get fewer; take at least 2")
    queries = queries.astype(jnp.float32)

    def chunk(state) -> tuple[Array, Array]:
        found = memory.read(prepared, state, queries)
        return found.latent, found.confidence

    latent, sure = _in_blocks(chunk, memories.states)
    best = jnp.argmax(sure, axis=0).astype(jnp.int32)
    if by == "surest":
        return Found(latent[best, jnp.arange(len(queries))], best, jnp.max(sure, axis=0), sure.T)
    answer = functools.partial(_reduced, memory, prepared, fan_in, by)
    latent = jax.lax.map(lambda given: answer(*given), (queries, latent.swapaxes(0, 1), sure.T))
    return Found(latent, best, jnp.max(sure, axis=0), sure.T)


def _reduced(
    memory: Memory,
    prepared: Prepared,
    fan_in: int,
    by: By,
    query: Float[Array, "C"],
    latent: Float[Array, "n C"],
    sure: Float[Array, "n"],
) -> Float[Array, "C"]:
    """One query's readouts of n chunks, level by level to one."""
    while latent.shape[0] > 1:
        keys, values = _grouped(latent, fan_in), _grouped(latent, fan_in)
        surer = _grouped(sure[:, None], fan_in)
        surest = jnp.max(surer, axis=(1, 2))
        if by == "confidence":
            # Key and value alike: least squares then gives the mean by the squares of these.
            weight = (surer / jnp.maximum(surest[:, None, None], 1e-9)) ** SHARP
            there = jnp.any(values != 0, axis=2, keepdims=True)
            keys, values = jnp.where(there, weight * query, 0.0), weight * values

        def level(given, query=query) -> Array:
            return memory.read(prepared, _state(memory, prepared, *given), query[None]).latent[0]

        latent, sure = _in_blocks(level, (keys, values)), surest
    return latent[0]


def _state(memory: Memory, prepared: Prepared, keys: Float[Array, "E C"], values: Float[Array, "E C"]):
    return memory.write(prepared, memory.empty(prepared), keys, values)


def _states(memory: Memory, prepared: Prepared, keys, values):
    return _in_blocks(lambda facts: _state(memory, prepared, *facts), (keys, values))


def _grouped(rows: Float[Array, "N *c"], size: int) -> Float[Array, "n size *c"]:
    fill = -rows.shape[0] % size
    rows = jnp.pad(rows.astype(jnp.float32), ((0, fill), *((0, 0) for _ in rows.shape[1:])))
    return rows.reshape(-1, size, *rows.shape[1:])


def _in_blocks(function: Callable[[Any], Any], rows: Any) -> Any:
    """`function` over the leading axis, as many rows at a time as fit `BYTES` with what they make."""
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rows)
    leaves = jax.tree.leaves((one, jax.eval_shape(function, one)))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    total = jax.tree.leaves(rows)[0].shape[0]
    return jax.lax.map(function, rows, batch_size=max(1, min(total, BYTES // max(size, 1))))
