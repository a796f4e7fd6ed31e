"""Texts that continue prompts under a condition, whole or piece by piece (§2); the loop: decoding.py."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from larimar_jax.conditions import Rows
from larimar_jax.decoding import LanguageModel, Run, check_room
from larimar_jax.model import Condition
from larimar_jax.sampling import Sampling
from larimar_jax.weights.tokenizers import Tokenizer

# How many prompts are decoded together.
BATCH = 128


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    condition: Condition | None = None,
    *,
    max_tokens: int | Sequence[int] = 16,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: str | Sequence[str] = "\n",
    rng: jax.Array | None = None,
    batch: int = BATCH,
) -> list[str]:
    """Continues each prompt by up to `max_tokens` tokens, many rows in one compiled loop.

    The loop ends where every row has: at the end-of-text token, at a token with a stop text in it, or
    with its last. Rows do not see each other.

    Args:
      condition: row i belongs to prompt i; None is the untouched base LM.
      max_tokens: one for all, or one for each prompt; of more than a batch, those that may say as much
        are decoded together.
      temperature: 0 takes the likeliest token; above 0 draws, and then needs `rng`.
      top_k: draws among so many of the likeliest only; 0 is all.
      top_p: draws among the fewest of the likeliest that have this much probability together.
      stop: texts that end a continuation; what follows is cut off with them.
      rng: one key, or one for each prompt, with which it draws the same whatever it stands beside.
      batch: the most prompts that are decoded together; a cache for so many has to fit.

    Raises:
      PromptTooLong: where a prompt plus its `max_tokens` exceeds the decoder's positions.
      ValueError: drawing without a key, keys or `max_tokens` but not one a prompt, or a setting out of
        its range.
    """
    if batch < 1:
        raise ValueError(f"batch is a number of prompts, at least 1; got {batch}")
    draw = Sampling(temperature, top_k, top_p, rng)
    reader, said = _Reader(tokenizer, stop), [""] * len(prompts)
    ids, most = _ids(tokenizer, prompts), _each(max_tokens, len(prompts))
    check_room(model, ids, most)
    given = None if condition is None else Rows(condition, len(prompts))
    order = list(range(len(prompts)))
    if len(order) > batch:
        order.sort(key=lambda row: (most[row], len(ids[row])))
        draw = draw.each(len(order))
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        part = draw if len(rows) == len(order) else draw.of(rows)
        run = _start(model, reader, ids, given, rows, most, part)
        run.advance(max(most[row] for row in rows) - 1)
        for row, tokens in zip(rows, run.tokens, strict=True):
            said[row] = reader.text(tokens[: most[row]])[0]
    return said


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
    draw = Sampling(temperature, top_k, top_p, rng)
    reader, ids = _Reader(tokenizer, stop), _ids(tokenizer, prompts)
    most = _each(int(max_tokens), len(prompts))
    check_room(model, ids, most)
    if not ids:
        return
    rows = None if condition is None else Rows(condition, len(prompts))
    run = _start(model, reader, ids, rows, range(len(ids)), most, draw)
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


def _ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    if isinstance(prompts, str):
        raise TypeError("prompts is a list of texts, not one text")
    return [prompt_ids(tokenizer, prompt) for prompt in prompts]


def _each(max_tokens: int | Sequence[int], prompts: int) -> list[int]:
    """The most tokens of each prompt."""
    one = np.ndim(max_tokens) == 0
    most = [max_tokens] * prompts if one else list(max_tokens)
    if len(most) != prompts:
        raise ValueError(f"max_tokens has {len(most)} numbers for {prompts} prompts")
    if min([max_tokens] if one else most, default=1) < 1:
        raise ValueError(f"max_tokens is at least 1; got {max_tokens}")
    return most


def _start(
    model: LanguageModel,
    reader: "_Reader",
    ids: Sequence[Sequence[int]],
    given: Rows | None,
    rows: Sequence[int],
    most: Sequence[int],
    draw: Sampling,
) -> Run:
    ends = reader.ends(model.decoder.config.vocab_size)
    own, most = [ids[row] for row in rows], [most[row] for row in rows]
    return Run(model, own, given, rows, most, draw, ends, reader.tokenizer.eos)


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
    most = _each(max_tokens, len(prompts))
    check_room(model, prompts, most)
    if not prompts:
        return np.zeros((0, max_tokens), np.int32)
    given, greedy = None if condition is None else Rows(condition, len(prompts)), Sampling()
    ends = np.zeros(rows, bool)
    run = Run(model, prompts, given, range(len(prompts)), most, greedy, ends, 0)
    run.advance(max_tokens - 1)
    return np.asarray(run.tokens, np.int32).reshape(len(prompts), max_tokens)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt as the decoder sees it: the beginning-of-text token, and no blank at its end."""
    return [tokenizer.bos, *tokenizer.ids(prompt.rstrip())]


@functools.lru_cache(maxsize=16)
def _ending_ids(tokenizer: Tokenizer, stops: tuple[str, ...]) -> tuple[int, ...]:
    """Tokens after which a row has nothing more to say."""
    ids = range(tokenizer.vocab_size) if stops else ()
    texts = tokenizer.backend.decode_batch([[i] for i in ids], skip_special_tokens=True)
    found = [i for i, text in enumerate(texts) if any(stop in text for stop in stops)]
    return (*found, tokenizer.eos)
