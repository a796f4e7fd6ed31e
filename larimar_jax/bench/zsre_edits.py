"""ZsRE, one edit at a time (Tables 12 and 13)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from larimar_jax.bench.systems import MODE, Mode, Queries
from larimar_jax.bench.task import ZSRE, EditTask, Metric, Pivot, option
from larimar_jax.data import zsre
from larimar_jax.data.edit_records import EditRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZsRE(EditTask):
    """ZsRE, one edit at a time: accuracy of rewrite, paraphrase and neighbourhood (Tables 12–13).

    The share of the answer's tokens that are the likeliest where they stand, teacher-forced. Mode
    `rome`: the scope decision and the memory query see the prompt only. Mode `released`, that of
    the authors' code: every token is a question of its own. Memory and scope detector see the
    prompt with the right tokens so far, the detector beside the written fact; out of scope is
    z = 0. Neighbours are scored on their own right answers. Each case is written into an empty
    memory of its own; its controls are in `systems.py`.
    """

    name = "zsre"
    metrics: ClassVar = {
        "accuracy": Metric("accuracy"),
        "in_scope": Metric("prompts in scope"),
    }
    tables = (Pivot(cells=("accuracy",), caption="accuracy ± standard error, percent"),)
    paper: ClassVar = {("rewrite",): 98.1, ("paraphrase",): 81.6, ("neighbourhood",): 19.7}
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

    def read(self, limit: int | None, skipped: list[str] | None) -> list[EditRecord]:
        """Return the first `limit` records of the file."""
        return zsre.load(self.data, limit, self.target, skipped=skipped)

    def paper_holds(self, settings) -> bool:
        """Return whether it is the paper's protocol."""
        return self.mode == "rome"

    def cases(self, systems) -> Sequence[EditRecord]:
        """Return the records."""
        return self.records

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        """Yield the accuracy on every prompt of a chunk of cases."""
        facts = [(case.prompt, case.target_new) for case in cases]
        questions = [_questions(case) for case in cases]
        measure = self._by_prompt if self.mode == "rome" else self._by_token
        edits, accuracy, columns = measure(systems, facts, questions)
        rows = [(case, *each) for case, row in zip(cases, questions, strict=True) for each in row]
        for row, (case, kind, prompt, target) in enumerate(rows):
            for system, values in accuracy.items():
                yield {
                    "case": case.case_id,
                    "system": system,
                    "kind": kind,
                    "accuracy": values[row],
                    "written": edits.editor.written(case.prompt, case.target_new),
                    "prompt": prompt,
                    "target": target,
                    **(columns(row) if system == "larimar" else {}),
                }

    def _by_prompt(self, systems, facts, questions):
        """The queries, their accuracy, and the columns of the scope decision."""
        edits = systems.single_edits(facts, [[prompt for _, prompt, _ in row] for row in questions])
        targets = [target for row in questions for _, _, target in row]
        return edits, edits.accuracy(targets), edits.scope

    def _by_token(self, systems, facts, questions):
        """Each token apart; then the mean of a query's tokens, and the share of them in scope."""
        prompts, asking, targets, places, counts = [], [], [], [], []
        editor = systems.editor
        for row in questions:
            prompts.append([])
            asking.append([])
            for _, prompt, target in row:
                tokens = editor.tokens(target)
                counts.append(len(tokens))
                for place in range(len(tokens)):
                    before = editor.text(tokens[:place]).strip() if place else ""
                    prompts[-1].append(prompt)
                    asking[-1].append(f"{prompt} {before}".strip())
                    targets.append(target)
                    places.append(place)
        edits: Queries = systems.single_edits(
            facts,
            prompts,
            mode="released",
            asking=asking,
            scoped=[[text] for row in asking for text in row],
        )
        begins = np.cumsum([0, *counts[:-1]])

        def mean(values):
            return np.add.reduceat(np.asarray(values, np.float64).reshape(-1), begins) / counts

        hits = {name: mean(values) for name, values in edits.hits(targets, places).items()}
        scope = {"scope_score": mean(edits.scope_score), "in_scope": mean(edits.in_scope)}
        return edits, hits, lambda row: {name: values[row] for name, values in scope.items()}


def _questions(case: EditRecord) -> list[tuple[str, str, str]]:
    """(kind, prompt, the answer that is scored) of every prompt of a case."""
    neighbours = zip(case.neighbourhood, case.neighbourhood_targets, strict=True)
    return [
        ("rewrite", case.prompt, case.target_new),
        *(("paraphrase", prompt, case.target_new) for prompt in case.paraphrases),
        *(("neighbourhood", prompt, target) for prompt, target in neighbours),
    ]
