"""Decoding under a condition: one compiled loop over a KV cache, whole or piece by piece (§2)."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.layers import Cache
from larimar_jax.model import Condition
from larimar_jax.sampling import Draw, Sampling, pick
from larimar_jax.weights.tokenizers import Tokenizer, bucket

# What a call is padded to. Lengths and rows grow in steps of a quarter to a half, so that few
# shapes are compiled; a piece of the loop is cut into whole tokens by a number that is not static.
LENGTH_BUCKET = 8
CACHE_BUCKET = 32
PIECE_BUCKET = 16


class PromptTooLong(ValueError):
    """A prompt and its continuation do not fit into the decoder's positions."""


@runtime_checkable
class LanguageModel(Protocol):
    """What is decoded: a `Larimar`, or anything else around a decoder."""

    decoder: Any
    hidden: Any
    """(tokens, condition, cache, start) → (last hidden states, cache)."""


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    condition: Condition | None = None,
    *,
    max_tokens: int = 16,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: str | Sequence[str] = "\n",
    rng: jax.Array | None = None,
) -> list[str]:
    """Continues each prompt by up to `max_tokens` tokens, all rows in one compiled loop.

    The loop ends where every row has: at the end-of-text token, or at a token with a stop text in
    it. Rows are padded on the right and do not see each other or their padding.

    Args:
      condition: row i belongs to prompt i; None is the untouched base LM.
      temperature: 0 takes the likeliest token; above 0 draws, and then needs `rng`.
      top_k: draws among so many of the likeliest only; 0 is all.
      top_p: draws among the fewest of the likeliest that have this much probability together.
      stop: texts that end a continuation; what follows is cut off with them.
      rng: one key, or one for each prompt, with which it draws the same whatever it stands beside.

    Raises:
      PromptTooLong: where a prompt plus `max_tokens` exceeds the decoder's positions.
      ValueError: drawing without a key, keys but not one a prompt, or a setting out of its range.
    """
    draw = Sampling(temperature, top_k, top_p, rng)
    reader = _Reader(tokenizer, stop)
    run = _start(model, reader, prompts, condition, max_tokens, draw)
    run.advance(max_tokens - 1)
    return [reader.text(tokens)[0] for tokens in run.tokens]


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    condition: Condition | None = None,
    *,
    max_tokens: int = 16,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: str | Sequence[str] = "\n",
    rng: jax.Array | None = None,
    every: int = 1,
) -> Iterator[list[str]]:
    """As `generate`, yielding what each row has gained after every `every` tokens.

    Joined, the pieces of a row are what `generate` returns. A character of several tokens comes
    with its last, and a text that may turn out to be a stop is held back until it is known.

    Args:
      every: tokens between two returns to the host; more is faster.

    Raises:
      As `generate`; and ValueError where `every` is not above 0.
    """
    if every < 1:
        raise ValueError(f"every is the number of tokens per piece, at least 1; got {every}")
    draw = Sampling(temperature, top_k, top_p, rng)
    reader = _Reader(tokenizer, stop)
    run = _start(model, reader, prompts, condition, max_tokens, draw)
    given = [0] * len(prompts)
    for so_far in range(1, max_tokens + every, every):  # the first token comes with the prompt
        last = so_far >= max_tokens or run.finished()
        pieces = []
        for row in range(len(prompts)):
            text, sure = reader.text(run.tokens[row])
            end = len(text) if last else max(sure, given[row])
            pieces.append(text[given[row] : end])
            given[row] = end
        if last or any(pieces):
            yield pieces
        if last:
            return
        run.advance(min(every, max_tokens - so_far))


class _Loop(NamedTuple):
    """What the compiled loop carries: the newest tokens, which the cache does not hold yet."""

    step: Int[Array, ""]  # tokens so far
    token: Int[Array, "B"]
    cache: Cache
    done: Bool[Array, "B"]


