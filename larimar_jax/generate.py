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

LENGTH_BUCKET = 8
TARGET_BUCKET = 4


class PromptTooLong(ValueError):
    """A prompt and its continuation do not fit into the decoder's positions."""


def score(
    model: Larimar,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    condition: Condition | None = None,
    *,
    batch: int = 32,
) -> np.ndarray:
    """ℓ(p, t): mean −ln p(target token | prompt, target so far, condition), in nats (metrics.md).

    Prompt and target are separated by one space. Prompt i is decoded under row i of `condition`; None
    is the untouched base LM. Candidates of one prompt that differ in their last token only share one
    row. Rows are sorted by length, so that few are padded, and go through one compiled function per
    length bucket.

    Args:
      candidates: c targets for each of the n prompts.

    Returns:
      float32 [n, c].

    Raises:
      ValueError: for an empty target. PromptTooLong: where a row exceeds the decoder's positions.
    """
    width = len(candidates[0]) if len(candidates) else 0
    if len(candidates) != len(prompts) or any(len(targets) != width for targets in candidates):
        raise ValueError(
            f"{len(prompts)} prompts need as many rows of candidates, all of one length; got "
            f"{[len(targets) for targets in candidates]}."
        )
    rows: dict[tuple[int, tuple[int, ...]], list[tuple[int, list[int]]]] = {}
    opening = {prompt: _prompt_ids(tokenizer, prompt) for prompt in prompts}
    for index, targets in enumerate(candidates):
        for column, target in enumerate(targets):
            if not target.strip():
                raise ValueError(
                    f"Target {column} of prompt {prompts[index]!r} is empty: there is nothing to score."
                )
            answer = tokenizer.ids(" " + target.strip())
            rows.setdefault((index, tuple(answer[:-1])), []).append((column, answer))
    scores = np.full((len(prompts), width), np.nan, np.float32)
    order = sorted(rows, key=lambda row: len(opening[prompts[row[0]]]) + len(row[1]))
    graph, state = nnx.split(model)
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        # The last batch repeats its first row rather than compile for a size of its own.
        padded = chosen + [chosen[0]] * (batch - len(chosen))
        packed = _pack(model, [(opening[prompts[i]], rows[i, done]) for i, done in padded], width)
        index = jnp.asarray([i for i, _ in padded], jnp.int32)
        part = None if condition is None else condition.rows(index)
        values = np.asarray(_score_rows(graph, state, *packed, part))
        for row, found in zip(chosen, values, strict=False):
            for place, (column, _) in enumerate(rows[row]):
                scores[row[0], column] = found[place]
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
    needed, limit = max(len(row) for row in ids), model.decoder.config.max_length - 1
    length = min(bucket(needed, LENGTH_BUCKET), limit - max_tokens)
    if needed > length:
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
        graph,
        state,
        jnp.asarray(tokens),
        lengths,
        condition,
        jnp.float32(temperature),
        key,
        max_tokens=max_tokens,
        eos=tokenizer.eos,
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


def _pack(model: Larimar, rows, width: int) -> tuple[Array, Array, Array, Array]:
    """Rows of (prompt ids, its answers, which differ in their last token) → arrays of one shape.

    Returns tokens [B,T], the positions that predict the answer [B,A], answers [B,c,A], mask [B,A].
    """
    needed = max(len(prompt) + len(answers[0][1]) - 1 for prompt, answers in rows)
    limit = model.decoder.config.max_length - 1
    length = min(bucket(needed, LENGTH_BUCKET), limit)
    if needed > length:
        raise PromptTooLong(
            f"A prompt and its target have {needed} tokens and the decoder has {limit} positions. "
            "Shorten the prompt."
        )
    longest = bucket(max(len(answers[0][1]) for _, answers in rows), TARGET_BUCKET)
    tokens = np.zeros((len(rows), length), np.int32)
    positions, mask = np.zeros((len(rows), longest), np.int32), np.zeros((len(rows), longest), bool)
    labels = np.zeros((len(rows), width, longest), np.int32)
    for row, (prompt, answers) in enumerate(rows):
        size = len(answers[0][1])
        given = prompt + answers[0][1][:-1]
        tokens[row, : len(given)] = given
        positions[row, :size] = np.arange(size) + len(prompt) - 1
        mask[row, :size] = True
        for place, (_, answer) in enumerate(answers):
            labels[row, place, :size] = answer
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(labels), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnums=0)
def _score_rows(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B A"],
    labels: Int[Array, "B c A"],
    mask: Bool[Array, "B A"],
    condition: Condition | None,
) -> Float[Array, "B c"]:
    model = nnx.merge(graph, state)
    hidden, _ = model.hidden(tokens, condition)
    # The head is the largest GEMM of a small model: only the answer's positions go through it.
    picked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    logits = model.decoder.logits(picked)
    bonus = model.bonus(condition)
    if bonus is not None:
        fading = model.lexicon.decay ** jnp.arange(positions.shape[1], dtype=jnp.float32)
        logits = logits + bonus[:, None, :] * fading[:, None]
    chosen = jnp.take_along_axis(logits, labels.swapaxes(1, 2), axis=-1).swapaxes(1, 2)
    entropy = jnp.where(mask[:, None], jax.nn.logsumexp(logits, axis=-1)[:, None] - chosen, 0.0)
    return entropy.sum(axis=-1) / mask.sum(axis=-1, keepdims=True).astype(jnp.float32)


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

    start = (
        jnp.int32(0),
        last,
        cache,
        jnp.full((rows, max_tokens), eos, jnp.int32),
        jnp.zeros(rows, bool),
    )
    return jax.lax.while_loop(unfinished, advance, start)[3]
