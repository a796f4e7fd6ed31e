"""Wall clock of an edit (Table 1), and of the benchmark.

    rome …               an edit by another editor that the run names, on the untouched model
    write, ask, forget   what a session's user waits for, each with the encoder; base: the same question
                         to the untouched language model
    batched              CounterFact's cases under every system, as `larimar bench counterfact` has it

All run in turns within one process, so that they see the same machine load, after a first call of each,
which compiles. `python -m tests.comparisons scoring` times a naive loop beside `batched`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax

from larimar_jax.bench.counterfact import CounterFact
from larimar_jax.bench.memory_speed import Turn
from larimar_jax.bench.task import ComparedTask, Metric, Pivot, option
from larimar_jax.session import Session

# Facts that are in the session beside the one that is timed.
BESIDE = 64
TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed(ComparedTask):
    """Wall clock of an edit (Table 1), and of the benchmark."""

    metrics: ClassVar = {
        "seconds": Metric("ms", 1e3, median=True, lower=True),
        "first_seconds": Metric("first call, which compiles, s", 1.0, median=True, lower=True),
        "cases_per_second": Metric("cases/s", 1.0, 2, median=True),
    }
    labels: ClassVar = {
        "write": "write a fact",
        "ask": f"ask for it, at most {TOKENS} tokens",
        "base": f"ask the base LM, at most {TOKENS} tokens",
        "forget": "forget it, with its certificate",
        "batched": "CounterFact, every system",
    }
    tables: ClassVar = (Pivot(columns=None, title=f"{BESIDE} facts in memory", caption="medians"),)
    plots: ClassVar = ()
    quoted: ClassVar = False
    reference: ClassVar = (
        "Table 1, seconds per edit on an A100: ROME 4.8 (GPT-2 XL) and 13.9 (GPT-J), GRACE 13.9 and "
        "19.3, Larimar 1.1 and 1.7."
    )

    scored: int = option("cases of CounterFact", default=25)
    repeats: int = option("timings of each", default=5)
    chunk: int = option("timings computed together", default=1)

    def records_needed(self) -> int:
        return max(self.scored, BESIDE + 1)

    def cases(self, systems) -> Sequence[Turn]:
        """Return the turns; ValueError where the file has too few records."""
        self.require(self.records_needed(), "are needed", "--scored")
        return [Turn(number) for number in range(self.repeats)]

    def evaluate(self, systems, cases: Sequence[Turn]) -> Iterator[dict]:
        sides, first = systems.cached("sides", self, lambda: self._compile(systems))
        for case in cases:
            for name, side in sides.items():
                seconds = _seconds(side)
                yield {
                    "case": case.case_id,
                    "system": name,
                    "kind": "call",
                    "seconds": seconds,
                    "first_seconds": first[name],
                    "cases_per_second": self.scored / seconds if name == "batched" else None,
                }

    def _compile(self, systems) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
        """Return what is timed after its first calls, and their seconds."""
        # Benchmarks of this process that ran before, as in `larimar reproduce`, compiled some of it.
        jax.clear_caches()
        session, facts = Session(systems.model), [(r.prompt, r.target_new) for r in self.records]
        # The first write compiles.
        first = {"write": _seconds(lambda: session.write(*facts[0]))}
        for fact in facts[1:BESIDE]:
            session.write(*fact)
        prompt, ids = facts[BESIDE][0], []
        sizes = dict(chunk=self.scored, limit=self.scored)
        task = CounterFact(data=self.data, skip_bad=self.skip_bad, **sizes)
        records = self.records[: self.scored]
        sides = dict(
            write=lambda: ids.append(session.write(*facts[BESIDE]).id),
            ask=lambda: session.ask(prompt, max_tokens=TOKENS, stop=()),
            base=lambda: systems.model.generate([prompt], max_tokens=TOKENS, stop=()),
            forget=lambda: session.forget(ids.pop()),
            **systems.edits_of(facts[BESIDE]),
            batched=lambda: list(task.evaluate(systems, records)),
        )
        return sides, {name: _seconds(side) for name, side in sides.items()} | first


def _seconds(side: Callable[[], Any]) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start