class _Run:
    """Prompts on their way: the loop's state, and the tokens so far."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        condition: Condition | None,
        max_tokens: int,
        sampling: Sampling,
        ends: Bool[np.ndarray, "V"],
        eos: int,
    ):
        if max_tokens < 1:
            raise ValueError(f"max_tokens is at least 1; got {max_tokens}")
        self.tokens: list[list[int]] = [[] for _ in prompts]
        if not prompts:
            return
        ids, lengths, room = _pack(model, prompts, max_tokens)
        self._graph, self._state = nnx.split(model)
        self._condition = (
            None if condition is None else fit_rows(condition, len(prompts), len(ids))
        )
        self._lengths = jax.device_put(lengths)
        self._draw, self._how = sampling.traced(len(prompts), len(ids)), sampling.static()
        self._ends, self._eos = jax.device_put(ends), jnp.int32(eos)
        idle = jax.device_put(np.arange(len(ids)) >= len(prompts))
        inputs = (jax.device_put(ids), self._lengths, idle, self._condition, self._draw, self._ends)
        self._loop = _prefill(self._graph, self._state, *inputs, room=room, **self._how)
        self._take(np.asarray(self._loop.token)[:, None])

    def advance(self, steps: int) -> None:
        """Up to `steps` more tokens for every row that is not done."""
        if not self.tokens or steps < 1:
            return
        self._loop, produced, count = _decode(
            self._graph,
            self._state,
            self._loop,
            self._lengths,
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
        return not self.tokens or bool(np.asarray(self._loop.done).all())

    def _take(self, new: Int[np.ndarray, "B N"]) -> None:
        for row, tokens in zip(self.tokens, new, strict=False):  # rows of padding come last
            row.extend(tokens.tolist())


class _Reader:
    """Tokens as text, up to a stop."""

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str]):
        self.tokenizer = tokenizer
        self._stops = tuple(text for text in ((stop,) if isinstance(stop, str) else stop) if text)

    def ends(self, vocab_size: int) -> Bool[np.ndarray, "V"]:
        """Tokens after which a row has nothing more to say."""
        ends = np.zeros(vocab_size, bool)
        ends[list(_ending_ids(self.tokenizer, self._stops))] = True
        return ends

    def text(self, tokens: Sequence[int]) -> tuple[str, int]:
        """A continuation so far, and how much of it later tokens can't change."""
        ended = self.tokenizer.eos in tokens
        kept = tokens[: tokens.index(self.tokenizer.eos)] if ended else tokens
        text = self.tokenizer.decode(kept)
        cut = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            return text[:cut], cut
        # An unfinished character decodes to U+FFFD.
        sure = len(text.rstrip("\ufffd"))
        held = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text, len(text) if ended else min(sure, len(text) - max(held, default=0))


def _start(model, reader: _Reader, prompts, condition, max_tokens, sampling) -> _Run:
    if isinstance(prompts, str):
        raise TypeError("prompts is a list of texts, not one text")
    tokenizer = reader.tokenizer
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    ends = reader.ends(model.decoder.config.vocab_size)
    return _Run(model, ids, condition, max_tokens, sampling, ends, tokenizer.eos)


