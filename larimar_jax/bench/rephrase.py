"""Facts of ZsRE in several wordings, asked in one that was not written: which keys find them (Table 14)?

A cell F x n writes F facts, each in n wordings, into one memory, and asks each in its paraphrase. The
wordings are those that the file itself has for other subjects (`data/wordings.py`). Keys are compared
on the same rows, decoded through the memory whether or not a query is in scope: the model's own (the
pseudo-inverse of its M₀ with features), and with a slot for each fact, M_ref being the first wordings,
the pseudo-inverse and Gaussian keys (Eqs. 7–8). Recall is the share of an answer's tokens that are the
likeliest where they stand, teacher-forced. Controls: the base LM, z = 0, the fact in the prompt, and a
lookup of the nearest wording, where the scope detector lets it; keys that do not beat it say so.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from larimar_jax.bench import controls, given, headline, metrics, systems
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import Encoded, Store, encoded, written
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.memory.base import MemoryParams
from larimar_jax.memory.streaming import Streaming
from larimar_jax.pipeline import Pipeline

KEYS = {"own": "keys of the model", "pinv": "pseudo-inverse", "gaussian": "Gaussian"}
SYSTEMS = {
    "base": "base LM",
    "zero": "z = 0",
    "prompt": "fact in the prompt",
    "lookup": "nearest neighbour",
    "larimar": "Larimar with scope",
    **KEYS,
}
# α of Eq. 7, as in Fig. 2b of the paper.
WIDTH = 1e-3


def cell(text: str) -> tuple[int, int]:
    """F and n of "FxN"."""
    facts, _, wordings = text.partition("x")
    if not (facts.isdecimal() and wordings.isdecimal() and int(facts) and int(wordings)):
        raise argparse.ArgumentTypeError(f"{text!r} is not as 20x10: facts, x, wordings of each")
    return int(facts), int(wordings)


CELLS = ("20x10", "40x5", "100x2", "200x1", "1x1")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench rephrase`."""
    given.options(parser, "ZsRE's JSON file, of MEND or of KnowEdit")
    parser.add_argument(
        "--cells",
        type=cell,
        nargs="+",
        default=[cell(text) for text in CELLS],
        metavar="FxN",
        help=f"facts in a memory, and wordings of each that are written ({' '.join(CELLS)})",
    )
    parser.add_argument(
        "--asked",
        type=int,
        default=200,
        help="facts asked in a cell, in as many memories as they fill (%(default)s)",
    )
    systems.model_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="which facts (%(default)s)")
    parser.add_argument("--chunk", type=int, default=40, help="cases computed together (%(default)s)")


def experiment(args: argparse.Namespace) -> "Rephrase":
    """The experiment of a parsed command line; reads the data and loads the model."""
    from larimar_jax.data import zsre

    records, data = given.read(args, zsre.load, None)
    records = [record for record in records if record.paraphrases]
    wordings = given.wordings(args, zsre.load, records, max(n for _, n in args.cells) - 1)
    sizes = dict(cells=args.cells, asked=args.asked, seed=args.seed, chunk=args.chunk)
    return Rephrase(systems.model(args), records, wordings, data=data, **sizes)


@dataclasses.dataclass(frozen=True)
class Case:
    """Record `index` is asked of the memory of `together`, each written in n `wordings`."""

    case_id: str
    index: int
    together: tuple[int, ...]
    wordings: int


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row a cell."""
    title = "recall of unseen wordings ± standard error, percent"
    table = Table("facts", "wordings", *SYSTEMS.values(), title=title)
    for name, found in summary["results"].items():
        cells = [controls.noted(found[system]) for system in SYSTEMS]
        table.add_row(*name.split("x"), *cells)
    return [table]


PAPER = (
    "Table 14, (facts, wordings) pseudo-inverse / Gaussian: (20, 10) 94 / 90, (40, 5) 84 / 84, (100, 2) "
    "66 / 78, (200, 1) 33 / 69, (1, 1) 63 / 68."
)


def headlines(summary: Mapping[str, Any]) -> list[headline.Headline]:
    """Recall of unseen wordings by cell, through the model's own keys."""
    paper = {"20x10": "94", "40x5": "84", "100x2": "66", "200x1": "33", "1x1": "63"}
    return [
        headline.Headline(
            "unseen wordings, {} facts x {}".format(*cell.split("x")),
            headline.of(found, lambda one: one),
            paper.get(cell, ""),
        )
        for cell, found in summary["results"].items()
    ]


