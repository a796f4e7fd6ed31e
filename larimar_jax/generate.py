"""Cached decoding and scoring under a condition: static shapes, one compilation per bucket."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.model import Condition, Larimar
from larimar_jax.weights.tokenizers import Tokenizer, bucket

LENGTH_BUCKET = 16
TARGET_BUCKET = 4


class PromptTooLong(ValueError):
    """A prompt and its continuation do not fit into the decoder's positions."""


def score(
    model: Larimar,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    targets: Sequence[str],
    condition: Condition | None = None,
    *,
    batch: int = 32,
) -> np.ndarray:
    """ℓ(p, t): mean −ln p(target token | prompt, target so far, condition), in nats (metrics.md).

    Prompt and target are separated by one space. Row i is decoded under row i of `condition`; None is
    the untouched base LM. Rows are sorted by length, so that few are padded, and go through one
    compiled function per length bucket.

    Returns:
      float32 [n].

    Raises:
      ValueError: for an empty target. PromptTooLong: naming the row.
    """
    rows = []
    for index, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        answer = tokenizer.ids(" " + target.strip())
        if not target.strip():
            raise ValueError(f"Target {index} (prompt {prompt!r}) is empty: there is nothing to score.")
        rows.append((_prompt_ids(tokenizer, prompt), answer))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]) + len(rows[row][1]))
    scores = np.zeros(len(rows), np.float32)
    graph, state = nnx.split(model)
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        # The last batch repeats its first row rather than compile for a size of its own.
        padded = chosen + [chosen[0]] * (batch - len(chosen))
        tokens, answers, mask = _pack_targets(model, [rows[row] for row in padded], prompts)
        part = None if condition is None else condition.rows(jnp.asarray(padded, jnp.int32))
        values = _score_rows(graph, state, tokens, answers, mask, part)
        scores[chosen] = np.asarray(values)[: len(chosen)]
    return scores


def generate(
    model: Larimar,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    condition: Condition | None = None,
    *,
    max_tokens: int = 16,
    temperature: float = 0.0,
    stop: str = "\n",
    rng: jax.Array | None = None,
) -> list[str]:
    """Continues each prompt by up to `max_tokens` tokens, all rows in one compiled loop with a cache.

    Args:
      condition: row i belongs to prompt i; None is the untouched base LM.
      temperature: 0 is greedy; above 0 samples, and then needs `rng`.
      stop: a text that ends a continuation; it is cut off, as is the end-of-text token.

    Raises:
      PromptTooLong: where a prompt plus `max_tokens` exceeds the decoder's positions.
    """
    if temperature > 0.0 and rng is None:
        raise ValueError("Sampling (temperature > 0) needs rng; pass jax.random.key(seed).")
    ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    length = bucket(max(len(row) for row in ids), LENGTH_BUCKET)
    limit = model.decoder.config.max_length - 1
    if length + max_tokens > limit:
        longest = max(range(len(ids)), key=lambda row: len(ids[row]))
        raise PromptTooLong(
            f"Prompt {longest} has {len(ids[longest])} tokens; with {max_tokens} more it exceeds the "
            f"decoder's {limit} positions. Shorten it or ask for fewer tokens."
        )
    tokens = np.full((len(ids), length), tokenizer.pad, np.int32)
    for row, values in enumerate(ids):
        tokens[row, : len(values)] = values
    lengths = jnp.asarray([len(row) for row in ids], jnp.int32)
    graph, state = nnx.split(model)
    key = jax.random.key(0) if rng is None else rng
    produced = _continue(
        graph, state, jnp.asarray(tokens), lengths, condition, jnp.float32(temperature), key,
        max_tokens=max_tokens, eos=tokenizer.eos,
    )
    texts = []
    for row in np.asarray(produced):
        kept = row.tolist()
        kept = kept[: kept.index(tokenizer.eos)] if tokenizer.eos in kept else kept
        text = tokenizer.decode(kept)
        texts.append(text.split(stop, 1)[0] if stop else text)
    return texts


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return [tokenizer.bos, *tokenizer.ids(prompt.rstrip())]


def _pack_targets(model: Larimar, rows, prompts) -> tuple[Array, Array, Array]:
    """Rows of (prompt ids, answer ids) → tokens [B,T], positions that predict the answer [B,A], mask."""
    length = bucket(max(len(prompt) + len(answer) for prompt, answer in rows), LENGTH_BUCKET)
    limit = model.decoder.config.max_length - 1
    if length > limit:
        prompt, answer = max(rows, key=lambda row: len(row[0]) + len(row[1]))
        raise PromptTooLong(
            f"A prompt of {len(prompt)} tokens and its target of {len(answer)} exceed the decoder's "
            f"{limit} positions. Shorten the prompt."
        )
    width = bucket(max(len(answer) for _, answer in rows), TARGET_BUCKET)
    tokens = np.zeros((len(rows), length), np.int32)
    positions = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), bool)
    for row, (prompt, answer) in enumerate(rows):
        tokens[row, : len(prompt) + len(answer)] = prompt + answer
        positions[row, : len(answer)] = np.arange(len(answer)) + len(prompt) - 1
        mask[row, : len(answer)] = True
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnums=0)
def _score_rows(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B A"],
    mask: Bool[Array, "B A"],
    condition: Condition | None,
) -> Float[Array, " B"]:
    model = nnx.merge(graph, state)
    hidden, _ = model.hidden(tokens, condition)
    # The head is the largest GEMM of a small model: only the answer's positions go through it.
    picked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    logits = model.decoder.logits(picked)
    bonus = model.bonus(condition)
    if bonus is not None:
        fading = model.lexicon.decay ** jnp.arange(positions.shape[1], dtype=jnp.float32)
        logits = logits + bonus[:, None, :] * fading[:, None]
    answers = jnp.take_along_axis(tokens, positions + 1, axis=1)
    chosen = jnp.take_along_axis(logits, answers[..., None], axis=-1)[..., 0]
    entropy = jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
    return entropy.sum(axis=-1) / mask.sum(axis=-1).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_tokens", "eos"))
def _continue(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    condition: Condition | None,
    temperature: Float[Array, ""],
    rng: jax.Array,
    *,
    max_tokens: int,
    eos: int,
) -> Int[Array, "B N"]:
    model = nnx.merge(graph, state)
    rows = tokens.shape[0]
    cache = model.decoder.empty_cache(rows, tokens.shape[1] + max_tokens)
    hidden, cache = model.hidden(tokens, condition, cache)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    bonus = model.bonus(condition)

    def pick(hidden_row, step, key):
        logits = model.decoder.logits(hidden_row)
        if bonus is not None:
            logits = logits + bonus * model.lexicon.decay ** step.astype(jnp.float32)
        sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0.0, sampled, logits.argmax(axis=-1)).astype(jnp.int32)

    def unfinished(carry):
        step, *_, done = carry
        return (step < max_tokens) & ~done.all()

    def advance(carry):
        step, last, cache, produced, done = carry
        token = jnp.where(done, eos, pick(last, step, jax.random.fold_in(rng, step)))
        produced = produced.at[:, step].set(token)
        hidden, cache = model.hidden(token[:, None], condition, cache, lengths + step)
        return step + 1, hidden[:, 0], cache, produced, done | (token == eos)

    start = (jnp.int32(0), last, cache, jnp.full((rows, max_tokens), eos, jnp.int32), jnp.zeros(rows, bool))
    return jax.lax.while_loop(unfinished, advance, start)[3]