def continue_ids(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    condition: Condition | None = None,
) -> Int[np.ndarray, "n N"]:
    """The max_tokens likeliest tokens after each prompt, whatever they are: no text, no stop.

    Raises:
      PromptTooLong: as `generate`. ValueError: a prompt without tokens, or an id that the decoder
        has no row for.
    """
    rows = model.decoder.config.vocab_size
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens; give it at least its beginning-of-text token")
    for row, prompt in enumerate(prompts):
        if not all(0 <= token < rows for token in prompt):
            raise ValueError(
                f"prompt {row} has token ids from {min(prompt)} to {max(prompt)}, and the decoder's"
                f" vocabulary goes from 0 to {rows - 1}; encode it with the decoder's own tokenizer"
            )
    ends = np.zeros(rows, bool)
    run = _Run(model, prompts, condition, max_tokens, Sampling(0.0, 0, 1.0, None), ends, 0)
    run.advance(max_tokens - 1)
    return np.asarray(run.tokens, np.int32).reshape(len(prompts), max_tokens)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt as the decoder sees it: the beginning-of-text token, and no blank at its end."""
    return [tokenizer.bos, *tokenizer.ids(prompt.rstrip())]


def check_rows(condition: Condition, prompts: int) -> None:
    """Raises ValueError where a condition has fewer rows than there are prompts."""
    given = len(condition.prefix.active)
    if given < prompts:
        raise ValueError(
            f"the condition has {given} rows for {prompts} prompts; row i of it belongs to prompt i"
        )


def fit_rows(condition: Condition, prompts: int, rows: int) -> Condition:
    """The condition with exactly so many rows: cut, or with rows of zeros, not active, at its end.

    Raises:
      ValueError: as `check_rows`.
    """
    check_rows(condition, prompts)
    given = len(condition.prefix.active)
    if given == rows:
        return condition

    # In NumPy: a device would compile for every number of rows.
    def fit(leaf):
        axis = 1 if leaf.ndim == 5 else 0  # slots lead with their layer
        widths = [(0, max(rows - given, 0) * (i == axis)) for i in range(leaf.ndim)]
        return jax.device_put(np.pad(np.asarray(leaf), widths).take(range(rows), axis))

    return jax.tree.map(fit, condition)


def steps_bucket(size: int, unit: int) -> int:
    """The least of unit × (1, 2, 3, 4, 6, 8, 12, 16, …) that holds `size`."""
    whole = max(1, -(-size // unit))
    power = 1 << (whole - 1).bit_length()
    return unit * (power * 3 // 4 if power >= 4 and whole <= power * 3 // 4 else power)


def _pack(model: LanguageModel, ids: Sequence[Sequence[int]], max_tokens: int):
    """Prompts [B, T] and lengths [B], both padded to buckets, and the length of the cache."""
    needed, limit = max(map(len, ids)), model.decoder.config.max_length - 1
    if needed + max_tokens > limit:
        longest = max(range(len(ids)), key=lambda row: len(ids[row]))
        raise PromptTooLong(
            f"Prompt {longest} has {needed} tokens; with {max_tokens} more it exceeds the "
            f"decoder's {limit} positions. Shorten it or ask for fewer tokens."
        )
    length = min(steps_bucket(needed, LENGTH_BUCKET), limit)
    room = min(steps_bucket(length + max_tokens, CACHE_BUCKET), limit)
    rows = steps_bucket(len(ids), 1)
    tokens = np.zeros((rows, length), np.int32)
    for row, values in enumerate(ids):
        tokens[row, : len(values)] = values
    lengths = np.asarray([len(row) for row in ids] + [1] * (rows - len(ids)), np.int32)
    return tokens, lengths, room


@functools.lru_cache(maxsize=16)
def _ending_ids(tokenizer: Tokenizer, stops: tuple[str, ...]) -> tuple[int, ...]:
    """Tokens after which a row has nothing more to say."""
    ids = range(tokenizer.vocab_size) if stops else ()
    texts = tokenizer.backend.decode_batch([[i] for i in ids], skip_special_tokens=True)
    found = [i for i, text in enumerate(texts) if any(stop in text for stop in stops)]
    return (*found, tokenizer.eos)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("room", "sampled", "truncated")
)
def _prefill(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    idle: Bool[Array, "B"],
    condition: Condition | None,
    draw: Draw,
    ends: Bool[Array, "V"],
    *,
    room: int,
    **how: bool,
) -> _Loop:
    """The prompts into a cache, and the first token of each."""
    model = nnx.merge(graph, state)
    cache = model.decoder.empty_cache(tokens.shape[0], room)
    hidden, cache = model.hidden(tokens, condition, cache)
    hidden = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    step = jnp.int32(0)
    token = pick(_logits(model, hidden, condition, step), step, draw, **how)
    return _Loop(step + 1, token, cache, idle | ends[token])


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
        return _Loop(loop.step + 1, token, cache, loop.done | ends[token]), produced

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
    if condition is None or condition.spelled is None:
        return logits
    return condition.spelled.add(logits[:, None], jnp.full((len(hidden), 1), step))[:, 0]
