"""Many facts written at once (Fig. 2a)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from larimar_jax.bench.fact_store import FactStore, encode_facts, written
from larimar_jax.bench.metrics import rewrite_columns
from larimar_jax.bench.queries import SHARED
from larimar_jax.bench.task import ComparedTask, Metric, Pivot, Plot, option
from larimar_jax.data.edit_records import EditRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(ComparedTask):
    """Batch editing: N facts of CounterFact written at once, each with its own prompt (Fig. 2a).

    Rewrite S for every N, protocol `rome`. A case is a fact, evaluated at every N that it is among.
    """

    metrics: ClassVar = {
        "S": Metric("rewrite S"),
        "M": Metric("M"),
        "own_key_nearest": Metric("own key nearest"),
    }
    factors = ("facts",)
    labels: ClassVar = {"facts": "N", "edit": "rewrite"}
    tables = (Pivot(("facts",), "system", ("S",), caption="rewrite S, percent ± standard error"),)
    plots = (Plot("facts", "S", log="x", xlabel="N, facts in one memory"),)
    # N = K there, and in its K = 512 alone; its 82 is of N = 2K.
    paper: ClassVar = {("edit", 512): 100.0}
    paper_if: ClassVar = {"model": {"slots": 512}}
    reference = "Fig. 2a, K = 512: about 100 % up to N = 512, 82 % at 1,024."

    facts: tuple[int, ...] = option("how many at once, N", default=(1, 64, 256, 512, 1024, 2048))
    chunk: int = option("cases computed together", default=128)

    def records_needed(self) -> int:
        return max(self.facts)

    def cases(self, systems) -> Sequence["NumberedRecord"]:
        """Return the facts by their place in the file; ValueError where it has fewer."""
        self.require(max(self.facts), "are to be written at once", "--facts")
        return [NumberedRecord(place, record) for place, record in enumerate(self.records)]

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        """Yield S and M of each fact at every N."""
        stores = systems.cached("stores", (), lambda: self._stores(systems.model))
        # What the untouched LM makes of a text is measured once for all N.
        memo: dict = {}
        for size in sorted(set(self.facts)):
            within = [case for case in cases if case.case_id < size]
            columns = [
                dict(
                    case=case.case_id,
                    kind="edit",
                    facts=size,
                    prompt=case.record.prompt,
                    new=case.record.target_new,
                    true=case.record.target_true,
                )
                for case in within
            ]
            if not columns:
                continue
            facts = [(column["prompt"], column["new"]) for column in columns]
            texts = [written(*fact) for fact in facts]
            queries = systems.shared_memories([(stores[size], columns, texts)])
            pairs = [(column["new"], column["true"]) for column in columns]
            losses = queries.score(pairs, SHARED, memo)
            own = [
                {"own_key_nearest": float(fact == nearest)}
                for fact, nearest in zip(facts, queries.nearest, strict=True)
            ]
            yield from queries.rows(losses, rewrite_columns, own)

    def _stores(self, model) -> dict[int, FactStore]:
        facts = [(record.prompt, record.target_new) for record in self.records]
        encoded = encode_facts(model, facts)
        return {size: FactStore(encoded, facts[:size]) for size in sorted(set(self.facts))}


@dataclasses.dataclass(frozen=True)
class NumberedRecord:
    """A record with its place in the file."""

    case_id: int
    record: EditRecord
