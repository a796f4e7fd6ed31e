"""ZsRE, one edit at a time: accuracy of rewrite, paraphrase and neighbourhood (Tables 12–13).

The share of the answer's tokens that are the likeliest where they stand, teacher-forced. Mode `rome`:
the scope decision and the memory query see the prompt only. Mode `released`, that of the authors' code:
every token is a question of its own: memory and scope detector see the prompt with the right tokens so
far, the detector beside the written fact; out of scope is z = 0. Neighbours are
asked for their own right answers. Each case is written into an empty memory of its own; its controls
are in `systems.py`.
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

# In this order everywhere: tables, records.
KINDS = ("rewrite", "paraphrase", "neighbourhood")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench zsre`."""
    given.options(parser, "ZsRE's JSON file, of MEND or of KnowEdit")
    parser.add_argument(
        "--target",
        choices=("answer", "alternative"),
        help="what is written: the right answer, or the false one that the record proposes "
        "(default: the first for MEND's file, the second for KnowEdit's)",
    )
    parser.add_argument("--limit", type=int, help="only the first N records (default: all)")
    systems.mode_option(parser)
    systems.model_options(parser)
    parser.add_argument(
        "--chunk", type=int, default=25, help="cases computed together (%(default)s)"
    )


def experiment(args: argparse.Namespace) -> "ZsRE":
    """The experiment of a parsed command line; reads the data and loads the model."""
    from larimar_jax.bench import editor
    from larimar_jax.data import zsre

    cases, data = given.read(args, zsre.load, args.limit, target=args.target)
    data |= {"limit": args.limit, "target": args.target}
    edited = editor.LarimarEditor(systems.model(args))
    return ZsRE(edited, cases, data=data, chunk=args.chunk, mode=args.mode)


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row a system."""
    results = summary["results"]
    title = f"ZsRE, {summary['cases']} cases, mode {summary['settings']['mode']}"
    caption = "accuracy ± standard error, percent"
    table = Table("system", *KINDS, title=title, caption=caption)
    for system, label in {**systems.SYSTEMS, "in_scope": "prompts in scope"}.items():
        cells = [controls.noted(results[system][kind]) for kind in KINDS]
        table.add_row(label, *cells)
    return [table]


PAPER = (
    "Tables 12–13, rewrite / paraphrase / neighbourhood: Larimar-1.3B 98.1 / 81.6 / 19.7, Larimar-6B "
    "94.5 / 70.4 / 25.1 (other base LMs; neighbours from Natural Questions)."
)


def headlines(summary: Mapping[str, Any]) -> list[headline.Headline]:
    """Accuracy of each kind."""
    paper = dict(zip(KINDS, ("98.1", "81.6", "19.7"), strict=True))
    told = summary["settings"]["mode"] == "rome"
    return [
        headline.Headline(
            f"{kind}, tokens",
            headline.of(summary["results"], lambda one, kind=kind: one[kind]),
            paper[kind] if told else "",
        )
        for kind in KINDS
    ]


def values(record: Record) -> dict[str, float]:
    """Accuracy of a case by system and kind."""
    return {
        f"{label}, {kind}": float(np.mean(record["accuracy"][system][kind]))
        for system, label in systems.SYSTEMS.items()
        for kind in KINDS
        if record["accuracy"][system][kind]
    }


def texts(record: Record) -> list[str]:
    """What was written, and every prompt with its target and how much of it is likeliest."""
    lines = [f"written: {record['written']}"]
    for kind in KINDS:
        rows = (record["prompts"][kind], record["targets"][kind], record["accuracy"]["larimar"][kind])
        for prompt, target, accuracy in zip(*rows, strict=True):
            lines.append(f"{kind}: {prompt} → {target}: {100 * accuracy:.0f} %")
    return lines


def draw(axes: Any, summary: Mapping[str, Any]) -> None:
    """Accuracy by kind, a bar a system."""
    systems.bars(axes, summary["results"], KINDS, lambda row: row)
    axes.set_ylabel("accuracy (percent, ± standard error)")


class ZsRE:
    """ZsRE under one model and its controls; see `runner.Experiment`."""

    name = "zsre"
    tables = staticmethod(tables)

    def __init__(
        self,
        editor: Editor,
        cases: Sequence[EditRecord],
        *,
        data: Mapping[str, Any],
        chunk: int = 25,
        mode: systems.Mode = "rome",
    ):
        self.editor, self.cases, self.chunk, self.mode = editor, cases, chunk, mode
        # Nothing is drawn at random: σ_W = 0 and ξ = 0 at inference (§4).
        self.settings: Mapping[str, Any] = {
            "mode": mode,
            "data": dict(data),
            "model": dict(editor.settings),
            "chunk": chunk,
            "seed": None,
        }

    def run(self, cases: Sequence[EditRecord]) -> list[Record]:
        """Measures a chunk of cases; every system sees the same rows in one batch."""
        queries = [_queries(case) for case in cases]
        facts = [(case.prompt, case.target_new) for case in cases]
        found = (self._by_prompt if self.mode == "rome" else self._by_token)(facts, queries)
        records, start = [], 0
        for written, case, row in zip(found.written, cases, queries, strict=True):
            kinds = [kind for kind, _, _ in row]
            rows = slice(start, start + len(kinds))
            start = rows.stop
            accuracy = {system: values[rows] for system, values in found.values.items()}
            systems.check_finite(case.case_id, kinds, accuracy)

            def by_kind(values, kinds=kinds):
                return systems.by_kind(kinds, values, KINDS)

            records.append(
                {
                    "case_id": case.case_id,
                    "written": written,
                    "prompts": by_kind([prompt for _, prompt, _ in row]),
                    "targets": by_kind([target for _, _, target in row]),
                    "scope_score": by_kind(found.scope_score[rows].tolist()),
                    "in_scope": by_kind(found.in_scope[rows].tolist()),
                    "accuracy": {
                        system: by_kind(values.tolist()) for system, values in accuracy.items()
                    },
                }
            )
        return records

    def _by_prompt(self, facts, queries: Sequence[Sequence["_Query"]]) -> systems.Measured:
        return systems.measured(
            self.editor,
            facts,
            [[prompt for _, prompt, _ in row] for row in queries],
            [target for row in queries for _, _, target in row],
            self.editor.accuracy,
        )

    def _by_token(self, facts, queries: Sequence[Sequence["_Query"]]) -> systems.Measured:
        """Each token apart; then the mean of a query's tokens, and the share of them in scope."""
        prompts, asked, scoped, targets, tokens = [], [], [], [], []
        for row in queries:
            prompts.append([])
            asked.append([])
            for _, prompt, target in row:
                pieces = self.editor.pieces(target)
                tokens.append(len(pieces))
                for place, before in enumerate(["", *pieces[:-1]]):
                    prompts[-1].append(prompt)
                    asked[-1].append(f"{prompt} {before}".strip())
                    scoped.append([asked[-1][-1]])
                    targets.append((target, place))

        def hits(prompts, targets, condition):
            texts, places = [text for text, _ in targets], [place for _, place in targets]
            return self.editor.hits(prompts, texts, places, condition)[:, None]

        found = systems.measured(
            self.editor,
            facts,
            prompts,
            targets,
            hits,
            mode="released",
            seen=systems.Seen(asked, scoped),
        )
        begins = np.cumsum([0, *tokens[:-1]])

        def mean(values):
            return np.add.reduceat(np.asarray(values[:, 0], np.float64), begins) / tokens

        return systems.Measured(
            found.written,
            mean(found.scope_score),
            mean(found.in_scope),
            {system: mean(values) for system, values in found.values.items()},
        )

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """{system: {kind: accuracy}} in percent with standard errors: prompts are averaged inside a
        case, cases afterwards; and the share of prompts in scope."""
        results: dict[str, Any] = {}
        for system in systems.SYSTEMS:
            results[system] = {
                kind: vars(metrics.estimate(_means(records, system, kind))) for kind in KINDS
            }
            if system in systems.MEMORY_SYSTEMS:
                for kind in KINDS:
                    control = _means(records, systems.CONTROL, kind)
                    found = systems.versus_lookup(_means(records, system, kind), control)
                    results[system][kind] |= found
        results["in_scope"] = {
            kind: vars(
                metrics.estimate([np.mean(r["in_scope"][kind]) for r in records if r["in_scope"][kind]])
            )
            for kind in KINDS
        }
        return results


_Query = tuple[str, str, str]


def _queries(case: EditRecord) -> list[_Query]:
    """(kind, prompt, the answer it is asked for) of every prompt of a case, in the order of KINDS."""
    neighbours = zip(case.neighbourhood, case.neighbourhood_targets, strict=True)
    return [
        ("rewrite", case.prompt, case.target_new),
        *(("paraphrase", prompt, case.target_new) for prompt in case.paraphrases),
        *(("neighbourhood", prompt, target) for prompt, target in neighbours),
    ]


def _means(records: Sequence[Record], system: str, kind: str) -> list[float]:
    found = [record["accuracy"][system][kind] for record in records]
    return [float(np.mean(values)) for values in found if values]
