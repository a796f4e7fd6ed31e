"""Recall of unseen wordings under several keys (Table 14)."""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from larimar_jax.bench.fact_store import EncodedTexts, FactStore, encode_facts, written
from larimar_jax.bench.task import ZSRE, EditTask, Metric, Pivot, Plot, option
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.memory.addressing import Addressing, Gaussian, PseudoInverse
from larimar_jax.memory.base import MemoryParams
from larimar_jax.pipeline import Pipeline

KEYS = {"own": "keys of the model", "pinv": "pseudo-inverse", "gaussian": "Gaussian"}
# α of Eq. 7 as in Fig. 2b of the paper.
ADDRESSINGS = {"pinv": PseudoInverse(), "gaussian": Gaussian(width=1e-3)}
Keys = Literal["own", "pinv", "gaussian"]


def keys_option() -> Any:
    """Return a task's option for a memory with a slot for every prompt that is written."""
    text = "keys by the model's M₀, or with a slot for every prompt that is written, all of them known "
    return option(f"{text}beforehand: by their pseudo-inverse, or by Eqs. 7–8", default="own")


def cell(text: str) -> tuple[int, int]:
    """Return F and n of "FxN", for argparse."""
    facts, _, wordings = text.partition("x")
    if not (facts.isdecimal() and wordings.isdecimal() and int(facts) and int(wordings)):
        raise argparse.ArgumentTypeError(f"{text!r} is not as 20x10: facts, x, wordings of each")
    return int(facts), int(wordings)


