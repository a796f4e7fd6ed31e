"""Batch editing: N facts of CounterFact written at once, each asked by its own prompt (Fig. 2a).

Rewrite S for every N, protocol `rome`, beside the controls: the untouched LM, z = 0, the fact in the
prompt, and a lookup that puts the nearest written fact there where the scope detector lets it. A case is
a fact, asked of every N that it is among, so that what the untouched LM makes of its text, such as of a
lookup's that finds it at all N, is measured once. A row of the memory says where it does not beat the
lookup.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from larimar_jax.bench import controls, given, headline, metrics, systems
from larimar_jax.bench.editor import Recall
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import Store, encoded, written
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.pipeline import Pipeline

CONTROLS = {"base": "base LM", "zero": "z = 0", "prompt": "fact in the prompt"}
SYSTEMS = {"lookup": "nearest neighbour", "larimar": "Larimar with scope"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench batch`."""
    given.options(parser, given.COUNTERFACT)
    parser.add_argument(
        "--facts",
        type=int,
        nargs="+",
        default=[1, 64, 256, 512, 1024, 2048],
        help="how many at once, N (%(default)s)",
    )
    systems.model_options(parser)
    parser.add_argument("--chunk", type=int, default=128, help="cases computed together (%(default)s)")


def experiment(args: argparse.Namespace) -> "Batch":
    """The experiment of a parsed command line; reads the data and loads the model.

    Raises:
        ValueError: the file has fewer records than facts are to be written.
    """
    from larimar_jax.data import counterfact

    most = max(args.facts)
    records, data = given.read(args, counterfact.load, most)
    if len(records) < most:
        raise ValueError(
            f"{args.data} has {len(records)} records, and {most} are to be written at once: give a "
            "larger file, or fewer --facts"
        )
    return Batch(systems.model(args), records, args.facts, data=data, chunk=args.chunk)


