"""Forgetting one of many facts (Table 4)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.linalg

from larimar_jax.bench.fact_store import EncodedTexts, FactStore, encode_facts, written
from larimar_jax.bench.queries import CONTROLS
from larimar_jax.bench.rephrase import Keys, keys_option, with_keys
from larimar_jax.bench.task import EditTask, Metric, Pivot, Plot, option
from larimar_jax.memory import diagnostics

UNKNOWN = "unknown"
MOMENTS = ("before", "forgotten", "never", "replaced")


class ForgottenFact(NamedTuple):
    """Of `facts` facts, `index` is forgotten, and `others` are queries beside it."""

    case_id: str
    facts: int
    index: int
    others: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forget(EditTask):
    """Forgetting one of N facts of CounterFact: recall of it, and of the others (Table 4).

    N facts are written at once, one is forgotten (α = −1), and then its prompt is written with the
    answer "unknown"; beside it, a memory into which it was never written. Recall is the share of an
    answer's tokens that are the likeliest where they stand, teacher-forced, through the memory
    whether or not the query is in its scope: what the scope detector would keep from the decoder is
    no forgetting. Both lookups, too, take the nearest fact in scope or not: the fact's own, and
    once that is taken out of the store another's, or the one with "unknown". Beside it what no
    behaviour shows: how far the memory is from the float64 solution that never saw the fact, what
    the memory's own certificate estimates of that, and the leverage that is left to the key. The
    base LM, z = 0 and the fact in the prompt are the same at every moment: what a prompt holds is
    not forgotten. Of what was forgotten, the less is recalled the better.
    """

    metrics: ClassVar = {
        "recall": Metric("recall"),
        "distance": Metric("distance", 1.0, 3, lower=True),
        "certificate": Metric("certificate", 1.0, 3, lower=True),
        "leverage": Metric("leverage", 1.0, 3, lower=True),
        "refused": Metric("refused", 1.0, 0, lower=True),
        "largest_distance": Metric("largest distance", 1.0, 3, lower=True),
        "least_ratio": Metric("certificate / distance, least", 1.0),
        "largest_ratio": Metric("largest", 1.0),
    }
    factors = ("moment", "facts")
    labels: ClassVar = dict(facts="N", kind="of", never="never written", replaced="“unknown”")
    tables = (
        Pivot(
            ("system", "facts", "kind"),
            "moment",
            ("recall",),
            caption="recall, percent ± standard error; of the forgotten, once it is: lower is better",
        ),
        Pivot(
            ("facts",),
            None,
            ("distance", "certificate", "leverage", "refused"),
            where={"system": "open", "kind": "forgotten", "moment": "forgotten"},
            title="the memory after α = −1",
            caption="mean ± standard error over the forgotten facts",
        ),
        Pivot(
            ("facts",),
            None,
            ("largest_distance", "least_ratio", "largest_ratio"),
            where={"kind": "certificates"},
            title="its certificates",
            caption="over the forgotten facts",
        ),
    )
    plots = (Plot("moment", "recall", where={"facts": "last"}),)
    # After the same prompt was written with “unknown”, at N = K = 512.
    paper: ClassVar = {("forgotten", "replaced", 512): 0.1, ("others", "replaced", 512): 99.7}
    paper_if: ClassVar = {"model": {"slots": 512}}
    overview: ClassVar = {"moment": ("forgotten", "replaced")}
    quoted = False
    reference = (
        "Table 4, CounterFact, recall of the forgotten / of the others: Larimar-1.3B .001 / .997 at "
        "N = K, .02 / .79 at N = 2K (after the same prompt was written with “unknown”)."
    )

    facts: tuple[int, ...] = option("in the memory, N", default=(512, 1024))
    forget: int = option("facts forgotten, one at a time", default=50)
    others: int = option("other facts evaluated after each of them", default=8, least=0)
    keys: Keys = keys_option()
    seed: int = option("which facts", default=0, least=0)
    chunk: int = option("cases computed together", default=5)

    def records_needed(self) -> int:
        return max(self.facts)

    def lower_is_better(self, metric, entry) -> bool:
        """Return whether it is about what should be gone."""
        gone = entry["kind"] == "forgotten" and entry["moment"] != "before"
        return gone if metric == "recall" else super().lower_is_better(metric, entry)

    def cases(self, systems) -> Sequence[ForgottenFact]:
        """Return `forget` of the facts, and for each of them `others` of the rest, at every N."""
        self.require(max(self.facts), "are to be written", "--facts")
        cases = []
        for size in sorted(set(self.facts)):
            draw = np.random.default_rng((self.seed, size))
            for index in draw.permutation(size)[: self.forget]:
                rest = draw.permutation(np.delete(np.arange(size), index))[: self.others]
                others = tuple(int(place) for place in rest)
                cases.append(ForgottenFact(f"{size}/{index}", size, int(index), others))
        return cases

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        """Yield what each forgotten fact and the others are recalled by, and the certificates."""
        parts, certificates = [], []
        for case in cases:
            records = [self.records[index] for index in (case.index, *case.others)]
            facts = [written(record.prompt, record.target_new) for record in records]
            full = self._full(systems, case.facts)
            after = full.without([case.index])
            never = FactStore(self._encoded(systems), after.facts, model=full.model)
            replaced = after.plus([(records[0].prompt, UNKNOWN)])
            certificate = self._certificate(systems, case, full, after)
            for moment, store in zip(MOMENTS, (full, after, never, replaced), strict=True):
                columns = [
                    dict(case=case.case_id, kind="others" if place else "forgotten", moment=moment)
                    | dict(facts=case.facts, prompt=record.prompt, target=record.target_new)
                    for place, record in enumerate(records)
                ]
                parts.append((store, columns, facts))
                certificates.append(certificate if moment == "forgotten" else {})
                certificates += [{}] * len(case.others)
        queries = systems.shared_memories(parts, scoped=False)
        targets = [column["target"] for column in queries.columns]
        recall = queries.accuracy(targets, (*CONTROLS, "open"))
        yield from queries.rows(recall, lambda _, share: {"recall": share}, certificates)

    def derived(self, rows) -> list[dict[str, Any]]:
        """Return, for every N, the largest distance and how far the certificate is from it."""
        entries = []
        certified = [row for row in rows if row.get("distance") is not None]
        for size in dict.fromkeys(row["facts"] for row in certified):
            of_size = [row for row in certified if row["facts"] == size]
            ratios = [row["certificate"] / row["distance"] for row in of_size]
            extremes = {
                "largest_distance": max(row["distance"] for row in of_size),
                "least_ratio": min(ratios),
                "largest_ratio": max(ratios),
            }
            entry = {"system": "open", "kind": "certificates", "moment": "forgotten", "facts": size}
            fixed = {"standard_error": None, "cases": len(of_size)}
            entries.append(entry | {name: {"mean": v, **fixed} for name, v in extremes.items()})
        return entries

    def _certificate(self, systems, case: ForgottenFact, full, after: FactStore) -> dict[str, Any]:
        """How far the memory is from the float64 solution that never saw the fact, and what it
        estimates of that itself."""
        model, key = full.model, full.keys[[case.index]]
        states = full.state, after.state
        certificate = diagnostics.certify(model.memory, model.prepared, *states, key)
        return {
            "distance": self._distance(systems, case, full, after),
            "certificate": float(certificate.distance),
            "leverage": float(certificate.leverage),
            "refused": int(after.state.refused),
        }

    def _distance(self, systems, case: ForgottenFact, full: FactStore, after: FactStore) -> float:
        """‖M − M*‖ / ‖M*‖, M* the float64 solution of the facts that are left (Eq. 6)."""
        memory, prepared = full.model.memory, full.model.prepared

        def sums():
            weights = np.float64(memory.address(prepared, full.keys))
            return weights, np.float64(full.values), weights.T @ weights

        weights, values, gram = systems.cached("sums", case.facts, sums)
        before, gone = np.float64(prepared.prior_memory), weights[case.index]
        left = np.delete(weights, case.index, axis=0)
        shrink = float(memory.shrink(after.state.gram.total()))
        ridge = float(np.float32(memory.ridge)) + shrink
        right = left.T @ (np.delete(values, case.index, axis=0) - left @ before) - shrink * before
        rest = gram - np.outer(gone, gone) + ridge * np.eye(memory.slots)
        exact = before + scipy.linalg.solve(rest, right, assume_a="pos")
        apart = np.float64(after.state.solution) - exact
        return float(np.linalg.norm(apart) / np.linalg.norm(exact))

    def _full(self, systems, size: int) -> FactStore:
        """The store of the first `size` facts; one is held at a time."""
        facts = [(record.prompt, record.target_new) for record in self.records[:size]]

        def write() -> FactStore:
            encoded, prompts = self._encoded(systems), [prompt for prompt, _ in facts]
            model = with_keys(systems.model, self.keys, encoded, prompts)
            return FactStore(encoded, facts, model=model)

        return systems.cached("store", size, write)

    def _encoded(self, systems) -> EncodedTexts:
        facts = [(record.prompt, record.target_new) for record in self.records]
        gone = sorted({case.index for case in self.cases(systems)})
        facts += [(self.records[index].prompt, UNKNOWN) for index in gone]
        return systems.cached("encoded", (), lambda: encode_facts(systems.model, facts))
