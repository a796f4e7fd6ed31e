"""A stream of ZsRE edits, one after the other, with no knowledge of the future (Table 3, Fig. 2b).

Every edit is streamed into one memory (Eqs. 2–4). An edit is a fact in one wording: with `--wordings N`
each fact is written in its prompt and in N − 1 wordings that the file has for other subjects
(`data/wordings.py`), one edit after the other, and `--edits` counts them all. Facts that have N wordings
come first, in the file's order; where they do not fill the stream, facts with fewer follow, each in as
many as it has.

Along the way, rephrasings that are never written of facts that were are asked (the generalisation
curve); at the end every written prompt is (edit retention), and so are prompts of facts that were never
written, for their right answers (test retention: as for the base LM, where nothing was lost). Answers
are decoded greedily; the score is the F1 of the words of the first line that is not empty, of which as
many count as the right answer has. Controls: the base LM, z = 0, the right fact in front of the prompt
(of what was never written there is none), and a lookup that puts the nearest written fact there.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from larimar_jax.bench import answers, given, headline, metrics, systems
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import Encoded, Store, encoded, written
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.memory import rls
from larimar_jax.pipeline import Pipeline

SYSTEMS = {
    "base": "base LM",
    "zero": "z = 0",
    "prompt": "fact in the prompt",
    "lookup": "nearest neighbour",
    "larimar": "Larimar with scope",
}
KINDS = {
    "edit": "edit retention",
    "rephrased": "held-out rephrasings",
    "unwritten": "test retention",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench stream`."""
    given.options(parser, "ZsRE's JSON file, of MEND or of KnowEdit")
    parser.add_argument(
        "--edits",
        type=int,
        default=900,
        help="edits of the stream, each of them a fact in one wording (%(default)s)",
    )
    parser.add_argument(
        "--wordings",
        type=int,
        default=1,
        metavar="N",
        help="write a fact in so many wordings one after the other, its prompt and those of other "
        "records of the file; facts that have as many come first (%(default)s)",
    )
    parser.add_argument(
        "--unwritten", type=int, default=100, help="facts after them, never written (%(default)s)"
    )
    parser.add_argument(
        "--every", type=int, default=50, help="edits between points of the curve (%(default)s)"
    )
    parser.add_argument(
        "--asked", type=int, default=32, help="facts asked at a point of the curve (%(default)s)"
    )
    parser.add_argument(
        "--retained",
        type=int,
        metavar="N",
        help="ask only so many of the written prompts at the end, drawn by chance (default: all)",
    )
    systems.model_options(parser)
    parser.add_argument("--chunk", type=int, default=128, help="cases computed together (%(default)s)")


def experiment(args: argparse.Namespace) -> "Stream":
    """The experiment of a parsed command line; reads the data and loads the model.

    Raises:
        ValueError: the file has fewer records than are asked for.
    """
    from larimar_jax.data import zsre

    retained = args.edits if args.retained is None else args.retained
    if min(args.edits, args.every, args.wordings, retained) < 1 or args.unwritten < 0:
        raise ValueError(
            "--edits, --every, --wordings and --retained must be at least 1, and --unwritten not less "
            "than 0: they are numbers of edits, of wordings and of facts"
        )
    # Which facts have enough wordings is known from the whole file.
    most = args.edits + args.unwritten if args.wordings == 1 else None
    records, data = given.read(args, zsre.load, most)
    wordings = given.wordings(args, zsre.load, records, args.wordings - 1)
    order = sorted(range(len(records)), key=lambda place: -len(wordings[place]))
    records, wordings = [records[place] for place in order], [wordings[place] for place in order]
    made = np.cumsum([1 + len(more) for more in wordings])
    facts = int(np.searchsorted(made, args.edits)) + 1
    if facts + args.unwritten > len(records):
        raise ValueError(
            f"{args.data} has {len(records)} records, which make {made[-1]} edits in at most "
            f"{args.wordings} wordings, and --edits {args.edits} and --unwritten {args.unwritten} "
            "ask for more: give a larger file, or fewer of them"
        )
    # What was never written is asked for its right answer, whatever the file proposes to write.
    right, _ = given.read(args, zsre.load, None, target="answer")
    right = {record.case_id: record for record in right}
    unwritten = [right[record.case_id] for record in records[facts : facts + args.unwritten]]
    return Stream(
        systems.model(args),
        [*records[:facts], *unwritten],
        args.edits,
        args.every,
        args.asked,
        data=data,
        wordings=[*wordings[:facts], *[()] * args.unwritten],
        retained=args.retained,
        chunk=args.chunk,
    )


