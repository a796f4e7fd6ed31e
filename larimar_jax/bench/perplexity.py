"""Perplexity of text that no fact is about, with facts in memory: is the language model left alone?

The rest of a held-out text after its first words, per token: exp of the mean −ln p over all tokens. And
what is decoded greedily after them: the entropy of its n-grams, which repetition lowers, and its TF-IDF
cosine to the rest that was written (fluency.py). Both depend on how long a text is, and a memory that is
let through says its answer and stops: against the lookup, text by text, both are cut to the words of the
shorter one. A text of fewer than three words has no entropy.

    base      the untouched language model
    zero      z = 0: the memory slot is there and holds zeros
    prompt    the fact that is nearest to the first words is written in front of every text
    lookup    it is, where the scope detector lets the text through, and no matrix
    larimar   the facts are in one memory, and the scope detector sees the first words
    open      the same memory, let through for every text

A memory whose perplexity is not below the lookup's, or whose text is not above it, says so.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table

from larimar_jax.bench import controls, fluency, given, metrics, systems
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import Encoded, Store, encoded
from larimar_jax.data import corpus
from larimar_jax.pipeline import Pipeline

SYSTEMS = {
    "base": "base LM",
    "zero": "z = 0",
    "prompt": "nearest fact in the prompt",
    "lookup": "nearest neighbour",
    "larimar": "Larimar with scope",
    "open": "Larimar without scope",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench perplexity`."""
    given.options(parser, "CounterFact's JSON file: what is in memory")
    parser.add_argument("--facts", type=int, default=512, help="in the memory (%(default)s)")
    parser.add_argument(
        "--corpus",
        default="wikipedia-summaries",
        help="where the texts are from: its held-out side (%(default)s)",
    )
    parser.add_argument("--texts", type=int, default=200, help="how many (%(default)s)")
    parser.add_argument(
        "--begun", type=int, default=8, help="words that are given and asked with (%(default)s)"
    )
    parser.add_argument(
        "--words", type=int, default=48, help="words of a text, the given ones included (%(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=40, help="decoded after the given words (%(default)s)"
    )
    systems.model_options(parser)
    parser.add_argument("--chunk", type=int, default=100, help="texts computed together (%(default)s)")


def experiment(args: argparse.Namespace) -> "Perplexity":
    """The experiment of a parsed command line; reads the data and loads the model.

    Raises:
        ValueError: there are fewer facts or texts than are asked for, or no words are left to judge.
    """
    from larimar_jax.data import edit_records

    if not 0 < args.begun < args.words:
        raise ValueError(f"--begun ({args.begun}) has to be above 0 and below --words ({args.words})")
    records, data = given.read(args, edit_records.load, args.facts)
    if len(records) < args.facts:
        raise ValueError(f"{args.data} has {len(records)} records and not {args.facts}")
    texts = []
    source = corpus.open_corpus(args.corpus)
    for document in source.side(held_out=True):
        words = document.text.split()
        if len(words) >= args.words and len(texts) < args.texts:
            texts.append(Text(len(texts), *_cut(words[: args.words], args.begun)))
    if len(texts) < args.texts:
        raise ValueError(
            f"{args.corpus} has {len(texts)} held-out texts of {args.words} words, and not {args.texts}"
        )
    data |= {"facts": args.facts, "texts": args.texts, "words": [args.begun, args.words]}
    data |= {"corpus": args.corpus, "corpus_identity": source.identity}
    facts = [(record.prompt, record.target_new) for record in records]
    options = dict(tokens=args.tokens, chunk=args.chunk)
    return Perplexity(systems.model(args), facts, texts, data=data, **options)


def _cut(words: Sequence[str], begun: int) -> tuple[str, str]:
    return " ".join(words[:begun]), " ".join(words[begun:])


@dataclasses.dataclass(frozen=True)
class Text:
    """begun: what is given. rest: what is judged."""

    case_id: int
    begun: str
    rest: str


# Of `values`, a hundred times.
UNIT = "hundredths of a nat per token"


