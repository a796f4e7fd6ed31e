"""The scope detector on CounterFact: equal error rate, F1 and AUROC (§6, ESD and ISD).

Paraphrases of a written prompt are positives, its neighbours negatives; a query's score is its best
cosine, sentence by sentence. Pairwise, each record is alone with its own prompt; against the store all
prompts are written at once, which is what deployment sees, and a paraphrase should also find its own.
Beside them, prompts of other relations in the file, put to the record's subject: how many pass. The
external detector (ESD) compares the encoder's output, the internal one (ISD) what the model's file maps
it to, where it was trained (`larimar calibrate`); it then decides.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from larimar_jax import scope
from larimar_jax.bench import given, metrics, systems
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import Encoded
from larimar_jax.data import questions
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.data.paraphrases import Wordings
from larimar_jax.pipeline import Pipeline

# Of the questions that are put to a record's subject.
SEED = 0
KINDS = ("paraphrase", "neighbourhood", "other")
STORES = {"pairwise": "its own prompt", "store": "all prompts"}
DETECTORS = {"external": "ESD: encodings", "internal": "ISD: projected"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench scope`."""
    given.options(parser, given.COUNTERFACT)
    parser.add_argument("--limit", type=int, default=1000, help="records (%(default)s)")
    parser.add_argument(
        "--others",
        type=int,
        default=2,
        help="questions of other relations to put to each record's subject (%(default)s)",
    )
    systems.model_options(parser)


def experiment(args: argparse.Namespace) -> "Scope":
    """The experiment of a parsed command line; reads the data and loads the model."""
    from larimar_jax.data import counterfact

    records, data = given.read(args, counterfact.load, args.limit)
    known = Wordings(counterfact.load(args.data, skipped=[] if args.skip_bad else None))
    asked = questions.asked(records, known, others=args.others, seed=SEED)
    data |= {"limit": args.limit, "others": args.others}
    return Scope(systems.model(args), records, [each.others for each in asked], data=data)


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row for each detector and store."""
    results, threshold = summary["results"], summary["settings"]["threshold"]
    title = f"scope, {summary['cases']} records"
    passing = [f"{kind} passing %" for kind in KINDS]
    table = Table("detector", "against", "EER %", "F1", "AUROC", "at", *passing, title=title)
    notes = []
    for detector, found in results.items():
        for name, label in STORES.items():
            one = found[name]
            table.add_row(
                DETECTORS[detector],
                label,
                f"{100 * one['error']:.1f}",
                f"{one['f1']:.3f}",
                f"{one['auroc']:.3f}",
                f"{one['threshold']:.2f}",
                *(systems.percent(one["passing"][kind]) for kind in KINDS),
            )
        notes.append(f"{DETECTORS[detector]}: {systems.percent(found['found_own'])} %")
    deciding = DETECTORS[list(results)[-1]]
    note = (
        f"passing: at the model's threshold {threshold:.3f} for what decides ({deciding}), at that "
        "of the equal error rate against its own prompt for another; paraphrases that find their own "
        f"prompt among all: {'; '.join(notes)}"
    )
    return [table, note]


PAPER = "ESD, pairwise on 3,800 pairs: equal error rate 2.9 %, F1 0.974."


class Scope:
    """See the head of this file; an experiment as in `runner.Experiment`.

    Args:
        others: of each record, questions about its subject that do not ask for its fact.
    """

    name = "scope"
    tables = staticmethod(tables)
    chunk = 100

    def __init__(
        self,
        model: Pipeline,
        records: Sequence[EditRecord],
        others: Sequence[Sequence[str]] | None = None,
        *,
        data: Mapping[str, Any],
    ):
        self.model, self.cases = model, records
        self.detectors = ["external"] if model.projection is None else list(DETECTORS)
        others = [()] * len(records) if others is None else others
        self._queries = {
            case.case_id: dict(zip(KINDS, (case.paraphrases, case.neighbourhood, asked), strict=True))
            for case, asked in zip(records, others, strict=True)
        }
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "threshold": model.scope_threshold,
            "seed": SEED,
        }
        self._encoded: Encoded | None = None

    def run(self, cases: Sequence[EditRecord]) -> list[Record]:
        """The scores of every query, alone with its prompt and against all."""
        prompts = [case.prompt for case in self.cases]
        if self._encoded is None:
            queries = [q for asked in self._queries.values() for kind in KINDS for q in asked[kind]]
            self._encoded = Encoded(self.model, [*prompts, *scope.split_sentences(queries)[0]])
        place = {case.case_id: number for number, case in enumerate(self.cases)}
        written = self._encoded(prompts)
        records = []
        for case in cases:
            record: Record = {"case_id": case.case_id, "prompt": case.prompt}
            own = place[case.case_id]
            for kind, asked in self._queries[case.case_id].items():
                sentences, owners = scope.split_sentences(asked)
                embedded = self._encoded(sentences)
                record[kind] = {"queries": list(asked)}
                for detector in self.detectors:
                    # What the model's own detector compares, last, is its embedding in any case.
                    by = "embedding" if detector == self.detectors[-1] else "pooled"
                    query, keys = getattr(embedded, by), getattr(written, by)
                    alone = scope.nearest_key(query, owners, keys[own : own + 1])
                    among = scope.nearest_key(query, owners, keys)
                    record[kind][detector] = {
                        "pairwise": alone.score.tolist(),
                        "store": among.score.tolist(),
                        "found_own": (among.key == own).tolist(),
                    }
            records.append(record)
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Of each detector: `Detection` pairwise and against the store; in percent with standard errors
        over records, the shares that pass and of paraphrases that find their own prompt."""
        return {detector: self._summary(records, detector) for detector in self.detectors}

    def _summary(self, records: Sequence[Record], detector: str) -> dict[str, Any]:
        def scores(kind: str, name: str) -> np.ndarray:
            return np.array([s for record in records for s in record[kind][detector][name]])

        result: dict[str, Any] = {}
        threshold = self.model.scope_threshold
        for name in STORES:
            found = scope.detection(scores("paraphrase", name), scores("neighbourhood", name))
            if detector != self.detectors[-1] and name == "pairwise":
                threshold = found.threshold
            passing = {}
            for kind in KINDS:
                of = [np.array(r[kind][detector][name]) for r in records if r[kind]["queries"]]
                passing[kind] = vars(metrics.estimate([float(np.mean(s >= threshold)) for s in of]))
            result[name] = vars(found) | {"passing": passing}
        own = [r["paraphrase"][detector]["found_own"] for r in records if r["paraphrase"]["queries"]]
        result["found_own"] = vars(metrics.estimate([float(np.mean(found)) for found in own]))
        return result
