"""Long context: a text of N facts in chunk memories, each fact asked through all of them (Table 6).

The facts stand in a row, are cut into chunks of `fan_in`, and every chunk is a memory of its own (§7).
A question is read from all of them and decoded from the answer of the most certain one, or from that of
the recursive read (`--by`). Nothing decides about scope: every question is about the text. Recall is the
share of the answer's tokens that are the likeliest, teacher-forced. The control with the fact in the
prompt has the whole text there, as far as it fits.

The facts are new ones of the world's cities (`data/atlas.py`), or those of a file of CounterFact.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from larimar_jax import long_context, scope
from larimar_jax.bench.fact_store import EncodedTexts, written
from larimar_jax.bench.queries import SCOPED, SHARED, Queries
from larimar_jax.bench.task import COUNTERFACT, EditTask, Metric, Pivot, Plot, option
from larimar_jax.data import atlas
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.data.segments import sentences


@dataclasses.dataclass(frozen=True)
class Question:
    """Fact `index` of a text of `facts`."""

    case_id: str
    facts: int
    index: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongContext(EditTask):
    """Long context: a text of N facts in chunk memories, each asked through all of them (Table 6)."""

    factors: ClassVar = ("facts",)
    metrics: ClassVar = {"recall": Metric("recall"), "right_chunk": Metric("right chunk")}
    labels: ClassVar = {
        "facts": "N",
        "prompt": "the text in the prompt",
        "larimar": "Larimar",
        "edit": "own words",
        "paraphrase": "other words",
    }
    tables: ClassVar = (
        Pivot(
            ("facts", "kind"),
            "system",
            ("recall", "right_chunk"),
            title="recall",
            caption="percent ± standard error; below Larimar's: answers from the right chunk",
        ),
    )
    plots: ClassVar = (
        Plot("facts", "recall", {"kind": "edit"}, log="x", xlabel="N, facts in the text"),
    )
    paper: ClassVar = {("edit", 64): 89.0, ("edit", 128): 88.0, ("edit", 256): 86.0}
    reference: ClassVar = (
        "Table 6, recall at 64 / 96 / 128 / 256 facts: Larimar-1.3B .89 / .88 / .88 / .86, Mistral-7B "
        "with the text in its prompt .98 / .96 / .57 / .42."
    )

    data: str | None = option(
        f"the facts: {COUNTERFACT} (default: made-up countries of cities)",
        default=None,
        metavar="FILE",
        recorded=False,
    )
    facts: tuple[int, ...] = option("facts in the text, N", default=(64, 128, 256, 1024, 4096))
    queries: int = option("facts that are asked for each N", default=32)
    fan_in: int = option("facts of a chunk", default=16)
    by: Literal["surest", "confidence", "readout"] = option(
        "how the chunks' answers become one", default="surest"
    )
    room: int = option(
        "tokens of the text that the control has in its prompt; a larger text is cut, its end stays",
        default=1024,
    )
    chunk: int = option("cases computed together", default=32)

    def read(self, limit: int | None, skipped: list[str] | None) -> list[EditRecord]:
        """Return facts of cities where no file is named."""
        return atlas.load(limit) if self.data is None else super().read(limit, skipped)

    def records_needed(self) -> int:
        return max(self.facts)

    def data_settings(self) -> dict[str, Any]:
        return atlas.provenance() if self.data is None else super().data_settings()

    def cases(self, systems) -> Sequence[Question]:
        """Return the questions, spread over each text from its beginning to its end; ValueError where
        there are fewer records than facts, or more questions than facts."""
        if len(self.records) < max(self.facts) or self.queries > min(self.facts):
            name = self.data or atlas.provenance()["name"]
            raise ValueError(
                f"{name} has {len(self.records)} records; a text of {max(self.facts)} facts and "
                f"{self.queries} questions for one of {min(self.facts)} need more: give a larger "
                "file, or fewer --facts and --queries"
            )
        return [
            Question(f"{size}/{index}", size, int(index))
            for size in self.facts
            for index in np.linspace(0, size - 1, self.queries).round().astype(int)
        ]

    def evaluate(self, systems, cases: Sequence[Question]) -> Iterator[dict[str, Any]]:
        """Yield the recall of each question in its own words, and of the lookups and the memory in
        other words; questions of one N are read together."""
        for size in dict.fromkeys(case.facts for case in cases):
            group = [case for case in cases if case.facts == size]
            records = [self.records[case.index] for case in group]
            sides = {
                "edit": ([record.prompt for record in records], SHARED),
                "paraphrase": ([other_words(record) for record in records], SCOPED),
            }
            for kind, (prompts, names) in sides.items():
                targets = [record.target_new for record in records]
                columns = [
                    dict(case=case.case_id, kind=kind, facts=size, prompt=p, target_new=t)
                    for case, p, t in zip(group, prompts, targets, strict=True)
                ]
                queries, chunks = self._read(systems, size, columns)
                recall = queries.accuracy(targets, names)
                right = [
                    {"right_chunk": bool(chunk == case.index // self.fan_in)}
                    for case, chunk in zip(group, chunks, strict=True)
                ]
                yield from queries.rows(recall, lambda _, r: {"recall": float(r)}, right)

    def _read(self, systems, size: int, columns: Sequence[dict]) -> tuple[Queries, np.ndarray]:
        """Return the queries about the first `size` facts, and the chunk of each answer."""
        encoded = systems.cached("encoded", None, lambda: self._encode(systems))
        memories = systems.cached("memories", size, lambda: self._write(systems, encoded, size))
        model, latents = systems.model, encoded([column["prompt"] for column in columns])
        asking = model.dual, model.prepared, memories, latents.latent
        reading = long_context.read(*asking, by=self.by)
        facts = self._facts(size)
        keys = encoded([prompt for prompt, _ in facts]).embedding
        nearest = scope.nearest_key(latents.embedding, keys).key
        queries = Queries(
            systems.editor,
            columns,
            [self.text_in_prompt(systems, facts)] * len(columns),
            [facts[fact] for fact in nearest],
            np.ones(len(columns), np.float32),
            np.ones(len(columns), bool),
            lambda chosen: model.condition(reading.latent[chosen]),
        )
        return queries, np.asarray(reading.chunk)

    def _facts(self, size: int) -> list[tuple[str, str]]:
        return [(record.prompt, record.target_new) for record in self.records[:size]]

    def text_in_prompt(self, systems, facts: Sequence[tuple[str, str]]) -> str | None:
        """Return the end of the text, as many whole facts as have room; None where none has."""
        tokens, shown = 0, []
        for fact in reversed(facts):
            sentence = f"{written(*fact).rstrip('.')}."
            tokens += len(systems.editor.tokens(f"{written(*fact)}."))
            if tokens > self.room:
                break
            shown.append(sentence)
        return " ".join(reversed(shown)) or None

    def _encode(self, systems) -> EncodedTexts:
        facts = self._facts(len(self.records))
        others = [other_words(self.records[case.index]) for case in self.cases(systems)]
        return EncodedTexts(systems.model, [*(prompt for prompt, _ in facts), *others], facts)

    def _write(self, systems, encoded: EncodedTexts, size: int) -> long_context.Memories:
        facts, model = self._facts(size), systems.model
        keys, values = encoded([prompt for prompt, _ in facts]).latent, encoded.values(facts)
        return long_context.write(model.dual, model.prepared, keys, values, self.fan_in)


def other_words(record: EditRecord) -> str:
    """Return the last sentence of a fact's first paraphrase, what is before it being about something
    else; its own prompt where there is none."""
    return sentences(record.paraphrases[0])[-1] if record.paraphrases else record.prompt
