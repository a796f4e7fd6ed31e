"""Texts that continue prompts under a condition, whole or piece by piece (§2).

prompts ─▶ rows of the decoder, several prompts in each (packing.py) ─▶ the cache, a row a prompt
        ─▶ a compiled loop of steps, each a token of every row (decoding.py) ─▶ texts, up to a stop
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from larimar_jax.decoders.sampling import Draw
from larimar_jax.decoding import Decoding, Endings
from larimar_jax.latent_layout import Condition
from larimar_jax.packing import ConditionRows, LanguageModel, steps_bucket
from larimar_jax.weights.tokenizer import Tokenizer

# How many prompts are decoded together.
BATCH = 128
_LEAST_TEMPERATURE = 1e-6


class PromptTooLong(ValueError):
    """A prompt and its continuation do not fit into the decoder's positions."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a continuation is drawn, and where it ends.

    max_tokens: the most tokens, of all prompts or of each; of more prompts than a batch, those with like
      numbers are decoded together.
    temperature: 0 takes the likeliest token; above 0 draws, and then needs `rng`.
    top_k: draws among so many of the likeliest only; 0 is all.
    top_p: draws among the fewest of the likeliest that have this much probability together.
    stop: texts that end a continuation where any text stands before them; what follows is cut off with
      them. The name of a special token ends it anywhere.
    stop_after: the first tokens in which no stop counts, of all prompts or of each.
    cut: leave out the beginning of a prompt that has no room, after its first token, and do not raise.
    rng: one key, or one for each prompt, with which it draws the same whatever it stands beside.
    """

    max_tokens: int | Sequence[int] = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: str | Sequence[str] = "\n"
    stop_after: int | Sequence[int] = 0
    cut: bool = False
    rng: jax.Array | None = None


class Piece(NamedTuple):
    """What a row has gained. tokens: all so far, without the one that ends it. ending: "stop", "length",
    or None where it goes on."""

    text: str
    tokens: list[int]
    ending: str | None


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    condition: Condition | None = None,
    *,
    batch: int = BATCH,
    **options: Any,
) -> list[str]:
    """Continue each prompt by up to `max_tokens` tokens, many rows in one compiled loop.

    The loop ends where every row has: at the end-of-text token, at a token with a stop text in it after
    one with any text, or with its last. Rows do not see each other.

    Args:
      condition: row i belongs to prompt i; None is the untouched base LM.
      batch: the most prompts that are decoded together; a cache for so many has to fit.
      options: fields of `Options`.

    Raises:
      PromptTooLong: a prompt plus its `max_tokens` exceeds the decoder's positions.
      ValueError: drawing without a key, keys or numbers but not one a prompt, or a setting out of its
        range.
    """
    if batch < 1:
        raise ValueError(f"batch is a number of prompts, at least 1; got {batch}")
    settings = Options(**options)
    reader = _Reader(tokenizer, settings.stop)
    ids, after = reader.ids(prompts), _each("stop_after", settings.stop_after, len(prompts))
    limits, start = _start(model, reader, ids, condition, settings)
    order, texts = list(range(len(ids))), [""] * len(ids)
    if len(order) > batch:
        order.sort(key=lambda row: (limits[row], len(ids[row])))
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        decoding = start(rows)
        decoding.advance(max(limits[row] for row in rows) - 1)
        for row, tokens in zip(rows, decoding.tokens, strict=True):
            texts[row] = reader.read(tokens[: limits[row]], after[row])[0]
    return texts


def pieces(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    condition: Condition | None = None,
    *,
    every: int = 1,
    **options: Any,
) -> Iterator[list[Piece]]:
    """As `generate`, yielding what each row has gained after every `every` tokens, all in one batch.

    Joined, the pieces of a row are what `generate` returns. A character of several tokens comes
    with its last, and a text that may turn out to be a stop is held back until it is known.

    Args:
      every: tokens between two returns to the host; more is faster.

    Raises:
      As `generate`; and ValueError where `every` is not above 0.
    """
    if every < 1:
        raise ValueError(f"every is the number of tokens per piece, at least 1; got {every}")
    if not prompts:
        return
    running = Continuations(model, tokenizer, prompts, condition, **options)
    yield (gained := running.gained())
    while any(piece.ending is None for piece in gained):
        running.advance(every)
        yield (gained := running.gained())


class Continuations:
    """Prompts on their way, all in one batch; options as in `generate`, and what it raises.

    Between two pieces rows may be dropped, and rows of others join (`join`).
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        condition: Condition | None = None,
        **options: Any,
    ):
        settings = Options(**options)
        self._reader = _Reader(tokenizer, settings.stop)
        after = _each("stop_after", settings.stop_after, len(prompts))
        limits, start = _start(model, self._reader, self._reader.ids(prompts), condition, settings)
        self._decoding = start(range(len(prompts)))
        # Of each row: the most tokens, in how many no stop counts, the length of its text so far.
        self._rows = [[*row, 0] for row in zip(limits, after, strict=True)]

    @classmethod
    def join(
        cls, parts: Sequence[tuple["Continuations", Sequence[int]]], count: int
    ) -> "Continuations":
        """Return one of chosen rows, in this order, of others that have the same model, options but for
        those of each prompt, and a condition or none; they are no longer used.

        Args:
          count: rows that are decoded, chosen ones and padding.
        """
        self = copy.copy(parts[0][0])
        self._rows = [part._rows[row] for part, rows in parts for row in rows]
        self._decoding = Decoding.join([(part._decoding, rows) for part, rows in parts], count)
        return self

    def advance(self, tokens: int) -> None:
        """Add up to so many tokens to each row that has not ended."""
        lengths = zip(self._rows, self._decoding.tokens, strict=True)
        self._decoding.advance(min(tokens, max(row[0] - len(own) for row, own in lengths)))

    def gained(self) -> list[Piece]:
        """Return what each row has gained since the last time."""
        gained, rows = (
            [],
            zip(self._decoding.tokens, self._decoding.ended(), self._rows, strict=True),
        )
        for tokens, is_done, row in rows:
            limit, after, before = row
            text, settled, length, ended = self._reader.read(tokens[:limit], after)
            is_whole = len(tokens) >= limit
            ending = "stop" if ended or is_done and not is_whole else "length" if is_whole else None
            row[2] = len(text) if ending else max(settled, before)
            gained.append(Piece(text[before : row[2]], tokens[:length], ending))
        return gained


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return a prompt as the decoder reads it: begin-of-text, and no blank at its end."""
    return [tokenizer.bos, *tokenizer.ids(prompt.rstrip())]


def without_beginning(ids: Sequence[int], room: int) -> list[int]:
    """Return at most `room` tokens of a prompt: its first, and its end."""
    return [*ids] if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


def _start(
    model: LanguageModel,
    reader: "_Reader",
    ids: Sequence[Sequence[int]],
    condition: Condition | None,
    options: Options,
) -> tuple[list[int], Callable[[Sequence[int]], Decoding]]:
    """Return the most tokens of each prompt, and what begins to decode some of the prompts."""
    count, max_tokens = len(ids), options.max_tokens
    draw = sampling(options.temperature, options.top_k, options.top_p, options.rng, count)
    limits = _each("max_tokens", max_tokens, count)
    after = _each("stop_after", options.stop_after, count)
    if np.min(max_tokens, initial=1) < 1:
        raise ValueError(f"max_tokens is at least 1; got {max_tokens}")
    ids, positions = list(ids), model.decoder.config.max_length - 1
    for row, (prompt, more) in enumerate(zip(ids, limits, strict=True)):
        room = positions - more
        if len(prompt) > room and options.cut and room > 0:
            ids[row] = without_beginning(prompt, room)
        elif len(prompt) > room:
            raise PromptTooLong(
                f"Prompt {row} has {len(prompt)} tokens; with {more} more it exceeds the "
                f"decoder's {positions} positions. Shorten it or ask for fewer tokens."
            )
    conditions = ConditionRows(condition, count)
    stops, texts = np.zeros((2, model.decoder.config.vocab_size), bool)
    for mask, tokens in zip((stops, texts), reader.stopping_ids(), strict=True):
        mask[tokens] = True
    endings = Endings(stops, texts, reader.tokenizer.eos)
    return limits, lambda rows: Decoding(model, ids, limits, after, rows, conditions, draw, endings)


def sampling(
    temperature: float, top_k: int, top_p: float, rng: jax.Array | None, rows: int
) -> Draw | None:
    """Return how so many rows draw, by `Options`, with keys for rows of padding; None is the likeliest.

    Raises:
      ValueError: a number out of its range, one that draws nothing, drawing without `rng`, or keys but
        not one a row.
    """
    # Logits are divided by it: by less they overflow, and what is drawn is NaN.
    drawn = _LEAST_TEMPERATURE <= temperature < math.inf
    if not (temperature == 0 or drawn) or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: the first two are at least 0,"
            f" the temperature 0 or finite and at least {_LEAST_TEMPERATURE}, top_p is above 0 and at"
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


def _each(name: str, value: int | Sequence[int], count: int) -> list[int]:
    """Return a number for each prompt."""
    numbers = [int(value)] * count if np.ndim(value) == 0 else list(value)
    if len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} numbers for {count} prompts")
    return numbers


class _Reader:
    """Texts as tokens, and tokens as text up to a stop."""

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str]):
        self.tokenizer = tokenizer
        stops = {text for text in ((stop,) if isinstance(stop, str) else stop) if text}
        added = tokenizer.backend.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        self._ends = {tokenizer.eos, *(special[text] for text in stops & {*special})}
        self._stops = tuple(sorted(stops - {*special}))

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each prompt."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of texts, not one text")
        return [prompt_ids(self.tokenizer, prompt) for prompt in prompts]

    def stopping_ids(self) -> tuple[list[int], list[int]]:
        """Return the tokens that hold a stop text, and those that hold any text but blanks."""
        stopping, texts = _stopping_ids(self.tokenizer, self._stops)
        return [*stopping, *self._ends], texts

    def read(self, tokens: Sequence[int], after: int = 0) -> tuple[str, int, int, bool]:
        """Return a continuation so far, how much of it later tokens can't change, its tokens without the
        one that ends it, and whether one does.

        Args:
          after: tokens at its beginning in which no stop counts.
        """
        count = next((n for n, token in enumerate(tokens) if token in self._ends), len(tokens))
        ended = count < len(tokens)
        text = self.tokenizer.decode(tokens[:count])
        # Behind the first letter: a stop at the beginning would leave nothing.
        begin = max(len(self.tokenizer.decode(tokens[:after])), len(text) - len(text.lstrip()) + 1)
        cut = min((at for stop in self._stops if (at := text.find(stop, begin)) >= 0), default=None)
        if cut is not None:
            return text[:cut], cut, count, True
        # An unfinished character decodes to U+FFFD.
        settled = len(text.rstrip("\ufffd"))
        held = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        settled = len(text) if ended else min(settled, len(text) - max(held, default=0))
        return text, settled, count, ended


@functools.lru_cache(maxsize=16)
def _stopping_ids(tokenizer: Tokenizer, stops: tuple[str, ...]) -> tuple[list[int], list[int]]:
    ids = range(tokenizer.vocab_size) if stops else ()
    texts = tokenizer.backend.decode_batch([[i] for i in ids], skip_special_tokens=True)
    stopping = [i for i, text in enumerate(texts) if any(stop in text for stop in stops)]
    return stopping, [i for i, text in enumerate(texts) if text.strip()]
