"""How likely continuations are (metrics.md): packed into rows, with logits where they are scored."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import packing
from larimar_jax.answer_code import TokenEvidence
from larimar_jax.conditions import Rows
from larimar_jax.decoders.base import Tree
from larimar_jax.decoding import PromptTooLong, inputs
from larimar_jax.generate import prompt_ids
from larimar_jax.model import Condition, Larimar
from larimar_jax.packing import steps_bucket
from larimar_jax.weights.tokenizers import Tokenizer

# How many places go through the vocabulary's product at a time.
HEAD = 64


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
    batch: int = 16,
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
    batch: int = 16,
) -> Scores:
    """ℓ(p, t): mean −ln p(target token | prompt, target so far, condition), in nats (metrics.md).

    Prompt and target are separated by one space. Prompt i is decoded under row i of `condition`;
    None is the untouched base LM. What texts under equal conditions begin with is computed once, and
    several texts share a row of the decoder (packing.py), to rounding as if each had one for itself.

    Args:
      candidates: c targets for each of the n prompts.
      batch: the most rows of `packing.ROW` tokens at a time; of longer ones as many as have no more
        tokens.

    Raises:
      ValueError: for an empty target, one without tokens, or a condition of fewer rows than there are
        prompts. PromptTooLong: where a prompt and a target exceed the decoder's positions.
    """
    width = len(candidates[0]) if len(candidates) else 0
    if len(candidates) != len(prompts) or any(len(targets) != width for targets in candidates):
        raise ValueError(
            f"{len(prompts)} prompts need as many rows of candidates, all of one length; got "
            f"{[len(targets) for targets in candidates]}."
        )
    given = None if condition is None else Rows(condition, len(prompts))
    if not len(prompts) or not width:
        empty = np.zeros((len(prompts), width), np.float32)
        return Scores(empty, empty, np.zeros((*empty.shape, 0), bool))
    trie = packing.Trie()
    texts = []
    for row, (prompt, targets) in enumerate(zip(prompts, candidates, strict=True)):
        ids, answers = _tokens(model, tokenizer, prompt, targets)
        texts.append(packing.text(trie, ids, answers, 0 if given is None else given.first[row]))

    labels: dict[packing.Place, list[int]] = {}
    for place, token in (step for text in texts for path in text.paths for step in path):
        if token not in (ways := labels.setdefault(place, [])):
            ways.append(token)
    hidden = _hidden(model, trie, texts, {place.node for place in labels}, given, batch)
    losses, likeliest = _entropies(model, trie, labels, hidden, given)

    longest = max(len(path) for text in texts for path in text.paths)
    loss = np.zeros((len(texts), width), np.float32)
    # A share is the nearest number to it, so that those counted in another way are equal to it.
    accuracy = np.zeros((len(texts), width), np.float64)
    hits = np.zeros((len(texts), width, longest), bool)
    number = {place: at for at, place in enumerate(labels)}
    for row, text in enumerate(texts):
        for column, path in enumerate(text.paths):
            at = [number[place] for place, _ in path]
            way = [labels[place].index(token) for place, token in path]
            hits[row, column, : len(path)] = likeliest[at, way]
            loss[row, column] = losses[at, way].mean(dtype=np.float64)
            accuracy[row, column] = likeliest[at, way].mean()
    scores = Scores(loss, accuracy, hits)
    # A masked place has no weight, but 0 times what is not finite still spreads to all of its row.
    # Whose it is shows where each text has a row for itself.
    broken = np.flatnonzero(~np.isfinite(loss).all(axis=1))
    for row in broken if len(prompts) > 1 else ():
        part = None if condition is None else condition.rows(jax.device_put(np.asarray([row], np.int32)))
        alone = judge(model, tokenizer, [prompts[row]], [candidates[row]], part, batch=batch)
        for every, own in zip(scores, alone, strict=True):
            every[row, ..., : own.shape[-1]] = own[0]
    return scores


def _tokens(
    model: Larimar, tokenizer: Tokenizer, prompt: str, targets: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """The tokens of a prompt and of what may follow it; raises as `judge`."""
    ids, answers = prompt_ids(tokenizer, prompt), []
    limit = model.decoder.config.max_length - 1
    for column, target in enumerate(targets):
        if not target.strip():
            raise ValueError(
                f"Target {column} of prompt {prompt!r} is empty: there is nothing to score."
            )
        answer = tokenizer.following(target.strip())
        if not answer:
            raise ValueError(
                f"Target {column} of prompt {prompt[:60]!r}, {target[:60]!r}, has no tokens: the "
                "decoder's tokenizer leaves nothing of it, so there is nothing to score."
            )
        if (needed := len(ids) - 1 + len(answer)) > limit:
            raise PromptTooLong(
                f"Prompt {prompt[:60]!r} and its target {target[:60]!r} have "
                f"{needed} tokens and the decoder has {limit} positions. "
                "Shorten the prompt."
            )
        answers.append(answer)
    return ids, answers


class _Ahead:
    """Results that are waited for a little later than they are begun, so that the host packs the next
    ones beside the device. Few at a time: each holds its inputs on the device."""

    MOST = 3

    def __init__(self, take: Callable[..., None]):
        self._take, self._waiting = take, collections.deque()

    def begun(self, *result: Any) -> None:
        """One more; the oldest is taken where they are too many."""
        self._waiting.append(result)
        if len(self._waiting) > self.MOST:
            self._take(*self._waiting.popleft())

    def finish(self) -> None:
        """Takes those that are left."""
        while self._waiting:
            self._take(*self._waiting.popleft())


def _hidden(
    model: Larimar,
    trie: packing.Trie,
    texts: Sequence[packing.Text],
    wanted: set[int],
    given: Rows | None,
    batch: int,
) -> dict[int, np.ndarray]:
    """The decoder's last hidden states [D] at these nodes."""
    graph, state = nnx.split(model)
    found: dict[int, np.ndarray] = {}

    def keep(where, states):
        for row, places in zip(np.asarray(states), where, strict=True):
            # Copied: a view would keep all the others.
            found.update({node: row[at].copy() for node, at in places.items() if node in wanted})

    ahead = _Ahead(keep)
    for rows in packing.batches(packing.rows(trie, texts), batch):
        packed = packing.pack(trie, rows)
        states = _decode(graph, state, *inputs(packed, given))
        ahead.begun(packed.where, states)
    ahead.finish()
    return found


