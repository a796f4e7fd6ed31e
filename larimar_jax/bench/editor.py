"""The edited model as benchmarks see it: a batch of cases, each with an empty memory of its own.

Benchmarks are written against `Editor`, so that they can be tested on a model whose answers are
known, and so that another edited model can be put beside Larimar in one file.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import generate
from larimar_jax.memory import Memory, Prior
from larimar_jax.model import Condition, Larimar
from larimar_jax.weights.tokenizers import Tokenizer, bucket


@dataclasses.dataclass(frozen=True)
class Recall:
    """What N one-fact memories answer to their queries, all queries in one row, R of them.

    scope_score: a query's likeness to its fact. in_scope: whether that lets the memory decide.
    condition: positions in that row [n] → the decoder's condition, one row each.
    """

    scope_score: Float[np.ndarray, " R"]
    in_scope: Bool[np.ndarray, " R"]
    condition: Callable[[Int[np.ndarray, " n"]], Any]


@runtime_checkable
class Editor(Protocol):
    """A language model with a memory that single facts are written into."""

    settings: Mapping[str, Any]
    """What decides its numbers, as JSON: weights, thresholds."""

    def written(self, prompt: str, answer: str) -> str:
        """The text that a written fact consists of."""

    def recall(self, facts: Sequence[tuple[str, str]], queries: Sequence[Sequence[str]]) -> Recall:
        """Writes (prompt, answer) n into empty memory n and reads queries n from it."""

    def zero(self, rows: int) -> Any:
        """The condition z = 0 for so many rows."""

    def score(self, prompts: Sequence[str], targets: Sequence[str], condition: Any) -> np.ndarray:
        """ℓ of each target after its prompt, in nats, float32 [n]; None is the base LM."""


# Rows and queries are padded to these, so that few shapes are compiled.
_TEXTS, _FACTS, _QUERIES = 32, 8, 4


class LarimarEditor:
    """Larimar with its scope detector; one encoder call and one vmapped write and read a chunk.

    Args:
        model, memory: the model and the variant that its facts are written into.
        encoder_tokenizer, decoder_tokenizer: those of its towers.
        likeness: (texts of N facts, their queries) → each query's score, float32 [R].
        threshold: the least score that is in scope.
        settings: what names these weights, as JSON; the threshold is added.
    """

    def __init__(
        self,
        model: Larimar,
        memory: Memory,
        encoder_tokenizer: Tokenizer,
        decoder_tokenizer: Tokenizer,
        likeness: Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray],
        threshold: float,
        settings: Mapping[str, Any],
    ):
        self.model, self.memory = model, memory
        self.encoder_tokenizer, self.decoder_tokenizer = encoder_tokenizer, decoder_tokenizer
        self.likeness, self.threshold = likeness, threshold
        self.settings = {**settings, "threshold": threshold}
        self._graph, self._state = nnx.split(model)
        self._prior = jax.jit(memory.prepare)(model.memory.params())

    def written(self, prompt: str, answer: str) -> str:
        """Prompt and answer with one space between them."""
        return f"{prompt.strip()} {answer.strip()}"

    def recall(self, facts: Sequence[tuple[str, str]], queries: Sequence[Sequence[str]]) -> Recall:
        """The key of a fact is its prompt's encoding, its value that of the written text (§4)."""
        texts = [self.written(prompt, answer) for prompt, answer in facts]
        prompts = [prompt for prompt, _ in facts]
        flat = [query for row in queries for query in row]
        unique = list(dict.fromkeys([*prompts, *texts, *flat]))
        place = {text: number for number, text in enumerate(unique)}
        latents = self.encode(unique)

        count = bucket(len(facts), _FACTS)
        width = bucket(max((len(row) for row in queries), default=0), _QUERIES)
        # A fact of zeros is padding: it changes nothing (memory/contract.py).
        keys, values = np.zeros((2, count, latents.shape[1]), np.float32)
        keys[: len(facts)] = latents[[place[prompt] for prompt in prompts]]
        values[: len(facts)] = latents[[place[text] for text in texts]]
        asked = np.zeros((count, width, latents.shape[1]), np.float32)
        where = [(fact, slot) for fact, row in enumerate(queries) for slot in range(len(row))]
        fact, slot = np.asarray(where, np.int32).reshape(-1, 2).T
        asked[fact, slot] = latents[[place[query] for query in flat]]
        latent, innovation = _recall(self.memory, self._prior, keys, values, asked)
        latent, innovation = latent[fact, slot], innovation[fact, slot]

        scores = np.asarray(self.likeness(texts, queries), np.float32)
        return Recall(
            scope_score=scores,
            in_scope=scores >= self.threshold,
            condition=lambda rows: _condition(
                self._graph, self._state, latent[rows], innovation[rows]
            ),
        )

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n C"]:
        """Z = e(X) of n texts in one encoder call, float32.

        Raises:
            TextTooLong: a text exceeds what the encoder takes; names it.
        """
        limit = self.model.encoder.config.max_length
        batch = self.encoder_tokenizer.encode(texts)
        if batch.ids.shape[1] > limit:
            batch = self.encoder_tokenizer.encode(texts, limit)
        padding = ((0, bucket(len(texts), _TEXTS) - len(texts)), (0, 0))
        ids, mask = np.pad(batch.ids, padding), np.pad(batch.mask, padding)
        return np.asarray(_encode(self._graph, self._state, ids, mask))[: len(texts)]

    def zero(self, rows: int) -> Condition:
        """z = 0, innovation 0."""
        nothing = np.zeros((rows, self.memory.latent), np.float32)
        return _condition(self._graph, self._state, nothing, nothing)

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], condition: Condition | None
    ) -> np.ndarray:
        """`generate.score` of this model."""
        return generate.score(self.model, self.decoder_tokenizer, prompts, targets, condition)


def load(name: str) -> LarimarEditor:
    """The editor of a checkpoint, by its shipped name or its path, with its own scope detector."""
    from larimar_jax.session import Session  # Loads towers; a benchmark's --help should not.

    session = Session(name)
    return LarimarEditor(
        session.model,
        session.memory,
        session.encoder_tokenizer,
        session.decoder_tokenizer,
        session.scope.likeness,
        session.scope.threshold,
        {"name": name, "fingerprint": session.fingerprint},
    )


@functools.partial(jax.jit, static_argnums=0)
def _encode(
    graph: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "n S"], mask: Bool[Array, "n S"]
) -> Float[Array, "n C"]:
    return nnx.merge(graph, state).encode(tokens, mask)


@functools.partial(jax.jit, static_argnums=0)
def _condition(
    graph: nnx.GraphDef,
    state: nnx.State,
    latent: Float[Array, "n C"],
    innovation: Float[Array, "n C"],
) -> Condition:
    return nnx.merge(graph, state).condition(latent, innovation)


@jax.jit
def _recall(
    memory: Memory,
    prior: Prior,
    keys: Float[Array, "N C"],
    values: Float[Array, "N C"],
    queries: Float[Array, "N Q C"],
) -> tuple[Float[Array, "N Q C"], Float[Array, "N Q C"]]:
    """N memories of one fact each: their readouts, and the innovations Z_read − z_query (§10)."""

    def one(key, value, asked):
        state = memory.write(prior, memory.empty(prior), key[None], value[None])
        latent = memory.read(prior, state, asked).latent
        return latent, latent - asked

    return jax.vmap(one)(keys, values, queries)
