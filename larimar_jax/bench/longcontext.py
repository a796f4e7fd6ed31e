"""Long context: a text of N facts in chunk memories, each fact asked through all of them (Table 6).

The facts stand in a row, are cut into chunks of `fan_in`, and every chunk is a memory of its own (§7).
A question is read from all of them and decoded from what the surest says, or from the recursive read's
answer (`--by`). Nothing decides about scope: every question is about the text. Recall is the share of
the answer's tokens that are the likeliest, teacher-forced. Controls: the base LM, z = 0, the whole text
in front of the question, as far as it fits, and a lookup that puts the nearest fact there.

The facts are new ones of the world's cities (`data/atlas.py`), or those of a file of CounterFact.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table

from larimar_jax import long_context
from larimar_jax.bench import given, headline, metrics, systems
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import Encoded, written
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.data.segments import sentences
from larimar_jax.pipeline import Pipeline

SYSTEMS = {
    "base": "base LM",
    "zero": "z = 0",
    "prompt": "the text in the prompt",
    "lookup": "nearest neighbour",
    "larimar": "Larimar",
    "rephrased": "Larimar, other words",
}
PAPER = (
    "Table 6, recall at 64 / 96 / 128 / 256 facts: Larimar-1.3B .89 / .88 / .88 / .86, Mistral-7B with "
    "the text in its prompt .98 / .96 / .57 / .42."
)


def headlines(summary: Mapping[str, Any]) -> list[headline.Headline]:
    """Recall at every N."""
    paper = {"64": "89", "128": "88", "256": "86"}
    return [
        headline.Headline(
            f"recall, N = {int(size):,}",
            headline.of(found["recall"], lambda one: one),
            paper.get(size, ""),
        )
        for size, found in summary["results"].items()
    ]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench longcontext`."""
    given.options(
        parser, f"the facts: {given.COUNTERFACT} (default: made-up countries of cities)", required=False
    )
    parser.add_argument(
        "--facts",
        type=int,
        nargs="+",
        default=[64, 128, 256, 1024, 4096],
        help="in the text, N (%(default)s)",
    )
    parser.add_argument("--asked", type=int, default=32, help="facts asked for each N (%(default)s)")
    parser.add_argument("--fan-in", type=int, default=16, help="facts of a chunk (%(default)s)")
    parser.add_argument(
        "--by",
        choices=("surest", "confidence", "readout"),
        default="surest",
        help="how the chunks' answers become one (%(default)s)",
    )
    parser.add_argument(
        "--room",
        type=int,
        default=1024,
        help="tokens of the text that the control has in its prompt; a larger text is cut, its end "
        "stays (%(default)s)",
    )
    systems.model_options(parser)
    parser.add_argument("--chunk", type=int, default=32, help="cases computed together (%(default)s)")


def experiment(args: argparse.Namespace) -> "LongContext":
    """The experiment of a parsed command line; reads the data and loads the model.

    Raises:
        ValueError: there are fewer records than facts, or more are asked than there are.
    """
    from larimar_jax.data import atlas, edit_records

    most = max(args.facts)
    if args.data is None:
        records, data = atlas.load(most), atlas.provenance()
    else:
        records, data = given.read(args, edit_records.load, most)
    if len(records) < most or args.asked > min(args.facts):
        raise ValueError(
            f"{args.data or data['name']} has {len(records)} records; a text of {most} facts and "
            f"{args.asked} questions for one of {min(args.facts)} need more: give a larger file, or "
            "fewer --facts and --asked"
        )
    how = dict(fan_in=args.fan_in, by=args.by, room=args.room, asked=args.asked)
    return LongContext(systems.model(args), records, args.facts, how, data=data, chunk=args.chunk)


@dataclasses.dataclass(frozen=True)
class Case:
    """Fact `index` of a text of `facts`."""

    case_id: str
    facts: int
    index: int


def values(record: Record) -> dict[str, float]:
    """Recall of a fact by system and N."""
    return {
        f"{label}, N = {record['facts']}": record["recall"][name] for name, label in SYSTEMS.items()
    }


def texts(record: Record) -> list[str]:
    """The fact, and its recall by system."""
    recall = (f"{label}: {100 * record['recall'][name]:.0f} %" for name, label in SYSTEMS.items())
    return [f"{record['prompt']} → {record['target_new']}", *recall]


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """A row for every N."""
    results = summary["results"]
    title = "recall ± standard error, percent"
    table = Table("N", *SYSTEMS.values(), "right chunk", title=title)
    for size, found in results.items():
        rows = [found["recall"][name] for name in SYSTEMS]
        cells = ["\n".join(filter(None, (systems.percent(row), row.get("note")))) for row in rows]
        table.add_row(size, *cells, systems.percent(found["right_chunk"]))
    return [table]


def draw(axes: Any, summary: Mapping[str, Any]) -> None:
    """Recall against N."""
    results = summary["results"]
    lines = {
        label: [found["recall"][name] for found in results.values()] for name, label in SYSTEMS.items()
    }
    systems.curves(axes, [int(size) for size in results], lines)
    systems.doubling(axes, [int(size) for size in results])
    axes.set_xlabel("N, facts in the text")
    axes.set_ylabel("recall (percent, ± standard error)")


