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
from larimar_jax.memory.contract import Prior
from larimar_jax.memory.streaming import Streaming
from larimar_jax.pretrained import Encodings, Pretrained
from larimar_jax.weights.tokenizers import bucket

# Facts and queries are padded to a multiple of these or a power of two, so that few shapes compile.
_FACTS, _QUERIES = 8, 32


class Encoded:
    """The encodings of texts, each computed once and all in one call, so that a run that is taken up
    has the very numbers of one that was not cut off."""

    def __init__(self, model: Pretrained, texts: Iterable[str]):
        self.model = model
        unique = list(dict.fromkeys(texts))
        self._place = {text: row for row, text in enumerate(unique)}
        self._made = model.encode(unique)

    def __call__(self, texts: Sequence[str]) -> Encodings:
        """Of n texts, in their order; KeyError for one that it was not made with."""
        rows = [self._place[text] for text in texts]
        return Encodings(self._made.embedding[rows], self._made.latent[rows])


def written(prompt: str, answer: str) -> str:
    """The text that a written fact consists of."""
    return f"{prompt.strip()} {answer.strip()}"


def encoded(
    model: Pretrained, facts: Sequence[tuple[str, str]], queries: Sequence[str] = ()
) -> Encoded:
    """Whatever stores of these facts need, asked by their own prompts or by other queries."""
    prompts = [prompt for prompt, _ in facts]
    asked, _ = scope.parts([*prompts, *queries])
    return Encoded(model, [*prompts, *(written(*fact) for fact in facts), *asked])


class Store:
    """A memory with its facts: keys are prompts, values prompts with answers (§4).

    Attributes:
        facts: (prompt, answer) of what is in it. texts: as written.
    """

    def __init__(self, encoded: Encoded, facts: Sequence[tuple[str, str]]):
        self._encoded, self.model, self.facts = encoded, encoded.model, list(facts)
        self.texts = [written(*fact) for fact in facts]
        prompts = encoded([prompt for prompt, _ in facts])
        self._embedding, self._keys = prompts.embedding, prompts.latent
        self._values = encoded(self.texts).latent
        memory, prior = self.model.memory, self.model.prior
        empty = memory.empty(prior)
        self.state = _write(memory, prior, empty, *self._padded(range(len(facts))), 1)

    def without(self, gone: Sequence[int]) -> "Store":
        """The store with facts forgotten (α = −1); their texts are no more in it either."""
        kept = [place for place in range(len(self.facts)) if place not in set(gone)]
        made = object.__new__(Store)
        made._encoded, made.model = self._encoded, self.model
        made.facts, made.texts = ([side[i] for i in kept] for side in (self.facts, self.texts))
        made._embedding, made._keys = self._embedding[kept], self._keys[kept]
        made._values = self._values[kept]
        memory, prior = self.model.memory, self.model.prior
        made.state = _write(memory, prior, self.state, *self._padded(gone), -1)
        return made

    def recall(self, queries: Sequence[str]) -> tuple[Recall, list[int]]:
        """What it answers to each query, and the number of the fact that is nearest to it; −1 where the
        store is empty."""
        sentences, owners = scope.parts(queries)
        encodings = self._encoded(sentences)
        found = scope.match(encodings.embedding, owners, self._embedding)
        asked = encodings.latent[found.sentence]
        rows = bucket(len(asked), _QUERIES)
        padded = np.pad(asked, ((0, rows - len(asked)), (0, 0)))
        read = _read(self.model.memory, self.model.prior, self.state, padded)
        latent = np.asarray(read)[: len(asked)]
        recall = Recall(
            scope_score=found.score,
            in_scope=found.within(self.model.scope_threshold),
            condition=lambda chosen: self.model.condition(
                latent[chosen], latent[chosen] - asked[chosen]
            ),
        )
        return recall, [int(key) for key in found.key]

    def _padded(self, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        rows = list(chosen)
        more = ((0, bucket(len(rows), _FACTS) - len(rows)), (0, 0))
        return np.pad(self._keys[rows], more), np.pad(self._values[rows], more)


@jax.jit
def _write(
    memory: Streaming,
    prior: Prior,
    state: Any,
    keys: Float[Array, "N C"],
    values: Float[Array, "N C"],
    sign: Any,
) -> Any:
    return memory.write(prior, state, keys, values, sign)


@jax.jit
def _read(
    memory: Streaming, prior: Prior, state: Any, queries: Float[Array, "Q C"]
) -> Float[Array, "Q C"]:
    return memory.read(prior, state, queries).latent
