"""The rephrase attack (Table 5)."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from larimar_jax.bench.fact_store import FactStore, encode_facts, written
from larimar_jax.bench.forget import UNKNOWN
from larimar_jax.bench.peers import by_model
from larimar_jax.bench.queries import SCOPED, SYSTEMS, Queries
from larimar_jax.bench.systems import case_keys
from larimar_jax.bench.task import ComparedTask, Metric, Pivot, Plot, option
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.data.paraphrases import Paraphrases
from larimar_jax.pipeline import Pipeline

# Records that are tried together.
_TRIED = 256


class AttackedFact(NamedTuple):
    """A fact that the base LM knows, and the wordings that it is attacked with."""

    record: EditRecord
    wordings: tuple[str, ...]

    @property
    def case_id(self) -> int:
        return self.record.case_id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(ComparedTask):
    """Rephrase attack: is an answer that was edited away still drawn from the model (Table 5)?

    Facts of CounterFact that the base LM knows: greedy decoding of the prompt gives the whole of
    the right answer. Each is edited to "unknown", alone in a memory and with all others in one. The
    attack samples after other wordings of the prompt (the record's own paraphrases, then those that
    the file has for other subjects), and succeeds where the right answer is anywhere in any sample.
    A case draws with a key of its own, under every system the same.

    A model that knows no facts is taught them with `--taught`: the memory holds the right answers, which
    are then forgotten (α = −1) and edited; the attack on the memory before that stands beside it.
    """

    metrics: ClassVar = {
        "success": Metric("attack succeeds", lower=True),
        "samples": Metric("samples with the answer", lower=True),
    }
    factors = ("memory",)
    labels: ClassVar = {"before": "before", "alone": "one edit", "together": "all edits"}
    tables = (
        Pivot(("system", "memory"), None, caption="percent ± standard error; lower is better"),
    )
    plots = (Plot(("memory",), "success"),)
    paper: ClassVar = {("attack", "alone"): 17.6, ("attack", "together"): 21.5}
    reference = (
        "Table 5, success: ROME 29.0, MEMIT 49.3, Larimar 17.6 (one fact written), 21.5 (batch)."
    )

    facts: int = option("that the base LM knows", default=50)
    taught: bool = option("write the right answers, and attack what was edited away", default=False)
    wordings: int = option("attacked with, of each", default=4)
    samples: int = option("after each wording", default=5)
    tokens: int = option("of a sample", default=10)
    temperature: float = option("of the samples", default=1.0, least=0)
    seed: int = option("of the samples", default=0, least=0)
    chunk: int = option("cases computed together", default=5)

    def cases(self, systems) -> Sequence[AttackedFact]:
        """Return the first facts that the base LM knows, or that it is taught; ValueError where there
        are fewer."""
        return systems.cached("cases", (), lambda: self._known(systems.model))

    def _known(self, model: Pipeline) -> list[AttackedFact]:
        wordings = Paraphrases(self.records)
        texts = [(r, (*r.paraphrases, *wordings.unseen(r))[: self.wordings]) for r in self.records]
        able = [AttackedFact(*each) for each in texts if len(each[1]) == self.wordings]
        if self.taught and len(able) >= self.facts:
            return able[: self.facts]
        known: list[AttackedFact] = []
        for start in range(0, len(able), _TRIED):
            tried = able[start : start + _TRIED]
            prompts = [fact.record.prompt for fact in tried]
            judged = model.judge(prompts, [[fact.record.target_true] for fact in tried])
            shares = judged.accuracy[:, 0]
            known += [fact for fact, share in zip(tried, shares, strict=True) if share == 1.0]
            if len(known) >= self.facts:
                return known[: self.facts]
        raise ValueError(
            f"of {len(able)} records the base LM knows {len(known)}, and {self.facts} are to be "
            "attacked: give a larger file, fewer --facts, or fewer --wordings"
        )

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        """Yield whether the attack on each fact succeeds, with the edit alone in memory and with
        all edits together."""
        prompts = [[text for text in case.wordings for _ in range(self.samples)] for case in cases]
        keys = case_keys(self.seed, [case.case_id for case in cases])
        rng = jnp.concatenate(
            [jax.random.split(key, len(row)) for key, row in zip(keys, prompts, strict=True)]
        )
        memo: dict = {}
        sample = functools.partial(self._sample, systems.model, rng, memo)
        times = np.repeat(np.arange(sum(len(case.wordings) for case in cases)), self.samples)
        samples = {
            memory: sample(queries.take(times), SYSTEMS if memory == "alone" else SCOPED)
            for memory, queries in self._queries(systems, cases).items()
        }
        row = 0
        for case, texts in zip(cases, prompts, strict=True):
            rows = slice(row, row + len(texts))
            row = rows.stop
            answer = " ".join(case.record.target_true.split())
            for memory, by_system in samples.items():
                for system, values in by_system.items():
                    leaks = [answer in " ".join(text.split()) for text in values[rows]]
                    yield {
                        "case": case.case_id,
                        "system": system,
                        "kind": "attack",
                        "memory": memory,
                        "success": float(max(leaks)),
                        "samples": float(np.mean(leaks)),
                        "prompt": case.record.prompt,
                        "true": case.record.target_true,
                        "wordings": list(case.wordings),
                        "texts": values[rows].tolist(),
                    }

    def _sample(self, model, rng, memo, queries: Queries, systems) -> dict[str, np.ndarray]:
        """The sample of every row by system, each with the row's key."""

        def sample(prompts, rows, condition):
            def generate(model, condition, chosen):
                return model.generate(
                    [prompts[place] for place in chosen],
                    condition,
                    max_tokens=self.tokens,
                    temperature=self.temperature,
                    rng=rng[np.asarray([rows[place] for place in chosen])],
                    stop=(),
                )

            return np.asarray(by_model(model, prompts, condition, generate), object)

        def forced(answer, row):
            return queries.editor.text(answer[: self.tokens])

        rows = list(range(len(queries.columns)))
        return queries.measure(sample, rows, forced, systems, memo)

    def _queries(self, systems, cases) -> dict[str, Queries]:
        """The queries of every wording, by what is in the memory."""
        texts = [[{"prompt": text} for text in case.wordings] for case in cases]
        everything = list(self.cases(systems))
        edits = [(case.record.prompt, UNKNOWN) for case in everything]
        store = systems.cached("store", (), lambda: self._store(systems, edits))
        if not self.taught:
            own = [edits[everything.index(case)] for case in cases]
            single = systems.single_edits(own, texts)
            together = systems.shared_memories([(store, single.columns, single.facts)])
            return {"alone": single, "together": together}
        all_edits = store.without(range(len(edits))).plus(edits)
        stores: dict[str, list[FactStore]] = {"before": [], "alone": [], "together": []}
        for case in cases:
            place = everything.index(case)
            edited = store.without([place]).plus([edits[place]])
            for memory, each in zip(stores, (store, edited, all_edits), strict=True):
                stores[memory].append(each)
        facts = [[written(case.record.prompt, UNKNOWN)] * len(case.wordings) for case in cases]
        return {
            memory: systems.shared_memories(list(zip(each, texts, facts, strict=True)))
            for memory, each in stores.items()
        }

    def _store(self, systems, edits: Sequence[tuple[str, str]]) -> FactStore:
        """The memory of all edits; of the right answers before them, where these are taught."""
        cases = self.cases(systems)
        right = [(case.record.prompt, case.record.target_true) for case in cases]
        queries = [text for case in cases for text in case.wordings]
        facts = [*edits, *(right if self.taught else ())]
        return FactStore(encode_facts(systems.model, facts, queries), facts[-len(cases) :])