class LongContext:
    """See the head of this file; an experiment as in `runner.Experiment`."""

    name = "longcontext"
    tables = staticmethod(tables)

    def __init__(
        self,
        model: Pipeline,
        records: Sequence[EditRecord],
        sizes: Sequence[int],
        how: Mapping[str, Any],
        *,
        data: Mapping[str, Any],
        chunk: int = 32,
    ):
        self.model, self.records, self.how, self.chunk = model, records, how, chunk
        self.cases = [
            Case(f"{size}/{index}", size, int(index))
            for size in sizes
            # Spread over the text, from its beginning to its end.
            for index in np.linspace(0, size - 1, how["asked"]).round().astype(int)
        ]
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "facts": list(sizes),
            **how,
            "chunk": chunk,
            "seed": None,
        }
        self._encoded: Encoded | None = None
        self._held: tuple[int, Any] = (0, None)

    def run(self, cases: Sequence[Case]) -> list[Record]:
        """Recall of each case's fact; cases of one N are asked together."""
        found: dict[str, Record] = {}
        for size in dict.fromkeys(case.facts for case in cases):
            some = [case for case in cases if case.facts == size]
            found |= {record["case_id"]: record for record in self._asked(size, some)}
        return [found[case.case_id] for case in cases]

    def _asked(self, size: int, cases: Sequence[Case]) -> list[Record]:
        records = [self.records[case.index] for case in cases]
        prompts, others = [r.prompt for r in records], [_last(r) for r in records]
        targets = [record.target_new for record in records]
        memories, encoded = self._written(size)
        latents = encoded([*prompts, *others])
        by = self.how["by"]
        reading = long_context.read(
            self.model.dual, self.model.prepared, memories, latents.latent, by=by
        )
        count = len(cases)
        facts = [written(r.prompt, r.target_new) for r in self.records[:size]]
        keys = encoded([r.prompt for r in self.records[:size]]).embedding
        nearest = np.argmax(_unit(latents.embedding[:count]) @ _unit(keys).T, axis=1)
        said = {
            "base": (prompts, None),
            "zero": (prompts, self.model.zero(count)),
            "prompt": ([f"{self._text(facts)} {prompt}" for prompt in prompts], None),
            "lookup": (
                [f"{facts[n].rstrip('.')}. {p}" for n, p in zip(nearest, prompts, strict=True)],
                None,
            ),
            "larimar": (prompts, self.model.condition(reading.latent[:count])),
            "rephrased": (others, self.model.condition(reading.latent[count:])),
        }
        recall = {
            name: self.model.judge(asked, [[t] for t in targets], condition).accuracy[:, 0]
            for name, (asked, condition) in said.items()
        }
        own = np.asarray([case.index // self.how["fan_in"] for case in cases])
        right = np.asarray(reading.chunk)[:count] == own
        return [
            {
                "case_id": case.case_id,
                "facts": size,
                "index": case.index,
                "prompt": record.prompt,
                "rephrased": other,
                "target_new": record.target_new,
                "recall": {name: float(rows[row]) for name, rows in recall.items()},
                "right_chunk": bool(right[row]),
            }
            for row, (case, record, other) in enumerate(zip(cases, records, others, strict=True))
        ]

    def _text(self, facts: Sequence[str]) -> str:
        """The end of the text, as many whole facts as have room."""
        tokens, kept = 0, []
        for fact in reversed(facts):
            tokens += len(self.model.decoder_tokenizer.following(f"{fact}."))
            if tokens > self.how["room"]:
                break
            kept.append(f"{fact.rstrip('.')}.")
        return " ".join(reversed(kept))

    def _written(self, size: int) -> tuple[long_context.Memories, Encoded]:
        """The memories of the first `size` facts; those of one size are kept at a time."""
        if self._encoded is None:
            facts = [(record.prompt, record.target_new) for record in self.records]
            asked = [_last(self.records[case.index]) for case in self.cases]
            self._encoded = Encoded(self.model, [*(p for p, _ in facts), *asked], facts)
        if self._held[0] != size:
            facts = [(record.prompt, record.target_new) for record in self.records[:size]]
            keys = self._encoded([prompt for prompt, _ in facts]).latent
            values = self._encoded.values(facts)
            made = long_context.write(
                self.model.dual, self.model.prepared, keys, values, self.how["fan_in"]
            )
            self._held = (size, made)
        return self._held[1], self._encoded

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Recall by N and system, in percent with standard errors, the memory's paired difference to the
        lookup with a note where it is not positive; how often the surest chunk was the fact's own."""
        results: dict[str, Any] = {}
        for size in dict.fromkeys(record["facts"] for record in records):
            some = [record for record in records if record["facts"] == size]
            recall = {name: [record["recall"][name] for record in some] for name in SYSTEMS}
            found = {name: vars(metrics.estimate(rows)) for name, rows in recall.items()}
            found["larimar"] |= systems.versus_lookup(recall["larimar"], recall["lookup"])
            results[str(size)] = {
                "recall": found,
                "right_chunk": vars(metrics.estimate([float(r["right_chunk"]) for r in some])),
            }
        return results


def _last(record: EditRecord) -> str:
    """A fact's other words: the last sentence of its first paraphrase, what is before it being about
    something else; its own prompt where there is none."""
    return sentences(record.paraphrases[0])[-1] if record.paraphrases else record.prompt


def _unit(rows: Float[np.ndarray, "n H"]) -> Float[np.ndarray, "n H"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
