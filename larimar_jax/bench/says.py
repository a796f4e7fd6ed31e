"""CounterFact, one edit at a time: does free generation say the new answer?

The likeliest continuation of the edit prompt and of its paraphrases, token by token, under Larimar and
every control. An answer is said where it stands in the first `--tokens` tokens, and it is said at once
where they begin with it; upper and lower case count, blanks do not. A memory that does not beat the
lookup says so. Mode `rome`: the scope decision and the memory query see the prompt only. Each case is
written into an empty memory of its own.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from larimar_jax.bench import controls, given, headline, metrics, systems
from larimar_jax.bench.editor import Editor
from larimar_jax.bench.runner import Record
from larimar_jax.data.edit_records import EditRecord

KINDS = ("edit", "paraphrase")
MEASURES = {"said": "says it", "at_once": "at once"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench says`."""
    given.options(parser, given.COUNTERFACT)
    parser.add_argument("--limit", type=int, help="only the first N records (default: all)")
    parser.add_argument("--tokens", type=int, default=10, help="decoded after a prompt (%(default)s)")
    systems.model_options(parser)
    parser.add_argument("--chunk", type=int, default=100, help="cases computed together (%(default)s)")


def experiment(args: argparse.Namespace) -> "Says":
    """The experiment of a parsed command line; reads the data and loads the model."""
    from larimar_jax.bench.editor import LarimarEditor
    from larimar_jax.data import counterfact

    cases, data = given.read(args, counterfact.load, args.limit)
    data |= {"limit": args.limit}
    edited = LarimarEditor(systems.model(args))
    return Says(edited, cases, data=data, tokens=args.tokens, chunk=args.chunk)


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row a system."""
    results, settings = summary["results"], summary["settings"]
    title = f"the new answer in {settings['tokens']} tokens, {summary['cases']} cases, mode rome"
    columns = [f"{kind}: {label}" for kind in KINDS for label in MEASURES.values()]
    table = Table("system", *columns, title=title, caption="percent ± standard error")
    for system, label in systems.SYSTEMS.items():
        found = results[system]
        cells = [controls.noted(found[kind][name]) for kind in KINDS for name in MEASURES]
        table.add_row(label, *cells)
    return [table]


def headlines(summary: Mapping[str, Any]) -> list[headline.Headline]:
    """The share of continuations that say the new answer."""
    tokens = summary["settings"]["tokens"]
    return [
        headline.Headline(
            f"{kind}: new answer in {tokens} tokens",
            headline.of(summary["results"], lambda one, kind=kind: one[kind]["said"]),
        )
        for kind in KINDS
    ]


def values(record: Record) -> dict[str, float]:
    """The share of a case's prompts that are answered with the new answer, by system and kind."""
    return {
        f"{label}, {kind}": float(np.mean(_measure(record, system, kind)["said"]))
        for system, label in systems.SYSTEMS.items()
        for kind in KINDS
        if record["text"][system][kind]
    }


def texts(record: Record) -> list[str]:
    """What was written, and every continuation through the memory."""
    said = record["text"]["larimar"]
    return [f"written: {record['written']}"] + [
        f"{kind}: {prompt} →{text}"
        for kind in KINDS
        for prompt, text in zip(record["prompts"][kind], said[kind], strict=True)
    ]


def draw(axes: Any, summary: Mapping[str, Any]) -> None:
    """The share that is said by kind, a bar a system."""
    systems.bars(axes, summary["results"], KINDS, lambda row: row["said"])
    axes.set_ylabel("says the new answer (percent, ± standard error)")


class Says:
    """See the head of this file; an experiment as in `runner.Experiment`."""

    name = "says"
    tables = staticmethod(tables)

    def __init__(
        self,
        editor: Editor,
        cases: Sequence[EditRecord],
        *,
        data: Mapping[str, Any],
        tokens: int = 10,
        chunk: int = 100,
    ):
        if tokens < 1:
            raise ValueError(f"--tokens must be at least 1, not {tokens}: so many are decoded.")
        self.editor, self.cases, self.tokens, self.chunk = editor, cases, tokens, chunk
        self.settings: Mapping[str, Any] = {
            "mode": "rome",
            "data": dict(data),
            "model": dict(editor.settings),
            "tokens": tokens,
            "chunk": chunk,
            "seed": None,
        }

    def run(self, cases: Sequence[EditRecord]) -> list[Record]:
        """The continuations of a chunk of cases."""
        queries = [
            [("edit", case.prompt), *(("paraphrase", p) for p in case.paraphrases)] for case in cases
        ]

        def continued(prompts, _, condition):
            return np.asarray(self.editor.generate(prompts, condition, self.tokens), object)

        found = systems.measured(
            self.editor,
            [(case.prompt, case.target_new) for case in cases],
            [[prompt for _, prompt in row] for row in queries],
            [case.target_new for case, row in zip(cases, queries, strict=True) for _ in row],
            continued,
        )
        records, start = [], 0
        for written, case, row in zip(found.written, cases, queries, strict=True):
            kinds, rows = [kind for kind, _ in row], slice(start, start + len(row))
            start = rows.stop
            records.append(
                {
                    "case_id": case.case_id,
                    "written": written,
                    "target_new": case.target_new,
                    "prompts": systems.by_kind(kinds, [prompt for _, prompt in row], KINDS),
                    "in_scope": systems.by_kind(kinds, found.in_scope[rows].tolist(), KINDS),
                    "text": {
                        system: systems.by_kind(kinds, texts[rows].tolist(), KINDS)
                        for system, texts in found.values.items()
                    },
                }
            )
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """{system: {kind: {said, at_once}}} in percent with standard errors: prompts are averaged inside
        a case, cases afterwards. Of a memory also the difference to the lookup, with a note."""
        result: dict[str, Any] = {name: {kind: {} for kind in KINDS} for name in systems.SYSTEMS}
        for kind in KINDS:
            for measure in MEASURES:
                found = {name: _shares(records, name, kind, measure) for name in systems.SYSTEMS}
                for name, values in found.items():
                    row = result[name][kind][measure] = vars(metrics.estimate(values))
                    if name in systems.MEMORY_SYSTEMS:
                        row |= systems.versus_lookup(values, found[systems.CONTROL])
        return result


def _shares(records: Sequence[Record], system: str, kind: str, measure: str) -> list[float]:
    return [
        float(np.mean(_measure(record, system, kind)[measure]))
        for record in records
        if record["text"][system][kind]
    ]


def _measure(record: Record, system: str, kind: str) -> dict[str, list[bool]]:
    answer = " ".join(record["target_new"].split())
    found = [" ".join(text.split()) for text in record["text"][system][kind]]
    return {
        "said": [answer in text for text in found],
        "at_once": [text.startswith(answer) for text in found],
    }
