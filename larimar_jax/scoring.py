"""How likely continuations are (metrics.md): packed into rows, with logits where they are scored."""

import collections
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import latent_layout, packing
from larimar_jax.generate import PromptTooLong, prompt_ids
from larimar_jax.latent_layout import Condition, TokenEvidence
from larimar_jax.packing import ConditionRows, LanguageModel, Text, TokenPlace, Trie, steps_bucket
from larimar_jax.weights.tokenizer import Tokenizer

# How many places go through the vocabulary's product at a time.
HEAD = 64
# Of likeliest tokens.
TOP = 20

T = TypeVar("T")


class Scores(NamedTuple):
    """Of c candidates for each of n prompts, teacher-forced.

    loss: ℓ in nats per token. accuracy: the share of a candidate's tokens that are the likeliest where
    they stand; a tie counts. hits: the same of every token, False behind a candidate's last.
    """

    loss: Float[np.ndarray, "n c"]
    accuracy: Float[np.ndarray, "n c"]
    hits: Bool[np.ndarray, "n c A"]


def judge(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    condition: Condition | None = None,
    *,
    batch: int = 16,
) -> Scores:
    """Return ℓ(p, t), the mean −ln p(target token | prompt, target so far, condition), and accuracies.

    Prompt and target are separated by one space. Prompt i is decoded under row i of `condition`;
    None is the untouched base LM. What texts under equal conditions begin with is computed once, and
    several texts share a row of the decoder (packing.py), to rounding as if each had one for itself.

    Args:
      candidates: c targets for each of the n prompts.
      batch: the most rows of `packing.ROW` tokens at a time; of longer ones as many as have no more
        tokens.

    Raises:
      ValueError: an empty target, one without tokens, or a condition of fewer rows than there are
        prompts.
      PromptTooLong: a prompt and a target exceed the decoder's positions.
    """
    width = len(candidates[0]) if len(candidates) else 0
    if len(candidates) != len(prompts) or any(len(targets) != width for targets in candidates):
        raise ValueError(
            f"{len(prompts)} prompts need as many rows of candidates, all of one length; got "
            f"{[len(targets) for targets in candidates]}."
        )
    conditions = ConditionRows(condition, len(prompts))
    loss = np.zeros((len(prompts), width), np.float32)
    if not loss.size:
        return Scores(loss, loss, np.zeros((*loss.shape, 0), bool))
    trie = Trie()
    texts = [
        trie.add(*_tokens(model, tokenizer, prompt, targets), conditions.first[row])
        for row, (prompt, targets) in enumerate(zip(prompts, candidates, strict=True))
    ]
    labels: dict[TokenPlace, list[int]] = {}
    for place, token in (step for text in texts for path in text.paths for step in path):
        if token not in (tokens := labels.setdefault(place, [])):
            tokens.append(token)
    hidden = _hidden(model, trie, texts, {place.node for place in labels}, conditions, batch)
    losses, likeliest = _entropies(model, trie, labels, hidden, conditions)

    # A share is the nearest number to it, so that those counted in another way are equal to it.
    accuracy = np.zeros(loss.shape, np.float64)
    hits = np.zeros((*loss.shape, max(len(path) for text in texts for path in text.paths)), bool)
    number = {place: at for at, place in enumerate(labels)}
    for row, text in enumerate(texts):
        for column, path in enumerate(text.paths):
            at = [number[place] for place, _ in path]
            label = [labels[place].index(token) for place, token in path]
            hits[row, column, : len(path)] = likeliest[at, label]
            loss[row, column] = losses[at, label].mean(dtype=np.float64)
            accuracy[row, column] = likeliest[at, label].mean()
    return Scores(loss, accuracy, hits)


class TokenScores(NamedTuple):
    """Of n tokens of an answer, ln p each, and the likeliest tokens in each one's place with theirs."""

    log_p: Float[np.ndarray, " n"]
    top: Int[np.ndarray, "n k"]
    top_log_p: Float[np.ndarray, "n k"]


