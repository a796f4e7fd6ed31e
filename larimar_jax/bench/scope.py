"""The scope detector on CounterFact: equal error rate, F1 and AUROC (§6, ESD).

Paraphrases of a written prompt are positives, its neighbours negatives; a query's score is its best
cosine, sentence by sentence. Pairwise, each record is alone with its own prompt; against the store all
prompts are written at once, which is what deployment sees, and a paraphrase should also find its own.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table
from scipy import stats

from larimar_jax import scope
from larimar_jax.bench import given, metrics, systems
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import Encoded
from larimar_jax.data.records import EditRecord
from larimar_jax.pretrained import Pretrained

KINDS = ("paraphrase", "neighbourhood")
STORES = {"pairwise": "its own prompt", "store": "all prompts"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench scope`."""
    given.options(parser, "CounterFact's JSON file, either schema")
    parser.add_argument("--limit", type=int, default=1000, help="records (%(default)s)")
    systems.model_options(parser)


def experiment(args: argparse.Namespace) -> "Scope":
    """The experiment of a parsed command line; reads the data and loads the model."""
    from larimar_jax.data import counterfact

    records, data = given.read(args, counterfact.load, args.limit)
    data |= {"limit": args.limit}
    return Scope(systems.model(args), records, data=data)


@dataclasses.dataclass(frozen=True)
class Detection:
    """How well scores tell positives from negatives, in [0, 1]. threshold: where the share of missed
    positives and of let-through negatives are nearest to each other; error: the mean of the two there
    (the equal error rate); f1: there. auroc: the chance that a positive scores above a negative, a tie
    being half."""

    threshold: float
    error: float
    f1: float
    auroc: float


def detection(positive: Float[np.ndarray, "P"], negative: Float[np.ndarray, "N"]) -> Detection:
    """Of the scores of P positives and N negatives.

    Raises:
        ValueError: there are none of a kind.
    """
    if not len(positive) or not len(negative):
        raise ValueError("a detector is measured with positives and negatives, at least one of each")
    # Every score is a threshold (≥ passes), and one that nothing passes.
    thresholds = np.append(np.unique(np.concatenate([positive, negative])), np.inf)
    missed = np.searchsorted(np.sort(positive), thresholds) / len(positive)
    passed = 1 - np.searchsorted(np.sort(negative), thresholds) / len(negative)
    best = int(np.argmin(np.abs(missed - passed)))
    right = (1 - missed[best]) * len(positive)
    wrong = passed[best] * len(negative)
    f1 = 2 * right / (right + wrong + len(positive)) if right else 0.0
    wins = stats.mannwhitneyu(positive, negative).statistic
    return Detection(
        float(thresholds[best]),
        float((missed[best] + passed[best]) / 2),
        float(f1),
        float(wins / (len(positive) * len(negative))),
    )


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row for each store."""
    results = summary["results"]
    title = f"scope, {summary['cases']} records"
    table = Table("against", "EER %", "F1", "AUROC", "at", *KINDS, title=title)
    for name, label in STORES.items():
        found = results[name]
        table.add_row(
            label,
            f"{100 * found['error']:.1f}",
            f"{found['f1']:.3f}",
            f"{found['auroc']:.3f}",
            f"{found['threshold']:.2f}",
            *(systems.percent(found["in_scope"][kind]) for kind in KINDS),
        )
    note = (
        f"{KINDS[0]}, {KINDS[1]}: percent in scope at the model's threshold "
        f"{summary['settings']['threshold']}; paraphrases that find their own prompt among all: "
        f"{systems.percent(results['found_own'])} %"
    )
    return [table, note]


PAPER = "ESD, pairwise on 3,800 pairs: equal error rate 2.9 %, F1 0.974."


class Scope:
    """See the head of this file; an experiment as in `runner.Experiment`."""

    name = "scope"
    tables = staticmethod(tables)
    chunk = 100

    def __init__(
        self, model: Pretrained, records: Sequence[EditRecord], *, data: Mapping[str, Any]
    ):
        self.model, self.cases = model, records
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "threshold": model.scope_threshold,
            "seed": None,
        }
        self._encoded: Encoded | None = None

    def run(self, cases: Sequence[EditRecord]) -> list[Record]:
        """The scores of every query, alone with its prompt and against all."""
        if self._encoded is None:
            queries = [q for case in self.cases for kind in KINDS for q in _queries(case)[kind]]
            prompts = [case.prompt for case in self.cases]
            self._encoded = Encoded(self.model, [*prompts, *scope.parts(queries)[0]])
        place = {case.case_id: number for number, case in enumerate(self.cases)}
        written = self._encoded([case.prompt for case in self.cases]).embedding
        records = []
        for case in cases:
            record: Record = {"case_id": case.case_id, "prompt": case.prompt}
            own = place[case.case_id]
            for kind, asked in _queries(case).items():
                sentences, owners = scope.parts(asked)
                embedded = self._encoded(sentences).embedding
                alone = scope.match(embedded, owners, written[own : own + 1])
                among = scope.match(embedded, owners, written)
                record[kind] = {
                    "queries": list(asked),
                    "pairwise": alone.score.tolist(),
                    "store": among.score.tolist(),
                    "found_own": (among.key == own).tolist(),
                }
            records.append(record)
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """`Detection` pairwise and against the store; in percent with standard errors over records, the
        shares in scope at the model's threshold and of paraphrases that find their own prompt."""
        result: dict[str, Any] = {}
        for name in STORES:
            scores = {
                kind: np.array([s for record in records for s in record[kind][name]]) for kind in KINDS
            }
            shares = {
                kind: vars(
                    metrics.estimate([
                        float(np.mean(np.array(r[kind][name]) >= self.model.scope_threshold))
                        for r in records
                        if r[kind][name]
                    ])
                )
                for kind in KINDS
            }
            found = detection(scores["paraphrase"], scores["neighbourhood"])
            result[name] = vars(found) | {"in_scope": shares}
        own = [r["paraphrase"]["found_own"] for r in records if r["paraphrase"]["found_own"]]
        result["found_own"] = vars(metrics.estimate([float(np.mean(found)) for found in own]))
        return result


def _queries(case: EditRecord) -> dict[str, tuple[str, ...]]:
    return {"paraphrase": case.paraphrases, "neighbourhood": case.neighbourhood}
