"""Wall clock of an edit (Table 1), and of the benchmark.

    write, forget, ask   what a session's user waits for, each with the encoder; `base` is the same
                         question to the untouched language model
    batched              CounterFact's cases under every system, as `larimar bench counterfact` has it

All are run in turns within one process, after a first run of each, which compiles: what it takes longer
than the median of those that follow is told apart. `python -m tests.comparisons scoring` times a loop of
one call of the decoder for each system, prompt and candidate beside it.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.table import Table

from larimar_jax.bench import given, systems
from larimar_jax.bench.editor import LarimarEditor
from larimar_jax.bench.runner import Record
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.pipeline import Pipeline
from larimar_jax.session import Session

PAPER = (
    "Table 1, seconds per edit on an A100: ROME 4.8 (GPT-2 XL) and 13.9 (GPT-J), GRACE 13.9 and 19.3, "
    "Larimar 1.1 and 1.7."
)
SESSION = {
    "write": "write a fact",
    "ask": "ask for it, at most 8 tokens",
    "base": "ask the base LM, at most 8 tokens",
    "forget": "forget it, with its certificate",
}
# Facts that are in the session beside the one that is timed.
_BESIDE = 64


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench speed`."""
    given.options(parser, given.COUNTERFACT)
    parser.add_argument("--cases", type=int, default=25, help="scored both ways (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each (%(default)s)")
    systems.model_options(parser)


def experiment(args: argparse.Namespace) -> "Speed":
    """The experiment of a parsed command line; reads the data and loads the model.

    Raises:
        ValueError: the file has too few records.
    """
    from larimar_jax.data import edit_records as data

    need = max(args.cases, _BESIDE + 1)
    records, named = given.read(args, data.load, need)
    if len(records) < need:
        raise ValueError(f"{args.data} has {len(records)} records, and {need} are needed")
    return Speed(systems.model(args), records, args.cases, args.repeats, data=named)


@dataclasses.dataclass(frozen=True)
class Case:
    """One timing of everything."""

    case_id: int


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """What a user waits for, and what batching gains."""
    results = summary["results"]
    compiling = results["compiling"]
    waited = Table("", "ms", "compiling, s", title=f"one call, {_BESIDE} facts in memory")
    for name, label in SESSION.items():
        waited.add_row(label, f"{1e3 * results['seconds'][name]:.1f}", f"{compiling[name]:.1f}")
    scored = Table("CounterFact, every system", "cases/s", "compiling, s")
    rate = results["cases_per_second"]
    scored.add_row("batched", f"{rate:.2f}", f"{compiling['batched']:.1f}")
    return [waited, scored]


class Speed:
    """See the head of this file; an experiment as in `runner.Experiment`."""

    name = "speed"
    chunk = 1
    tables = staticmethod(tables)

    def __init__(
        self,
        model: Pipeline,
        records: Sequence[EditRecord],
        scored: int,
        repeats: int,
        *,
        data: Mapping[str, Any],
    ):
        self.model, self.records, self.scored = model, records, scored
        self.cases = [Case(repeat) for repeat in range(repeats)]
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "scored": scored,
            "repeats": repeats,
            "timed": [*SESSION, "batched", "compiling"],
            "seed": None,
        }
        self._sides: dict[str, Callable[[], Any]] | None = None
        self._first: dict[str, float] = {}

    def run(self, cases: Sequence[Case]) -> list[Record]:
        """Seconds of each side."""
        if self._sides is None:
            # Other benchmarks of this process, as in `larimar reproduce`, may have compiled it all.
            jax.clear_caches()
            self._sides = {**self._session(), **self._scoring()}
            # The first write is already done, of the facts beside.
            self._first = _timed(self._sides) | self._first
        records = []
        for case in cases:
            seconds = _timed(self._sides)
            found = {"seconds": seconds, "first_seconds": self._first}
            records.append({"case_id": case.case_id, **found})
        return records

    def _session(self) -> dict[str, Callable[[], Any]]:
        session = Session(self.model)
        begin = time.perf_counter()
        for number, record in enumerate(self.records[:_BESIDE]):
            session.write(record.prompt, record.target_new)
            if not number:
                self._first["write"] = time.perf_counter() - begin
        last = self.records[_BESIDE]
        written = []

        def forget():
            session.forget(written.pop())

        return {
            "write": lambda: written.append(session.write(last.prompt, last.target_new).id),
            "ask": lambda: session.ask(last.prompt, max_tokens=8, stop=()),
            "base": lambda: self.model.generate([last.prompt], max_tokens=8, stop=()),
            "forget": forget,
        }

    def _scoring(self) -> dict[str, Callable[[], Any]]:
        chosen = self.records[: self.scored]
        made = counterfact.CounterFact(LarimarEditor(self.model), chosen, data={})
        return {"batched": lambda: made.run(chosen)}

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Medians, and cases per second; `compiling` is in seconds."""
        seconds = {
            name: statistics.median(record["seconds"][name] for record in records)
            for name in records[0]["seconds"]
        }
        first = records[0]["first_seconds"]
        return {
            "seconds": seconds,
            "compiling": {name: max(0.0, first[name] - seconds[name]) for name in first},
            "cases_per_second": self.scored / seconds["batched"],
        }


def _timed(sides: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each side."""
    seconds = {}
    for name, side in sides.items():
        begin = time.perf_counter()
        side()
        seconds[name] = time.perf_counter() - begin
    return seconds
