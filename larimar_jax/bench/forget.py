"""Forgetting one of N facts of CounterFact: what is still recalled of it, and of the others (Table 4).

N facts are written at once, one is forgotten (α = −1), and then its prompt is written with the answer
"unknown". Recall is the share of an answer's tokens that are the likeliest where they stand,
teacher-forced, through the memory whether or not the query is in its scope: what the scope detector
would keep from the decoder is no forgetting. Beside it what no behaviour shows: how far the memory is
from the float64 solution that never saw the fact, what the memory's own certificate says of that, and
the leverage that is left to the key.

Controls: a lookup that puts the nearest text in front, in scope or not, as through the memory: the
fact's own, and once that is taken out of the store another's, or the one with "unknown". The base LM,
z = 0 and the fact in the prompt are the same at every moment: what a prompt holds is not forgotten. A
memory that does not beat the lookup says so; of what was forgotten, the less is recalled the better.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy.linalg
from rich.table import Table

from larimar_jax.bench import controls, given, headline, metrics, systems
from larimar_jax.bench.runner import Record
from larimar_jax.bench.store import Encoded, Store, encoded, written
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.memory import health
from larimar_jax.pipeline import Pipeline

UNKNOWN = "unknown"
# What is recalled, in this order.
MOMENTS = {"before": "before", "forgotten": "forgotten", "replaced": "“unknown”"}
# By what. The first ones know nothing of a memory.
CONSTANT = ("base", "zero", "prompt")
SYSTEMS = {name: systems.SYSTEMS[name] for name in (*CONSTANT, "lookup", "open")}
MEMORY = "open"
SIDES = {"forgotten": "recall", "others": "recall_others"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `larimar bench forget`."""
    given.options(parser, given.COUNTERFACT)
    parser.add_argument(
        "--facts", type=int, nargs="+", default=[512, 1024], help="in the memory, N (%(default)s)"
    )
    parser.add_argument(
        "--forget", type=int, default=50, help="facts forgotten, one at a time (%(default)s)"
    )
    parser.add_argument(
        "--others", type=int, default=8, help="others asked after each of them (%(default)s)"
    )
    systems.model_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="which facts (%(default)s)")
    parser.add_argument("--chunk", type=int, default=5, help="cases computed together (%(default)s)")


def experiment(args: argparse.Namespace) -> "Forget":
    """The experiment of a parsed command line; reads the data and loads the model.

    Raises:
        ValueError: the file has fewer records than facts are to be written.
    """
    from larimar_jax.data import counterfact

    most = max(args.facts)
    records, data = given.read(args, counterfact.load, most)
    if len(records) < most:
        raise ValueError(
            f"{args.data} has {len(records)} records, and {most} are to be written: give a larger "
            "file, or fewer --facts"
        )
    sizes = (args.facts, args.forget, args.others)
    return Forget(systems.model(args), records, *sizes, data=data, seed=args.seed, chunk=args.chunk)


@dataclasses.dataclass(frozen=True)
class Case:
    """Of `facts` facts, `index` is forgotten, and `others` are asked."""

    case_id: str
    facts: int
    index: int
    others: tuple[int, ...]


def tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """For every N a row a system, for the forgotten facts and for the others."""
    results = summary["results"]
    title = "recall ± standard error, percent"
    names = ("system", "N", "of", *MOMENTS.values(), "distance", "leverage")
    table = Table(*names, title=title, caption="of the forgotten, once it is: lower is better")
    for size, found in results.items():
        for side in SIDES:
            for name, label in SYSTEMS.items():
                cells = [controls.noted(found[side][name][moment]) for moment in MOMENTS]
                ours = side == "forgotten" and name == MEMORY
                more = [f"{found['distance']:.1e}", f"{found['leverage']:.3f}"] if ours else ["", ""]
                table.add_row(label, size, side, *cells, *more)
    return [table]


PAPER = (
    "Table 4, CounterFact, recall of the forgotten / of the others: Larimar-1.3B .001 / .997 at N = K, "
    ".02 / .79 at N = 2K (after the same prompt was written with “unknown”)."
)