def values(record: Record) -> dict[str, float]:
    """Mean ln p per token of a text by system."""
    return {label: -record["loss"][name] for name, label in SYSTEMS.items()}


def texts(record: Record) -> list[str]:
    """The text, and what every system makes of its beginning."""
    spoken = [f"{label}: {record['text'][name]}" for name, label in SYSTEMS.items()]
    return [f"{record['begun']} → {record['rest']}", *spoken]


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row a system."""
    results, count = summary["results"], summary["cases"]
    columns = ("perplexity", "over the base LM's", "words", "n-gram entropy", "likeness to the rest")
    table = Table("system", *columns, title=f"{count} held-out texts")
    for name, label in SYSTEMS.items():
        found = results[name]
        error = found["ratio_error"]
        over = f"{found['ratio']:.4f}" + ("" if error is None else f" ± {error:.4f}")
        row = [controls.noted(found, f"{found['perplexity']:.2f}"), over]
        entropy = controls.noted(found["entropy"], _bits(found["entropy"]))
        spoken = (f"{found['words']:.1f}", entropy, controls.noted(found["likeness"]))
        table.add_row(label, *row, *spoken)
    return [
        table,
        f"in scope: {100 * results['in_scope']:.1f} % of the texts; of what is decoded greedily, "
        f"at most {summary['settings']['tokens']} tokens: words, entropy in bits of those with at least "
        f"{fluency.LEAST}, TF-IDF cosine in percent; against the lookup with texts cut to one length",
    ]


def _bits(estimate: Mapping[str, Any]) -> str:
    """Of an estimate in hundredths of a bit."""
    error = estimate["standard_error"]
    if estimate["mean"] is None:
        return systems.number(None)
    return f"{estimate['mean'] / 100:.2f}" + ("" if error is None else f" ± {error / 100:.2f}")


class Perplexity:
    """See the head of this file; an experiment as in `runner.Experiment`."""

    name = "perplexity"
    tables = staticmethod(tables)

    def __init__(
        self,
        model: Pipeline,
        facts: Sequence[tuple[str, str]],
        texts: Sequence[Text],
        *,
        tokens: int,
        data: Mapping[str, Any],
        chunk: int = 100,
    ):
        self.model, self.facts, self.cases, self.chunk = model, list(facts), texts, chunk
        self._tokens = tokens
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "systems": list(SYSTEMS),
            "tokens": tokens,
            "chunk": chunk,
            "seed": None,
        }
        self._encoded: Encoded | None = None
        self._store: Store | None = None

    def run(self, cases: Sequence[Text]) -> list[Record]:
        """−ln p per token of every rest, and what is decoded in its place, under every system."""
        if self._encoded is None or self._store is None:
            begun = [text.begun for text in self.cases]
            self._encoded = encoded(self.model, self.facts, begun)
            self._store = Store(self._encoded, self.facts)
        prompts, rests = [text.begun for text in cases], [[text.rest] for text in cases]

        recall, nearest = self._store.recall(prompts)
        inside = recall.in_scope
        facts = [self._store.texts[fact] for fact in nearest]
        let = [fact if within else None for fact, within in zip(facts, inside, strict=True)]
        sides = {
            "base": prompts,
            "prompt": controls.in_front(facts, prompts),
            "lookup": controls.in_front(let, prompts),
        }
        found = controls.measured(self.model.score, sides, rests)
        zero, through = self.model.zero(len(cases)), recall.condition(np.arange(len(cases)))
        found["zero"] = self.model.score(prompts, rests, zero)
        found["open"] = self.model.score(prompts, rests, through)
        found["larimar"] = np.where(inside[:, None], found["open"], found["base"])
        told = controls.measured(lambda asked, _: self._decoded(asked), sides, [""] * len(cases))
        told |= {"zero": self._decoded(prompts, zero), "open": self._decoded(prompts, through)}
        told["larimar"] = np.where(inside, told["open"], told["base"])
        tokens = [len(self.model.decoder_tokenizer.following(text.rest)) for text in cases]
        return [
            {
                "case_id": text.case_id,
                "begun": text.begun,
                "rest": text.rest,
                "tokens": tokens[row],
                "scope_score": float(recall.scope_score[row]),
                "in_scope": bool(inside[row]),
                "nearest": facts[row],
                "loss": {name: float(found[name][row, 0]) for name in SYSTEMS},
                "text": {name: told[name][row] for name in SYSTEMS},
            }
            for row, text in enumerate(cases)
        ]

    def _decoded(self, prompts: Sequence[str], condition: Any = None) -> np.ndarray:
        options = dict(max_tokens=self._tokens, stop=())
        return np.asarray(self.model.generate(prompts, condition, **options), object)

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Perplexity by system, and its ratio to the base LM's with its standard error over texts; of
        what is decoded, the entropy in hundredths of a bit and the likeness in percent. Of a memory also
        what it gains on the lookup, of perplexity in hundredths of a nat per token, with notes."""
        tokens = np.asarray([record["tokens"] for record in records], np.float64)
        losses = {
            name: np.asarray([record["loss"][name] for record in records], np.float64)
            for name in SYSTEMS
        }
        results: dict[str, Any] = {"in_scope": float(np.mean([r["in_scope"] for r in records]))}
        rests = [fluency.words(record["rest"]) for record in records]
        spoken = {
            name: [fluency.words(record["text"][name]) for record in records] for name in SYSTEMS
        }
        for name, each in losses.items():
            found, error = ratio(each, losses["base"], tokens)
            results[name] = {
                "perplexity": float(np.exp((each * tokens).sum() / tokens.sum())),
                "ratio": found,
                "ratio_error": error,
                "words": float(np.mean([len(found) for found in spoken[name]])),
                "entropy": vars(metrics.estimate(_entropies(spoken[name]))),
                "likeness": vars(metrics.estimate(fluency.reference_scores(spoken[name], rests))),
            }
        # Each text by its tokens, as in a perplexity; the lower loss is the better one.
        weighted = {name: (each * tokens / tokens.mean()).tolist() for name, each in losses.items()}
        for name in systems.MEMORY_SYSTEMS:
            results[name] |= systems.versus_lookup(weighted[systems.CONTROL], weighted[name])
            ours, theirs = _alike(spoken[name], spoken[systems.CONTROL])
            compared = {
                "entropy": (_entropies(side) for side in (ours, theirs)),
                "likeness": (fluency.reference_scores(side, rests) for side in (ours, theirs)),
            }
            for what, sides in compared.items():
                results[name][what] |= systems.versus_lookup(*sides)
        return results


