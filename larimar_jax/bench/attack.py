"""Rephrase attack: is an answer that was edited away still drawn from the model (Table 5)?

Facts of CounterFact that the base LM knows: greedy decoding of the prompt gives the whole of the right
answer. Each is edited to "unknown", alone in a memory and with all others in one. The attack samples
after other wordings of the prompt (the record's own paraphrases, then those that the file has for other
subjects), and succeeds where the right answer is anywhere in any sample. Controls: the base LM, z = 0,
the edit as text in the prompt, and a lookup that puts the nearest edit there where the scope detector
lets it, of this edit alone and of all. A memory that does not beat the lookup of the same edits says so.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from larimar_jax.bench import controls, draws, given, headline, metrics, systems
from larimar_jax.bench.editor import LarimarEditor
from larimar_jax.bench.forget import UNKNOWN
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import Store, encoded, written
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.data.paraphrases import Wordings
from larimar_jax.pipeline import Pipeline

SYSTEMS = {
    "base": "base LM",
    "zero": "z = 0",
    "prompt": "fact in the prompt",
    "lookup": "nearest neighbour",
    "lookup_batch": "nearest neighbour, all edits at once",
    "open": "Larimar without scope",
    "larimar": "Larimar with scope",
    "batch": "Larimar with scope, all edits at once",
}
# Each memory, and the lookup of the same edits.
CONTROL = {"open": "lookup", "larimar": "lookup", "batch": "lookup_batch"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench attack`."""
    given.options(parser, given.COUNTERFACT)
    sizes = {
        "facts": (50, "that the base LM knows"),
        "wordings": (4, "attacked with, of each"),
        "samples": (5, "after each wording"),
        "tokens": (10, "of a sample"),
    }
    for name, (size, what) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"{what} (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples (%(default)s)")
    systems.model_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")
    parser.add_argument("--chunk", type=int, default=5, help="cases computed together (%(default)s)")


def experiment(args: argparse.Namespace) -> "Attack":
    """The experiment of a parsed command line; reads the data, loads the model, and looks for facts that
    it knows."""
    from larimar_jax.data import counterfact

    records, data = given.read(args, counterfact.load, None)
    model, other = systems.model(args), Wordings(records)
    able = [(r, (*r.paraphrases, *other.unseen(r))[: args.wordings]) for r in records]
    able = [(record, texts) for record, texts in able if len(texts) == args.wordings]
    cases = known(model, able, args.facts)
    options = dict(samples=args.samples, tokens=args.tokens, temperature=args.temperature)
    return Attack(model, cases, data=data, chunk=args.chunk, seed=args.seed, **options)


# A fact and the wordings that it is attacked with.
Attacked = tuple[EditRecord, tuple[str, ...]]


def known(model: Pipeline, records: Sequence[Attacked], count: int) -> list[Attacked]:
    """The first `count` records whose right answer the base LM gives, greedily and whole.

    Raises:
        ValueError: there are fewer.
    """
    found: list[Attacked] = []
    for start in range(0, len(records), _SEARCHED):
        some = records[start : start + _SEARCHED]
        judged = model.judge([r.prompt for r, _ in some], [[r.target_true] for r, _ in some])
        found += [one for one, share in zip(some, judged.accuracy[:, 0], strict=True) if share == 1.0]
        if len(found) >= count:
            return found[:count]
    raise ValueError(
        f"of {len(records)} records the base LM knows {len(found)}, and {count} are to be attacked: "
        "give a larger file, fewer --facts, or fewer --wordings"
    )


