"""CounterFact, one edit at a time: edit, paraphrase and neighbourhood S and M (Table 2).

Mode `rome`, the protocol of the editing literature: the scope decision and the memory query see the
prompt only (the sentence of it that is nearest to the fact), paraphrases keep their distractor
sentence, and what is out of scope is decoded by the untouched LM. Mode `released`, that of the authors'
code: the scope decision sees prompt and candidate beside the written fact, so that the two candidates
of a prompt may be decoded differently; a paraphrase is cut to its last sentence; out of scope is z = 0.
Each case is written into an empty memory of its own, with `--rephrasings N` in N more wordings, none of
which is asked. The controls are in `systems.py`.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from larimar_jax.bench import given, headline, metrics, systems
from larimar_jax.bench.editor import Editor
from larimar_jax.bench.runner import Record
from larimar_jax.data.edit_records import EditRecord


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench counterfact`."""
    given.options(parser, given.COUNTERFACT)
    parser.add_argument("--limit", type=int, help="only the first N records (default: all)")
    parser.add_argument(
        "--rephrasings",
        type=int,
        default=0,
        metavar="N",
        help="write a fact in so many more wordings, which are those of other records of the file "
        "(%(default)s)",
    )
    systems.mode_option(parser)
    systems.model_options(parser)
    parser.add_argument(
        "--chunk", type=int, default=25, help="cases computed together (%(default)s)"
    )


def experiment(args: argparse.Namespace) -> "CounterFact":
    """The experiment of a parsed command line; reads the data and loads the model."""
    from larimar_jax.bench import editor
    from larimar_jax.data import counterfact

    cases, data = given.read(args, counterfact.load, args.limit)
    data |= {"limit": args.limit}
    wordings: Sequence[Sequence[str]] = ()
    if args.rephrasings:
        wordings = given.wordings(args, counterfact.load, cases, args.rephrasings)
    edited = editor.LarimarEditor(systems.model(args))
    options = dict(chunk=args.chunk, mode=args.mode, wordings=wordings)
    return CounterFact(edited, cases, data=data, **options)


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """S ± standard error above M of each kind, and the score; a row a system."""
    title = f"CounterFact, {summary['cases']} cases, mode {summary['settings']['mode']}"
    if more := summary["results"].get("wordings"):
        title += f", written in {more:.2f} more wordings"
    return [table(summary["results"], title)]


PAPER = (
    "Table 2, edit / paraphrase / neighbourhood S: GPT-2 XL 22.2 / 24.7 / 78.1, Larimar-1.3B 100 / 83.5 "
    "/ 74.7, GPT-J 16.3 / 18.6 / 83.0, Larimar-6B 99.6 / 88.4 / 80.4; with one and two rephrasings, "
    "Larimar-1.3B 100 / 89.8 / 73.3 and 100 / 90.8 / 73.3 (first 2,000 cases; other LMs)."
)


def headlines(summary: Mapping[str, Any]) -> list[headline.Headline]:
    """S of each kind, and the score."""
    results, paper = summary["results"], {"edit": "100", "paraphrase": "83.5", "neighbourhood": "74.7"}
    rows = [
        (f"{kind} S", paper[kind], lambda one, kind=kind: {"note": "", **one[kind], **one[kind]["S"]})
        for kind in metrics.KINDS
    ]
    rows.append(("score", "", lambda one: one["score"]))
    told = summary["settings"]["mode"] == "rome" and not summary["settings"]["rephrasings"]
    return [
        headline.Headline(label, headline.of(results, found), said if told else "")
        for label, said, found in rows
    ]


def values(record: Record) -> dict[str, float]:
    """S of a case by system and kind."""
    return {
        f"{label}, {kind}": metrics.success(kind, *np.asarray(record["loss"][system][kind]).T)
        for system, label in systems.SYSTEMS.items()
        for kind in metrics.KINDS
        if record["loss"][system][kind]
    }


def texts(record: Record) -> list[str]:
    """What was written, and ℓ of both answers to every prompt through the memory."""
    new, true = record["target_new"], record["target_true"]
    lines = [f"written: {record['written']}"]
    for kind in metrics.KINDS:
        losses = record["loss"]["larimar"][kind]
        for prompt, (mine, other) in zip(record["prompts"][kind], losses, strict=True):
            lines.append(f"{kind}: {prompt} → ℓ({new}) {mine:.2f}, ℓ({true}) {other:.2f}")
    return lines


def draw(axes: Any, summary: Mapping[str, Any]) -> None:
    """S by kind, a bar a system."""
    systems.bars(axes, summary["results"], metrics.KINDS, lambda row: row["S"])
    axes.set_ylabel("S (percent, ± standard error)")


