"""A stream of ZsRE edits, one after the other, with no knowledge of the future (Table 3, Fig. 2b).

Every fact is streamed into one memory (Eqs. 2–4). Along the way, wordings that were never written of
facts that were are asked (the generalisation curve); at the end every written prompt is (edit
retention), and so are prompts of facts that were never written, for their right answers (test
retention: as for the base LM, where nothing was lost). Answers are decoded greedily; the score is the F1
of the words of the first line that is not empty, of which as many count as the right answer has.
Controls: the base LM, and a lookup that puts the nearest written fact in front of the prompt.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from larimar_jax.bench import given, metrics, systems
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import Encoded, Store, encoded
from larimar_jax.data.records import EditRecord
from larimar_jax.memory import live
from larimar_jax.pretrained import Pretrained

SYSTEMS = {"base": "base LM", "lookup": "nearest neighbour", "larimar": "Larimar with scope"}
KINDS = {
    "edit": "edit retention",
    "rephrased": "held-out rephrasings",
    "unwritten": "test retention",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench stream`."""
    given.options(parser, "ZsRE's JSON file, of MEND or of KnowEdit")
    parser.add_argument("--edits", type=int, default=900, help="facts of the stream (%(default)s)")
    parser.add_argument(
        "--unwritten", type=int, default=100, help="facts after them, never written (%(default)s)"
    )
    parser.add_argument(
        "--every", type=int, default=50, help="edits between points of the curve (%(default)s)"
    )
    parser.add_argument(
        "--asked", type=int, default=32, help="facts asked at a point of the curve (%(default)s)"
    )
    systems.model_options(parser)
    parser.add_argument("--chunk", type=int, default=32, help="cases computed together (%(default)s)")


def experiment(args: argparse.Namespace) -> "Stream":
    """The experiment of a parsed command line; reads the data and loads the model.

    Raises:
        ValueError: the file has fewer records than are asked for.
    """
    from larimar_jax.data import zsre

    needed = args.edits + args.unwritten
    records, data = given.read(args, zsre.load, needed)
    # What was never written is asked for its right answer, whatever the file proposes to write.
    right, _ = given.read(args, zsre.load, None, target="answer")
    right = {record.case_id: record for record in right}
    records[args.edits :] = [right[record.case_id] for record in records[args.edits :]]
    if len(records) < needed:
        raise ValueError(
            f"{args.data} has {len(records)} records, and --edits and --unwritten ask for {needed}: "
            "give a larger file, or fewer of them"
        )
    sizes = (args.edits, args.every, args.asked)
    return Stream(systems.model(args), records, *sizes, data=data, chunk=args.chunk)


