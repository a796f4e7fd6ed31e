"""What the noise of addressing costs: edit success and fluency as σ_W grows (Fig. 6).

Each fact of CounterFact is written into an empty memory of its own, and W is drawn around its mean
(Algorithm 1) with one σ_W after the other, for all weights alike. Measured are S of edit and paraphrases
through the memory, whether or not they are in scope, and the perplexity that the base LM gives to the
greedy continuation of the edit prompt. The control is the base LM with its own continuation.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from larimar_jax.bench import given, metrics, systems
from larimar_jax.bench.editor import LarimarEditor
from larimar_jax.bench.runner import Record
from larimar_jax.data.records import EditRecord
from larimar_jax.pretrained import Pretrained

BASE = "base"
KINDS = ("edit", "paraphrase")
SIGMAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench noise`."""
    given.options(parser, "CounterFact's JSON file, either schema")
    parser.add_argument("--limit", type=int, default=100, help="records (%(default)s)")
    parser.add_argument(
        "--sigmas", type=float, nargs="+", default=list(SIGMAS), help="σ_W (%(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=20, help="of a continuation (%(default)s)")
    systems.model_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--chunk", type=int, default=25, help="cases computed together (%(default)s)")


def experiment(args: argparse.Namespace) -> "Noise":
    """The experiment of a parsed command line; reads the data and loads the model."""
    from larimar_jax.data import counterfact

    cases, data = given.read(args, counterfact.load, args.limit)
    data |= {"limit": args.limit}
    options = dict(tokens=args.tokens, seed=args.seed, chunk=args.chunk)
    return Noise(systems.model(args), cases, args.sigmas, data=data, **options)


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row for every σ_W."""
    title = f"σ_W, {summary['cases']} facts: S in percent, perplexity of the continuation"
    table = Table("σ_W", *(f"{kind} S" for kind in KINDS), "perplexity", title=title)
    for name, found in summary["results"].items():
        cells = [systems.percent(found[kind]) for kind in KINDS]
        table.add_row("base LM" if name == BASE else name, *cells, systems.number(found["perplexity"]))
    return [table]


PAPER = "Fig. 6: perplexity of generations and edit success against σ_W (a figure without numbers)."


def values(record: Record) -> dict[str, float]:
    """S of the edit prompt by σ_W."""
    return {
        f"σ_W = {name}, edit": metrics.success("edit", *np.asarray(found["edit"]).T)
        for name, found in record["loss"].items()
    }


def texts(record: Record) -> list[str]:
    """The continuations under every σ_W."""
    said = record["text"].items()
    return [f"written: {record['written']}"] + [f"σ_W = {name}: {text}" for name, text in said]


def draw(axes: Any, summary: Mapping[str, Any]) -> None:
    """S against σ_W, and the perplexity on an axis of its own."""
    results = {name: found for name, found in summary["results"].items() if name != BASE}
    places = np.arange(len(results))
    for kind in KINDS:
        rows = [found[kind] for found in results.values()]
        errors = [row["standard_error"] or 0.0 for row in rows]
        axes.errorbar(places, [row["mean"] for row in rows], errors, marker="o", label=f"{kind} S")
    axes.set_xticks(places, list(results))
    axes.set_ylim(0, 101)
    axes.set_xlabel("σ_W")
    axes.set_ylabel("S (percent, ± standard error)")
    beside = axes.twinx()
    found = [row["perplexity"] or math.nan for row in results.values()]
    beside.plot(places, found, color="grey", linestyle="--", label="perplexity")
    beside.set_yscale("log")
    beside.set_ylabel("perplexity of the continuation (dashed)")
    axes.legend(loc="lower left", fontsize=9)


class Noise:
    """See the head of this file; an experiment as in `runner.Experiment`.

    Raises:
        ValueError: a σ_W below zero, or none.
    """

    name = "noise"
    tables = staticmethod(tables)

    def __init__(
        self,
        model: Pretrained,
        cases: Sequence[EditRecord],
        sigmas: Sequence[float],
        *,
        tokens: int,
        data: Mapping[str, Any],
        seed: int = 0,
        chunk: int = 25,
    ):
        if not sigmas or not all(0 <= sigma < math.inf for sigma in sigmas):
            raise ValueError(f"σ_W is a standard deviation, at least 0; got {list(sigmas)}")
        self.model, self.cases, self.chunk = model, cases, chunk
        self._sigmas, self._tokens, self._seed = sorted(set(sigmas)), tokens, seed
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "sigmas": self._sigmas,
            "tokens": tokens,
            "chunk": chunk,
            "seed": seed,
        }

    def run(self, cases: Sequence[EditRecord]) -> list[Record]:
        """ℓ and continuations of a chunk of cases under every σ_W; each draws from the same keys."""
        facts = [(case.prompt, case.target_new) for case in cases]
        queries = [[case.prompt, *case.paraphrases] for case in cases]
        prompts = [text for row in queries for text in row]
        pairs = [
            [case.target_new, case.target_true]
            for case, row in zip(cases, queries, strict=True)
            for _ in row
        ]
        first = np.cumsum([0, *(len(row) for row in queries[:-1])])
        rng = jax.random.fold_in(jax.random.key(self._seed), self.cases.index(cases[0]))
        loss, text, surprise = {}, {}, {}
        for name, editor in {BASE: None, **self._editors(rng)}.items():
            everyone = begun = None
            if editor is not None:
                recall = editor.recall(facts, queries)
                everyone, begun = recall.condition(np.arange(len(prompts))), recall.condition(first)
            loss[name] = self.model.score(prompts, pairs, everyone)
            edits = [prompts[row] for row in first]
            options = dict(max_tokens=self._tokens, stop=())
            text[name] = self.model.generate(edits, begun, **options)
            surprise[name] = self._surprise(edits, text[name])
        records = []
        for number, (case, start) in enumerate(zip(cases, first, strict=True)):
            end = start + len(queries[number])
            records.append(
                {
                    "case_id": case.case_id,
                    "written": " ".join(facts[number]),
                    "loss": {
                        name: {"edit": rows[start : start + 1].tolist(),
                               "paraphrase": rows[start + 1 : end].tolist()}
                        for name, rows in loss.items()
                    },
                    "text": {name: found[number] for name, found in text.items()},
                    "surprise": {name: found[number] for name, found in surprise.items()},
                }
            )
        return records

    def _editors(self, rng: Any) -> dict[str, LarimarEditor]:
        """By σ_W, the model that reads with it."""
        found = {}
        for sigma in self._sigmas:
            if not sigma:
                found[f"{sigma:g}"] = LarimarEditor(self.model)
                continue
            prior = dataclasses.replace(
                self.model.prior,
                log_variance=jnp.full_like(self.model.prior.log_variance, 2 * math.log(sigma)),
                variance_by_query=None,
                variance_by_memory=None,
            )
            model = self.model.with_memory(self.model.memory, prior)
            found[f"{sigma:g}"] = LarimarEditor(model, rng)
        return found

    def _surprise(self, prompts: Sequence[str], texts: Sequence[str]) -> list[float | None]:
        """ℓ of each continuation under the base LM, in nats a token; None of one without words."""
        rows = [row for row, text in enumerate(texts) if text.strip()]
        found: list[float | None] = [None] * len(texts)
        judged = self.model.score([prompts[row] for row in rows], [[texts[row]] for row in rows])
        for row, value in zip(rows, judged, strict=True):
            found[row] = float(value[0])
        return found

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """By σ_W: S of edit and paraphrase in percent with standard errors, the perplexity of the
        continuations (exp of the mean ℓ over cases), and how many of them have no words."""
        result = {}
        for name in records[0]["loss"] if records else ():
            rows = [(record["loss"][name], record["surprise"][name]) for record in records]
            said = [surprise for _, surprise in rows if surprise is not None]
            result[name] = {
                kind: vars(
                    metrics.estimate([
                        metrics.success(kind, *np.asarray(loss[kind]).T)
                        for loss, _ in rows
                        if loss[kind]
                    ])
                )
                for kind in KINDS
            } | {
                "perplexity": math.exp(sum(said) / len(said)) if said else None,
                "silent": len(rows) - len(said),
            }
        return result
