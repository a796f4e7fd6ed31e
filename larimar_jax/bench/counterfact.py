"""CounterFact, one edit at a time: edit, paraphrase and neighbourhood S and M (Table 2).

Protocol `rome`, that of the editing literature: the scope decision and the memory query see the
prompt only, paraphrases keep their distractor sentence, and the base row is the untouched LM. Each
case is written into an empty memory of its own. Side by side, on the same cases and weights:

    base      the untouched language model
    zero      z = 0: the memory slot is there and holds zeros
    prompt    the fact written in front of every prompt, whatever it asks
    lookup    the fact in front of the prompts that the scope detector lets through, and no matrix
    larimar   memory-conditioned decoding of the prompts that the scope detector lets through
"""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from larimar_jax.bench import metrics
from larimar_jax.bench.editor import Editor
from larimar_jax.bench.runner import Record
from larimar_jax.data.records import EditRecord

# The controls that every comparison carries, then what is compared with them.
SYSTEMS = {
    "base": "base LM",
    "zero": "z = 0",
    "prompt": "fact in the prompt",
    "lookup": "nearest neighbour",
    "larimar": "Larimar with scope",
}
MEMORY_SYSTEMS = ("larimar",)
CONTROL = "lookup"
Losses = dict[str, list[list[float]]]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench counterfact`."""
    parser.add_argument("--data", required=True, help="CounterFact's JSON file, either schema")
    parser.add_argument("--limit", type=int, help="only the first N records (default: all)")
    parser.add_argument("--model", default="smol", help="checkpoint, by name or path (%(default)s)")
    parser.add_argument(
        "--chunk", type=int, default=25, help="cases computed together (%(default)s)"
    )


def experiment(args: argparse.Namespace) -> "CounterFact":
    """The experiment of a parsed command line; reads the data and loads the model."""
    from larimar_jax.bench import editor
    from larimar_jax.data import counterfact

    cases = counterfact.load(args.data, args.limit)
    path = Path(args.data)
    data = {
        "name": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        "limit": args.limit,
    }
    return CounterFact(editor.LarimarEditor(args.model), cases, data=data, chunk=args.chunk)


class CounterFact:
    """CounterFact under one model and its controls; see `runner.Experiment`."""

    name = "counterfact"

    def __init__(
        self,
        editor: Editor,
        cases: Sequence[EditRecord],
        *,
        data: Mapping[str, Any],
        chunk: int = 25,
    ):
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}: it is a number of cases.")
        self.editor, self.cases, self.chunk = editor, cases, chunk
        # Nothing is drawn at random: σ_W = 0 and ξ = 0 at inference (§4).
        self.settings = {
            "mode": "rome",
            "data": dict(data),
            "model": dict(editor.settings),
            "chunk": chunk,
            "seed": None,
        }

    def run(self, cases: Sequence[EditRecord]) -> list[Record]:
        """Scores a chunk of cases; every system sees the same rows in one batch."""
        facts = [self.editor.written(case.prompt, case.target_new) for case in cases]
        queries = [[prompt for _, prompt, _ in _queries(case)] for case in cases]
        recalled = self.editor.recall(
            [(case.prompt, case.target_new) for case in cases], queries
        )
        inside = recalled.in_scope
        prompts = [prompt for row in queries for prompt in row]
        supported = [
            f"{fact.rstrip('.')}. {prompt}"
            for fact, row in zip(facts, queries, strict=True)
            for prompt in row
        ]
        targets = [(case.target_new, true) for case in cases for _, _, true in _queries(case)]
        everyone = np.arange(len(prompts))
        base = self._pairs(prompts, targets, everyone, lambda rows: None)
        with_fact = self._pairs(supported, targets, everyone, lambda rows: None)
        losses = {
            "base": base,
            "zero": self._pairs(
                prompts, targets, everyone, lambda rows: self.editor.zero(len(rows))
            ),
            "prompt": with_fact,
            # Outside the scope both fall back to the untouched LM, whose numbers are there already.
            "lookup": np.where(inside[:, None], with_fact, base),
            "larimar": base.copy(),
        }
        scoped = everyone[inside]
        losses["larimar"][scoped] = self._pairs(prompts, targets, scoped, recalled.condition)
        return _records(cases, facts, recalled, losses)

    def _pairs(self, prompts, targets, rows, condition) -> np.ndarray:
        """ℓ(new), ℓ(true) [n, 2] of n chosen prompts; `condition(rows)` gives their memory."""
        if len(rows) == 0:
            return np.zeros((0, 2), np.float32)
        chosen = [prompts[row] for row in rows]
        return self.editor.score(chosen, [targets[row] for row in rows], condition(rows))

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """`summarise`, as the runner calls it."""
        return summarise(records)

    def show(self, summary: Mapping[str, Any], console: Console) -> None:
        """Prints one row a system."""
        console.print(table(summary, f"CounterFact, {len(self.cases)} cases, mode rome"))


def _queries(case: EditRecord) -> list[tuple[str, str, str]]:
    """(kind, prompt, true target) of every prompt of a case, in the order of `metrics.KINDS`."""
    edits = [("edit", case.prompt), *(("paraphrase", prompt) for prompt in case.paraphrases)]
    neighbours = zip(case.neighbourhood, case.neighbourhood_targets, strict=True)
    return [(kind, prompt, case.target_true) for kind, prompt in edits] + [
        ("neighbourhood", prompt, true) for prompt, true in neighbours
    ]


def _records(cases, facts, recalled, losses: Mapping[str, np.ndarray]) -> list[Record]:
    records, start = [], 0
    for number, case in enumerate(cases):
        kinds = [kind for kind, _, _ in _queries(case)]
        rows = range(start, start + len(kinds))
        start += len(kinds)

        def by_kind(values, kinds=kinds):
            return {
                kind: [value for k, value in zip(kinds, values, strict=True) if k == kind]
                for kind in metrics.KINDS
            }

        for system, values in losses.items():
            broken = np.flatnonzero(~np.isfinite(values[rows.start : rows.stop]).all(axis=1))
            if broken.size:
                raise metrics.UnusableScore(
                    f"case {case.case_id}, {kinds[broken[0]]}, system {system}: a score is not "
                    "finite. The model's logits overflowed: run it in float32, or check the "
                    "checkpoint it was loaded from."
                )

        records.append(
            {
                "case_id": case.case_id,
                "written": facts[number],
                "target_new": case.target_new,
                "target_true": case.target_true,
                "prompts": by_kind([prompt for _, prompt, _ in _queries(case)]),
                "scope_score": by_kind([float(recalled.scope_score[row]) for row in rows]),
                "in_scope": by_kind([bool(recalled.in_scope[row]) for row in rows]),
                "loss": {
                    system: by_kind([[float(x) for x in values[row]] for row in rows])
                    for system, values in losses.items()
                },
            }
        )
    return records


# The result


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """{system: {kind: {S, M, …}, score}} from records, in percent with standard errors.

    A memory system's rows also hold `versus_lookup`, the paired difference of their S, and a `note`
    where that is not positive.
    """
    tables = {
        system: metrics.counterfact([record["loss"][system] for record in records])
        for system in SYSTEMS
    }
    results: dict[str, Any] = {}
    for system, found in tables.items():
        rows: dict[str, Any] = {}
        for kind in metrics.KINDS:
            rows[kind] = {name: vars(value) for name, value in found[kind].items()}
            if system in MEMORY_SYSTEMS and found[kind]["S"].cases:
                difference = metrics.paired_difference(
                    _successes(records, system, kind), _successes(records, CONTROL, kind)
                )
                rows[kind]["versus_lookup"] = vars(difference)
                if difference.mean <= 0.0:
                    rows[kind]["note"] = "does not beat the lookup"
        rows["score"] = vars(found["score"])
        if system in MEMORY_SYSTEMS and found["score"].cases:
            if found["score"].mean <= tables[CONTROL]["score"].mean:
                rows["score"]["note"] = "does not beat the lookup"
        results[system] = rows
    results["in_scope"] = {
        kind: vars(
            metrics.estimate(
                [np.mean(r["in_scope"][kind]) for r in records if r["in_scope"][kind]]
            )
        )
        for kind in metrics.KINDS
    }
    return results


def _successes(records: Sequence[Record], system: str, kind: str) -> list[float]:
    found = [np.asarray(record["loss"][system][kind], np.float64) for record in records]
    return [metrics.success(kind, pairs[:, 0], pairs[:, 1]) for pairs in found if len(pairs)]


def table(results: Mapping[str, Any], title: str) -> Table:
    """The result for people: S ± standard error above M of each kind, and the score."""
    shown = Table(title=title, caption="S ± standard error, below it M; percent", show_lines=True)
    shown.add_column("system")
    for kind in (*metrics.KINDS, "score"):
        shown.add_column(kind, justify="right")
    for system, label in SYSTEMS.items():
        rows = results[system]
        cells = [
            f"{_percent(rows[kind]['S'])}\n{_number(rows[kind]['M']['mean'])}"
            for kind in metrics.KINDS
        ]
        cells.append(_percent(rows["score"]))
        kinds = (*metrics.KINDS, "score")
        notes = [rows[kind].get("note", "").replace(" the", "\nthe") for kind in kinds]
        lines = zip(cells, notes, strict=True)
        shown.add_row(label, *("\n".join(filter(None, pair)) for pair in lines))
    share = results["in_scope"]
    cells = [_percent(share[kind]) for kind in metrics.KINDS]
    shown.add_row("prompts in scope", *cells, "", style="dim")
    return shown


def _percent(value: Mapping[str, Any]) -> str:
    error = value["standard_error"]
    return _number(value["mean"]) + ("" if error is None else f" ± {error:.1f}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
