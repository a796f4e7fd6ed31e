"""The compiled loop of decoding: prompts in a cache, then a token for every row a step.

Shapes are padded to buckets, and a piece of the loop has a length that is data: another prompt, or
another number of prompts, seldom compiles anything. Rows are independent: between two pieces those that
have ended leave, and others that were begun elsewhere join.
"""

import copy
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import latent_layout, packing
from larimar_jax.decoders.decoder import Cache
from larimar_jax.decoders.sampling import Draw, pick
from larimar_jax.latent_layout import Condition
from larimar_jax.packing import ConditionRows, LanguageModel, Packed, Text, Trie, steps_bucket
from larimar_jax.weights.tokenizer import bucket

CACHE_BUCKET = 32
PIECE_BUCKET = 16
# How many rows of packing.ROW tokens the decoder reads at a time.
PREFILL_ROWS = 16


class Endings(NamedTuple):
    """What ends a row: the token `eos`, or one that holds a stop after one that holds a text."""

    stops: Bool[Array | np.ndarray, "V"]
    texts: Bool[Array | np.ndarray, "V"]
    eos: int | Int[Array, ""]


class _Loop(NamedTuple):
    """What the compiled loop carries: of each row its tokens so far and the newest, which the cache does
    not hold yet, and whether it has any text, and is done."""

    step: Int[Array, "B"]
    token: Int[Array, "B"]
    cache: Cache
    begun: Bool[Array, "B"]
    done: Bool[Array, "B"]


class _Rows(NamedTuple):
    """What stays of every row: the prompt's length, after how many tokens it is done, in how many of
    them no stop counts; its condition."""

    lengths: Int[Array, "B"]
    limits: Int[Array, "B"]
    after: Int[Array, "B"]
    condition: Condition | None
    draw: Draw | None
    endings: Endings


class _Entries(NamedTuple):
    """Which packed tokens belong where in the cache, and which is each prompt's last.

    source: counted through all packed rows. row, place: in the cache; padding has a row that is not
    there. last: the source for each row of the cache, −1 where it stays as it is.
    """

    source: Int[Array, " E"]
    row: Int[Array, " E"]
    place: Int[Array, " E"]
    last: Int[Array, " B"]