def headlines(summary: Mapping[str, Any]) -> list[headline.Headline]:
    """Recall of the forgotten and of the others, after α = −1 and after “unknown” was written."""
    # At N = K, and in its K = 512 alone.
    same = summary["settings"].get("slots") == 512
    paper = {"forgotten": "0.1", "others": "99.7"} if same else {}
    return [
        headline.Headline(
            f"{label}{', then “unknown”' * (moment == 'replaced')}, N = {int(size):,}",
            headline.of(
                {**found[side], "larimar": found[side][MEMORY]}, lambda one, moment=moment: one[moment]
            ),
            paper.get(side, "") if moment == "replaced" and size == "512" else "",
        )
        for size, found in summary["results"].items()
        for side, label in (("forgotten", "forgotten (less is better)"), ("others", "others"))
        for moment in ("forgotten", "replaced")
    ]


class Forget:
    """See the head of this file; an experiment as in `runner.Experiment`."""

    name = "forget"
    tables = staticmethod(tables)

    def __init__(
        self,
        model: Pipeline,
        records: Sequence[EditRecord],
        sizes: Sequence[int],
        forget: int,
        others: int,
        *,
        data: Mapping[str, Any],
        seed: int = 0,
        chunk: int = 5,
    ):
        self.model, self.records, self.chunk = model, records, chunk
        self.sizes = sorted(set(sizes))
        self.cases = [case for size in self.sizes for case in _cases(size, forget, others, seed)]
        self.settings: Mapping[str, Any] = {
            "data": dict(data),
            "model": systems.named(model),
            "facts": self.sizes,
            "forget": forget,
            "others": others,
            "systems": list(SYSTEMS),
            "slots": model.memory.slots,
            "chunk": chunk,
            "seed": seed,
        }
        self._encoded: Encoded | None = None
        self._store: Store | None = None
        self._sums: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def run(self, cases: Sequence[Case]) -> list[Record]:
        """What each forgotten fact and the others are recalled by, and the certificates; all that is
        asked under one condition is judged together."""
        asked = [[case.index, *case.others] for case in cases]
        records = [self.records[index] for row in asked for index in row]
        prompts, targets = [r.prompt for r in records], [[r.target_new] for r in records]
        begins = np.cumsum([0, *map(len, asked)])
        found: dict[str, list[str | None]] = {moment: [] for moment in MOMENTS}
        latents: dict[str, list[np.ndarray]] = {moment: [] for moment in MOMENTS}
        certificates = []
        for case, begin, end in zip(cases, begins, begins[1:], strict=False):
            full = self._filled(case.facts)
            after = full.without([case.index])
            replaced = after.plus([(self.records[case.index].prompt, UNKNOWN)])
            for moment, store in zip(MOMENTS, (full, after, replaced), strict=True):
                latent, match = store.read(prompts[begin:end])
                latents[moment].append(latent)
                # A store that only had the forgotten fact has none that is nearest.
                found[moment] += [store.texts[fact] if fact >= 0 else None for fact in match.key]
            certificates.append(self._certificate(case, after))

        def recalled(texts, targets, condition=None):
            return self.model.judge(texts, targets, condition).accuracy[:, 0]

        own = [written(r.prompt, r.target_new) for r in records]
        sides = {"base": prompts, "prompt": controls.in_front(own, prompts)}
        sides |= {moment: controls.in_front(found[moment], prompts) for moment in MOMENTS}
        plain = controls.measured(recalled, sides, targets)

        def nothing(texts, targets):
            return recalled(texts, targets, self.model.zero(len(texts)))

        plain |= controls.measured(nothing, {"zero": prompts}, targets)
        read = np.concatenate([latent for rows in latents.values() for latent in rows])
        condition = self.model.condition(read)
        through = recalled(prompts * len(MOMENTS), targets * len(MOMENTS), condition)
        values = {name: dict.fromkeys(MOMENTS, plain[name]) for name in CONSTANT} | {
            "lookup": {moment: plain[moment] for moment in MOMENTS},
            MEMORY: dict(zip(MOMENTS, np.split(through, len(MOMENTS)), strict=True)),
        }
        return [
            {
                "case_id": case.case_id,
                "facts": case.facts,
                "index": case.index,
                "prompt": prompts[begin],
                "target_new": targets[begin][0],
                "others": list(case.others),
                "nearest": {moment: texts[begin] for moment, texts in found.items()},
                "recall": {
                    name: {moment: float(each[begin]) for moment, each in row.items()}
                    for name, row in values.items()
                },
                "recall_others": {
                    name: {moment: each[begin + 1 : end].tolist() for moment, each in row.items()}
                    for name, row in values.items()
                },
                **certificate,
            }
            for case, begin, end, certificate in zip(
                cases, begins, begins[1:], certificates, strict=False
            )
        ]

    def _certificate(self, case: Case, after: Store) -> Record:
        """How far the memory is from the float64 solution that never saw the fact, and what it says of
        that itself."""
        key = self._filled(case.facts).keys[[case.index]]
        said, leverage = _certify(self.model.memory, self.model.prepared, after.state, key)
        return {
            "distance": self._distance(case, after),
            "certificate": float(said),
            "leverage": float(leverage),
            "refused": int(after.state.refused),
        }

    def _distance(self, case: Case, after: Store) -> float:
        """‖M − M*‖ / ‖M*‖, M* the float64 solution of the facts that are left (Eq. 6)."""
        memory, prepared = self.model.memory, self.model.prepared
        if self._sums is None or self._sums[0] != case.facts:
            full = self._filled(case.facts)
            weights = np.float64(_address(memory, prepared, full.keys))
            self._sums = case.facts, weights, np.float64(full.values), weights.T @ weights
        _, weights, values, gram = self._sums
        before, gone = np.float64(prepared.memory), weights[case.index]
        left = np.delete(weights, case.index, axis=0)
        shrink = float(memory.shrink(after.state.gram.total()))
        regular = float(np.float32(memory.ridge)) + shrink
        right = left.T @ (np.delete(values, case.index, axis=0) - left @ before) - shrink * before
        kept = gram - np.outer(gone, gone) + regular * np.eye(memory.slots)
        exact = before + scipy.linalg.solve(kept, right, assume_a="pos")
        return float(np.linalg.norm(np.float64(after.state.solution) - exact) / np.linalg.norm(exact))

    def _filled(self, size: int) -> Store:
        """The store of the first `size` facts; one is kept at a time."""
        facts = [(record.prompt, record.target_new) for record in self.records]
        if self._encoded is None:
            gone = sorted({case.index for case in self.cases})
            replaced = [(self.records[index].prompt, UNKNOWN) for index in gone]
            self._encoded = encoded(self.model, [*facts, *replaced])
        if self._store is None or len(self._store.facts) != size:
            self._store = Store(self._encoded, facts[:size])
        return self._store

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """By N: recall of the forgotten and of the others by every system at every moment, in percent
        with standard errors; of the memory the difference to the lookup, with a note; the largest
        distance, and how far the certificate is from it."""
        result = {}
        for size in self.sizes:
            rows = [record for record in records if record["facts"] == size]
            recall = {side: _recall(rows, side) for side in SIDES}
            ratios = [record["certificate"] / record["distance"] for record in rows]
            result[str(size)] = recall | {
                "distance": max(record["distance"] for record in rows),
                "certificate_over_distance": [min(ratios), max(ratios)],
                "leverage": float(np.mean([record["leverage"] for record in rows])),
                "refused": sum(record["refused"] for record in rows),
            }
        return result


