"""How likely continuations are: every prompt once, its candidates as a tree behind it (metrics.md)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.decoders.base import Tree
from larimar_jax.generate import LENGTH_BUCKET, PromptTooLong, check_rows, prompt_ids, steps_bucket
from larimar_jax.model import Condition, Larimar
from larimar_jax.weights.tokenizers import Tokenizer

# How many places of a row go through the vocabulary's product at a time.
HEAD_CHUNK = 16


class Scores(NamedTuple):
    """Of c candidates for each of n prompts: `loss` is ℓ in nats per token, `accuracy` the share of a
    candidate's tokens that are the likeliest where they stand, teacher-forced (a tie counts); `hits`
    says it of every token, with False behind a candidate's last."""

    loss: Float[np.ndarray, "n c"]
    accuracy: Float[np.ndarray, "n c"]
    hits: Bool[np.ndarray, "n c A"]


def score(
    model: Larimar,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    condition: Condition | None = None,
    *,
    batch: int = 32,
) -> np.ndarray:
    """The `loss` of `judge`, float32 [n, c]."""
    return judge(model, tokenizer, prompts, candidates, condition, batch=batch).loss


def judge(
    model: Larimar,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    condition: Condition | None = None,
    *,
    batch: int = 32,
) -> Scores:
    """ℓ(p, t): mean −ln p(target token | prompt, target so far, condition), in nats (metrics.md).

    Prompt and target are separated by one space. Prompt i is decoded under row i of `condition`;
    None is the untouched base LM. A prompt's candidates share one row: the prompt is computed once,
    and so is every beginning that several candidates have. Rows are sorted by length, so that few
    are padded, and go through one compiled function per length bucket.

    Args:
      candidates: c targets for each of the n prompts.

    Raises:
      ValueError: for an empty target, one without tokens, or a condition of fewer rows than there are
        prompts. PromptTooLong: where a prompt and a target exceed the
        decoder's positions.
    """
    width = len(candidates[0]) if len(candidates) else 0
    if len(candidates) != len(prompts) or any(len(targets) != width for targets in candidates):
        raise ValueError(
            f"{len(prompts)} prompts need as many rows of candidates, all of one length; got "
            f"{[len(targets) for targets in candidates]}."
        )
    if condition is not None:
        check_rows(condition, len(prompts))
    scores = np.full((2, len(prompts), width), np.nan, np.float32)
    if not scores.size:
        return Scores(*scores, np.zeros((len(prompts), width, 0), bool))
    rows = [
        _branch(model, tokenizer, prompt, targets)
        for prompt, targets in zip(prompts, candidates, strict=True)
    ]
    # One size for the whole call, so that only the length makes for another compilation.
    places = steps_bucket(max(len(row.at) for row in rows), 1)
    places = places if places <= HEAD_CHUNK else -(-places // HEAD_CHUNK) * HEAD_CHUNK
    ways = steps_bucket(max(len(labels) for row in rows for labels in row.labels), 2)
    longest = steps_bucket(max(len(path) for row in rows for path in row.paths), 2)
    hits = np.zeros((len(rows), width, longest), bool)
    # Even batches of a bucketed size: few rows are not padded to the largest.
    batch = min(batch, steps_bucket(-(-len(rows) // -(-len(rows) // batch)), 4))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
    graph, state = nnx.split(model)
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        # The last batch repeats its first row rather than compile for a size of its own.
        padded = chosen + [chosen[0]] * (batch - len(chosen))
        packed = _pack([rows[index] for index in padded], places, ways, longest)
        part = None if condition is None else condition.rows(jnp.asarray(padded, jnp.int32))
        means, likeliest = _score_rows(graph, state, *map(jnp.asarray, packed), part)
        scores[:, chosen] = np.asarray(means)[:, : len(chosen)]
        hits[chosen] = np.asarray(likeliest)[: len(chosen)]
    return Scores(*scores, hits)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One prompt and the tree of its candidates.

    tokens, index, parent: the row's tokens, their places on their branches, and what they follow.
    at: tokens after which something is scored, their depth in the answer, and what may follow each.
    paths: of each candidate, per token, (which of `at`, which of its labels).
    """

    tokens: list[int]
    index: list[int]
    parent: list[int]
    at: list[int]
    depth: list[int]
    labels: list[list[int]]
    paths: list[list[tuple[int, int]]]


def _branch(model: Larimar, tokenizer: Tokenizer, prompt: str, targets: Sequence[str]) -> _Row:
    tokens = prompt_ids(tokenizer, prompt)
    index, parent = list(range(len(tokens))), list(range(-1, len(tokens) - 1))
    at, depth, labels, paths = [], [], [], []
    nodes: dict[tuple[int, ...], int] = {(): len(tokens) - 1}  # beginning of an answer → its token
    scored: dict[tuple[int, ...], int] = {}  # beginning → place in `at`
    for column, target in enumerate(targets):
        if not target.strip():
            raise ValueError(
                f"Target {column} of prompt {prompt!r} is empty: there is nothing to score."
            )
        answer = tuple(tokenizer.following(target.strip()))
        if not answer:
            raise ValueError(
                f"Target {column} of prompt {prompt[:60]!r}, {target[:60]!r}, has no tokens: the "
                "decoder's tokenizer leaves nothing of it, so there is nothing to score."
            )
        limit = model.decoder.config.max_length - 1
        if nodes[()] + len(answer) > limit:
            raise PromptTooLong(
                f"Prompt {prompt[:60]!r} and its target {target[:60]!r} have "
                f"{nodes[()] + len(answer)} tokens and the decoder has {limit} positions. "
                "Shorten the prompt."
            )
        path = []
        for length, token in enumerate(answer):
            begun = answer[:length]
            if begun not in nodes:
                parent.append(nodes[begun[:-1]])
                index.append(index[parent[-1]] + 1)
                tokens.append(begun[-1])
                nodes[begun] = len(tokens) - 1
            if begun not in scored:
                scored[begun] = len(at)
                at.append(nodes[begun])
                depth.append(length)
                labels.append([])
            ways = labels[scored[begun]]
            if token not in ways:
                ways.append(token)
            path.append((scored[begun], ways.index(token)))
        paths.append(path)
    return _Row(tokens, index, parent, at, depth, labels, paths)


def _pack(rows: Sequence[_Row], places: int, ways: int, longest: int) -> tuple[np.ndarray, ...]:
    """Rows as arrays of one shape; see `_score_rows`."""
    count, width = len(rows), len(rows[0].paths)
    length = steps_bucket(max(len(row.tokens) for row in rows), LENGTH_BUCKET)
    tokens, index = np.zeros((2, count, length), np.int32)
    seen = np.zeros((count, length, length), bool)
    at, depth = np.zeros((2, count, places), np.int32)
    labels = np.zeros((count, places, ways), np.int32)
    paths = np.zeros((count, width, longest), np.int32)
    mask = np.zeros((count, width, longest), bool)
    for b, row in enumerate(rows):
        size = len(row.tokens)
        tokens[b, :size], index[b, :size] = row.tokens, row.index
        seen[b, np.arange(length), np.arange(length)] = True  # padding sees itself
        for place, parent in enumerate(row.parent):
            if parent >= 0:
                seen[b, place] |= seen[b, parent]
        at[b, : len(row.at)], depth[b, : len(row.at)] = row.at, row.depth
        for place, found in enumerate(row.labels):
            labels[b, place, : len(found)] = found
        for column, path in enumerate(row.paths):
            paths[b, column, : len(path)] = [place * ways + way for place, way in path]
            mask[b, column, : len(path)] = True
    return tokens, index, seen, at, depth, labels, paths, mask


@functools.partial(jax.jit, static_argnums=0)
def _score_rows(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    index: Int[Array, "B T"],
    seen: Bool[Array, "B T T"],
    at: Int[Array, "B N"],
    depth: Int[Array, "B N"],
    labels: Int[Array, "B N R"],
    paths: Int[Array, "B c A"],
    mask: Bool[Array, "B c A"],
    condition: Condition | None,
) -> tuple[Float[Array, "2 B c"], Bool[Array, "B c A"]]:
    """−ln p of R labels after each of N places and whether they are the likeliest there; then the mean
    of both along each candidate's path, and the second token by token."""
    model = nnx.merge(graph, state)
    hidden, _ = model.hidden(tokens, condition, tree=Tree(index, seen))
    spelled = None if condition is None else condition.spelled

    def entropies(piece):
        at, depth, labels = piece
        # The head is the largest product of a small model: only scored places go through it.
        logits = model.decoder.logits(jnp.take_along_axis(hidden, at[..., None], axis=1))
        if spelled is not None:
            logits = spelled.add(logits, depth)
        chosen = jnp.take_along_axis(logits, labels, axis=-1)
        likeliest = chosen >= jnp.max(logits, axis=-1, keepdims=True)
        losses = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - chosen
        return jnp.stack([losses, likeliest.astype(losses.dtype)])

    pieces = max(1, at.shape[1] // HEAD_CHUNK)

    def split(a):
        return a.reshape(a.shape[0], pieces, -1, *a.shape[2:]).swapaxes(0, 1)

    found = jax.lax.map(entropies, jax.tree.map(split, (at, depth, labels)))
    found = jnp.moveaxis(found, 0, 2).reshape(2, at.shape[0], 1, -1)
    along = jnp.take_along_axis(found, paths[None], axis=3)
    means = jnp.where(mask, along, 0.0).sum(axis=-1) / mask.sum(axis=-1).astype(jnp.float32)
    return means, mask & (along[1] > 0)
