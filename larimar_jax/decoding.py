"""The compiled loop of decoding: prompts packed into a cache, then a token for every row a step (§2).

    prompts ─▶ rows of the decoder, several prompts in each (packing.py) ─▶ the cache, a row a prompt
            ─▶ a loop of steps, each a token of every row
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import packing
from larimar_jax.conditions import Rows
from larimar_jax.decoders.base import Cache, Tree
from larimar_jax.model import Condition
from larimar_jax.packing import steps_bucket
from larimar_jax.sampling import Draw, Sampling, pick
from larimar_jax.weights.tokenizers import bucket

# What a call is padded to beside rows, so that few shapes are compiled; a piece of the loop is cut into
# whole tokens by a number that is not static.
CACHE_BUCKET = 32
PIECE_BUCKET = 16
# How many rows of packing.ROW tokens the decoder reads at a time.
ROWS = 16


class PromptTooLong(ValueError):
    """A prompt and its continuation do not fit into the decoder's positions."""


@runtime_checkable
class LanguageModel(Protocol):
    """What is decoded: a `Larimar`, or anything else around a `decoders.base.Decoder`."""

    decoder: Any
    hidden: Any
    """(tokens, condition, cache, start, tree) → (last hidden states, cache), as `Decoder.hidden`."""


class _Loop(NamedTuple):
    """What the compiled loop carries: the newest tokens, which the cache does not hold yet."""

    step: Int[Array, ""]  # tokens so far
    token: Int[Array, "B"]
    cache: Cache
    done: Bool[Array, "B"]


class Run:
    """Prompts, at least one, on their way: the loop's state, and the tokens so far.

    Args:
      given: the condition's rows, and `rows` which of them belong to the prompts; None is the untouched
        base LM.
      most: tokens of each prompt, the first included, after which it is done; they have to fit
        (`check_room`).
      ends: tokens after which a row is done. eos: what it goes on with.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        given: Rows | None,
        rows: Sequence[int],
        most: Sequence[int],
        sampling: Sampling,
        ends: Bool[np.ndarray, "V"],
        eos: int,
    ):
        self.tokens: list[list[int]] = [[] for _ in prompts]
        longest = max(len(prompt) + more for prompt, more in zip(prompts, most, strict=True))
        limit = model.decoder.config.max_length - 1
        room = min(steps_bucket(longest, CACHE_BUCKET), limit)
        self._graph, self._state = nnx.split(model)
        count = steps_bucket(len(prompts), 1)
        spare = count - len(prompts)
        cache, states = _empty(self._graph, self._state, count, room)
        everyone = range(len(prompts))
        cache, states = self._read(prompts, given, rows, everyone, cache, states)
        # A masked place has no weight, but 0 times what is not finite still spreads to all of a packed
        # row. Whose it is shows where each prompt has a row for itself.
        broken = np.flatnonzero(~np.isfinite(np.asarray(states)[: len(prompts)]).all(axis=1))
        for row in broken if len(prompts) > 1 else ():
            cache, states = self._read(prompts, given, rows, [int(row)], cache, states)

        self._condition = None
        if given is not None:
            self._condition = given.take(np.asarray([*rows, *[rows[0]] * spare], np.int32))
        lengths = [len(prompt) for prompt in prompts] + [1] * spare
        self._lengths = jax.device_put(np.asarray(lengths, np.int32))
        self._draw, self._how = sampling.traced(len(prompts), count), sampling.static()
        self._ends, self._eos = jax.device_put(ends), jnp.int32(eos)
        # Padding has nothing to say.
        self._most = jax.device_put(np.asarray([*most, *[0] * spare], np.int32))
        rest = (self._most, self._condition, self._draw, self._ends)
        self._loop = _begin(self._graph, self._state, cache, states, *rest, **self._how)
        self._take(np.asarray(self._loop.token)[:, None])

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        given: Rows | None,
        rows: Sequence[int],
        chosen: Sequence[int],
        cache: Cache,
        states: Float[Array, "B D"],
    ) -> tuple[Cache, Float[Array, "B D"]]:
        """Puts chosen prompts into the cache, and what the decoder makes of their last tokens."""
        trie = packing.Trie()
        paths = {
            row: trie.path(prompts[row], 0 if given is None else given.first[rows[row]])
            for row in chosen
        }
        texts = [packing.Text(frozenset(path), ()) for path in paths.values()]
        for batch in packing.batches(packing.rows(trie, texts), ROWS):
            packed = packing.pack(trie, batch)
            hidden, read = _prefill(self._graph, self._state, *inputs(packed, given))
            entries = _entries(packed, paths, cache.value.shape[1])
            cache, states = _place(cache, states, hidden, read, *entries)
        return cache, states

    def advance(self, steps: int) -> None:
        """Up to `steps` more tokens for every row that is not done."""
        if steps < 1:
            return
        self._loop, produced, count = _decode(
            self._graph,
            self._state,
            self._loop,
            self._lengths,
            self._most,
            self._condition,
            self._draw,
            self._ends,
            self._eos,
            jnp.int32(steps),
            capacity=bucket(steps, PIECE_BUCKET),
            **self._how,
        )
        self._take(np.asarray(produced)[:, : int(count)])

    def finished(self) -> bool:
        """Whether every row has ended."""
        return bool(np.asarray(self._loop.done).all())

    def _take(self, new: Int[np.ndarray, "B N"]) -> None:
        for row, tokens in zip(self.tokens, new, strict=False):  # rows of padding come last
            row.extend(tokens.tolist())


def inputs(
    packed: packing.Packed, given: Rows | None
) -> tuple[Int[Array, "R T"], Tree, Condition | None]:
    """What the decoder reads of packed rows: tokens, what they see, and the condition of each row."""
    condition = None if given is None else given.take(packed.conditions.ravel())
    owner = None if packed.conditions.shape[1] == 1 else jax.device_put(packed.owner)
    tree = Tree(jax.device_put(packed.index), jax.device_put(packed.seen), owner)
    return jax.device_put(packed.tokens), tree, condition


def check_room(model: LanguageModel, ids: Sequence[Sequence[int]], most: Sequence[int]) -> None:
    """Raises PromptTooLong where a prompt and so many tokens more exceed the decoder's positions."""
    limit = model.decoder.config.max_length - 1
    for row, (prompt, more) in enumerate(zip(ids, most, strict=True)):
        if len(prompt) + more > limit:
            raise PromptTooLong(
                f"Prompt {row} has {len(prompt)} tokens; with {more} more it exceeds the "
                f"decoder's {limit} positions. Shorten it or ask for fewer tokens."
            )


