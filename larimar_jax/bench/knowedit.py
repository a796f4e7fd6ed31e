"""What follows from an edit, and what has to stay, by kind (KnowEdit, RippleEdits, MQuAKE, UniEdit)."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from larimar_jax.bench.task import ComparedTask, Metric, Pivot, option
from larimar_jax.data.edit_records import EditRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnowEdit(ComparedTask):
    """Portability and locality of single edits, by kind of question (KnowEdit's sets and their like).

    Of the written prompt and of what follows from the edit, the share of the answer's tokens that are
    the likeliest, teacher-forced, and how often all are. Of what has to stay, such as another relation
    of the same subject, how often the greedy continuation is the base LM's.
    """

    name = "knowedit"
    metrics: ClassVar = {
        "accuracy": Metric("accuracy"),
        "exact": Metric("all tokens right"),
        "kept": Metric("as the base LM"),
        "in_scope": Metric("prompts in scope"),
    }
    labels: ClassVar = {"edit": "rewrite"}
    tables = (
        Pivot(cells=("accuracy", "exact"), title="what follows", caption="accuracy, all right"),
        Pivot(cells=("kept",), title="what has to stay", caption="percent ± standard error"),
    )

    data: str = option(
        "a JSON file of KnowEdit, RippleEdits, MQuAKE or UniEdit", metavar="FILE", recorded=False
    )
    limit: int | None = option("only the first N records (default: all)", default=None)
    tokens: int = option("decoded after a prompt that has to stay", default=10)

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        facts = [(case.prompt, case.target_new) for case in cases]
        edits = systems.single_edits(facts, [_queries(case) for case in cases])
        accuracy = edits.accuracy([column["target"] for column in edits.columns])
        texts = edits.generate(self.tokens)
        values = {
            name: np.asarray([*zip(shares, texts[name], texts["base"], strict=True)], object)
            for name, shares in accuracy.items()
        }

        def measured(column, value):
            share, text, base = value
            if column["stays"]:
                return {"kept": float(text == base), "text": text}
            return {"accuracy": share, "exact": float(share == 1.0)}

        yield from edits.rows(values, measured)


def _queries(case: EditRecord) -> list[dict[str, Any]]:
    """The columns of every question of a case."""
    near = zip(case.neighbourhood, case.neighbourhood_targets, strict=True)
    kinds = case.portability_kinds or ("follows",) * len(case.portability)
    stays = case.neighbourhood_kinds or ("stays",) * len(case.neighbourhood)
    questions = [
        ("edit", case.prompt, case.target_new, False),
        *(("paraphrase", prompt, case.target_new, False) for prompt in case.paraphrases),
        *((kind, *pair, False) for kind, pair in zip(kinds, case.portability, strict=True)),
        *((kind, *pair, True) for kind, pair in zip(stays, near, strict=True)),
    ]
    return [
        dict(case=case.case_id, kind=kind, prompt=prompt, target=target, stays=stays)
        for kind, prompt, target, stays in questions
    ]
