"""What the noise of addressing costs: edit success and fluency as σ_W grows (Fig. 6).

Each fact of CounterFact is written into an empty memory of its own, and W is drawn around its mean
(Algorithm 1) with one σ_W after the other, for all weights alike. Measured are S of edit and
paraphrases through the memory, whether or not they are in scope, and the perplexity that the base LM
gives to the greedy continuation of the edit prompt, to as many words as the shortest of its case has.
Controls, which no σ_W changes: the base LM, z = 0, the fact in the prompt, and a lookup that puts it
there where the scope detector lets it; each with its own continuation, judged after the plain prompt. A
σ_W that does not beat the lookup says so.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from larimar_jax.bench import controls, draws, given, metrics, systems
from larimar_jax.bench.editor import LarimarEditor
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import written
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.pipeline import Pipeline

CONTROLS = {name: systems.SYSTEMS[name] for name in ("base", "zero", "prompt", "lookup")}
KINDS = ("edit", "paraphrase")
SIGMAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench noise`."""
    given.options(parser, given.COUNTERFACT)
    parser.add_argument("--limit", type=int, default=100, help="records (%(default)s)")
    parser.add_argument(
        "--sigmas", type=float, nargs="+", default=list(SIGMAS), help="σ_W (%(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=20, help="of a continuation (%(default)s)")
    systems.model_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--chunk", type=int, default=25, help="cases computed together (%(default)s)")


def experiment(args: argparse.Namespace) -> "Noise":
    """The experiment of a parsed command line; reads the data and loads the model."""
    from larimar_jax.data import counterfact

    cases, data = given.read(args, counterfact.load, args.limit)
    data |= {"limit": args.limit}
    options = dict(tokens=args.tokens, seed=args.seed, chunk=args.chunk)
    return Noise(systems.model(args), cases, args.sigmas, data=data, **options)


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row for every control and every σ_W."""
    title = f"σ_W, {summary['cases']} facts: S in percent, perplexity of the continuation"
    table = Table("σ_W", *(f"{kind} S" for kind in KINDS), "perplexity", title=title)
    for name, found in summary["results"].items():
        cells = [controls.noted(found[kind]) for kind in KINDS]
        spoken = controls.noted(found["fluency"], systems.number(found["perplexity"]))
        table.add_row(CONTROLS.get(name, name), *cells, spoken)
    return [table]


PAPER = "Fig. 6: perplexity of generations and edit success against σ_W (a figure without numbers)."


def values(record: Record) -> dict[str, float]:
    """S of the edit prompt by control and σ_W."""
    return {
        f"{_label(name)}, edit": metrics.success("edit", *np.asarray(found["edit"]).T)
        for name, found in record["loss"].items()
    }


def texts(record: Record) -> list[str]:
    """The continuations under every control and σ_W."""
    said = record["text"].items()
    return [f"written: {record['written']}"] + [f"{_label(name)}: {text}" for name, text in said]


def _label(name: str) -> str:
    return CONTROLS.get(name, f"σ_W = {name}")


def draw(axes: Any, summary: Mapping[str, Any]) -> None:
    """S against σ_W, beside the controls' as level lines, and the perplexity on an axis of its own."""
    results = {name: found for name, found in summary["results"].items() if name not in CONTROLS}
    places = np.arange(len(results))
    for kind in KINDS:
        rows = [found[kind] for found in results.values()]
        means = [math.nan if row["mean"] is None else row["mean"] for row in rows]
        errors = [row["standard_error"] or 0.0 for row in rows]
        axes.errorbar(places, means, errors, marker="o", label=f"{kind} S")
    for number, name in enumerate(("base", systems.CONTROL), start=len(KINDS)):
        level = summary["results"][name]["edit"]["mean"]
        axes.axhline(level, color=f"C{number}", linestyle=":", label=f"{CONTROLS[name]}: edit S")
    axes.set_xticks(places, list(results))
    axes.set_ylim(0, 101)
    axes.set_xlabel("σ_W (standard deviation of an addressing weight)")
    axes.set_ylabel("S (percent, ± standard error)")
    beside = axes.twinx()
    found = [row["perplexity"] or math.nan for row in results.values()]
    beside.plot(places, found, color="grey", linestyle="--", label="perplexity")
    beside.set_yscale("log")
    beside.set_ylabel("perplexity of the continuation (dashed)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=9)


class Noise:
    """See the head of this file; an experiment as in `runner.Experiment`.

    Raises:
        ValueError: a σ_W below zero, or none.
    """

    name = "noise"
    tables = staticmethod(tables)

    def __init__(
        self,
        model: Pipeline,
        cases: Sequence[EditRecord],
        sigmas: Sequence[float],
        *,
        tokens: int,
        data: Mapping[str, Any],
        seed: int = 0,
        chunk: int = 25,
    ):
        if not sigmas or not all(0 <= sigma < math.inf for sigma in sigmas):
            raise ValueError(f"σ_W is a standard deviation, at least 0; got {list(sigmas)}")
        self.model, self.cases, self.chunk = model, cases, chunk
        self._sigmas, self._tokens, self._seed = sorted(set(sigmas)), tokens, seed
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "sigmas": self._sigmas,
            "controls": list(CONTROLS),
            "draws": draws.SCHEME,
            "tokens": tokens,
            "chunk": chunk,
            "seed": seed,
        }

    def run(self, cases: Sequence[EditRecord]) -> list[Record]:
        """ℓ and continuations of a chunk of cases under every control and σ_W; a case draws with its own
        key (`draws.keys`), under each σ_W the same."""
        facts = [(case.prompt, case.target_new) for case in cases]
        queries = [[case.prompt, *case.paraphrases] for case in cases]
        prompts = [text for row in queries for text in row]
        pairs = [
            [case.target_new, case.target_true]
            for case, row in zip(cases, queries, strict=True)
            for _ in row
        ]
        first = np.cumsum([0, *(len(row) for row in queries[:-1])])
        edits = [prompts[row] for row in first]
        rng = draws.keys(self._seed, [case.case_id for case in cases])
        read = {
            f"{sigma:g}": self._editor(sigma).recall(facts, queries, rng=rng if sigma else None)
            for sigma in self._sigmas
        }
        # What is in scope depends on no σ_W.
        inside = next(iter(read.values())).in_scope
        told = [written(*fact) for fact, row in zip(facts, queries, strict=True) for _ in row]
        let = [fact if within else None for fact, within in zip(told, inside, strict=True)]
        sides = {
            "base": prompts,
            "prompt": controls.in_front(told, prompts),
            "lookup": controls.in_front(let, prompts),
        }
        begun = {name: [side[row] for row in first] for name, side in sides.items()}
        loss = controls.measured(self.model.score, sides, pairs)
        loss["zero"] = self.model.score(prompts, pairs, self.model.zero(len(prompts)))
        text = controls.measured(lambda asked, _: self._continued(asked), begun, [""] * len(cases))
        text["zero"] = self._continued(edits, self.model.zero(len(edits)))
        for name, recall in read.items():
            everyone = recall.condition(np.arange(len(prompts)))
            loss[name] = self.model.score(prompts, pairs, everyone)
            text[name] = self._continued(edits, recall.condition(first))
        names = [*CONTROLS, *read]
        text = {name: text[name].tolist() for name in names}
        # A continuation through the memory may end with its answer: all are judged to the same length.
        least = [min(len(text[name][row].split()) for name in names) for row in range(len(edits))]
        alike = {
            name: [" ".join(one.split()[:most]) for one, most in zip(found, least, strict=True)]
            for name, found in text.items()
        }
        surprise = self._surprise(edits, alike)
        records = []
        for number, (case, start) in enumerate(zip(cases, first, strict=True)):
            end = start + len(queries[number])
            records.append(
                {
                    "case_id": case.case_id,
                    "written": told[start],
                    "in_scope": {"edit": inside[start : start + 1].tolist(),
                                 "paraphrase": inside[start + 1 : end].tolist()},
                    "loss": {
                        name: {"edit": loss[name][start : start + 1].tolist(),
                               "paraphrase": loss[name][start + 1 : end].tolist()}
                        for name in names
                    },
                    "text": {name: text[name][number] for name in names},
                    "surprise": {name: surprise[name][number] for name in names},
                }
            )
        return records

    def _continued(self, prompts: Sequence[str], condition: Any = None) -> np.ndarray:
        options = dict(max_tokens=self._tokens, stop=())
        return np.asarray(self.model.generate(prompts, condition, **options), object)

    def _editor(self, sigma: float) -> LarimarEditor:
        """The model with this σ_W."""
        if not sigma:
            return LarimarEditor(self.model)
        prepared = dataclasses.replace(
            self.model.prepared,
            log_variance=jnp.full_like(self.model.prepared.log_variance, 2 * math.log(sigma)),
            variance_by_query=None,
            variance_by_memory=None,
        )
        return LarimarEditor(self.model.with_memory(self.model.memory, prepared))

    def _surprise(
        self, prompts: Sequence[str], texts: Mapping[str, Sequence[str]]
    ) -> dict[str, list[float | None]]:
        """ℓ of each continuation under the base LM, in nats a token, each text once; None of one without
        words."""
        spoken = [
            (name, row)
            for name, found in texts.items()
            for row, text in enumerate(found)
            if text.strip()
        ]
        asked = {"all": [prompts[row] for _, row in spoken]}
        said = [[texts[name][row]] for name, row in spoken]
        found: dict[str, list[float | None]] = {name: [None] * len(prompts) for name in texts}
        for (name, row), value in zip(
            spoken, controls.measured(self.model.score, asked, said)["all"], strict=True
        ):
            found[name][row] = float(value[0])
        return found

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """By control and σ_W: S of edit and paraphrase in percent with standard errors, the perplexity
        of the continuations (exp of the mean ℓ over cases), and how many of them have no words. Of a σ_W
        also the differences to the lookup, with notes; `fluency` has that of −ℓ of the continuations, in
        hundredths of a nat."""
        result: dict[str, Any] = {}
        for name in records[0]["loss"] if records else ():
            said = [r["surprise"][name] for r in records if r["surprise"][name] is not None]
            result[name] = {
                kind: vars(metrics.estimate(_successes(records, name, kind))) for kind in KINDS
            } | {
                "perplexity": math.exp(sum(said) / len(said)) if said else None,
                "fluency": {},
                "silent": len(records) - len(said),
            }
            if name in CONTROLS:
                continue
            for kind in KINDS:
                control = _successes(records, systems.CONTROL, kind)
                versus = systems.versus_lookup(_successes(records, name, kind), control)
                result[name][kind] |= versus
            pairs = [(r["surprise"][systems.CONTROL], r["surprise"][name]) for r in records]
            pairs = [(control, ours) for control, ours in pairs if None not in (control, ours)]
            # The lower ℓ is the better one.
            result[name]["fluency"] = systems.versus_lookup(*zip(*pairs, strict=True)) if pairs else {}
        return result


def _successes(records: Sequence[Record], name: str, kind: str) -> list[float]:
    found = [np.asarray(record["loss"][name][kind], np.float64) for record in records]
    return [metrics.success(kind, *losses.T) for losses in found if len(losses)]