class CounterFact:
    """CounterFact under one model and its controls; see `runner.Experiment`."""

    name = "counterfact"
    tables = staticmethod(tables)

    def __init__(
        self,
        editor: Editor,
        cases: Sequence[EditRecord],
        *,
        data: Mapping[str, Any],
        chunk: int = 25,
        mode: systems.Mode = "rome",
        wordings: Sequence[Sequence[str]] = (),
    ):
        """wordings: of each case, in which its fact is written too."""
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}: it is a number of cases.")
        self.editor, self.cases, self.chunk, self.mode = editor, cases, chunk, mode
        wordings = wordings or [()] * len(cases)
        self._wordings = {
            case.case_id: tuple(found) for case, found in zip(cases, wordings, strict=True)
        }
        # Nothing is drawn at random: σ_W = 0 and ξ = 0 at inference (§4).
        self.settings = {
            "mode": mode,
            "data": dict(data),
            "model": dict(editor.settings),
            "rephrasings": max(map(len, wordings), default=0),
            "chunk": chunk,
            "seed": None,
        }

    def run(self, cases: Sequence[EditRecord]) -> list[Record]:
        """Scores a chunk of cases; every system sees the same rows in one batch."""
        queries = [_queries(case, self.mode) for case in cases]
        asked = [[prompt for _, prompt, _ in row] for row in queries]
        targets = [
            (case.target_new, true)
            for case, row in zip(cases, queries, strict=True)
            for _, _, true in row
        ]
        seen = None
        if self.mode == "released":
            prompts = [prompt for row in asked for prompt in row]
            scoped = [
                [f"{prompt} {candidate}" for candidate in pair]
                for prompt, pair in zip(prompts, targets, strict=True)
            ]
            seen = systems.Seen(asked, scoped)
        found = systems.measured(
            self.editor,
            [(case.prompt, case.target_new) for case in cases],
            asked,
            targets,
            self.editor.score,
            mode=self.mode,
            seen=seen,
            wordings=[self._wordings[case.case_id] for case in cases],
        )
        records = _records(cases, queries, found)
        for record in records:
            record["wordings"] = list(self._wordings[record["case_id"]])
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """`summarise`, as the runner calls it."""
        return summarise(records)


def _queries(case: EditRecord, mode: systems.Mode) -> list[tuple[str, str, str]]:
    """(kind, prompt, true target) of every prompt of a case, in the order of `metrics.KINDS`."""
    paraphrases = case.paraphrases
    if mode == "released":
        paraphrases = tuple(prompt.split(". ")[-1] for prompt in paraphrases)
    edits = [("edit", case.prompt), *(("paraphrase", prompt) for prompt in paraphrases)]
    neighbours = zip(case.neighbourhood, case.neighbourhood_targets, strict=True)
    return [(kind, prompt, case.target_true) for kind, prompt in edits] + [
        ("neighbourhood", prompt, true) for prompt, true in neighbours
    ]


def _records(
    cases: Sequence[EditRecord],
    queries: Sequence[Sequence[tuple[str, str, str]]],
    found: systems.Measured,
) -> list[Record]:
    records, start = [], 0
    for written, case, row in zip(found.written, cases, queries, strict=True):
        kinds = [kind for kind, _, _ in row]
        rows = slice(start, start + len(kinds))
        start = rows.stop
        losses = {system: values[rows] for system, values in found.values.items()}
        systems.check_finite(case.case_id, kinds, losses)

        def by_kind(values, kinds=kinds):
            return systems.by_kind(kinds, values, metrics.KINDS)

        records.append(
            {
                "case_id": case.case_id,
                "written": written,
                "target_new": case.target_new,
                "target_true": case.target_true,
                "prompts": by_kind([prompt for _, prompt, _ in row]),
                "scope_score": by_kind(found.scope_score[rows].tolist()),
                "in_scope": by_kind(found.in_scope[rows].tolist()),
                "loss": {system: by_kind(values.tolist()) for system, values in losses.items()},
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
        for system in systems.SYSTEMS
    }
    results: dict[str, Any] = {}
    for system, found in tables.items():
        rows: dict[str, Any] = {}
        for kind in metrics.KINDS:
            rows[kind] = {name: vars(value) for name, value in found[kind].items()}
            if system in systems.MEMORY_SYSTEMS:
                rows[kind] |= systems.versus_lookup(
                    _successes(records, system, kind),
                    _successes(records, systems.CONTROL, kind),
                )
        rows["score"] = vars(found["score"])
        if system in systems.MEMORY_SYSTEMS and found["score"].cases:
            if found["score"].mean <= tables[systems.CONTROL]["score"].mean:
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
    results["wordings"] = sum(len(record["wordings"]) for record in records) / max(1, len(records))
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
    for system, label in systems.SYSTEMS.items():
        rows = results[system]
        cells = [
            f"{systems.percent(rows[kind]['S'])}\n{systems.number(rows[kind]['M']['mean'])}"
            for kind in metrics.KINDS
        ]
        cells.append(systems.percent(rows["score"]))
        kinds = (*metrics.KINDS, "score")
        notes = [rows[kind].get("note", "").replace(" the", "\nthe") for kind in kinds]
        lines = zip(cells, notes, strict=True)
        shown.add_row(label, *("\n".join(filter(None, pair)) for pair in lines))
    share = results["in_scope"]
    cells = [systems.percent(share[kind]) for kind in metrics.KINDS]
    shown.add_row("prompts in scope", *cells, "", style="dim")
    return shown
