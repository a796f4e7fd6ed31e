"""A stream of edits (Table 3, Fig. 2b)."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from larimar_jax.bench.fact_store import EncodedTexts, FactStore, encode_facts, written
from larimar_jax.bench.metrics import answer_words, first_line, token_f1, token_f1_grace
from larimar_jax.bench.queries import SHARED
from larimar_jax.bench.rephrase import Keys, keys_option, with_keys
from larimar_jax.bench.task import ZSRE, ComparedTask, Metric, Pivot, Plot, option
from larimar_jax.data.edit_records import EditRecord, load
from larimar_jax.memory import rls

# Tokens decoded beyond those of the right answer: line breaks before it.
MARGIN = 3


class StreamQuestion(NamedTuple):
    """`prompt` after `edits` edits, whose right answer is `gold`. fact: what was written of it, as
    a text; None where nothing was."""

    case_id: str
    kind: str
    edits: int
    prompt: str
    gold: str
    fact: str | None


class Edits(NamedTuple):
    """records: facts in the order of the stream, and behind them those that are never written.
    prompts: (record, prompt) of each edit. facts: how many records are written."""

    records: list[EditRecord]
    prompts: list[tuple[int, str]]
    facts: int

    def written(self, edits: int) -> list[tuple[str, str]]:
        """Return prompt and answer of the first edits."""
        return [(prompt, self.records[row].target_new) for row, prompt in self.prompts[:edits]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream(ComparedTask):
    """A stream of ZsRE edits, one after the other, with no knowledge of the future (Table 3, Fig.
    2b).

    Every edit is streamed into one memory (Eqs. 2–4). An edit is a fact in one wording: with
    `--wordings N` each fact is written in its prompt and in N − 1 wordings that the file has for
    other subjects (`data/paraphrases.py`), one edit after the other, and `--edits` counts them all.
    Facts that have N wordings come first, in the file's order; where they do not fill the stream,
    facts with fewer follow, each in as many as it has. With `--keys pinv` or `gaussian` the memory has
    a slot for the prompt of every edit, all of them known beforehand, as in the paper's Table 3.

    Along the way, rephrasings that are never written are put to facts that were (the generalisation
    curve); at the end every written prompt is a query (edit retention), and so are prompts of facts
    that were never written, with their right answers (test retention: as for the base LM, where
    nothing was lost). Answers are decoded greedily; the score is the F1 of the words of the first
    line that is not empty, of which as many count as the right answer has.
    """

    metrics: ClassVar = {
        "f1": Metric("word F1"),
        "f1_grace": Metric("GRACE's F1"),
        "in_scope": Metric("prompts in scope"),
    }
    factors = ("edits",)
    labels: ClassVar = {
        "edit": "edit retention",
        "rephrased": "held-out rephrasings",
        "unwritten": "test retention",
    }
    kinds = ("edit", "rephrased", "unwritten")
    tables = (
        Pivot(where={"edits": "last"}, title="word F1 at the end of the stream"),
        Pivot(("edits",), "system", where={"kind": "rephrased"}, title="held-out rephrasings"),
    )
    plots = (Plot("edits", "f1", where={"kind": "rephrased"}, xlabel="edits so far"),)
    paper: ClassVar = {("edit", 1000): 97.0}
    paper_if: ClassVar = {"options": {"wordings": 5}}
    overview: ClassVar = {"edits": "last"}
    reference = (
        "Table 3, 1,000 edits (200 facts in 5 wordings), edit retention: MEND 27, GRACE 93, "
        "Larimar-1.3B 97, Larimar-6B 92 (with a slot for each of the prompts, known beforehand)."
    )

    data: str = option(ZSRE, metavar="FILE", recorded=False)
    edits: int = option("edits of the stream", default=900)
    wordings: int = option(
        "write a fact in so many wordings one after the other, its prompt and those of other "
        "records of the file; facts that have as many come first",
        default=1,
        metavar="N",
    )
    keys: Keys = keys_option()
    unwritten: int = option("facts after them, never written", default=100, least=0)
    every: int = option("edits between points of the curve", default=50)
    queries: int = option("facts put to the memory at a point of the curve", default=32)
    retained: int | None = option(
        "evaluate only so many of the written prompts at the end, drawn by chance (default: all)",
        default=None,
        metavar="N",
    )
    chunk: int = option("cases computed together", default=128)

    def records_needed(self) -> int | None:
        """Return the facts of the stream; which have enough wordings is known from the whole
        file."""
        return self.edits + self.unwritten if self.wordings == 1 else None

    @functools.cached_property
    def stream(self) -> Edits:
        """All edits in their order, and the facts that are never written.

        Raises:
            ValueError: the file has too few records.
        """
        wordings = self.other_wordings(self.records, self.wordings - 1)
        order = sorted(range(len(self.records)), key=lambda place: -len(wordings[place]))
        records = [self.records[place] for place in order]
        wordings = [wordings[place] for place in order]
        total = np.cumsum([1 + len(more) for more in wordings])
        facts = int(np.searchsorted(total, self.edits)) + 1
        if facts + self.unwritten > len(records):
            raise ValueError(
                f"{self.data} has {len(records)} records, which make {total[-1]} edits in at most "
                f"{self.wordings} wordings, and --edits {self.edits} and --unwritten "
                f"{self.unwritten} need more: give a larger file, or fewer of them"
            )
        # The right answer of what was never written, whatever the file proposes to write.
        right = load(self.data, None, "answer", skipped=[] if self.skip_bad else None)
        right = {record.case_id: record for record in right}
        unwritten = [right[record.case_id] for record in records[facts : facts + self.unwritten]]
        prompts = [
            (place, prompt)
            for place, (record, more) in enumerate(zip(records[:facts], wordings, strict=False))
            for prompt in (record.prompt, *more)
        ]
        return Edits([*records[:facts], *unwritten], prompts[: self.edits], facts)

    @property
    def points(self) -> list[int]:
        """The numbers of edits at which the curve has a point."""
        return sorted({*range(self.every, self.edits + 1, self.every), self.edits})

    def cases(self, systems) -> Sequence[StreamQuestion]:
        """Return the queries of the curve, and behind them those of the end."""
        return [*self._curve(), *self._end()]

    def _curve(self) -> Iterator[StreamQuestion]:
        """At every point, `queries` of the facts so far that have a rephrasing which no edit
        writes: another record may have it for its prompt."""
        draw, (records, edits, _) = np.random.default_rng(0), self.stream
        prompts = {prompt for _, prompt in edits}
        for point in self.points:
            known = [
                row
                for row in dict.fromkeys(row for row, _ in edits[:point])
                if records[row].paraphrases and records[row].paraphrases[0] not in prompts
            ]
            for row in sorted(draw.permutation(known)[: self.queries]):
                record = records[row]
                fact = written(record.prompt, record.target_new)
                name, query = f"rephrased/{point}/{row}", record.paraphrases[0]
                yield StreamQuestion(name, "rephrased", point, query, record.target_new, fact)

    def _end(self) -> Iterator[StreamQuestion]:
        edits = list(enumerate(self.stream.written(self.edits)))
        if self.retained is not None:
            chosen = np.random.default_rng(0).permutation(len(edits))[: self.retained]
            edits = [edits[number] for number in sorted(chosen)]
        for number, (prompt, answer) in edits:
            fact = written(prompt, answer)
            yield StreamQuestion(f"edit/{number}", "edit", self.edits, prompt, answer, fact)
        for row, record in enumerate(self.stream.records[self.stream.facts :], self.stream.facts):
            name, gold = f"unwritten/{row}", record.target_new
            yield StreamQuestion(name, "unwritten", self.edits, record.prompt, gold, None)

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        """Yield answers and their F1; the memory is read as it is after a case's edits."""
        parts = []
        for edits, group in itertools.groupby(cases, key=lambda case: case.edits):
            group = list(group)
            columns = [
                dict(case=case_id, kind=kind, edits=edits, prompt=prompt, gold=gold)
                for case_id, kind, _, prompt, gold, _ in group
            ]
            parts.append((self._after(systems, edits), columns, [case.fact for case in group]))
        queries = systems.shared_memories(parts, in_turn=True)
        ids = systems.model.decoder_tokenizer.ids
        limits = [len(ids(f" {case.gold}")) + MARGIN for case in cases]

        def measured(column, text):
            gold = answer_words(column["gold"])
            words = answer_words(first_line(text), len(gold))
            f1, f1_grace = token_f1(words, gold), token_f1_grace(words, gold)
            return {"f1": f1, "f1_grace": f1_grace, "text": text}

        yield from queries.rows(queries.generate(limits, SHARED), measured)

    def _after(self, systems, edits: int) -> FactStore:
        """The store after so many edits, streamed one by one."""
        facts = self.stream.written(self.edits)

        def encode() -> EncodedTexts:
            queries = [case.prompt for case in self.cases(systems)]
            return encode_facts(systems.model, facts, queries)

        encoded = systems.cached("encoded", (), encode)
        prompts = [prompt for prompt, _ in facts]
        model = systems.cached(
            "keyed", (), lambda: with_keys(systems.model, self.keys, encoded, prompts)
        )
        memory, prepared = model.memory, model.prepared
        progress = systems.cached("progress", (), dict)
        if progress.get("edits", edits + 1) > edits:
            progress |= {"edits": 0, "state": rls.init(memory, prepared, memory.empty(prepared))}
        # From point to point, so that a run that is taken up streams the very same blocks.
        for point in self.points:
            done = progress["edits"]
            if done < point <= edits:
                keys = encoded([prompt for prompt, _ in facts[done:point]]).latent
                values = encoded.values(facts[done:point])
                state, _ = rls.stream(memory, prepared, progress["state"], keys, values)
                progress |= {"edits": point, "state": state}
        state = rls.to_state(memory, prepared, progress["state"])
        return FactStore(encoded, facts[:edits], state, model)