@dataclasses.dataclass(frozen=True)
class Case:
    """Fact `case_id` in the order of the file, asked of every memory that holds it."""

    case_id: int


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row for every N."""
    results = summary["results"]
    names = {**CONTROLS, **SYSTEMS}
    table = Table("N", *names.values(), title="rewrite S, percent ± standard error")
    for size, found in results.items():
        cells = [
            controls.noted(found[name], systems.percent(found[name]["S"])) for name in names
        ]
        table.add_row(size, *cells)
    return [table]


PAPER = "Fig. 2a, K = 512: about 100 % up to N = 512, 82 % at 1,024."


def headlines(summary: Mapping[str, Any]) -> list[headline.Headline]:
    """Rewrite S at every N."""
    # N = K there, and in its K = 512 alone; its 82 is of N = 2K.
    paper = {"512": "100"} if summary["settings"].get("slots") == 512 else {}
    return [
        headline.Headline(
            f"rewrite S, N = {int(size):,}",
            headline.of(found, lambda one: one["S"] | {"note": one.get("note", "")}),
            paper.get(size, ""),
        )
        for size, found in summary["results"].items()
    ]


def values(record: Record) -> dict[str, float]:
    """Rewrite S of a fact by system and N."""
    return {label: float(new < true) for label, (new, true) in _labelled(record).items()}


def texts(record: Record) -> list[str]:
    """The fact, and ℓ of both answers by system and N."""
    return [record["prompt"]] + [
        f"{label}: ℓ({record['target_new']}) {new:.2f}, ℓ({record['target_true']}) {true:.2f}"
        for label, (new, true) in _labelled(record).items()
    ]


def _labelled(record: Record) -> dict[str, Sequence[float]]:
    """ℓ(new) and ℓ(true) by what has them."""
    found = {CONTROLS[name]: pair for name, pair in record["loss"].items()}
    for size, memory in record["memory"].items():
        found |= {f"{SYSTEMS[name]}, N = {size}": pair for name, pair in memory["loss"].items()}
    return found


def draw(axes: Any, summary: Mapping[str, Any]) -> None:
    """Rewrite S against N."""
    results = summary["results"]
    names = CONTROLS | SYSTEMS
    lines = {label: [found[name]["S"] for found in results.values()] for name, label in names.items()}
    systems.curves(axes, [int(size) for size in results], lines)
    systems.doubling(axes, [int(size) for size in results])
    axes.set_xlabel("N, facts in one memory")
    axes.set_ylabel("rewrite S (percent, ± standard error)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=9)


class Batch:
    """See the head of this file; an experiment as in `runner.Experiment`."""

    name = "batch"
    tables = staticmethod(tables)

    def __init__(
        self,
        model: Pipeline,
        records: Sequence[EditRecord],
        sizes: Sequence[int],
        *,
        data: Mapping[str, Any],
        chunk: int = 128,
    ):
        self.model, self.records, self.chunk = model, records, chunk
        self.sizes = sorted(set(sizes))
        self.cases = [Case(index) for index in range(self.sizes[-1])]
        self.settings: Mapping[str, Any] = {
            "mode": "rome",
            "data": dict(data),
            "model": systems.named(model),
            "facts": self.sizes,
            "chunk": chunk,
            "slots": model.memory.slots,
            "seed": None,
        }
        self._stores: dict[int, Store] = {}

    def run(self, cases: Sequence[Case]) -> list[Record]:
        """ℓ(new) and ℓ(true) under every system, at every N."""
        records = [self.records[case.case_id] for case in cases]
        prompts = [record.prompt for record in records]
        targets = [(record.target_new, record.target_true) for record in records]
        own = [written(record.prompt, record.target_new) for record in records]
        sides = {"base": prompts, "prompt": controls.in_front(own, prompts)}
        read: dict[str, _Read] = {}
        for size in self.sizes:
            rows = [row for row, case in enumerate(cases) if case.case_id < size]
            if not rows:
                continue
            store = self._filled(size)
            recall, nearest = store.recall([prompts[row] for row in rows])
            read[str(size)] = _Read(rows, recall, nearest)
            found: list[str | None] = [None] * len(cases)
            for row, fact, within in zip(rows, nearest, recall.in_scope, strict=True):
                found[row] = store.texts[fact] if within else None
            sides[str(size)] = controls.in_front(found, prompts)
        losses = controls.measured(self.model.score, sides, targets)
        losses["zero"] = self.model.score(prompts, targets, self.model.zero(len(prompts)))
        memory: list[dict[str, Any]] = [{} for _ in cases]
        for size, (rows, recall, nearest) in read.items():
            # Out of scope the memory is the untouched LM, as the lookup is.
            ours = losses[size].copy()
            inside = np.flatnonzero(recall.in_scope)
            if len(inside):
                asked = [rows[place] for place in inside]
                ours[asked] = self.model.score(
                    [prompts[row] for row in asked],
                    [targets[row] for row in asked],
                    recall.condition(inside),
                )
            for place, row in enumerate(rows):
                memory[row][size] = {
                    "scope_score": float(recall.scope_score[place]),
                    "nearest": nearest[place],
                    "in_scope": bool(recall.in_scope[place]),
                    "loss": {"lookup": losses[size][row].tolist(), "larimar": ours[row].tolist()},
                }
        return [
            {
                "case_id": case.case_id,
                "prompt": record.prompt,
                "target_new": record.target_new,
                "target_true": record.target_true,
                "loss": {name: losses[name][row].tolist() for name in CONTROLS},
                "memory": memory[row],
            }
            for row, (case, record) in enumerate(zip(cases, records, strict=True))
        ]

    def _filled(self, size: int) -> Store:
        """The store of the first `size` facts."""
        if not self._stores:
            known = encoded(self.model, _facts(self.records))
            self._stores = {n: Store(known, _facts(self.records[:n])) for n in self.sizes}
        return self._stores[size]

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Rewrite S and M by N and system, in percent with standard errors; of the memory's S the
        difference to the lookup's, with a note; how often the nearest key was the fact's own."""
        result = {}
        for size in map(str, self.sizes):
            rows = [record for record in records if size in record["memory"]]
            pairs = {name: [row["loss"][name] for row in rows] for name in CONTROLS}
            held = [row["memory"][size] for row in rows]
            pairs |= {name: [row["loss"][name] for row in held] for name in SYSTEMS}
            found = {name: _measured(pairs[name]) for name in pairs}
            both = (_successes(pairs[name]) for name in ("larimar", systems.CONTROL))
            found["larimar"] |= systems.versus_lookup(*both)
            own = [
                float(memory["nearest"] == row["case_id"])
                for row, memory in zip(rows, held, strict=True)
            ]
            result[size] = found | {"own_key_nearest": vars(metrics.estimate(own))}
        return result


class _Read(NamedTuple):
    """Of the rows that a memory holds, what it answers, and the number of the fact that is nearest."""

    rows: list[int]
    recall: Recall
    nearest: list[int]


def _facts(records: Sequence[EditRecord]) -> list[tuple[str, str]]:
    return [(record.prompt, record.target_new) for record in records]


# ℓ(new) and ℓ(true) of each fact.
_Pairs = Sequence[Sequence[float]]


def _measured(pairs: _Pairs) -> dict[str, Any]:
    magnitudes = [metrics.magnitude("edit", *_columns(pair)) for pair in pairs]
    return {
        "S": vars(metrics.estimate(_successes(pairs))),
        "M": vars(metrics.estimate(magnitudes)),
    }


def _successes(pairs: _Pairs) -> list[float]:
    return [metrics.success("edit", *_columns(pair)) for pair in pairs]


def _columns(pair: Sequence[float]) -> np.ndarray:
    return np.asarray([pair], np.float64).T