def ratio(
    losses: Float[np.ndarray, "n"], base: Float[np.ndarray, "n"], tokens: Float[np.ndarray, "n"]
) -> tuple[float, float | None]:
    """Of two perplexities of n texts, from losses in nats per token; and its standard error over texts,
    None for one text."""
    apart = (losses - base) * tokens
    found = float(np.exp(apart.sum() / tokens.sum()))
    if len(tokens) < 2:
        return found, None
    # The delta method for a ratio of two sums, and for its exp.
    left = apart - apart.sum() / tokens.sum() * tokens
    return found, found * float(left.std(ddof=1) / np.sqrt(len(tokens)) / tokens.mean())


# Of a text, its words.
_Words = Sequence[str]


def _entropies(spoken: Sequence[_Words]) -> list[float]:
    """Of the texts that have one."""
    return [fluency.ngram_entropy(found) for found in spoken if len(found) >= fluency.LEAST]


def _alike(one: Sequence[_Words], other: Sequence[_Words]) -> tuple[list[_Words], list[_Words]]:
    """Text by text, both cut to the words of the shorter one."""
    least = [min(map(len, pair)) for pair in zip(one, other, strict=True)]
    cut = (
        [found[:most] for found, most in zip(side, least, strict=True)] for side in (one, other)
    )
    return next(cut), next(cut)