class Decoding:
    """Prompts, at least one, on their way: the loop's state, and the tokens so far of each.

    Args:
      prompts, limits, after: tokens of each prompt, after how many more it is done, and in how many of
        those no stop counts; prompt and limit together have to fit the decoder's positions.
      rows: which prompts are decoded.
      conditions, draw: of all prompts.
      endings: what ends a row, which then goes on with eos.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        after: Sequence[int],
        rows: Sequence[int],
        conditions: ConditionRows,
        draw: Draw | None,
        endings: Endings,
    ):
        self._graph, self._state = nnx.split(model)
        self._most = model.decoder.config.max_length - 1
        self._ends = [len(prompts[row]) + limits[row] for row in rows]
        space, count = self._space(self._ends), steps_bucket(len(rows), 1)
        cache, hidden = _empty(self._graph, self._state, count, space)
        trie = Trie()
        paths = [trie.path(prompts[row], conditions.first[row]) for row in rows]
        texts = [Text(frozenset(path)) for path in paths]
        for packed, *values in packing.read(model, trie, texts, conditions, PREFILL_ROWS, True):
            cache, hidden = _place(cache, hidden, *values, _entries(packed, paths, count))

        padded = np.asarray([*rows, *[rows[0]] * (count - len(rows))], np.int32)
        # A row of padding is done at once.
        of_rows = [
            (len(prompts[row]), limits[row] * (place < len(rows)), after[row], prompts[row][-1])
            for place, row in enumerate(padded)
        ]
        *numbers, last = jax.device_put([*np.asarray(of_rows, np.int32).T])
        self._rows = _Rows(
            *numbers,
            conditions.take(padded),
            None if draw is None else draw._replace(keys=draw.keys[padded]),
            Endings(*jax.device_put(endings[:2]), jnp.int32(endings.eos)),
        )
        self._loop = _begin(self._graph, self._state, cache, hidden, last, self._rows)
        self.tokens: list[list[int]] = [[] for _ in rows]
        self._append(np.asarray(self._loop.token)[:, None])

    @classmethod
    def join(cls, parts: Sequence[tuple["Decoding", Sequence[int]]], count: int) -> "Decoding":
        """Return one of chosen rows, in this order, of others that have the same model, endings and kind
        of drawing, and are no longer used.

        Args:
          count: rows that it computes at a time, those of padding among them.
        """
        self, begin, index = copy.copy(parts[0][0]), 0, []
        for part, rows in parts:
            index += [begin + row for row in rows]
            begin += len(part._loop.step)
        self.tokens = [part.tokens[row] for part, rows in parts for row in rows]
        self._ends = [part._ends[row] for part, rows in parts for row in rows]
        space, padding = self._space(self._ends), [begin] * (count - len(index))
        states = [(part._loop, part._rows) for part, _ in parts]
        self._loop, self._rows = _join(states, np.int32([*index, *padding]), space)
        return self

    def advance(self, steps: int) -> None:
        """Add up to `steps` tokens to every row that is not done."""
        if steps < 1:
            return
        capacity = bucket(steps, PIECE_BUCKET)
        self._loop, tokens, count = _decode(
            self._graph, self._state, self._loop, self._rows, jnp.int32(steps), capacity=capacity
        )
        self._append(np.asarray(tokens)[:, : int(count)])

    def ended(self) -> list[bool]:
        """Return which rows have ended."""
        return np.asarray(self._loop.done)[: len(self.tokens)].tolist()

    def _space(self, ends: Sequence[int]) -> int:
        """Return how many tokens of a row the cache holds."""
        return min(steps_bucket(max(ends), CACHE_BUCKET), self._most)

    def _append(self, new: Int[np.ndarray, "B N"]) -> None:
        for row, tokens in zip(self.tokens, new, strict=False):  # rows of padding come last
            row.extend(tokens.tolist())


def _entries(packed: Packed, paths: Sequence[Sequence[int]], rows: int) -> _Entries:
    """Return the entries of all prompts that these rows of the decoder hold."""
    length = packed.tokens.shape[1]
    # Whole, and from one row of the decoder: what another makes of the same beginning may not be finite.
    sources = {
        row: [number * length + where[node] for node in path]
        for number, where in enumerate(packed.where)
        for row, path in enumerate(paths)
        if path[-1] in where
    }
    total = sum(map(len, sources.values()))
    # More than there are tokens only where prompts share their beginnings.
    source, place = np.zeros((2, steps_bucket(total, packed.tokens.size)), np.int32)
    row, last = np.full(len(source), rows, np.int32), np.full(rows, -1, np.int32)
    end = 0
    for number, path in sources.items():
        part = slice(end, end := end + len(path))
        source[part], row[part], place[part] = path, number, np.arange(len(path))
        last[number] = path[-1]
    return _Entries(*map(jax.device_put, (source, row, place, last)))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _empty(
    graph: nnx.GraphDef, state: nnx.State, rows: int, space: int
) -> tuple[Cache, Float[Array, "B D"]]:
    decoder = nnx.merge(graph, state).decoder
    return decoder.empty_cache(rows, space), jnp.zeros((rows, decoder.config.width), decoder.dtype)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _place(
    cache: Cache,
    hidden: Float[Array, "B D"],
    packed_hidden: Float[Array, "R T D"],
    packed_cache: Cache,
    entries: _Entries,
) -> tuple[Cache, Float[Array, "B D"]]:
    """Return the cache and the last hidden states with packed prompts in them."""

    def sources(tokens: Float[Array, "R T L G d"]) -> Float[Array, "E L G d"]:
        return tokens.reshape(-1, *tokens.shape[2:])[entries.source]

    # One scatter each, in place as the cache is donated.
    row, place, last = entries.row, entries.place, entries.last
    key = sources(packed_cache.key.transpose(1, 4, 0, 2, 3))
    value = sources(packed_cache.value.transpose(1, 3, 0, 2, 4))
    cache = Cache(
        cache.key.at[:, row, :, :, place].set(key, mode="drop"),
        cache.value.at[:, row, :, place].set(value, mode="drop"),
    )
    flat = packed_hidden.reshape(-1, packed_hidden.shape[-1])
    return cache, jnp.where(last[:, None] >= 0, flat[jnp.maximum(last, 0)], hidden)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _begin(
    graph: nnx.GraphDef,
    state: nnx.State,
    cache: Cache,
    hidden: Float[Array, "B D"],
    last: Int[Array, "B"],
    rows: _Rows,
) -> _Loop:
    """Return the loop with the first token of each row; `last`: of each prompt."""
    step = jnp.zeros_like(last)
    token = _next_token(nnx.merge(graph, state), hidden, last, step, rows)
    done = (token == rows.endings.eos) | (rows.limits <= 1)
    return _Loop(step + 1, token, cache, rows.endings.texts[token], done)


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacity", donate_argnames="loop")
def _decode(
    graph: nnx.GraphDef,
    state: nnx.State,
    loop: _Loop,
    rows: _Rows,
    steps: Int[Array, ""],
    *,
    capacity: int,
) -> tuple[_Loop, Int[Array, "B N"], Int[Array, ""]]:
    """Return up to steps ≤ capacity tokens more, and how many; a row that is done goes on with eos."""
    model = nnx.merge(graph, state)

    def unfinished(carry):
        count, loop, _ = carry
        return (count < steps) & ~loop.done.all()

    def advance(carry):
        count, loop, tokens = carry
        place = rows.lengths + loop.step - 1
        hidden, cache = model.hidden(loop.token[:, None], rows.condition, loop.cache, place)
        token = _next_token(model, hidden[:, 0], loop.token, loop.step, rows)
        stops, texts, eos = rows.endings
        token = jnp.where(loop.done, eos, token)
        tokens = tokens.at[:, count].set(token)
        stopped = stops[token] & loop.begun & (loop.step >= rows.after)
        done = loop.done | stopped | (token == eos) | (loop.step + 1 >= rows.limits)
        loop = _Loop(loop.step + 1, token, cache, loop.begun | texts[token], done)
        return count + 1, loop, tokens

    tokens = jnp.zeros((rows.lengths.shape[0], capacity), jnp.int32)
    count, loop, tokens = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), loop, tokens))
    return loop, tokens, count


@functools.partial(jax.jit, static_argnums=2)
def _join(
    parts: Sequence[tuple[_Loop, _Rows]], index: Int[Array, " B"], space: int
) -> tuple[_Loop, _Rows]:
    """Return chosen rows of all parts, whose cache holds `space` tokens; one beyond the last is done."""

    def rows_of(*leaves: Array) -> Array:
        """Pad other axes to the longest, and choose."""
        # Slots and caches lead with their layer.
        axis = 1 if leaves[0].ndim == 5 else 0
        longest = np.max([leaf.shape for leaf in leaves], axis=0)
        longest[axis] = 0
        more = [np.maximum(0, longest - leaf.shape) for leaf in leaves]
        padded = [
            jnp.pad(leaf, [(0, n) for n in lacking]) if lacking.any() else leaf
            for leaf, lacking in zip(leaves, more, strict=True)
        ]
        return jnp.concatenate(padded, axis).take(index, axis, mode="clip")

    loops, rows = zip(*parts, strict=True)
    loop = jax.tree.map(rows_of, *loops)
    cache = Cache(loop.cache.key[..., :space], loop.cache.value[..., :space, :])
    total = sum(len(part.step) for part in loops)
    loop = loop._replace(cache=cache, done=loop.done | (index >= total))
    *numbers, condition, keys = jax.tree.map(
        rows_of, *[(*r[:3], r.condition, r.draw and r.draw.keys) for r in rows]
    )
    _, draw, endings = rows[0][3:]
    draw = None if draw is None else draw._replace(keys=keys)
    return loop, _Rows(*numbers, condition, draw, endings)


def _next_token(
    model: LanguageModel, hidden: Float[Array, "B D"], newest: Array, step: Array, rows: _Rows
) -> Int[Array, "B"]:
    read = (None, None) if rows.condition is None else rows.condition.of_answer
    return pick(latent_layout.logits(model, hidden, newest, step, *read), step, rows.draw)
