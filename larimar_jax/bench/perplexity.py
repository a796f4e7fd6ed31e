"""Perplexity of text that no fact is about, with facts in memory: is the language model left alone?

The rest of a held-out text after its first words, per token: exp of the mean −ln p over all tokens.
And what is decoded greedily after them: the entropy of its n-grams, which repetition lowers, and its
TF-IDF cosine to the rest that was written (fluency.py). Both depend on how long a text is, and a memory
that is let through gives its answer and stops: what it gains on the lookup is of texts that are cut to
the words of the shorter one. A text of fewer than three words has no entropy.

Verbatim lookup has no perplexity: a forced answer is no distribution over tokens. The control with a
fact in the prompt has the fact that is nearest to the first words, in every text.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from larimar_jax.bench import fluency
from larimar_jax.bench.fact_store import FactStore, encode_facts
from larimar_jax.bench.queries import MEMORIES
from larimar_jax.bench.task import ComparedTask, Metric, Pivot, Plot, option
from larimar_jax.data.corpus import Corpus, open_corpus

_LOSS = dict(scale=1.0, lower=True, weight="tokens", exponential=True)


@dataclasses.dataclass(frozen=True)
class HeldOutText:
    """A text. prompt: its first words. rest: the words that are judged."""

    case_id: int
    prompt: str
    rest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(ComparedTask):
    """Perplexity of text that no fact is about, with facts in memory: is the LM left alone?"""

    metrics: ClassVar = {
        "loss": Metric("perplexity", digits=2, **_LOSS),
        "loss_above_base": Metric(
            "perplexity over the base LM's", digits=4, compared=False, **_LOSS
        ),
        "words": Metric("words", 1.0, compared=False),
        "entropy": Metric("n-gram entropy, bits", 1.0, 2, compared=False),
        "entropy_gain": Metric("its gain on the lookup", 1.0, 2, gain=True),
        "likeness": Metric("likeness to the rest, %", compared=False),
        "likeness_gain": Metric("its gain on the lookup, %", gain=True),
        "in_scope": Metric("in scope, %", compared=False),
    }
    labels: ClassVar = {"prompt": "nearest fact in the prompt", "text": "texts"}
    tables: ClassVar = (Pivot(columns=None, title="held-out texts"),)
    plots: ClassVar = (Plot(y="loss_above_base", log="y"),)

    facts: int = option("facts in the memory", default=512)
    corpus: str = option(
        "where the texts come from: its held-out side", default="wikipedia-summaries"
    )
    texts: int = option("how many texts", default=200)
    prompt_words: int = option("words of a text that stand in the prompt", default=8)
    words: int = option("words of a text, those of the prompt included", default=48)
    tokens: int = option("tokens that are decoded after the prompt, at most", default=40)
    chunk: int = option("texts computed together", default=100)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.prompt_words < self.words:
            raise ValueError(
                f"--prompt-words ({self.prompt_words}) has to be above 0 and below --words "
                f"({self.words})"
            )

    def records_needed(self) -> int:
        return self.facts

    @functools.cached_property
    def _corpus(self) -> Corpus:
        return open_corpus(self.corpus)

    @functools.cached_property
    def _texts(self) -> list[HeldOutText]:
        texts: list[HeldOutText] = []
        for document in self._corpus.side(held_out=True):
            words = document.text.split()
            if len(words) >= self.words and len(texts) < self.texts:
                sides = words[: self.prompt_words], words[self.prompt_words : self.words]
                texts.append(HeldOutText(len(texts), *map(" ".join, sides)))
        if len(texts) < self.texts:
            raise ValueError(
                f"{self.corpus} has {len(texts)} held-out texts of {self.words} words, and not "
                f"{self.texts}"
            )
        return texts

    def data_settings(self) -> dict[str, Any]:
        return super().data_settings() | {"corpus_identity": self._corpus.identity}

    def cases(self, systems) -> Sequence[HeldOutText]:
        """Return the texts; ValueError where there are fewer, or fewer facts, than are asked for."""
        self.require(self.facts, "are to be in the memory", "--facts")
        return self._texts

    def evaluate(self, systems, cases: Sequence[HeldOutText]) -> Iterator[dict[str, Any]]:
        """Yield ℓ of the rest of each text, and how what is decoded in its place reads."""
        store = systems.cached("store", self.facts, lambda: self._store(systems))
        rests = [fluency.words(text.rest) for text in self._texts]
        tfidf = systems.cached("tfidf", self.texts, lambda: fluency.TfIdf(rests))
        columns = [{"prompt": text.prompt} for text in cases]
        near = store.nearest([text.prompt for text in cases])
        queries = systems.shared_memories([(store, columns, near)])
        losses = queries.score([[text.rest] for text in cases])
        decoded = queries.generate(self.tokens)
        for row, text in enumerate(cases):
            rest = fluency.words(text.rest)
            lookup = fluency.words(decoded["lookup"][row])
            for system, loss in losses.items():
                words = fluency.words(decoded[system][row])
                gains = {}
                if system in MEMORIES:
                    least = min(len(words), len(lookup))
                    sides = (words[:least], lookup[:least])
                    ours, theirs = (tfidf.cosine(side, rest) for side in sides)
                    gains["likeness_gain"] = ours - theirs
                    if least >= fluency.LEAST:
                        ours, theirs = map(fluency.ngram_entropy, sides)
                        gains["entropy_gain"] = ours - theirs
                long_enough = len(words) >= fluency.LEAST
                nats = None if system == "verbatim" else float(loss[row, 0])
                above = None if nats is None else nats - float(losses["base"][row, 0])
                yield {
                    "case": text.case_id,
                    "system": system,
                    "kind": "text",
                    "loss": nats,
                    "loss_above_base": above,
                    "tokens": len(systems.editor.tokens(text.rest)),
                    "in_scope": float(queries.in_scope[row]) if system in MEMORIES else None,
                    "words": len(words),
                    "entropy": fluency.ngram_entropy(words) if long_enough else None,
                    "likeness": tfidf.cosine(words, rest),
                    **gains,
                    "prompt": text.prompt,
                    "rest": text.rest,
                    "text": decoded[system][row],
                }

    def _store(self, systems) -> FactStore:
        facts = [(record.prompt, record.target_new) for record in self.records]
        prompts = [text.prompt for text in self._texts]
        return FactStore(encode_facts(systems.model, facts, prompts), facts)
