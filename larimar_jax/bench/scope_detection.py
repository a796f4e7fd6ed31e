"""The scope detector on CounterFact (§6 of the paper)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from larimar_jax import scope
from larimar_jax.bench.fact_store import EncodedTexts
from larimar_jax.bench.task import EditTask, Metric, Pivot, Plot, option
from larimar_jax.data.paraphrases import Paraphrases, scope_questions

# Of the questions that are put to a record's subject.
SEED = 0
KINDS = ("paraphrase", "neighbourhood", "other")
STORES = ("pairwise", "store")


class ScopeCase(NamedTuple):
    """A written prompt, and what is compared with it: {kind: queries}."""

    case_id: int
    prompt: str
    queries: dict[str, Sequence[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope(EditTask):
    """The scope detector on CounterFact: equal error rate, F1 and AUROC (§6, ESD and ISD).

    Paraphrases of a written prompt are positives, its neighbours negatives; a query's score is its
    best cosine, by its last sentence. Pairwise, each record is alone with its own prompt; against
    the store all prompts are written at once, which is what deployment sees, and a paraphrase
    should also be nearest to its own. Beside them, prompts of other relations in the file, put to
    the record's subject: how many pass. The external detector (ESD) compares the encoder's output,
    the internal one (ISD) is the model's own, where it was trained (`larimar calibrate`); it then
    decides. Queries pass at the model's threshold where a detector decides,
    else at that of its equal error rate against its own prompt.
    """

    name = "scope"
    metrics: ClassVar = {
        "passes": Metric("passing"),
        "own_prompt": Metric("nearest to its own prompt"),
        "error": Metric("EER"),
        "f1": Metric("F1", 1.0, 3),
        "auroc": Metric("AUROC", 1.0, 3),
        "threshold": Metric("at", 1.0, 2),
    }
    factors = ("store",)
    labels: ClassVar = {
        "system": "detector",
        "store": "all prompts",
        "pairwise": "its own prompt",
        "external": "ESD: encodings",
        "internal": "ISD: projected",
        "other": "other relations",
    }
    kinds = KINDS
    tables = (
        Pivot(
            ("system", "store"),
            None,
            ("error", "f1", "auroc", "threshold"),
            where={"kind": "detection"},
            labels=("system", "against"),
            caption="EER in percent",
        ),
        Pivot(
            ("system", "store"),
            "kind",
            ("passes",),
            where={"kind": KINDS},
            title="queries that pass",
            labels=("system", "against"),
        ),
        Pivot(
            ("system",),
            None,
            ("own_prompt",),
            where={"kind": "paraphrase", "store": "store"},
            title="paraphrases among all prompts",
        ),
    )
    plots = (Plot(("kind",), "passes", where={"kind": KINDS, "store": "store"}),)
    quoted = False
    reference = "ESD, pairwise on 3,800 pairs: equal error rate 2.9 %, F1 0.974."

    limit: int = option("records", default=1000)
    others: int = option(
        "questions of other relations to put to each record's subject", default=2, least=0
    )
    chunk: int = option("cases computed together", default=100)

    def lower_is_better(self, metric, entry) -> bool:
        """Return whether the queries should not pass."""
        return metric == "passes" and entry["kind"] != "paraphrase"

    def cases(self, systems) -> Sequence[ScopeCase]:
        """Return the records that have a query."""
        skipped = [] if self.skip_bad else None
        wordings = Paraphrases(self.read(None, skipped))
        asides = scope_questions(self.records, wordings, others=self.others, seed=SEED)
        cases = []
        for record, aside in zip(self.records, asides, strict=True):
            queries = (record.paraphrases, record.neighbourhood, aside.others)
            by_kind = dict(zip(KINDS, queries, strict=True))
            cases.append(ScopeCase(record.case_id, record.prompt, by_kind))
        return [case for case in cases if any(case.queries.values())]

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        """Yield the score of every query, alone with its prompt and against all."""
        rows = systems.cached("rows", (), lambda: self._rows(systems))
        for case in cases:
            yield from rows[case.case_id]

    def _rows(self, systems) -> dict[int, list[dict[str, Any]]]:
        """The rows of all cases: no threshold but the model's is known before all scores."""
        model, cases = systems.model, self.cases(systems)
        prompts = [record.prompt for record in self.records]
        queries = [q for case in cases for each in case.queries.values() for q in each]
        encoded = EncodedTexts(model, [*prompts, *map(scope.question, queries)])
        place = {record.case_id: number for number, record in enumerate(self.records)}
        # What the model's own detector compares, last, is its embedding in any case.
        detectors = {"external": "embedding"}
        if model.projection is not None or model.relations is not None:
            detectors = {"external": "pooled", "internal": "embedding"}
        rows: dict[int, list[dict[str, Any]]] = {case.case_id: [] for case in cases}
        for detector, by in detectors.items():
            keys, scored = getattr(encoded(prompts), by), []
            relations = model.relations if by == "embedding" else None
            for case in cases:
                own = place[case.case_id]
                for kind, texts in case.queries.items():
                    questions = [*map(scope.question, texts)]
                    embedding = getattr(encoded(questions), by)
                    allowed = scope.comparable(relations, questions, prompts)
                    own_key, own_allowed = keys[own : own + 1], allowed[:, own : own + 1]
                    alone = scope.nearest_key(embedding, own_key, own_allowed)
                    among = scope.nearest_key(embedding, keys, allowed)
                    fixed = dict(case=case.case_id, system=detector, kind=kind, prompt=case.prompt)
                    for n, query in enumerate(texts):
                        for store, match in zip(STORES, (alone, among), strict=True):
                            row = fixed | {
                                "store": store,
                                "query": query,
                                "score": float(match.score[n]),
                            }
                            if (kind, store) == ("paraphrase", "store"):
                                row["own_prompt"] = float(match.key[n] == own)
                            scored.append(row)
            threshold = model.scope_threshold
            if by == "pooled":
                threshold = scope.detection(*_sides(scored, detector, "pairwise")).threshold
            for row in scored:
                rows[row["case"]].append(row | {"passes": float(row["score"] >= threshold)})
        return rows

    def derived(self, rows) -> list[dict[str, Any]]:
        """Return equal error rate, F1 and AUROC of each detector, pairwise and against the
        store."""
        entries = []
        for detector in dict.fromkeys(row["system"] for row in rows):
            for store in STORES:
                sides = _sides(rows, detector, store)
                detection = vars(scope.detection(*sides))
                fixed = {"standard_error": None, "cases": sum(map(len, sides))}
                estimates = {
                    name: {"mean": self.metrics[name].scale * value, **fixed}
                    for name, value in detection.items()
                }
                entry = {"system": detector, "kind": "detection", "store": store}
                entries.append(entry | estimates)
        return entries


def _sides(rows: Sequence[Mapping[str, Any]], *group: str) -> list[np.ndarray]:
    """The scores of positives and of negatives under a detector and a store."""
    return [
        np.asarray(
            [r["score"] for r in rows if (r["system"], r["store"], r["kind"]) == (*group, kind)]
        )
        for kind in KINDS[:2]
    ]
