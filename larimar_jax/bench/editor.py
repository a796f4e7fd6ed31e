"""The edited model as benchmarks see it: a batch of cases, each with an empty memory of its own.

Benchmarks are written against `Editor`, so that they can be tested on a model whose answers are
known, and so that another edited model can be put beside Larimar in one file.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int


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