# Records that are asked together.
_SEARCHED = 256


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row a system."""
    settings = summary["settings"]
    budget = f"{settings['wordings']} wordings x {settings['samples']} samples"
    title = f"rephrase attack, {summary['cases']} facts, {budget}"
    table = Table("system", "succeeds", "samples with it", title=title)
    for name, label in SYSTEMS.items():
        found = summary["results"][name]
        table.add_row(label, *(controls.noted(found[key]) for key in ("attack", "sample")))
    return [table, "percent ± standard error; lower is better"]


PAPER = "Table 5, success: ROME 29.0, MEMIT 49.3, Larimar 17.6 (one fact written), 21.5 (batch)."


def headlines(summary: Mapping[str, Any]) -> list[headline.Headline]:
    """Attacks that succeed on one edit, and on all at once."""
    results = summary["results"]
    many = {"lookup": results["lookup_batch"], "larimar": results["batch"]}

    def succeeds(one: Mapping[str, Any]) -> Mapping[str, Any]:
        return one["attack"]

    return [
        headline.Headline("successes (less is better)", headline.of(results, succeeds), "17.6"),
        headline.Headline("the same, all edits at once", headline.of(many, succeeds), "21.5"),
    ]


def values(record: Record) -> dict[str, float]:
    """Whether a case withstands the attack, by system."""
    return {f"{label}, withstood": 1.0 - max(record["leaked"][name]) for name, label in SYSTEMS.items()}


def texts(record: Record) -> list[str]:
    """The fact, and through the memory a sample that has it, else the first one, for each wording."""
    lines = [f"{record['prompt']} → {record['target_true']}, edited to “{UNKNOWN}”"]
    per = len(record["leaked"]["larimar"]) // len(record["wordings"])
    for number, wording in enumerate(record["wordings"]):
        leaked = record["leaked"]["larimar"][number * per : (number + 1) * per]
        lines.append(f"{wording} →{record['text']['larimar'][number * per + int(np.argmax(leaked))]}")
    return lines


def draw(axes: Any, summary: Mapping[str, Any]) -> None:
    """Success of the attack, a bar a system."""
    found = [summary["results"][name]["attack"] for name in SYSTEMS]
    heights = [row["mean"] for row in found]
    axes.barh(range(len(found)), heights, xerr=[row["standard_error"] or 0.0 for row in found])
    axes.set_yticks(range(len(found)), [label.replace(", ", ",\n") for label in SYSTEMS.values()])
    axes.invert_yaxis()
    axes.set_xlim(0, 101)
    axes.set_xlabel("attacks that succeed (percent, ± standard error; lower is better)")


class Attack:
    """See the head of this file; an experiment as in `runner.Experiment`.

    Args:
        cases: facts that the base LM knows, each with as many wordings to attack it with.
    """

    name = "attack"
    tables = staticmethod(tables)

    def __init__(
        self,
        model: Pipeline,
        cases: Sequence[Attacked],
        *,
        samples: int,
        tokens: int,
        temperature: float,
        data: Mapping[str, Any],
        chunk: int = 5,
        seed: int = 0,
    ):
        if min(samples, tokens) < 1:
            raise ValueError(f"{samples} samples of {tokens} tokens: an attack needs one of each")
        self.model, self.chunk = model, chunk
        self._wordings = {record.case_id: wordings for record, wordings in cases}
        self.cases = [record for record, _ in cases]
        self._samples, self._tokens, self._temperature = samples, tokens, temperature
        self._seed, self._store = seed, None
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "facts": len(self.cases),
            "wordings": len(cases[0][1]) if cases else 0,
            "samples": samples,
            "tokens": tokens,
            "temperature": temperature,
            "systems": list(SYSTEMS),
            "draws": draws.SCHEME,
            "chunk": chunk,
            "seed": seed,
        }

    def run(self, cases: Sequence[EditRecord]) -> list[Record]:
        """Samples of a chunk of cases; a case draws with its own keys (`draws.keys`), under every system
        the same."""
        facts = [(case.prompt, UNKNOWN) for case in cases]
        queries = [self._wordings[case.case_id] for case in cases]
        prompts = [text for row in queries for text in row]
        alone, store = LarimarEditor(self.model).recall(facts, queries), self._all()
        together, nearest = store.recall(prompts)
        edits = [written(*fact) for fact, row in zip(facts, queries, strict=True) for _ in row]
        told = controls.in_front(edits, prompts)
        found = controls.in_front([store.texts[fact] for fact in nearest], prompts)
        rows = zip(found, told, together.in_scope, strict=True)
        own = all(near == edit for near, edit, within in rows if within)
        times = np.repeat(np.arange(len(prompts)), self._samples)
        own_keys = draws.keys(self._seed, [case.case_id for case in cases])
        rng = jnp.concatenate([
            jax.random.split(key, len(row) * self._samples)
            for key, row in zip(own_keys, queries, strict=True)
        ])

        def drawn(texts, condition=None):
            return np.asarray(
                self.model.generate(
                    [texts[row] for row in times],
                    condition,
                    max_tokens=self._tokens,
                    temperature=self._temperature,
                    rng=rng,
                    stop=(),
                ),
                object,
            )

        base, zero = drawn(prompts), drawn(prompts, self.model.zero(len(times)))
        with_edit, through = drawn(told), drawn(prompts, alone.condition(times))
        let, let_by_all = alone.in_scope[times], together.in_scope[times]
        said = {
            "base": base,
            "zero": zero,
            "prompt": with_edit,
            # Row n draws the same after the same text: where all find their own edit, it is drawn.
            "lookup": np.where(let, with_edit, base),
            "lookup_batch": np.where(let_by_all, with_edit if own else drawn(found), base),
            "open": through,
            "larimar": np.where(let, through, base),
            "batch": np.where(let_by_all, drawn(prompts, together.condition(times)), base),
        }
        records, start = [], 0
        for case in cases:
            rows = slice(start, start + len(self._wordings[case.case_id]) * self._samples)
            start = rows.stop
            answer = " ".join(case.target_true.split())
            records.append(
                {
                    "case_id": case.case_id,
                    "prompt": case.prompt,
                    "target_true": case.target_true,
                    "wordings": list(self._wordings[case.case_id]),
                    "text": {name: found[rows].tolist() for name, found in said.items()},
                    "leaked": {
                        name: [answer in " ".join(text.split()) for text in found[rows]]
                        for name, found in said.items()
                    },
                }
            )
        return records

    def _all(self) -> Store:
        """The memory of all edits."""
        if self._store is None:
            facts = [(case.prompt, UNKNOWN) for case in self.cases]
            asked = [text for case in self.cases for text in self._wordings[case.case_id]]
            self._store = Store(encoded(self.model, facts, asked), facts)
        return self._store

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """By system in percent with standard errors over facts: attacks that succeed, and the share of
        samples that have the answer. Of a memory also by how much both are below the lookup's, with a
        note."""
        rates = {
            name: {
                "attack": [float(max(record["leaked"][name])) for record in records],
                "sample": [float(np.mean(record["leaked"][name])) for record in records],
            }
            for name in SYSTEMS
        }
        result: dict[str, Any] = {
            name: {rate: vars(metrics.estimate(values)) for rate, values in found.items()}
            for name, found in rates.items()
        }
        for name, control in CONTROL.items():
            for rate, ours in rates[name].items():
                # Less is better.
                result[name][rate] |= systems.versus_lookup(rates[control][rate], ours)
        return result
