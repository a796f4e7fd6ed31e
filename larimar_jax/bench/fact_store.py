"""One memory of many facts as benchmarks see it: what is in it, and what it answers.

Beside `editor.py`, where every case has a memory of its own.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from larimar_jax import scope
from larimar_jax.bench.editor import written
from larimar_jax.memory.base import Prepared
from larimar_jax.memory.finite import MemoryNotFinite
from larimar_jax.memory.streaming import Streaming
from larimar_jax.pipeline import Encodings, Pipeline
from larimar_jax.weights.tokenizer import bucket

# Facts and queries are padded to a multiple of these or a power of two, so that few shapes compile.
_FACTS, _QUERIES = 8, 32

Fact = tuple[str, str]


class EncodedTexts:
    """Encodings of texts and of facts, (prompt, answer), as they are written.

    Each is computed once and all in one call, so that a run that is taken up has the very numbers
    of one that was not cut off. KeyError for a text that it was not made with.
    """

    def __init__(self, model: Pipeline, texts: Iterable[str], facts: Iterable[Fact] = ()):
        self.model = model
        unique, facts = list(dict.fromkeys(texts)), list(dict.fromkeys(facts))
        self._place: dict[Any, int] = {key: row for row, key in enumerate([*unique, *facts])}
        answers = [None] * len(unique) + [answer for _, answer in facts]
        self._encodings = model.encode([*unique, *(written(*fact) for fact in facts)], answers)

    def __call__(self, texts: Sequence[str]) -> Encodings:
        """Return the encodings of n texts, in their order."""
        return self._encodings[[self._place[text] for text in texts]]

    def values(self, facts: Sequence[Fact]) -> Float[np.ndarray, "n C"]:
        """Return what is written of n facts, in their order."""
        return self._encodings.latent[[self._place[fact] for fact in facts]]


def encode_facts(
    model: Pipeline, facts: Sequence[Fact], queries: Sequence[str] = ()
) -> EncodedTexts:
    """Return all encodings that stores of these facts need, asked by their own prompts or by other
    queries."""
    prompts = [prompt for prompt, _ in facts]
    questions = [scope.question(query) for query in (*prompts, *queries)]
    return EncodedTexts(model, [*prompts, *questions], facts)


class FactStore:
    """A memory with its facts: keys are prompts, values prompts with answers (§4).

    Args:
        state: of the streaming memory, where one holds the facts already; else they are written at
            once.
        model: whose memory it is, where that is not the model that encoded the texts.
    Raises:
        MemoryNotFinite: float32 cannot solve for the facts, here or in `plus`.
    Attributes:
        facts: (prompt, answer) of what is in it. texts: as written. keys, values: their encodings.
    """

    def __init__(
        self,
        encoded: EncodedTexts,
        facts: Sequence[Fact],
        state: Any = None,
        model: Pipeline | None = None,
    ):
        self._encoded, self.model = encoded, encoded.model if model is None else model
        self._hold(facts)
        self.state = state
        if state is not None and not np.isfinite(state.solution).all():
            raise self._not_finite()
        if state is None:
            self.state = self.model.memory.empty(self.model.prepared)
            self._update(range(len(self.facts)), +1)

    def plus(self, facts: Sequence[Fact]) -> "FactStore":
        """Return the store with more facts, written beside those that are in."""
        store = FactStore(self._encoded, [*self.facts, *facts], self.state, self.model)
        store._update(range(len(self.facts), len(store.facts)), +1)
        return store

    def without(self, gone: Sequence[int]) -> "FactStore":
        """Return the store with facts forgotten (α = −1); their texts are no more in it either."""
        store = FactStore(self._encoded, self.facts, self.state, self.model)
        store._update(gone, -1)
        store._hold([fact for place, fact in enumerate(self.facts) if place not in set(gone)])
        return store

    def _not_finite(self) -> MemoryNotFinite:
        return MemoryNotFinite(
            f"A memory could not be solved for {len(self.facts)} facts in float32. Its ridge "
            f"({float(self.model.memory.ridge):g}) is too small for them: set a larger editing.ridge."
        )

    def _hold(self, facts: Sequence[Fact]) -> None:
        self.facts, self.texts = list(facts), [written(*fact) for fact in facts]
        prompts = self._encoded([prompt for prompt, _ in facts])
        self._embedding, self.keys = prompts.embedding, prompts.latent
        self.values = self._encoded.values(self.facts)

    def _update(self, chosen: Sequence[int], sign: int) -> None:
        rows = list(chosen)
        padding = ((0, bucket(len(rows), _FACTS) - len(rows)), (0, 0))
        keys, values = np.pad(self.keys[rows], padding), np.pad(self.values[rows], padding)
        before = int(self.state.refused)
        self.state = self.model.memory.update(
            self.model.prepared, self.state, keys, values, np.int32(sign)
        )
        if sign > 0 and int(self.state.refused) > before:
            raise self._not_finite()

    def read(self, queries: Sequence[str]) -> tuple[Float[np.ndarray, "Q C"], scope.Match]:
        """Return the readouts of queries, each by its `scope.question`."""
        written_prompts = scope.by_words([prompt for prompt, _ in self.facts])
        questions = [scope.question(query, written_prompts) for query in queries]
        encodings = self._encoded(questions)
        latent = encodings.latent
        allowed = scope.comparable(self.model.relations, questions, [p for p, _ in self.facts])
        match = scope.nearest_key(encodings.embedding, self._embedding, allowed)
        rows = bucket(len(latent), _QUERIES)
        padded = np.pad(latent, ((0, rows - len(latent)), (0, 0)))
        readout = _read(self.model.memory, self.model.prepared, self.state, padded)
        return np.asarray(readout)[: len(latent)], match

    def nearest(self, queries: Sequence[str]) -> list[str]:
        """Return the fact whose prompt is nearest to each query, be it of another relation."""
        embedding = self._encoded(queries).embedding
        return [self.texts[key] for key in scope.nearest_key(embedding, self._embedding).key]


@jax.jit
def _read(
    memory: Streaming, prepared: Prepared, state: Any, queries: Float[Array, "Q C"]
) -> Float[Array, "Q C"]:
    return memory.read(prepared, state, queries).latent
