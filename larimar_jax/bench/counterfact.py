"""CounterFact, one edit at a time (Table 2)."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from larimar_jax.bench.metrics import KINDS, rewrite_columns
from larimar_jax.bench.summary import harmonic_score
from larimar_jax.bench.systems import MODE, Mode
from larimar_jax.bench.task import ComparedTask, Metric, Pivot, Plot, option
from larimar_jax.data.edit_records import EditRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class CounterFact(ComparedTask):
    """CounterFact, one edit at a time: edit, paraphrase and neighbourhood S and M (Table 2).

    Mode `rome`, the protocol of the editing literature: the scope decision and the memory query see
    the prompt only (its last sentence, `scope.question`), paraphrases keep their
    distractor sentence, and what is out of scope is decoded by the untouched LM. Mode `released`,
    that of the authors' code: the scope decision sees prompt and candidate beside the written fact,
    so that the two candidates of a prompt may be decoded differently; a paraphrase is cut to its
    last sentence; out of scope is z = 0. Each case is written into an empty memory of its own, with
    `--rephrasings N` in N more wordings, none of which is a query. The controls are in
    `queries.py`.
    """

    name = "counterfact"
    metrics: ClassVar = {"S": Metric("S"), "M": Metric("M"), "in_scope": Metric("prompts in scope")}
    kinds = (*KINDS, "score")
    tables = (Pivot(cells=("S", "M"), caption="S ± standard error, below it M; percent"),)
    plots = (Plot(y="S", where={"kind": KINDS}),)
    paper: ClassVar = {("edit",): 100.0, ("paraphrase",): 83.5, ("neighbourhood",): 74.7}
    paper_if: ClassVar = {"options": {"mode": "rome", "rephrasings": 0}}
    reference = (
        "Table 2, edit / paraphrase / neighbourhood S: GPT-2 XL 22.2 / 24.7 / 78.1, Larimar-1.3B "
        "100 / 83.5 / 74.7, GPT-J 16.3 / 18.6 / 83.0, Larimar-6B 99.6 / 88.4 / 80.4; with one and "
        "two rephrasings, Larimar-1.3B 100 / 89.8 / 73.3 and 100 / 90.8 / 73.3 (first 2,000 cases; "
        "other LMs)."
    )

    limit: int | None = option("only the first N records (default: all)", default=None)
    rephrasings: int = option(
        "write a fact in so many more wordings, which are those of other records of the file",
        default=0,
        least=0,
        metavar="N",
    )
    mode: Mode = option(MODE, default="rome")

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        groups = [self.queries(case) for case in cases]
        columns = [column for group in groups for column in group]
        pairs = [(column["new"], column["true"]) for column in columns]
        scoped = None
        if self.mode == "released":
            scoped = [
                [f"{each['prompt']} {answer}" for answer in pair]
                for each, pair in zip(columns, pairs, strict=True)
            ]
        wordings = systems.cached("wordings", (), self._wordings)
        edits = systems.single_edits(
            [(case.prompt, case.target_new) for case in cases],
            groups,
            mode=self.mode,
            scoped=scoped,
            wordings=[wordings[case.case_id] for case in cases],
        )
        yield from edits.rows(edits.score(pairs), rewrite_columns)

    def queries(self, case: EditRecord) -> list[dict[str, Any]]:
        """Return the columns of every prompt of a case."""
        columns = []
        for kind, prompt, right in case.questions():
            if kind == "paraphrase" and self.mode == "released":
                prompt = prompt.split(". ")[-1]
            true = right if kind == "neighbourhood" else case.target_true
            columns.append(
                dict(case=case.case_id, kind=kind, prompt=prompt, new=case.target_new, true=true)
            )
        return columns

    def _wordings(self) -> dict[int, tuple[str, ...]]:
        wordings = self.other_wordings(self.records, self.rephrasings)
        ids = [record.case_id for record in self.records]
        return dict(zip(ids, wordings, strict=True))

    def derived(self, rows) -> list[dict[str, Any]]:
        """Return the score: the harmonic mean of the three S."""
        return harmonic_score(self, rows, "S", KINDS, "score")