def values(record: Record) -> dict[str, float]:
    """Recall of a case by system."""
    return {f"{label}, {record['cell']}": record["recall"][name] for name, label in SYSTEMS.items()}


def texts(record: Record) -> list[str]:
    """What was written, what was asked, and how much of the answer each keys find."""
    found = (f"{label} {100 * record['recall'][name]:.0f} %" for name, label in KEYS.items())
    return [f"written: {text}" for text in record["written"]] + [
        f"asked among {record['cell']}: {record['prompt']} → {record['target']}: {', '.join(found)}"
    ]


def draw(axes: Any, summary: Mapping[str, Any]) -> None:
    """Recall by cell, a bar a system."""
    results = summary["results"]
    width = 0.8 / len(SYSTEMS)
    for number, (name, label) in enumerate(SYSTEMS.items()):
        places = np.arange(len(results)) + (number - (len(SYSTEMS) - 1) / 2) * width
        heights = [found[name]["mean"] for found in results.values()]
        errors = [found[name]["standard_error"] or 0.0 for found in results.values()]
        axes.bar(places, heights, width, yerr=errors, label=label)
    axes.set_xticks(np.arange(len(results)), list(results))
    axes.set_xlabel("facts x wordings written")
    axes.set_ylabel("recall of unseen wordings (percent, ± standard error)")
    axes.set_ylim(0, 101)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9)


