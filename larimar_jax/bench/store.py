"""One memory of many facts as benchmarks see it: what is in it, and what it answers.

Beside `editor.py`, where every case has a memory of its own.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from larimar_jax import scope
from larimar_jax.bench.editor import Recall
from larimar_jax.memory.base import Prepared
from larimar_jax.memory.streaming import Streaming
from larimar_jax.pipeline import Encodings, Pipeline
from larimar_jax.weights.tokenizer import bucket

# Facts and queries are padded to a multiple of these or a power of two, so that few shapes compile.
_FACTS, _QUERIES = 8, 32


class Encoded:
    """The encodings of texts and of facts, (prompt, answer), as they are written; each computed once and
    all in one call, so that a run that is taken up has the very numbers of one that was not cut off."""

    def __init__(
        self, model: Pipeline, texts: Iterable[str], facts: Iterable[tuple[str, str]] = ()
    ):
        self.model = model
        unique, told = list(dict.fromkeys(texts)), list(dict.fromkeys(facts))
        self._place: dict[Any, int] = {key: row for row, key in enumerate([*unique, *told])}
        answers = [None] * len(unique) + [answer for _, answer in told]
        self._made = model.encode([*unique, *(written(*fact) for fact in told)], answers)

    def __call__(self, texts: Sequence[str]) -> Encodings:
        """Of n texts, in their order; KeyError for one that it was not made with."""
        rows = [self._place[text] for text in texts]
        return self._made[rows]

    def values(self, facts: Sequence[tuple[str, str]]) -> Float[np.ndarray, "n C"]:
        """What is written of n facts, in their order; KeyError for one that it was not made with."""
        return self._made.latent[[self._place[fact] for fact in facts]]


def written(prompt: str, answer: str) -> str:
    """The text that a written fact consists of."""
    return f"{prompt.strip()} {answer.strip()}"


def encoded(
    model: Pipeline, facts: Sequence[tuple[str, str]], queries: Sequence[str] = ()
) -> Encoded:
    """Whatever stores of these facts need, asked by their own prompts or by other queries."""
    prompts = [prompt for prompt, _ in facts]
    asked, _ = scope.split_sentences([*prompts, *queries])
    return Encoded(model, [*prompts, *asked], facts)


class Store:
    """A memory with its facts: keys are prompts, values prompts with answers (§4). They are written at
    once, where no `state` is given that holds them.

    Args:
        model: whose memory it is, where that is not the model that encoded the texts.
    Attributes:
        facts: (prompt, answer) of what is in it. texts: as written. keys, values: their encodings.
        state: of the streaming memory.
    """

    def __init__(
        self,
        encoded: Encoded,
        facts: Sequence[tuple[str, str]],
        state: Any = None,
        model: Pipeline | None = None,
    ):
        self._encoded, self.model = encoded, encoded.model if model is None else model
        self._hold(facts)
        self.state = state
        if state is None:
            self.state = self.model.memory.empty(self.model.prepared)
            self._change(range(len(self.facts)), +1)

    def plus(self, facts: Sequence[tuple[str, str]]) -> "Store":
        """The store with more facts, written beside those that are in."""
        made = self._copy([*self.facts, *facts])
        made._change(range(len(self.facts), len(made.facts)), +1)
        return made

    def without(self, gone: Sequence[int]) -> "Store":
        """The store with facts forgotten (α = −1); their texts are no more in it either."""
        made = self._copy(self.facts)
        made._change(gone, -1)
        made._hold([fact for place, fact in enumerate(self.facts) if place not in set(gone)])
        return made

    def _copy(self, facts: Sequence[tuple[str, str]]) -> "Store":
        made = object.__new__(Store)
        made._encoded, made.model, made.state = self._encoded, self.model, self.state
        made._hold(facts)
        return made

    def _hold(self, facts: Sequence[tuple[str, str]]) -> None:
        self.facts, self.texts = list(facts), [written(*fact) for fact in facts]
        prompts = self._encoded([prompt for prompt, _ in facts])
        self._embedding, self.keys = prompts.embedding, prompts.latent
        self.values = self._encoded.values(self.facts)

    def _change(self, chosen: Sequence[int], sign: int) -> None:
        rows = list(chosen)
        more = ((0, bucket(len(rows), _FACTS) - len(rows)), (0, 0))
        keys, values = np.pad(self.keys[rows], more), np.pad(self.values[rows], more)
        memory, prepared = self.model.memory, self.model.prepared
        self.state = _write(memory, prepared, self.state, keys, values, np.int32(sign))

    def recall(self, queries: Sequence[str]) -> tuple[Recall, list[int]]:
        """What it answers to each query, and the number of the fact that is nearest to it; −1 where the
        store is empty."""
        latent, found = self.read(queries)
        recall = Recall(
            scope_score=found.score,
            in_scope=found.within(self.model.scope_threshold),
            condition=lambda chosen: self.model.condition(latent[chosen]),
        )
        return recall, [int(key) for key in found.key]

    def read(self, queries: Sequence[str]) -> tuple[Float[np.ndarray, "Q C"], scope.Match]:
        """The readouts of queries, each by its sentence that is nearest to a fact."""
        sentences, owners = scope.split_sentences(queries)
        encodings = self._encoded(sentences)
        found = scope.nearest_key(encodings.embedding, owners, self._embedding)
        asked = encodings.latent[found.sentence]
        rows = bucket(len(asked), _QUERIES)
        padded = np.pad(asked, ((0, rows - len(asked)), (0, 0)))
        read = _read(self.model.memory, self.model.prepared, self.state, padded)
        return np.asarray(read)[: len(asked)], found


@jax.jit
def _write(
    memory: Streaming,
    prepared: Prepared,
    state: Any,
    keys: Float[Array, "N C"],
    values: Float[Array, "N C"],
    sign: Any,
) -> Any:
    return memory.update(prepared, state, keys, values, sign)


@jax.jit
def _read(
    memory: Streaming, prepared: Prepared, state: Any, queries: Float[Array, "Q C"]
) -> Float[Array, "Q C"]:
    return memory.read(prepared, state, queries).latent
