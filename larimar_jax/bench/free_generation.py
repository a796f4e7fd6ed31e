"""CounterFact, one edit at a time: free generation after an edit."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from larimar_jax.bench.task import ComparedTask, Metric, Pivot, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeGeneration(ComparedTask):
    """CounterFact, one edit at a time: does free generation give the new answer?

    The likeliest continuation of the edit prompt and of its paraphrases, token by token. An answer
    is given where it stands in whole words in the first `--tokens` tokens, and given at once where
    they begin with it; upper and lower case count, blanks do not. The scope decision and the memory
    query see the prompt only. Each case is written into an empty memory of its own.
    """

    metrics: ClassVar = {
        "contains": Metric("gives the new answer"),
        "begins": Metric("at once"),
        "in_scope": Metric("prompts in scope"),
    }
    kinds = ("edit", "paraphrase")
    tables = (
        Pivot(cells=("contains", "begins"), caption="percent ± standard error, below it at once"),
    )

    limit: int | None = option("only the first N records (default: all)", default=None)
    tokens: int = option("decoded after a prompt", default=10)
    chunk: int = option("cases computed together", default=100)

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        groups = [
            [
                dict(case=case.case_id, kind=kind, prompt=prompt, new=case.target_new)
                for kind, prompts in (("edit", [case.prompt]), ("paraphrase", case.paraphrases))
                for prompt in prompts
            ]
            for case in cases
        ]
        edits = systems.single_edits([(case.prompt, case.target_new) for case in cases], groups)

        def measured(column, text):
            words, answer = " ".join(text.split()), " ".join(column["new"].split())
            whole = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", words)
            begins = whole is not None and not whole.start()
            return {"contains": float(whole is not None), "begins": float(begins), "text": text}

        yield from edits.rows(edits.generate(self.tokens), measured)
