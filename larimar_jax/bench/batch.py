"""Batch editing: N facts of CounterFact written at once, each asked by its own prompt (Fig. 2a).

Rewrite S for every N, protocol `rome`, beside the controls: the untouched LM, z = 0, the fact in the
prompt, and a lookup that puts the nearest written fact there where the scope detector lets it. What
none of them holds in memory does not depend on N and is measured once. A row of the memory says where
it does not beat the lookup.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from larimar_jax.bench import controls, given, headline, metrics, systems
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import Encoded, Store, encoded, written
from larimar_jax.data.records import EditRecord
from larimar_jax.pretrained import Pretrained

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
    """Fact `index` asked while `facts` are in; with 0 facts, what does not depend on a memory."""

    case_id: str
    facts: int
    index: int


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
    names = CONTROLS | SYSTEMS
    return {
        names[system] + (f", N = {record['facts']}" if record["facts"] else ""): float(new < true)
        for system, (new, true) in record["loss"].items()
    }


def texts(record: Record) -> list[str]:
    """The fact, and ℓ of both answers by system."""
    names = CONTROLS | SYSTEMS
    return [f"N = {record['facts']}: {record['prompt']}"] + [
        f"{names[system]}: ℓ({record['target_new']}) {new:.2f}, ℓ({record['target_true']}) {true:.2f}"
        for system, (new, true) in record["loss"].items()
    ]


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
        model: Pretrained,
        records: Sequence[EditRecord],
        sizes: Sequence[int],
        *,
        data: Mapping[str, Any],
        chunk: int = 128,
    ):
        self.model, self.records, self.chunk = model, records, chunk
        self.sizes = sorted(set(sizes))
        self.cases = [
            Case(f"{size}/{index}", size, index)
            for size in (0, *self.sizes)
            for index in range(size or self.sizes[-1])
        ]
        self.settings: Mapping[str, Any] = {
            "mode": "rome",
            "data": dict(data),
            "model": systems.named(model),
            "facts": self.sizes,
            "chunk": chunk,
            "slots": model.memory.slots,
            "seed": None,
        }
        self._encoded: Encoded | None = None
        self._store: Store | None = None

    def run(self, cases: Sequence[Case]) -> list[Record]:
        """ℓ(new) and ℓ(true) under every system; cases of one size in one batch."""
        groups = itertools.groupby(cases, key=lambda case: case.facts)
        return [record for size, some in groups for record in self._group(size, list(some))]

    def _group(self, size: int, cases: list[Case]) -> list[Record]:
        records = [self.records[case.index] for case in cases]
        prompts = [record.prompt for record in records]
        targets = [(record.target_new, record.target_true) for record in records]
        if size == 0:
            own = [written(record.prompt, record.target_new) for record in records]
            sides = {"base": prompts, "prompt": controls.in_front(own, prompts)}
            losses = controls.untouched(self.model.score, sides, targets)
            losses["zero"] = self.model.score(prompts, targets, self.model.zero(len(prompts)))
            more = [{} for _ in cases]
        else:
            store = self._filled(size)
            recall, nearest = store.recall(prompts)
            inside = np.flatnonzero(recall.in_scope)
            found = [
                store.texts[key] if within else None
                for key, within in zip(nearest, recall.in_scope, strict=True)
            ]
            losses = {"lookup": self.model.score(controls.in_front(found, prompts), targets)}
            # Out of scope both are the untouched LM's.
            losses["larimar"] = losses["lookup"].copy()
            if len(inside):
                losses["larimar"][inside] = self.model.score(
                    [prompts[row] for row in inside],
                    [targets[row] for row in inside],
                    recall.condition(inside),
                )
            more = [
                {"scope_score": float(score), "nearest": key, "in_scope": bool(within)}
                for score, key, within in zip(
                    recall.scope_score, nearest, recall.in_scope, strict=True
                )
            ]
        return [
            {
                "case_id": case.case_id,
                "facts": size,
                "index": case.index,
                "prompt": record.prompt,
                "target_new": record.target_new,
                "target_true": record.target_true,
                **extra,
                "loss": {name: [float(x) for x in found[row]] for name, found in losses.items()},
            }
            for row, (case, record, extra) in enumerate(zip(cases, records, more, strict=True))
        ]

    def _filled(self, size: int) -> Store:
        """The store of the first `size` facts; one is kept at a time."""
        if self._encoded is None:
            self._encoded = encoded(self.model, _facts(self.records))
        if self._store is None or len(self._store.facts) != size:
            self._store = Store(self._encoded, _facts(self.records[:size]))
        return self._store

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Rewrite S and M by N and system, in percent with standard errors; of the memory's S the
        difference to the lookup's, with a note; how often the nearest key was the fact's own."""
        without = [record for record in records if record["facts"] == 0]
        result = {}
        for size in self.sizes:
            rows = [record for record in records if record["facts"] == size]
            alone = [record for record in without if record["index"] < size]
            found = {name: _measured(alone, name) for name in CONTROLS}
            found |= {name: _measured(rows, name) for name in SYSTEMS}
            pair = (_successes(rows, name) for name in ("larimar", systems.CONTROL))
            found["larimar"] |= systems.versus_lookup(*pair)
            own = metrics.estimate([float(row["nearest"] == row["index"]) for row in rows])
            result[str(size)] = found | {"own_key_nearest": vars(own)}
        return result


def _facts(records: Sequence[EditRecord]) -> list[tuple[str, str]]:
    return [(record.prompt, record.target_new) for record in records]


def _measured(records: Sequence[Record], system: str) -> dict[str, Any]:
    pairs = [np.asarray([record["loss"][system]], np.float64) for record in records]
    return {
        "S": vars(metrics.estimate(_successes(records, system))),
        "M": vars(metrics.estimate([metrics.magnitude("edit", p[:, 0], p[:, 1]) for p in pairs])),
    }


def _successes(records: Sequence[Record], system: str) -> list[float]:
    return [
        metrics.success("edit", *np.asarray([record["loss"][system]], np.float64).T)
        for record in records
    ]
