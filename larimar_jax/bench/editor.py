"""The edited model as benchmarks see it: a batch of cases, each with an empty memory of its own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from larimar_jax import scope
from larimar_jax.bench.peers import by_model
from larimar_jax.generate import row_keys
from larimar_jax.latent_layout import Condition
from larimar_jax.memory.base import Memory, Prepared
from larimar_jax.pipeline import Pipeline
from larimar_jax.weights.tokenizer import bucket


@dataclasses.dataclass(frozen=True)
class Recall:
    """What memories answer to their queries, all queries in one row, R of them.

    scope_score: likeness of each query to its nearest fact. in_scope: whether the scope detector
    lets the memory decide. condition: positions in that row [n] → the decoder's condition, one row
    each.
    """

    scope_score: Float[np.ndarray, " R"]
    in_scope: Bool[np.ndarray, " R"]
    condition: Callable[[Int[np.ndarray, " n"]], Any]


def written(prompt: str, answer: str) -> str:
    """Return the text that a written fact consists of: both with one space between them."""
    return f"{prompt.strip()} {answer.strip()}"


# Rows and queries are padded to these, so that few shapes are compiled.
_FACTS, _QUERIES = 8, 4


class LarimarEditor:
    """Larimar with its scope detector: one encoder call, and one vmapped write and read a chunk.

    settings: what decides its numbers, as JSON: weights, thresholds. A condition is what the decoder is
    handed, a row a prompt; None is the base LM.
    """

    def __init__(self, model: Pipeline):
        self.model = model
        self.settings = {
            "name": model.source,
            "fingerprint": model.fingerprint,
            "editing": dataclasses.asdict(model.config.editing),
            "slots": model.memory.slots,
        }

    def written(self, prompt: str, answer: str) -> str:
        """Return `written` of a fact."""
        return written(prompt, answer)

    def recall(
        self,
        facts: Sequence[tuple[str, str]],
        queries: Sequence[Sequence[str]],
        wordings: Sequence[Sequence[str]] = (),
        by_text: bool = False,
        rng: Key[Array, " N"] | None = None,
    ) -> Recall:
        """Read each case's queries from a memory of its own fact; its key is its prompt's encoding,
        its value that of the written text (§4).

        Args:
            wordings: of each case, more prompts that are written with the same answer.
            by_text: whether the scope detector compares with the written text, and not its prompt.
            rng: a key for every fact, with which W is drawn around its mean with the model's σ_W
                (Algorithm 1); None reads the mean.

        Raises:
            ValueError: keys, but not one a fact.
        """
        extra = wordings or [()] * len(facts)
        rows = [
            (number, slot, prompt, answer)
            for number, ((first, answer), more) in enumerate(zip(facts, extra, strict=True))
            for slot, prompt in enumerate([first, *more])
        ]
        owner, line, prompts, answers = zip(*rows, strict=True) if rows else ((), (), (), ())
        owner, line = np.asarray(owner, np.int32), np.asarray(line, np.int32)
        texts = [written(prompt, answer) for _, _, prompt, answer in rows]
        written_prompts = scope.by_words(prompts)
        questions = [scope.question(query, written_prompts) for row in queries for query in row]
        unique = list(dict.fromkeys([*prompts, *questions]))
        place = {text: number for number, text in enumerate(unique)}
        encodings = self.model.encode([*unique, *texts], [None] * len(unique) + [*answers])
        of_prompts = [place[text] for text in prompts]
        of_texts = slice(len(unique), None)
        of_questions = [place[text] for text in questions]

        where = [(fact, slot) for fact, row in enumerate(queries) for slot in range(len(row))]
        fact, slot = np.asarray(where, np.int32).reshape(-1, 2).T
        match = scope.nearest_key(
            encodings.embedding[of_questions],
            encodings.embedding[of_texts if by_text else of_prompts],
            (fact[:, None] == owner)
            & scope.comparable(self.model.relations, questions, texts if by_text else prompts),
        )

        latents = encodings.latent
        count = bucket(len(facts), _FACTS)
        width = bucket(max(map(len, queries), default=0), _QUERIES)
        # A fact of zeros is padding: it changes nothing (memory/base.py).
        deep = 1 + max(map(len, extra), default=0)
        keys, values = np.zeros((2, count, deep, latents.shape[1]), np.float32)
        keys[owner, line], values[owner, line] = latents[of_prompts], latents[of_texts]
        asking = np.zeros((count, width, latents.shape[1]), np.float32)
        asking[fact, slot] = latents[of_questions]
        rng = None if rng is None else row_keys(rng, len(facts), count)
        memory, prepared = self.model.dual, self.model.prepared
        readout = np.asarray(_recall(memory, prepared, keys, values, asking, rng))[fact, slot]
        return Recall(
            scope_score=match.score,
            in_scope=match.within(self.model.scope_threshold),
            condition=lambda chosen: self.model.condition(readout[chosen]),
        )

    def zero(self, rows: int) -> Condition:
        """Return z = 0, without an answer code."""
        return self.model.zero(rows)

    def score(self, prompts, candidates, condition) -> Float[np.ndarray, "n c"]:
        """Return `scoring.score` of this model."""

        def score(model, condition, rows):
            chosen = ([each[row] for row in rows] for each in (prompts, candidates))
            return model.score(*chosen, condition)

        return np.asarray(by_model(self.model, prompts, condition, score), np.float32)

    def hits(self, prompts, targets, condition) -> list[Bool[np.ndarray, "_"]]:
        """Return `hits` of `scoring.judge`."""

        def judge(model, condition, rows):
            chosen = [prompts[row] for row in rows], [[targets[row]] for row in rows]
            return model.judge(*chosen, condition).hits[:, 0]

        hits = by_model(self.model, prompts, condition, judge)
        lengths = [len(self.tokens(target)) for target in targets]
        return [row[:length] for row, length in zip(hits, lengths, strict=True)]

    def generate(self, prompts, condition, tokens: Sequence[int]) -> list[str]:
        """Return `generate.generate` of this model, through line breaks: an answer may follow
        one."""

        def generate(model, condition, rows):
            chosen = ([each[row] for row in rows] for each in (prompts, tokens))
            texts, limits = chosen
            return model.generate(texts, condition, max_tokens=limits, stop=())

        return by_model(self.model, prompts, condition, generate)

    def tokens(self, target: str) -> list[int]:
        """Return a target's tokens as the decoder's tokenizer splits it after a space."""
        return self.model.decoder_tokenizer.following(target.strip())

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of the decoder's tokens."""
        return self.model.decoder_tokenizer.decode(list(tokens))


@jax.jit
def _recall(
    memory: Memory,
    prepared: Prepared,
    keys: Float[Array, "N W C"],
    values: Float[Array, "N W C"],
    queries: Float[Array, "N Q C"],
    rng: Key[Array, "N"] | None,
) -> Float[Array, "N Q C"]:
    """Return readouts of N memories of one fact each, in W wordings; each draws with a key of its
    own."""

    def recall(key, value, query, rng):
        state = memory.write(prepared, memory.empty(prepared), key, value)
        return memory.read(prepared, state, query, rng).latent

    return jax.vmap(recall)(keys, values, queries, rng)