class _Entries(NamedTuple):
    """Which packed tokens belong where in the cache, and which is each prompt's last.

    source: counted through all packed rows. row, place: in the cache; padding has a row that is not
    there. last: the source for each row of the cache, −1 where it stays as it is.
    """

    source: Int[Array, " E"]
    row: Int[Array, " E"]
    place: Int[Array, " E"]
    last: Int[Array, " B"]


def _entries(
    packed: packing.Packed, paths: dict[int, Sequence[int]], rows: int
) -> _Entries:
    """The entries of all prompts that these rows of the decoder hold, which are taken out of `paths`."""
    length = packed.tokens.shape[1]
    found = {}
    for number, where in enumerate(packed.where):
        # Whole, and from one row: what another makes of the same beginning may not be finite.
        for row in [row for row, path in paths.items() if path[-1] in where]:
            found[row] = [number * length + where[node] for node in paths.pop(row)]
    total = sum(map(len, found.values()))
    # More than there are tokens only where prompts share their beginnings.
    source, place = np.zeros((2, steps_bucket(total, packed.tokens.size)), np.int32)
    row, last = np.full(len(source), rows, np.int32), np.full(rows, -1, np.int32)
    end = 0
    for number, path in found.items():
        part = slice(end, end := end + len(path))
        source[part], row[part], place[part] = path, number, np.arange(len(path))
        last[number] = path[-1]
    return _Entries(*map(jax.device_put, (source, row, place, last)))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _empty(
    graph: nnx.GraphDef, state: nnx.State, rows: int, room: int
) -> tuple[Cache, Float[Array, "B D"]]:
    decoder = nnx.merge(graph, state).decoder
    return decoder.empty_cache(rows, room), jnp.zeros((rows, decoder.config.width), decoder.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "R T"],
    tree: Tree,
    condition: Condition | None,
) -> tuple[Float[Array, "R T D"], Cache]:
    """Packed prompts: last hidden states, and keys and values."""
    return nnx.merge(graph, state).hidden(tokens, condition, tree=tree)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _place(
    cache: Cache,
    states: Float[Array, "B D"],
    hidden: Float[Array, "R T D"],
    read: Cache,
    source: Int[Array, " E"],
    row: Int[Array, " E"],
    place: Int[Array, " E"],
    last: Int[Array, " B"],
) -> tuple[Cache, Float[Array, "B D"]]:
    """The cache and the last states with packed prompts in them (`_Entries`)."""

    def chosen(tokens: Float[Array, "R T L G d"]) -> Float[Array, "E L G d"]:
        return tokens.reshape(-1, *tokens.shape[2:])[source]

    # One scatter each, in place as the cache is donated.
    key, value = read.key.transpose(1, 4, 0, 2, 3), read.value.transpose(1, 3, 0, 2, 4)
    cache = Cache(
        cache.key.at[:, row, :, :, place].set(chosen(key), mode="drop"),
        cache.value.at[:, row, :, place].set(chosen(value), mode="drop"),
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    return cache, jnp.where(last[:, None] >= 0, flat[jnp.maximum(last, 0)], states)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2, static_argnames=("sampled", "truncated"))
def _begin(
    graph: nnx.GraphDef,
    state: nnx.State,
    cache: Cache,
    states: Float[Array, "B D"],
    most: Int[Array, "B"],
    condition: Condition | None,
    draw: Draw,
    ends: Bool[Array, "V"],
    **how: bool,
) -> _Loop:
    """The first token of each row."""
    model = nnx.merge(graph, state)
    step = jnp.int32(0)
    token = pick(_logits(model, states, condition, step), step, draw, **how)
    return _Loop(step + 1, token, cache, ends[token] | (most <= 1))


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("capacity", "sampled", "truncated"),
    donate_argnames="loop",
)
def _decode(
    graph: nnx.GraphDef,
    state: nnx.State,
    loop: _Loop,
    lengths: Int[Array, "B"],
    most: Int[Array, "B"],
    condition: Condition | None,
    draw: Draw,
    ends: Bool[Array, "V"],
    eos: Int[Array, ""],
    steps: Int[Array, ""],
    *,
    capacity: int,
    **how: bool,
) -> tuple[_Loop, Int[Array, "B N"], Int[Array, ""]]:
    """Up to steps ≤ capacity tokens more, and how many; a row that is done goes on with eos."""
    model = nnx.merge(graph, state)
    first = loop.step

    def unfinished(carry):
        loop, _ = carry
        return (loop.step - first < steps) & ~loop.done.all()

    def advance(carry):
        loop, produced = carry
        place = lengths + loop.step - 1
        hidden, cache = model.hidden(loop.token[:, None], condition, loop.cache, place)
        token = pick(_logits(model, hidden[:, 0], condition, loop.step), loop.step, draw, **how)
        token = jnp.where(loop.done, eos, token)
        produced = produced.at[:, loop.step - first].set(token)
        done = loop.done | ends[token] | (loop.step + 1 >= most)
        return _Loop(loop.step + 1, token, cache, done), produced

    produced = jnp.zeros((lengths.shape[0], capacity), jnp.int32)
    loop, produced = jax.lax.while_loop(unfinished, advance, (loop, produced))
    return loop, produced, loop.step - first


def _logits(
    model: LanguageModel,
    hidden: Float[Array, "B D"],
    condition: Condition | None,
    step: Int[Array, ""],
) -> Float[Array, "B V"]:
    logits = model.decoder.logits(hidden)
    if condition is None or condition.evidence is None:
        return logits
    return condition.evidence.add(logits[:, None], jnp.full((len(hidden), 1), step))[:, 0]