def _entropies(
    model: Larimar,
    trie: packing.Trie,
    labels: dict[packing.Place, list[int]],
    hidden: dict[int, np.ndarray],
    given: Rows | None,
) -> tuple[Float[np.ndarray, "N R"], Bool[np.ndarray, "N R"]]:
    """−ln p of what may follow at each of N places, and whether it is the likeliest there."""
    graph, state = nnx.split(model)
    places = list(labels)
    # One width for the whole call, so that only the number of places makes for another compilation.
    ways = steps_bucket(max(map(len, labels.values())), 2)
    losses = np.zeros((len(places), ways), np.float32)
    likeliest = np.zeros((len(places), ways), bool)

    def keep(rows, found):
        for every, own in zip((losses, likeliest), found, strict=True):
            every[rows] = np.asarray(own)[: len(every[rows])]

    ahead = _Ahead(keep)
    for first in range(0, len(places), HEAD):
        piece = places[first : first + HEAD]
        rows = slice(first, first + len(piece))
        # Padding repeats a place.
        padded = piece + [piece[0]] * (steps_bucket(len(piece), 2) - len(piece))
        told = np.asarray([(labels[p] * ways)[:ways] for p in padded], np.int32)
        evidence = None
        if given is not None:
            owners = np.asarray([trie.condition[place.node] for place in padded])
            evidence = given.evidence(owners)
        found = _cross_entropies(
            graph,
            state,
            jax.device_put(np.stack([hidden[place.node] for place in padded])),
            jax.device_put(np.asarray([place.depth for place in padded], np.int32)),
            jax.device_put(told),
            evidence,
        )
        ahead.begun(rows, found)
    ahead.finish()
    return losses, likeliest


@functools.partial(jax.jit, static_argnums=0)
def _decode(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    tree: Tree,
    condition: Condition | None,
) -> Float[Array, "B T D"]:
    """Last hidden states; the condition has S rows for each row of tokens."""
    return nnx.merge(graph, state).hidden(tokens, condition, tree=tree)[0]


@functools.partial(jax.jit, static_argnums=0)
def _cross_entropies(
    graph: nnx.GraphDef,
    state: nnx.State,
    hidden: Float[Array, "K D"],
    depth: Int[Array, " K"],
    labels: Int[Array, "K R"],
    evidence: TokenEvidence | None,
) -> tuple[Float[Array, "K R"], Bool[Array, "K R"]]:
    """−ln p of R labels at each of K places, and whether they are the likeliest there."""
    logits = nnx.merge(graph, state).decoder.logits(hidden)
    if evidence is not None:
        logits = evidence.add(logits[:, None], depth[:, None])[:, 0]
    chosen = jnp.take_along_axis(logits, labels, axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - chosen
    return losses, chosen >= jnp.max(logits, axis=-1, keepdims=True)