# Tokens decoded beyond those of the right answer: line breaks before it.
_MORE = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """`prompt` asked after `edits` edits for `gold`. fact: what was written of it, as a text; None where
    nothing was."""

    case_id: str
    kind: str
    edits: int
    prompt: str
    gold: str
    fact: str | None


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row a system at the end, and the curve of held-out rephrasings."""
    results = summary["results"]
    settings = summary["settings"]
    title = (
        f"word F1 ± standard error after {settings['edits']} edits, {settings['facts']} facts in at "
        f"most {settings['wordings']} wordings, percent"
    )
    table = Table("system", *KINDS.values(), title=title)
    for system, label in SYSTEMS.items():
        rows = [results["f1"][system][kind] for kind in KINDS]
        cells = ["\n".join(filter(None, (systems.percent(row), row.get("note")))) for row in rows]
        table.add_row(label, *cells)
    curve = Table("edits", *SYSTEMS.values(), title="held-out rephrasings")
    for point, found in results["curve"].items():
        curve.add_row(point, *(systems.percent(found[system]) for system in SYSTEMS))
    return [table, curve]


PAPER = (
    "Table 3, 1,000 edits (200 facts in 5 wordings), edit retention: MEND 27, GRACE 93, Larimar-1.3B "
    "97, Larimar-6B 92 (with a slot for each of the prompts, known beforehand)."
)


def headlines(summary: Mapping[str, Any]) -> list[headline.Headline]:
    """F1 of what was written, and of rephrasings that were not, at the end."""
    settings, found = summary["settings"], summary["results"]["f1"]
    edits, papers = settings["edits"], (settings["edits"], settings["wordings"]) == (1000, 5)
    return [
        headline.Headline(
            f"{label}, F1 after {edits:,} edits",
            headline.of(found, lambda one, kind=kind: one[kind]),
            "97" if kind == "edit" and papers else "",
        )
        for kind, label in KINDS.items()
        if found["larimar"][kind]["cases"]
    ]


def values(record: Record) -> dict[str, float]:
    """F1 of a case by system, and what was asked."""
    kind = KINDS[record["kind"]]
    return {
        f"{label}, {kind}": record["f1"][name]
        for name, label in SYSTEMS.items()
        if record["f1"][name] is not None
    }


def texts(record: Record) -> list[str]:
    """The question, the right answer, and what was said."""
    texts = {label: record["said"][name] for name, label in SYSTEMS.items()}
    said = (f"{label}: {text!r}" for label, text in texts.items() if text is not None)
    return [f"after {record['edits']} edits: {record['prompt']} → {record['gold']}", *said]


def draw(axes: Any, summary: Mapping[str, Any]) -> None:
    """F1 of held-out rephrasings over the stream."""
    curve = summary["results"]["curve"]
    lines = {label: [found[name] for found in curve.values()] for name, label in SYSTEMS.items()}
    systems.curves(axes, [int(point) for point in curve], lines)
    axes.set_xlabel("edits so far")
    axes.set_ylabel("F1 of held-out rephrasings (percent, ± standard error)")


class Stream:
    """See the head of this file; an experiment as in `runner.Experiment`.

    Args:
        records: facts in the order of the stream, as many as `edits` needs, and behind them those that
            are never written. wordings: of each record, beside its prompt.
        edits: of the stream. every: edits between points of the curve. asked: facts asked at a point.
        retained: written prompts asked at the end; None for all.
    Raises:
        ValueError: the records make fewer edits.
    """

    name = "stream"
    tables = staticmethod(tables)

    def __init__(
        self,
        model: Pipeline,
        records: Sequence[EditRecord],
        edits: int,
        every: int,
        asked: int,
        *,
        data: Mapping[str, Any],
        wordings: Sequence[Sequence[str]] = (),
        retained: int | None = None,
        chunk: int = 128,
    ):
        self.model, self.records, self.edits, self.chunk = model, records, edits, chunk
        wordings = wordings or [()] * len(records)
        told = [
            (index, prompt)
            for index, (record, more) in enumerate(zip(records, wordings, strict=True))
            for prompt in (record.prompt, *more)
        ]
        if len(told) < edits:
            raise ValueError(f"{len(records)} records make {len(told)} edits, not {edits}")
        self.told = told[:edits]
        facts = self.told[-1][0] + 1
        self.points = sorted({*range(every, edits + 1, every), edits})
        self.cases = [*self._curve(asked), *self._end(facts, retained)]
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "edits": edits,
            "facts": facts,
            "wordings": 1 + max(map(len, wordings)),
            "unwritten": len(records) - facts,
            "every": every,
            "asked": asked,
            "retained": retained,
            "tokens": f"those of the right answer and {_MORE}",
            "chunk": chunk,
            "seed": 0,
        }
        self._encoded: Encoded | None = None
        self._now: tuple[int, rls.RLSState] | None = None

    def _curve(self, asked: int) -> list[Case]:
        """At every point, `asked` of the facts so far that have a rephrasing which no edit writes:
        another record may have it for its prompt."""
        draw, found = np.random.default_rng(0), []
        prompts = {prompt for _, prompt in self.told}
        for point in self.points:
            known = [
                index
                for index in dict.fromkeys(index for index, _ in self.told[:point])
                if self.records[index].paraphrases
                and self.records[index].paraphrases[0] not in prompts
            ]
            for index in sorted(draw.permutation(known)[:asked]):
                record = self.records[index]
                asks, fact = record.paraphrases[0], written(record.prompt, record.target_new)
                name = f"rephrased/{point}/{index}"
                found.append(Case(name, "rephrased", point, asks, record.target_new, fact))
        return found

    def _end(self, facts: int, retained: int | None) -> list[Case]:
        edits = [
            Case(f"edit/{number}", "edit", self.edits, prompt, answer, written(prompt, answer))
            for number, (prompt, answer) in enumerate(self._facts(self.edits))
        ]
        if retained is not None:
            chosen = np.random.default_rng(0).permutation(len(edits))[:retained]
            edits = [edits[number] for number in sorted(chosen)]
        return edits + [
            Case(f"unwritten/{index}", "unwritten", self.edits, record.prompt, record.target_new, None)
            for index, record in enumerate(self.records[facts:], facts)
        ]

    def _facts(self, edits: int) -> list[tuple[str, str]]:
        """Prompt and answer of the first edits."""
        return [(prompt, self.records[index].target_new) for index, prompt in self.told[:edits]]

    def run(self, cases: Sequence[Case]) -> list[Record]:
        """Answers and their F1, decoded together; the memory is asked as it is after a case's edits."""
        prompts, golds = [case.prompt for case in cases], [case.gold for case in cases]
        inside, nearest, latents = [], {}, []
        for edits, group in itertools.groupby(enumerate(cases), key=lambda case: case[1].edits):
            rows, store = [row for row, _ in group], self._after(edits)
            latent, found = store.read([prompts[row] for row in rows])
            within = found.within(self.model.scope_threshold)
            inside += within.tolist()
            latents.append(latent[within])
            let = zip(rows, found.key, within, strict=True)
            nearest |= {row: store.texts[key] for row, key, passes in let if passes}
        said = answers.answers(
            self.model,
            prompts,
            [case.fact for case in cases],
            nearest,
            self.model.condition(np.concatenate(latents)) if nearest else None,
            tokens=[len(self.model.decoder_tokenizer.ids(f" {gold}")) + _MORE for gold in golds],
        )
        records = []
        for row, (case, gold) in enumerate(zip(cases, golds, strict=True)):
            texts = {name: found[row] for name, found in said.items()}
            records.append(
                {
                    "case_id": case.case_id,
                    "kind": case.kind,
                    "edits": case.edits,
                    "prompt": case.prompt,
                    "gold": gold,
                    "said": texts,
                    "in_scope": inside[row],
                    "f1": answers.scores(metrics.token_f1, texts, gold),
                    "f1_grace": answers.scores(metrics.token_f1_grace, texts, gold),
                }
            )
        return records

    def _after(self, edits: int) -> Store:
        """The store after so many edits, streamed one by one."""
        memory, prepared = self.model.memory, self.model.prepared
        facts = self._facts(self.edits)
        if self._encoded is None:
            self._encoded = encoded(self.model, facts, [case.prompt for case in self.cases])
        if self._now is None or self._now[0] > edits:
            self._now = 0, _begin(memory, prepared, memory.empty(prepared))
        # From point to point, so that a run that is taken up streams the very same blocks.
        for point in self.points:
            done, now = self._now
            if done < point <= edits:
                keys = self._encoded([prompt for prompt, _ in facts[done:point]]).latent
                values = self._encoded.values(facts[done:point])
                self._now = point, _stream(memory, prepared, now, keys, values)
        return Store(self._encoded, facts[:edits], _settle(memory, prepared, self._now[1]))

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Mean F1 in percent with standard errors by kind and system at the end, the memory's paired
        difference to the lookup with a note where it is not positive; and the curve."""
        end = [record for record in records if record["edits"] == self.edits]
        tables = {
            measure: {
                system: {kind: _mean(end, kind, system, measure) for kind in KINDS}
                for system in SYSTEMS
            }
            for measure in ("f1", "f1_grace")
        }
        for measure, found in tables.items():
            for kind in KINDS:
                ours, control = (_values(end, kind, name, measure) for name in ("larimar", "lookup"))
                found["larimar"][kind] |= systems.versus_lookup(ours, control)
        curve = {
            str(point): {
                system: _mean([r for r in records if r["edits"] == point], "rephrased", system, "f1")
                for system in SYSTEMS
            }
            for point in self.points
        }
        return tables | {"curve": curve}


@jax.jit
def _begin(memory, prepared, state):
    return rls.init(memory, prepared, state)


@jax.jit
def _stream(memory, prepared, now, keys, values):
    return rls.stream(memory, prepared, now, keys, values)[0]


@jax.jit
def _settle(memory, prepared, now):
    return rls.to_state(memory, prepared, now)


def _values(records: Sequence[Record], kind: str, system: str, measure: str) -> list[float]:
    found = [record[measure][system] for record in records if record["kind"] == kind]
    return [value for value in found if value is not None]


def _mean(records: Sequence[Record], kind: str, system: str, measure: str) -> dict[str, Any]:
    return vars(metrics.estimate(_values(records, kind, system, measure)))
