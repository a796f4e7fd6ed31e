"""The edited model as benchmarks see it: a batch of cases, each with an empty memory of its own.

Benchmarks are written against `Editor`, so that they can be tested on a model whose answers are
known, and so that another edited model can be put beside Larimar in one file.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from larimar_jax import scope
from larimar_jax.memory.base import Memory, Prepared
from larimar_jax.model import Condition
from larimar_jax.pipeline import Pipeline, load
from larimar_jax.sampling import one_each
from larimar_jax.weights.tokenizers import bucket


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

    def recall(
        self,
        facts: Sequence[tuple[str, str]],
        queries: Sequence[Sequence[str]],
        wordings: Sequence[Sequence[str]] = (),
        told: bool = False,
    ) -> Recall:
        """Writes (prompt, answer) n into empty memory n, and wordings n with the same answer; reads
        queries n from it. told: the scope detector compares with the written text, and not with its
        prompt."""

    def zero(self, rows: int) -> Any:
        """The condition z = 0 for so many rows."""

    def score(
        self, prompts: Sequence[str], candidates: Sequence[Sequence[str]], condition: Any
    ) -> np.ndarray:
        """ℓ of c candidates after each of n prompts, in nats, float32 [n, c]; None is the base LM."""

    def accuracy(
        self, prompts: Sequence[str], targets: Sequence[str], condition: Any
    ) -> np.ndarray:
        """The share of each target's tokens that are the likeliest, teacher-forced, float32 [n]."""

    def pieces(self, target: str) -> list[str]:
        """The beginnings of a target, each by one more of the decoder's tokens, to the whole of it."""

    def hits(
        self, prompts: Sequence[str], targets: Sequence[str], places: Sequence[int], condition: Any
    ) -> np.ndarray:
        """Whether the token at a place of each target is the likeliest, teacher-forced, float32 [n]."""

    def generate(self, prompts: Sequence[str], condition: Any, tokens: int) -> list[str]:
        """The greedy continuations of n prompts by so many tokens at the most."""


# Rows and queries are padded to these, so that few shapes are compiled.
_FACTS, _QUERIES = 8, 4


class LarimarEditor:
    """Larimar with its scope detector; one encoder call and one vmapped write and read a chunk.

    Args:
        model: what is edited: by its shipped name, by its path, or loaded.
    """

    def __init__(self, model: Pipeline | str):
        self.model = model if isinstance(model, Pipeline) else load(model)
        self.settings = {
            "model": self.model.source,
            "fingerprint": self.model.fingerprint,
            "editing": dataclasses.asdict(self.model.config.editing),
        }

    def written(self, prompt: str, answer: str) -> str:
        """Prompt and answer with one space between them."""
        return f"{prompt.strip()} {answer.strip()}"

    def recall(
        self,
        facts: Sequence[tuple[str, str]],
        queries: Sequence[Sequence[str]],
        wordings: Sequence[Sequence[str]] = (),
        told: bool = False,
        rng: Key[Array, " N"] | None = None,
    ) -> Recall:
        """The key of a fact is its prompt's encoding, its value that of the written text (§4).

        Args:
            rng: a key for every fact, with which W is drawn around its mean with the model's σ_W
                (Algorithm 1); None reads the mean.

        Raises:
            ValueError: keys, but not one a fact.
        """
        more = wordings or [()] * len(facts)
        rows_of = [
            (number, slot, prompt, answer)
            for number, ((first, answer), others) in enumerate(zip(facts, more, strict=True))
            for slot, prompt in enumerate([first, *others])
        ]
        owner, line, prompts, answers = zip(*rows_of, strict=True) if rows_of else ((), (), (), ())
        owner, line = np.asarray(owner, np.int32), np.asarray(line, np.int32)
        texts = [self.written(prompt, answer) for _, _, prompt, answer in rows_of]
        flat = [query for row in queries for query in row]
        sentences, owners = scope.split_sentences(flat)
        unique = list(dict.fromkeys([*prompts, *sentences]))
        place = {text: number for number, text in enumerate(unique)}
        encodings = self.model.encode([*unique, *texts], [None] * len(unique) + [*answers])

        def rows(chosen):
            return [place[text] for text in chosen]

        where = [(fact, slot) for fact, row in enumerate(queries) for slot in range(len(row))]
        fact, slot = np.asarray(where, np.int32).reshape(-1, 2).T
        own = fact[:, None] == owner
        written = encodings.embedding[len(unique) :] if told else encodings.embedding[rows(prompts)]
        found = scope.nearest_key(encodings.embedding[rows(sentences)], owners, written, own)
        best = [sentences[number] for number in found.sentence]

        latents = encodings.latent
        count = bucket(len(facts), _FACTS)
        width = bucket(max((len(row) for row in queries), default=0), _QUERIES)
        # A fact of zeros is padding: it changes nothing (memory/contract.py).
        deep = 1 + max(map(len, more), default=0)
        keys, values = np.zeros((2, count, deep, latents.shape[1]), np.float32)
        keys[owner, line], values[owner, line] = latents[rows(prompts)], latents[len(unique) :]
        asked = np.zeros((count, width, latents.shape[1]), np.float32)
        asked[fact, slot] = latents[rows(best)]
        rng = None if rng is None else one_each(rng, len(facts), count)
        read = np.asarray(_recall(self.model.dual, self.model.prepared, keys, values, asked, rng))
        read = read[fact, slot]
        return Recall(
            scope_score=found.score,
            in_scope=found.within(self.model.scope_threshold),
            condition=lambda chosen: self.model.condition(read[chosen]),
        )

    def zero(self, rows: int) -> Condition:
        """z = 0, and nothing spelled."""
        return self.model.zero(rows)

    def score(
        self,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        condition: Condition | None,
    ) -> np.ndarray:
        """`scoring.score` of this model."""
        return self.model.score(prompts, candidates, condition)

    def accuracy(
        self, prompts: Sequence[str], targets: Sequence[str], condition: Condition | None
    ) -> np.ndarray:
        """`scoring.judge` of this model."""
        return self.model.judge(prompts, [[t] for t in targets], condition).accuracy[:, 0]

    def pieces(self, target: str) -> list[str]:
        """As the decoder's tokenizer splits it."""
        ids = self.model.decoder_tokenizer.following(target.strip())
        cut = range(1, len(ids) + 1)
        return [self.model.decoder_tokenizer.decode(ids[:end]).strip() for end in cut]

    def hits(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        places: Sequence[int],
        condition: Condition | None,
    ) -> np.ndarray:
        """`scoring.judge` of this model, a token of each target."""
        found = self.model.judge(prompts, [[t] for t in targets], condition).hits[:, 0]
        return found[np.arange(len(places)), np.asarray(places, np.int64)].astype(np.float32)

    def generate(
        self, prompts: Sequence[str], condition: Condition | None, tokens: int
    ) -> list[str]:
        """`generate.generate` of this model, through line breaks."""
        return self.model.generate(prompts, condition, max_tokens=tokens, stop=())


@jax.jit
def _recall(
    memory: Memory,
    prepared: Prepared,
    keys: Float[Array, "N W C"],
    values: Float[Array, "N W C"],
    queries: Float[Array, "N Q C"],
    rng: Key[Array, "N"] | None,
) -> Float[Array, "N Q C"]:
    """The readouts of N memories of one fact each, in W wordings; each draws with a key of its own."""

    def one(key, value, asked, rng):
        state = memory.write(prepared, memory.empty(prepared), key, value)
        return memory.read(prepared, state, asked, rng).latent

    return jax.vmap(one)(keys, values, queries, rng)
