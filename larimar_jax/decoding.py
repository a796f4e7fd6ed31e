"""The compiled loop of decoding: prompts in a cache, then a token for every row a step; drawing a token.

Shapes are padded to buckets, the numbers of sampling are data, and a piece of the loop has a length that
is data too: another prompt, another number of prompts or another temperature seldom compiles anything.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from larimar_jax import latent_layout, packing
from larimar_jax.decoders.decoder import Cache
from larimar_jax.latent_layout import Condition
from larimar_jax.packing import ConditionRows, LanguageModel, Packed, Text, Trie, steps_bucket
from larimar_jax.weights.tokenizer import bucket

CACHE_BUCKET = 32
PIECE_BUCKET = 16
# How many rows of packing.ROW tokens the decoder reads at a time.
PREFILL_ROWS = 16
LEAST_TEMPERATURE = 1e-6


class Draw(NamedTuple):
    """How tokens are drawn, as data of the compiled loop.

    truncation: top_k and top_p, or None where neither leaves anything out. keys: one for each row.
    """

    temperature: Float[Array, ""]
    truncation: tuple[Int[Array, ""], Float[Array, ""]] | None
    keys: Key[Array, "B"]


def sampling(
    temperature: float, top_k: int, top_p: float, rng: jax.Array | None, rows: int
) -> Draw | None:
    """Return how so many rows draw, by `generate.Options`; None takes the likeliest.

    Raises:
      ValueError: a number out of its range, one that draws nothing, drawing without `rng`, or keys but
        not one a row.
    """
    # Logits are divided by it: by less they overflow, and what is drawn is NaN.
    drawn = LEAST_TEMPERATURE <= temperature < math.inf
    if not (temperature == 0 or drawn) or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: the first two are at least 0,"
            f" the temperature 0 or finite and at least {LEAST_TEMPERATURE}, top_p is above 0 and at"
            " most 1"
        )
    if not drawn:
        if top_k or top_p < 1:
            raise ValueError("top_k and top_p choose among draws; set a temperature above 0")
        return None
    if rng is None:
        raise ValueError("Sampling (temperature > 0) needs rng; pass jax.random.key(seed).")
    truncation = (jnp.int32(top_k), jnp.float32(top_p)) if top_k > 0 or top_p < 1 else None
    return Draw(jnp.float32(temperature), truncation, row_keys(rng, rows, steps_bucket(rows, 1)))


def row_keys(rng: jax.Array, rows: int, padded: int) -> Key[Array, " padded"]:
    """Return a key a row, with more for the rows that pad them; of one key, row i has `fold_in(rng, i)`.

    Raises:
      ValueError: keys, but not one a row.
    """
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    keys = rng if typed else jax.random.wrap_key_data(rng)
    if not rows:
        keys = jax.random.key(0)
    if not keys.ndim:
        return jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(padded))
    if keys.shape != (rows,):
        raise ValueError(
            f"rng has shape {keys.shape} for {rows} rows; pass a key for each of them"
            f" (jax.random.split(key, {rows}))"
        )
    return keys[np.arange(padded) % rows]


class Endings(NamedTuple):
    """What ends a row: the token `eos`, or one that holds a stop after one that holds a text."""

    stops: Bool[Array | np.ndarray, "V"]
    texts: Bool[Array | np.ndarray, "V"]
    eos: int | Int[Array, ""]


class _Loop(NamedTuple):
    """What the compiled loop carries: the newest tokens, which the cache does not hold yet, and which
    rows have any text, and are done."""

    step: Int[Array, ""]  # tokens so far
    token: Int[Array, "B"]
    cache: Cache
    begun: Bool[Array, "B"]
    done: Bool[Array, "B"]


class _Rows(NamedTuple):
    """What stays of every row: the prompt's last token and length, after how many tokens it is done, in
    how many of them no stop counts; its condition."""

    last: Int[Array, "B"]
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
        longest = max(len(prompts[row]) + limits[row] for row in rows)
        space = min(steps_bucket(longest, CACHE_BUCKET), model.decoder.config.max_length - 1)
        count = steps_bucket(len(rows), 1)
        cache, hidden = _empty(self._graph, self._state, count, space)
        trie = Trie()
        paths = [trie.path(prompts[row], conditions.first[row]) for row in rows]
        texts = [Text(frozenset(path)) for path in paths]
        for packed, *values in packing.read(model, trie, texts, conditions, PREFILL_ROWS, True):
            cache, hidden = _place(cache, hidden, *values, _entries(packed, paths, count))

        padded = np.asarray([*rows, *[rows[0]] * (count - len(rows))], np.int32)
        # A row of padding is done at once.
        of_rows = [
            (prompts[row][-1], len(prompts[row]), limits[row] * (place < len(rows)), after[row])
            for place, row in enumerate(padded)
        ]
        self._rows = _Rows(
            *jax.device_put([*np.asarray(of_rows, np.int32).T]),
            conditions.take(padded),
            None if draw is None else draw._replace(keys=draw.keys[padded]),
            Endings(*jax.device_put(endings[:2]), jnp.int32(endings.eos)),
        )
        self._loop = _begin(self._graph, self._state, cache, hidden, self._rows)
        self.tokens: list[list[int]] = [[] for _ in rows]
        self._append(np.asarray(self._loop.token)[:, None])

    def advance(self, steps: int) -> None:
        """Add up to `steps` tokens to every row that is not done."""
        if steps < 1:
            return
        capacity = bucket(steps, PIECE_BUCKET)
        self._loop, tokens, count = _decode(
            self._graph, self._state, self._loop, self._rows, jnp.int32(steps), capacity=capacity
        )
        self._append(np.asarray(tokens)[:, : int(count)])

    def finished(self) -> bool:
        """Return whether every row has ended."""
        return bool(np.asarray(self._loop.done).all())

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
    graph: nnx.GraphDef, state: nnx.State, cache: Cache, hidden: Float[Array, "B D"], rows: _Rows
) -> _Loop:
    """Return the loop with the first token of each row."""
    step = jnp.int32(0)
    token = _next_token(nnx.merge(graph, state), hidden, rows.last, step, rows)
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
    first = loop.step

    def unfinished(carry):
        loop, _ = carry
        return (loop.step - first < steps) & ~loop.done.all()

    def advance(carry):
        loop, tokens = carry
        place = rows.lengths + loop.step - 1
        hidden, cache = model.hidden(loop.token[:, None], rows.condition, loop.cache, place)
        token = _next_token(model, hidden[:, 0], loop.token, loop.step, rows)
        stops, texts, eos = rows.endings
        token = jnp.where(loop.done, eos, token)
        tokens = tokens.at[:, loop.step - first].set(token)
        stopped = stops[token] & loop.begun & (loop.step >= rows.after)
        done = loop.done | stopped | (token == eos) | (loop.step + 1 >= rows.limits)
        return _Loop(loop.step + 1, token, cache, loop.begun | texts[token], done), tokens

    tokens = jnp.zeros((rows.lengths.shape[0], capacity), jnp.int32)
    loop, tokens = jax.lax.while_loop(unfinished, advance, (loop, tokens))
    return loop, tokens, loop.step - first


def _next_token(
    model: LanguageModel, hidden: Float[Array, "B D"], newest: Array, step: Array, rows: _Rows
) -> Int[Array, "B"]:
    read = (None, None) if rows.condition is None else rows.condition.of_answer
    depth = jnp.full(newest.shape, step)
    return pick(latent_layout.logits(model, hidden, newest, depth, *read), step, rows.draw)


def pick(logits: Float[Array, "B V"], step: Int[Array, ""], draw: Draw | None) -> Int[Array, "B"]:
    """Return a token for each row; what a row draws does not depend on the rows beside it."""
    if draw is None:
        return likeliest(logits)
    logits = logits / draw.temperature
    if draw.truncation is not None:
        logits = truncate(logits, *draw.truncation)
    keys = jax.vmap(jax.random.fold_in, (0, None))(draw.keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def likeliest(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """Return the first of the largest, as argmax; on CPU two plain reductions are four times as fast."""
    size = logits.shape[-1]
    best = logits == jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(best, jnp.arange(size, dtype=jnp.int32), size), axis=-1)
    return jnp.minimum(first, size - 1)  # with NaN none equals the largest


def truncate(
    logits: Float[Array, "*rows V"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "*rows V"]:
    """Return −∞ on all but the top_k likeliest (0: all), and of these all but the fewest with top_p.

    Of equally likely ones the first come first.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    size = logits.shape[-1]
    count = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    rank = jnp.arange(size)
    ordered = jnp.where(rank < count, ordered, -jnp.inf)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    # A token stays where those likelier than it do not reach top_p yet; the first always does.
    likelier = jnp.concatenate([jnp.zeros_like(before[..., :1]), before[..., :-1]], axis=-1)
    stays = (likelier < top_p) & (rank < count)
    least = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    above, equal = logits > least, logits == least
    room = jnp.sum(stays, axis=-1, keepdims=True) - jnp.sum(above, axis=-1, keepdims=True)
    first = equal & (jnp.cumsum(equal, axis=-1) <= room)
    return jnp.where(above | first, logits, -jnp.inf)