class RephrasedFact(NamedTuple):
    """Record `index` in the memory of `together`, each written in n `wordings`."""

    case_id: str
    index: int
    together: tuple[int, ...]
    wordings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rephrase(EditTask):
    """Facts of ZsRE in several wordings, recalled by an unseen one: which keys match (Table 14)?

    A cell F x n writes F facts, each in n wordings, into one memory, and queries each by its
    paraphrase. The wordings are those that the file itself has for other subjects
    (`data/paraphrases.py`). Keys are compared on the same rows, decoded through the memory whether
    or not a query is in scope: the model's own (the pseudo-inverse of its M₀ with features), and
    with a slot for each fact, M_ref being the first wordings, the pseudo-inverse and Gaussian keys
    (Eqs. 7–8). Recall is the share of an answer's tokens that are the likeliest where they stand,
    teacher-forced.
    """

    metrics: ClassVar = {"recall": Metric("recall"), "own_fact_nearest": Metric("own fact nearest")}
    factors = ("facts", "wordings")
    labels: ClassVar = {**KEYS, "unseen": "unseen wordings"}
    tables = (
        Pivot(
            ("facts", "wordings"),
            "system",
            ("recall",),
            caption="recall of unseen wordings ± standard error, percent",
        ),
    )
    plots = (Plot(("facts", "wordings"), "recall", xlabel="facts x wordings written"),)
    paper: ClassVar = {
        ("unseen", 20, 10): 94.0,
        ("unseen", 40, 5): 84.0,
        ("unseen", 100, 2): 66.0,
        ("unseen", 200, 1): 33.0,
        ("unseen", 1, 1): 63.0,
    }
    reference = (
        "Table 14, (facts, wordings) pseudo-inverse / Gaussian: (20, 10) 94 / 90, (40, 5) 84 / 84, "
        "(100, 2) 66 / 78, (200, 1) 33 / 69, (1, 1) 63 / 68."
    )

    data: str = option(ZSRE, metavar="FILE", recorded=False)
    cells: tuple[tuple[int, int], ...] = option(
        "facts in a memory, and wordings of each that are written (default: 20x10 40x5 100x2 200x1 1x1)",
        default=((20, 10), (40, 5), (100, 2), (200, 1), (1, 1)),
        metavar="FxN",
        parse=cell,
    )
    queries: int = option("facts evaluated in a cell, in all memories that they fill", default=200)
    seed: int = option("which facts", default=0, least=0)
    chunk: int = option("cases computed together", default=40)

    @functools.cached_property
    def facts(self) -> list[tuple[EditRecord, tuple[str, ...]]]:
        """Records that have a paraphrase, each with the prompts that it may be written in."""
        records = [record for record in self.records if record.paraphrases]
        extra = self.other_wordings(records, max(count for _, count in self.cells) - 1)
        return [(r, (r.prompt, *more)) for r, more in zip(records, extra, strict=True)]

    def cases(self, systems) -> Sequence[RephrasedFact]:
        """Return the cases of all cells.

        Raises:
            ValueError: too few of the records have as many wordings as a cell writes.
        """
        return [case for size in self.cells for case in self._of_cell(*size)]

    def _of_cell(self, facts: int, count: int) -> Iterator[RephrasedFact]:
        able = [index for index, (_, prompts) in enumerate(self.facts) if len(prompts) >= count]
        if len(able) < facts:
            raise ValueError(
                f"{len(able)} records have {count} wordings and a paraphrase, and the cell "
                f"{facts}x{count} writes {facts}: give a larger file, or a smaller cell"
            )
        draw = np.random.default_rng((self.seed, facts, count))
        for memory in range(max(1, self.queries // facts)):
            together = tuple(int(index) for index in draw.permutation(able)[:facts])
            for index in together:
                name = f"{facts}x{count}/{memory}/{index}"
                yield RephrasedFact(name, index, together, count)

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        """Yield recall under every system and kind of keys, all cases in one batch."""
        parts: dict[str, list] = {keys: [] for keys in KEYS}
        groups = itertools.groupby(cases, key=lambda case: (case.together, case.wordings))
        for (together, count), group in groups:
            group, key = list(group), (together, count)
            columns = [self._columns(case) for case in group]
            facts = [written(*self._written(case.index, 1)[0]) for case in group]
            stores = systems.cached("stores", key, functools.partial(self._stores, systems, *key))
            for keys, store in stores.items():
                parts[keys].append((store, columns, facts))
        queries = {keys: systems.shared_memories(each) for keys, each in parts.items()}
        targets = [column["target"] for column in queries["own"].columns]
        recall = queries["own"].accuracy(targets)
        recall["own"] = recall.pop("open")
        for keys in ADDRESSINGS:
            recall[keys] = queries[keys].accuracy(targets, ("open",))["open"]
        own = [
            {"own_fact_nearest": float(nearest in self._written(case.index, case.wordings))}
            for case, nearest in zip(cases, queries["own"].nearest, strict=True)
        ]
        yield from queries["own"].rows(recall, lambda _, share: {"recall": share}, own)

    def _columns(self, case: RephrasedFact) -> dict[str, Any]:
        facts, (record, _) = self._written(case.index, case.wordings), self.facts[case.index]
        return dict(case=case.case_id, kind="unseen", facts=len(case.together)) | dict(
            wordings=case.wordings,
            written="; ".join(written(*fact) for fact in facts),
            prompt=record.paraphrases[0],
            target=record.target_new,
        )

    def _written(self, index: int, count: int) -> list[tuple[str, str]]:
        record, prompts = self.facts[index]
        return [(prompt, record.target_new) for prompt in prompts[:count]]

    def _stores(self, systems, together: tuple[int, ...], count: int) -> dict[str, FactStore]:
        """The memory of these facts by every kind of keys."""
        encoded = systems.cached("encoded", (), lambda: self._encode(systems))
        facts = [fact for index in together for fact in self._written(index, count)]
        known = encoded([self.facts[index][0].prompt for index in together]).latent
        stores = {"own": FactStore(encoded, facts)}
        for keys in ADDRESSINGS:
            model = keyed(systems.model, ADDRESSINGS[keys], known)
            stores[keys] = FactStore(encoded, facts, model=model)
        return stores

    def _encode(self, systems) -> EncodedTexts:
        most_wordings: dict[int, int] = {}
        for case in self.cases(systems):
            for index in case.together:
                most_wordings[index] = max(most_wordings.get(index, 0), case.wordings)
        order = sorted(most_wordings.items())
        facts = [fact for index, count in order for fact in self._written(index, count)]
        queries = [self.facts[index][0].paraphrases[0] for index, _ in order]
        return encode_facts(systems.model, facts, queries)


def with_keys(
    model: Pipeline, keys: Keys, encoded: EncodedTexts, prompts: Iterable[str]
) -> Pipeline:
    """Return the model, or what `keyed` makes of it, with a slot for every prompt."""
    if keys == "own":
        return model
    return keyed(model, ADDRESSINGS[keys], encoded(list(dict.fromkeys(prompts))).latent)


def keyed(model: Pipeline, addressing: Addressing, known: np.ndarray) -> Pipeline:
    """Return the model with an empty memory whose slots are known prompts, addressed by Eqs. 7–8
    or by their pseudo-inverse.

    Args:
        known: the prompts' encodings [K, C], K slots.
    """
    slots, latent = known.shape
    sizes = {"slots": slots, "latent": latent}
    memory = dataclasses.replace(model.memory, addressing=addressing, **sizes)
    zero = jnp.zeros((slots, latent), jnp.float32)
    params = MemoryParams(zero, jnp.zeros((), jnp.float32), reference_memory=jnp.asarray(known))
    return model.with_memory(memory, memory.prepare(params))