# Tokens decoded beyond those of the longest answer of a chunk: line breaks before it.
_MORE = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """Record `index` asked after `edits` edits, in the wording that `kind` says."""

    case_id: str
    kind: str
    edits: int
    index: int


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row a system at the end, and the curve of held-out rephrasings."""
    results = summary["results"]
    title = f"word F1 ± standard error after {summary['settings']['edits']} edits, percent"
    table = Table("system", *KINDS.values(), title=title)
    for system, label in SYSTEMS.items():
        cells = [systems.percent(results["f1"][system][kind]) for kind in KINDS]
        table.add_row(label, *cells)
    curve = Table("edits", *SYSTEMS.values(), title="held-out rephrasings")
    for point, found in results["curve"].items():
        curve.add_row(point, *(systems.percent(found[system]) for system in SYSTEMS))
    return [table, curve]


PAPER = (
    "Table 3, 1,000 edits (200 facts in 5 wordings), edit retention: MEND 27, GRACE 93, Larimar-1.3B "
    "97, Larimar-6B 92 (with a slot for each of the prompts, known beforehand)."
)


def values(record: Record) -> dict[str, float]:
    """F1 of a case by system, and what was asked."""
    kind = KINDS[record["kind"]]
    return {f"{label}, {kind}": float(record["f1"][name]) for name, label in SYSTEMS.items()}


def texts(record: Record) -> list[str]:
    """The question, the right answer, and what was said."""
    said = (f"{label}: {record['said'][name]!r}" for name, label in SYSTEMS.items())
    return [f"after {record['edits']} edits: {record['prompt']} → {record['gold']}", *said]


def draw(axes: Any, summary: Mapping[str, Any]) -> None:
    """F1 of held-out rephrasings over the stream."""
    curve = summary["results"]["curve"]
    lines = {label: [found[name] for found in curve.values()] for name, label in SYSTEMS.items()}
    systems.curves(axes, [int(point) for point in curve], lines)
    axes.set_xlabel("edits so far")
    axes.set_ylabel("F1 of held-out rephrasings (percent, ± standard error)")


class Stream:
    """See the head of this file; an experiment as in `runner.Experiment`."""

    name = "stream"
    tables = staticmethod(tables)

    def __init__(
        self,
        model: Pretrained,
        records: Sequence[EditRecord],
        edits: int,
        every: int,
        asked: int,
        *,
        data: Mapping[str, Any],
        chunk: int = 32,
    ):
        self.model, self.records, self.edits, self.chunk = model, records, edits, chunk
        self.points = sorted({*range(every, edits + 1, every), edits})
        self.cases = [*self._curve(asked), *self._end()]
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "edits": edits,
            "unwritten": len(records) - edits,
            "every": every,
            "asked": asked,
            "chunk": chunk,
            "seed": 0,
        }
        self._encoded: Encoded | None = None
        self._now: tuple[int, live.Live] | None = None

    def _curve(self, asked: int) -> list[Case]:
        """At every point, `asked` of the facts so far that have another wording."""
        draw, found = np.random.default_rng(0), []
        for point in self.points:
            known = [i for i in range(point) if self.records[i].paraphrases]
            for index in sorted(draw.permutation(known)[:asked]):
                found.append(Case(f"rephrased/{point}/{index}", "rephrased", point, int(index)))
        return found

    def _end(self) -> list[Case]:
        kinds = [*["edit"] * self.edits, *["unwritten"] * (len(self.records) - self.edits)]
        return [
            Case(f"{kind}/{index}", kind, self.edits, index) for index, kind in enumerate(kinds)
        ]

    def run(self, cases: Sequence[Case]) -> list[Record]:
        """Answers and their F1; cases after as many edits in one batch."""
        groups = itertools.groupby(cases, key=lambda case: case.edits)
        return [record for edits, some in groups for record in self._group(edits, list(some))]

    def _group(self, edits: int, cases: list[Case]) -> list[Record]:
        chosen = [self.records[case.index] for case in cases]
        prompts = [
            record.paraphrases[0] if case.kind == "rephrased" else record.prompt
            for case, record in zip(cases, chosen, strict=True)
        ]
        golds = [record.target_new for record in chosen]
        store = self._after(edits)
        recall, nearest = store.recall(prompts)
        inside = np.flatnonzero(recall.in_scope)
        words = max(len(self.model.decoder_tokenizer.ids(f" {gold}")) for gold in golds) + _MORE

        def generate(texts, condition=None):
            # A question mark is often followed by a line break, and the answer comes after it.
            return self.model.generate(texts, condition, max_tokens=words, stop=())

        base = generate(prompts)
        said = {"base": base, "lookup": list(base), "larimar": list(base)}
        if len(inside):
            asked = [prompts[row] for row in inside]
            facts = [store.texts[nearest[row]] for row in inside]
            in_front = [f"{fact.rstrip('.')}. {p}" for fact, p in zip(facts, asked, strict=True)]
            for system, texts, condition in (
                ("lookup", in_front, None),
                ("larimar", asked, recall.condition(inside)),
            ):
                found = generate(texts, condition)
                for row, text in zip(inside, found, strict=True):
                    said[system][row] = text
        records = []
        for row, (case, gold) in enumerate(zip(cases, golds, strict=True)):
            wanted = metrics.answer_tokens(gold)
            answers = {name: metrics.answer_tokens(_line(texts[row])) for name, texts in said.items()}
            cut = {name: found[: len(wanted)] for name, found in answers.items()}
            records.append(
                {
                    "case_id": case.case_id,
                    "kind": case.kind,
                    "edits": edits,
                    "prompt": prompts[row],
                    "gold": gold,
                    "said": {name: texts[row] for name, texts in said.items()},
                    "in_scope": bool(recall.in_scope[row]),
                    "f1": {n: metrics.token_f1(found, wanted) for n, found in cut.items()},
                    "f1_grace": {n: metrics.token_f1_grace(f, wanted) for n, f in cut.items()},
                }
            )
        return records

    def _after(self, edits: int) -> Store:
        """The store after so many edits, streamed one by one."""
        memory, prior = self.model.memory, self.model.prior
        facts = [(record.prompt, record.target_new) for record in self.records[: self.edits]]
        if self._encoded is None:
            asked = [record.paraphrases[0] for record in self.records if record.paraphrases]
            unwritten = [record.prompt for record in self.records[self.edits :]]
            self._encoded = encoded(self.model, facts, [*asked, *unwritten])
        if self._now is None or self._now[0] > edits:
            self._now = 0, _begin(memory, prior, memory.empty(prior))
        # From point to point, so that a run that is taken up streams the very same blocks.
        for point in self.points:
            done, now = self._now
            if done < point <= edits:
                keys = self._encoded([prompt for prompt, _ in facts[done:point]]).latent
                values = self._encoded.values(facts[done:point])
                self._now = point, _stream(memory, prior, now, keys, values)
        return Store(self._encoded, facts[:edits], _settle(memory, prior, self._now[1]))

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Mean F1 in percent with standard errors by kind and system at the end, and the curve."""
        end = [record for record in records if record["edits"] == self.edits]
        tables = {
            measure: {
                system: {kind: _mean(end, kind, system, measure) for kind in KINDS}
                for system in SYSTEMS
            }
            for measure in ("f1", "f1_grace")
        }
        curve = {
            str(point): {
                system: _mean([r for r in records if r["edits"] == point], "rephrased", system, "f1")
                for system in SYSTEMS
            }
            for point in self.points
        }
        return tables | {"curve": curve}


@jax.jit
def _begin(memory, prior, state):
    return live.begin(memory, prior, state)


@jax.jit
def _stream(memory, prior, now, keys, values):
    return live.stream(memory, prior, now, keys, values)[0]


@jax.jit
def _settle(memory, prior, now):
    return live.settle(memory, prior, now)


def _line(text: str) -> str:
    """The first line of an answer that is not empty."""
    return next((line for line in text.splitlines() if line.strip()), "")


def _mean(records: Sequence[Record], kind: str, system: str, measure: str) -> dict[str, Any]:
    values = [float(r[measure][system]) for r in records if r["kind"] == kind]
    return vars(metrics.estimate(values))