def _recall(records: Sequence[Record], side: str) -> dict[str, Any]:
    """{system: {moment: estimate}} of the forgotten facts or of the others."""
    result: dict[str, Any] = {name: {} for name in SYSTEMS}
    for moment in MOMENTS:
        found = {
            name: [float(np.mean(record[SIDES[side]][name][moment])) for record in records]
            for name in SYSTEMS
        }
        for name, values in found.items():
            result[name][moment] = vars(metrics.estimate(values))
        pair = found[MEMORY], found[systems.CONTROL]
        if side == "forgotten" and moment != "before":  # the less is recalled the better
            pair = pair[::-1]
        result[MEMORY][moment] |= systems.versus_lookup(*pair)
    return result


def _cases(size: int, forget: int, others: int, seed: int) -> list[Case]:
    """`forget` of the facts, and for each of them `others` of the rest."""
    draw = np.random.default_rng((seed, size))
    found = []
    for index in draw.permutation(size)[:forget]:
        rest = np.delete(np.arange(size), index)
        asked = draw.permutation(rest)[:others]
        found.append(Case(f"{size}/{index}", size, int(index), tuple(int(i) for i in asked)))
    return found


@jax.jit
def _address(memory, prepared, keys):
    return memory.address(prepared, keys)


@jax.jit
def _certify(memory, prepared, state, key):
    return health.distance(memory, prepared, state), health.leverage(memory, prepared, state, key)[0]