class Rephrase:
    """See the head of this file; an experiment as in `runner.Experiment`.

    Args:
        records: with a paraphrase each. wordings: other wordings of each record's prompt.
        cells: (facts, wordings written of each). asked: facts a cell.
    Raises:
        ValueError: too few of the records have as many wordings as a cell writes.
    """

    name = "rephrase"
    tables = staticmethod(tables)

    def __init__(
        self,
        model: Pipeline,
        records: Sequence[EditRecord],
        wordings: Sequence[Sequence[str]],
        *,
        cells: Sequence[tuple[int, int]],
        asked: int,
        data: Mapping[str, Any],
        seed: int = 0,
        chunk: int = 40,
    ):
        self.model, self.records, self.chunk = model, records, chunk
        self._prompts = [(r.prompt, *more) for r, more in zip(records, wordings, strict=True)]
        self.cases = [case for size in cells for case in self._cases(*size, asked, seed)]
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "cells": [f"{facts}x{count}" for facts, count in cells],
            "asked": asked,
            "width": WIDTH,
            "systems": list(SYSTEMS),
            "chunk": chunk,
            "seed": seed,
        }
        self._encoded: Encoded | None = None
        self._stores: tuple[Any, dict[str, Store]] | None = None

    def _cases(self, facts: int, count: int, asked: int, seed: int) -> list[Case]:
        able = [index for index, prompts in enumerate(self._prompts) if len(prompts) >= count]
        if len(able) < facts:
            raise ValueError(
                f"{len(able)} records have {count} wordings and a paraphrase, and the cell "
                f"{facts}x{count} writes {facts}: give a larger file, or a smaller cell"
            )
        draw, found = np.random.default_rng((seed, facts, count)), []
        for memory in range(max(1, asked // facts)):
            together = tuple(int(i) for i in draw.permutation(able)[:facts])
            found += [
                Case(f"{facts}x{count}/{memory}/{index}", index, together, count) for index in together
            ]
        return found

    def run(self, cases: Sequence[Case]) -> list[Record]:
        """Recall under every system, all cases in one batch."""
        groups = itertools.groupby(cases, key=lambda case: (case.together, case.wordings))
        read: dict[str, list[np.ndarray]] = {keys: [] for keys in KEYS}
        nearest, inside, own = [], [], []
        for (together, count), some in groups:
            stores, some = self._filled(together, count), list(some)
            asked = [self.records[case.index].paraphrases[0] for case in some]
            for keys, store in stores.items():
                latent, match = store.read(asked)
                read[keys].append(latent)
                if keys == "own":
                    within = match.within(self.model.scope_threshold).tolist()
                    inside += within
                    nearest += [
                        store.texts[fact] if let else None
                        for fact, let in zip(match.key, within, strict=True)
                    ]
                    own += [
                        together[fact // count] == case.index
                        for fact, case in zip(match.key, some, strict=True)
                    ]
        asked = [self.records[case.index] for case in cases]
        prompts, targets = [r.paraphrases[0] for r in asked], [[r.target_new] for r in asked]

        def recall(texts, targets, condition=None):
            return self.model.judge(texts, targets, condition).accuracy[:, 0]

        sides = {
            "base": prompts,
            "prompt": controls.in_front([written(r.prompt, r.target_new) for r in asked], prompts),
            "lookup": controls.in_front(nearest, prompts),
        }
        found = controls.measured(recall, sides, targets)
        found["zero"] = recall(prompts, targets, self.model.zero(len(prompts)))
        for keys, latents in read.items():
            found[keys] = recall(prompts, targets, self.model.condition(np.concatenate(latents)))
        found["larimar"] = np.where(inside, found["own"], found["base"])
        return [
            {
                "case_id": case.case_id,
                "cell": case.case_id.split("/")[0],
                "written": [written(*fact) for fact in self._facts(case.index, case.wordings)],
                "prompt": prompts[row],
                "target": targets[row][0],
                "in_scope": inside[row],
                "nearest": nearest[row],
                "found_own": own[row],
                "recall": {name: float(found[name][row]) for name in SYSTEMS},
            }
            for row, case in enumerate(cases)
        ]

    def _facts(self, index: int, count: int) -> list[tuple[str, str]]:
        return [(prompt, self.records[index].target_new) for prompt in self._prompts[index][:count]]

    def _filled(self, together: tuple[int, ...], count: int) -> dict[str, Store]:
        """The memory of these facts by every kind of keys; those of one group are kept at a time."""
        if self._encoded is None:
            most = {index: 0 for case in self.cases for index in case.together}
            for case in self.cases:
                most[case.index] = max(most[case.index], case.wordings)
            facts = [fact for index, n in sorted(most.items()) for fact in self._facts(index, n)]
            asked = [self.records[index].paraphrases[0] for index in sorted(most)]
            self._encoded = encoded(self.model, facts, asked)
        if self._stores is None or self._stores[0] != (together, count):
            facts = [fact for index in together for fact in self._facts(index, count)]
            known = self._encoded([self.records[index].prompt for index in together]).latent
            stores = {"own": Store(self._encoded, facts)}
            for keys in ("pinv", "gaussian"):
                other = keyed(self.model, keys, known)
                stores[keys] = Store(self._encoded, facts, model=other)
            self._stores = (together, count), stores
        return self._stores[1]

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Recall in percent with standard errors by cell and system, and of the memory by every kind of
        keys the difference to the lookup, with a note."""
        result: dict[str, Any] = {}
        for cell in dict.fromkeys(record["cell"] for record in records):
            rows = [record["recall"] for record in records if record["cell"] == cell]
            found = {name: [row[name] for row in rows] for name in SYSTEMS}
            result[cell] = {name: vars(metrics.estimate(values)) for name, values in found.items()}
            for name in ("larimar", *KEYS):
                versus = systems.versus_lookup(found[name], found[systems.CONTROL])
                result[cell][name] |= versus
        return result


def keyed(model: Pipeline, addressing: Any, known: np.ndarray) -> Pipeline:
    """The model with an empty memory whose slots are known prompts, addressed by Eqs. 7–8 ("gaussian")
    or by their pseudo-inverse ("pinv").

    Args:
        known: the prompts' encodings [K, C], K slots.
    """
    slots, latent = known.shape
    own = model.memory
    memory = Streaming(
        slots=slots,
        latent=latent,
        ridge=own.ridge,
        query_noise=own.query_noise,
        addressing=addressing,
        width=WIDTH,
    )
    zero = jnp.zeros((slots, latent), jnp.float32)
    params = MemoryParams(zero, jnp.zeros((), jnp.float32), reference_memory=jnp.asarray(known))
    return model.with_memory(memory, memory.prepare(params))
