"""ZsRE, one edit at a time (Tables 12 and 13)."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np

from larimar_jax.bench.systems import MODE, Mode
from larimar_jax.bench.task import ZSRE, ComparedTask, Metric, Pivot, option
from larimar_jax.data.edit_records import EditRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZsRE(ComparedTask):
    """ZsRE, one edit at a time: accuracy of rewrite, paraphrase and neighbourhood (Tables 12–13).

    The share of the answer's tokens that are the likeliest where they stand, teacher-forced. Mode
    `rome`: the scope decision and the memory query see the prompt only. Mode `released`, that of
    the authors' code: every token is a question of its own. Memory and scope detector see the
    prompt with the right tokens so far, the detector beside the written fact; out of scope is
    z = 0. Neighbours are scored on their own right answers. Each case is written into an empty
    memory of its own; its controls are in `queries.py`.
    """

    name = "zsre"
    metrics: ClassVar = {"accuracy": Metric("accuracy"), "in_scope": Metric("prompts in scope")}
    kinds = ("rewrite", "paraphrase", "neighbourhood")
    tables = (Pivot(cells=("accuracy",), caption="accuracy ± standard error, percent"),)
    paper: ClassVar = {("rewrite",): 98.1, ("paraphrase",): 81.6, ("neighbourhood",): 19.7}
    paper_if: ClassVar = {"options": {"mode": "rome"}}
    reference = (
        "Tables 12–13, rewrite / paraphrase / neighbourhood: Larimar-1.3B 98.1 / 81.6 / 19.7, "
        "Larimar-6B 94.5 / 70.4 / 25.1 (other base LMs; neighbours from Natural Questions)."
    )

    data: str = option(ZSRE, metavar="FILE", recorded=False)
    target: Literal["answer", "alternative"] | None = option(
        "what is written: the right answer, or the false one that the record proposes (default: the "
        "first for MEND's file, the second for KnowEdit's)",
        default=None,
    )
    limit: int | None = option("only the first N records (default: all)", default=None)
    mode: Mode = option(MODE, default="rome")

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        facts = [(case.prompt, case.target_new) for case in cases]
        groups = [_queries(case) for case in cases]
        if self.mode == "rome":
            edits = systems.single_edits(facts, groups)
            accuracy = edits.accuracy([column["target"] for column in edits.columns])
        else:
            edits, accuracy = self._by_token(systems, facts, groups)
        yield from edits.rows(accuracy, lambda _, share: {"accuracy": share})

    def _by_token(self, systems, facts, groups):
        """Each token apart; then the mean of a query's tokens, and the share of them in scope."""
        queries, asking, targets, places, counts = [], [], [], [], []
        editor = systems.editor
        for group in groups:
            queries.append([])
            asking.append([])
            for column in group:
                tokens = editor.tokens(column["target"])
                counts.append(len(tokens))
                for place in range(len(tokens)):
                    before = editor.text(tokens[:place]).strip() if place else ""
                    queries[-1].append(column)
                    asking[-1].append(f"{column['prompt']} {before}".strip())
                targets += [column["target"]] * len(tokens)
                places += range(len(tokens))
        scoped = [[text] for row in asking for text in row]
        edits = systems.single_edits(facts, queries, mode="released", asking=asking, scoped=scoped)
        begins = np.cumsum([0, *counts[:-1]])

        def mean(values):
            return np.add.reduceat(np.asarray(values, np.float64).reshape(-1), begins) / counts

        accuracy = edits.accuracy(targets, places=places)
        edits = dataclasses.replace(
            edits.take(begins), scope_score=mean(edits.scope_score), in_scope=mean(edits.in_scope)
        )
        return edits, {name: mean(values) for name, values in accuracy.items()}


def _queries(case: EditRecord) -> list[dict[str, Any]]:
    """The columns of every prompt of a case."""
    kinds = {"edit": "rewrite"}
    return [
        dict(case=case.case_id, kind=kinds.get(kind, kind), prompt=prompt, target=target)
        for kind, prompt, target in case.questions()
    ]