def token_scores(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    condition: Condition | None = None,
    *,
    batch: int = 16,
) -> list[TokenScores]:
    """Return ln p(token | prompt, answer so far, condition) of all tokens of an answer to each prompt.

    Args:
      prompts, answers: tokens; together they fit the decoder's positions. No answer is empty.
    """
    conditions, trie = ConditionRows(condition, len(prompts)), Trie()
    texts = [
        trie.add(prompt, [answer], conditions.first[row])
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    steps = [step for text in texts for step in text.paths[0]]
    places, tokens = [place for place, _ in steps], np.asarray([[token] for _, token in steps])
    hidden = _hidden(model, trie, texts, {place.node for place in places}, conditions, batch)
    graph, state = nnx.split(model)
    pieces = []
    for at, (count, arrays) in enumerate(_heads(trie, places, hidden, conditions)):
        own = tokens[at * HEAD :][:count]
        own = np.pad(own, ((0, len(arrays[0]) - count), (0, 0)))
        scored = _log_probabilities(graph, state, jax.device_put(own.astype(np.int32)), *arrays)
        pieces.append([np.asarray(values)[:count] for values in scored])
    ends = np.cumsum([len(answer) for answer in answers])[:-1]
    rows = (np.split(np.concatenate(values), ends) for values in zip(*pieces, strict=True))
    return [TokenScores(own[:, 0], *top) for own, *top in zip(*rows, strict=True)]


def _tokens(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, targets: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a prompt and of what may follow it; raises as `judge`."""
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


def _begun_ahead(results: Iterable[T]) -> Iterator[T]:
    """Yield results in order, each when three more are begun: the host packs beside the device.

    Few at a time: each holds its inputs on the device.
    """
    waiting: collections.deque[T] = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > 3:
            yield waiting.popleft()
    yield from waiting


def _hidden(
    model: LanguageModel,
    trie: Trie,
    texts: Sequence[Text],
    wanted: set[int],
    conditions: ConditionRows,
    batch: int,
) -> dict[int, Float[np.ndarray, "D"]]:
    """Return the decoder's last hidden states at these nodes."""
    hidden: dict[int, np.ndarray] = {}
    for packed, states, _ in _begun_ahead(packing.read(model, trie, texts, conditions, batch)):
        for row, where in zip(np.asarray(states), packed.where, strict=True):
            # Copied: a view would keep all the others in memory.
            hidden.update({node: row[at].copy() for node, at in where.items() if node in wanted})
    return hidden


def _entropies(
    model: LanguageModel,
    trie: Trie,
    labels: dict[TokenPlace, list[int]],
    hidden: dict[int, Float[np.ndarray, "D"]],
    conditions: ConditionRows,
) -> tuple[Float[np.ndarray, "N R"], Bool[np.ndarray, "N R"]]:
    """Return −ln p of what may follow at each of N places, and whether it is the likeliest there."""
    graph, state = nnx.split(model)
    places = list(labels)
    # One width for the whole call, so that only the number of places makes for another compilation.
    width = steps_bucket(max(map(len, labels.values())), 2)

    def entropies(count: int, arrays: tuple, first: int) -> tuple[int, Array, Array]:
        rows = [(labels[p] * width)[:width] for p in places[first : first + count]]
        rows += [rows[0]] * (len(arrays[0]) - count)
        wanted = jax.device_put(np.asarray(rows, np.int32))
        return count, *_cross_entropies(graph, state, wanted, *arrays)

    heads = enumerate(_heads(trie, places, hidden, conditions))
    results = [
        [np.asarray(values)[:count] for values in arrays]
        for count, *arrays in _begun_ahead(entropies(*head, at * HEAD) for at, head in heads)
    ]
    losses, likeliest = map(np.concatenate, zip(*results, strict=True))
    return losses, likeliest


def _heads(
    trie: Trie,
    places: Sequence[TokenPlace],
    hidden: dict[int, Float[np.ndarray, "D"]],
    conditions: ConditionRows,
) -> Iterator[tuple[int, tuple]]:
    """Yield what `latent_layout.logits` takes at up to `HEAD` places at a time, and of how many of them;
    padding repeats the first."""
    for first in range(0, len(places), HEAD):
        piece = places[first : first + HEAD]
        padded = [*piece, *[piece[0]] * (steps_bucket(len(piece), 2) - len(piece))]
        yield (
            len(piece),
            (
                jax.device_put(np.stack([hidden[place.node] for place in padded])),
                jax.device_put(np.asarray([trie.token[place.node] for place in padded], np.int32)),
                jax.device_put(np.asarray([place.depth for place in padded], np.int32)),
                *conditions.of_answers(np.asarray([trie.condition[p.node] for p in padded])),
            ),
        )


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(
    graph: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "K 1"], *arrays: Any
) -> tuple[Float[Array, "K 1"], Int[Array, "K k"], Float[Array, "K k"]]:
    """Return ln p of a token at each of K places, and the likeliest tokens there with theirs."""
    logits = latent_layout.logits(nnx.merge(graph, state), *arrays)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    values, top = jax.lax.top_k(log_p, TOP)
    return jnp.take_along_axis(log_p, tokens, axis=-1), top, values


@functools.partial(jax.jit, static_argnums=0)
def _cross_entropies(
    graph: nnx.GraphDef,
    state: nnx.State,
    labels: Int[Array, "K R"],
    hidden: Float[Array, "K D"],
    tokens: Int[Array, " K"],
    depth: Int[Array, " K"],
    answer: Float[Array, "K A"] | None,
    evidence: TokenEvidence | None,
) -> tuple[Float[Array, "K R"], Bool[Array, "K R"]]:
    """Return −ln p of R labels at each of K places, and whether they are the likeliest there."""
    model = nnx.merge(graph, state)
    logits = latent_layout.logits(model, hidden, tokens, depth, answer, evidence)
    chosen = jnp.take_along_axis(logits, labels, axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - chosen
    return losses, chosen >= jnp.max(logits, axis=-1, keepdims=True)
