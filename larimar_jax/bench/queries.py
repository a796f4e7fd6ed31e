"""Larimar and its controls, side by side on the same prompts and weights.

    base      the untouched language model
    zero      z = 0: the memory slot is there and holds zeros
    prompt    the right fact in front of the prompt, whatever the scope detector decides
    lookup    the nearest written fact in front of the prompts that the scope detector lets through: no
              matrix
    verbatim  the nearest written fact's answer, forced token by token on the prompts that it lets
              through: no matrix, and no decoder's say
    larimar   memory-conditioned decoding of the prompts that it lets through
    open      memory-conditioned decoding of every prompt
    rome …    other editors of the same decoder, those that a run names (peers.py); for every prompt

What is out of scope is decoded by the base LM (protocol `rome`) or with z = 0 (protocol `released`,
as the authors' code does it).

**Verbatim lookup.** Forced are the answer's tokens and then the end of the text, by place, whatever
stands before: at place j the forced token has probability 1, and every other token, clipped,
e^−FLOOR. So of a target of n tokens, m of them not the forced ones, ℓ = m·FLOOR/n and the accuracy
is 1 − m/n; S and M follow (two targets that are forced alike tie, and a tie fails); its
continuation is the answer and nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from larimar_jax.bench.editor import LarimarEditor
from larimar_jax.bench.peers import EditedRows
from larimar_jax.editors import EditedModel

LABELS = {
    "base": "base LM",
    "zero": "z = 0",
    "prompt": "fact in the prompt",
    "lookup": "nearest neighbour",
    "verbatim": "verbatim lookup",
    "larimar": "Larimar with scope",
    "open": "Larimar without scope",
}
SYSTEMS = tuple(LABELS)
CONTROLS = SYSTEMS[:5]
# Systems of a memory that many facts share, and those whose queries the scope detector decides about.
SHARED = (*CONTROLS, "larimar")
SCOPED = ("lookup", "verbatim", "larimar")
MEMORIES = ("larimar", "open")
# What a memory has to be worth more than, as a note names it.
LOOKUPS = {"lookup": "the lookup", "verbatim": "verbatim lookup"}
# −ln p of a token that is not the forced one, in nats: finite, and far beyond what a decoder gives.
FLOOR = 100.0

# (prompts, their targets, the condition or None for the base LM) → n values, an array [n, …].
Measure = Callable[[Sequence[str], Sequence[Any], Any], np.ndarray]
# What the base LM and z = 0 made of texts and their targets.
Memo = dict[str, dict[tuple[str, Any], Any]]


@dataclasses.dataclass(frozen=True)
class Queries:
    """R prompts, and what each system is given of them.

    columns: of each query's rows, its "prompt" among them. facts: the right fact of each, as a
    text; None where there is none. nearest: the (prompt, answer) that is nearest to each in the
    memory; None where it is empty. scope_score, in_scope: [R], or [R, c] where c candidates are
    decided apart. condition: positions [n] → what the memory hands to the decoder. outside: the
    system that decodes what is out of scope. peers: by other editor, the model that decodes each.
    """

    editor: LarimarEditor
    columns: Sequence[Mapping[str, Any]]
    facts: Sequence[str | None]
    nearest: Sequence[tuple[str, str] | None]
    scope_score: np.ndarray
    in_scope: np.ndarray
    condition: Callable[[np.ndarray], Any]
    outside: Literal["base", "zero"] = "base"
    peers: Mapping[str, Sequence[EditedModel]] = dataclasses.field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each."""
        return [column["prompt"] for column in self.columns]

    def score(self, pairs: Sequence[Sequence[str]], *options: Any) -> dict[str, np.ndarray]:
        """Return ℓ of c candidates a prompt by system, in nats [R, c]. options: as of `measure`."""

        def forced(answer: list[int], candidates: Sequence[str]) -> list[float]:
            hits = (_agreement(answer, self.editor.tokens(text)) for text in candidates)
            return [FLOOR * (1.0 - float(np.mean(row))) for row in hits]

        return self.measure(self.editor.score, pairs, forced, *options)

    def accuracy(
        self, targets: Sequence[str], *options: Any, places: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Return the share of each target's tokens that are the likeliest, teacher-forced, by
        system [R]; where `places` are given, of the token at one place of each target."""
        keys = list(zip(targets, places or [None] * len(targets), strict=True))

        def share(hits: np.ndarray, place: int | None) -> float:
            return float(np.mean(hits if place is None else hits[place]))

        def measure(prompts, keys, condition):
            hits = self.editor.hits(prompts, [text for text, _ in keys], condition)
            return np.asarray([share(row, at) for row, (_, at) in zip(hits, keys, strict=True)])

        def forced(answer: list[int], key: tuple[str, int | None]) -> float:
            return share(_agreement(answer, self.editor.tokens(key[0])), key[1])

        return self.measure(measure, keys, forced, *options)

    def generate(self, tokens: int | Sequence[int], *options: Any) -> dict[str, np.ndarray]:
        """Return greedy continuations by system, texts [R]. tokens: the most, of all or of each."""
        limits = [tokens] * len(self.prompts) if isinstance(tokens, int) else list(tokens)

        def generate(prompts, limits, condition):
            return np.asarray(self.editor.generate(prompts, condition, limits), object)

        def forced(answer: list[int], limit: int) -> str:
            return self.editor.text(answer[:limit])

        return self.measure(generate, limits, forced, *options)

    def measure(
        self,
        measure: Measure,
        targets: Sequence[Any],
        forced: Callable[[list[int], Any], Any],
        systems: Sequence[str] = SYSTEMS,
        memo: Memo | None = None,
    ) -> dict[str, np.ndarray]:
        """Return what a measure makes of every prompt and its target, by system.

        A text that several controls have, such as that of a lookup which finds the right fact, is
        measured once for each target, and all that the base LM reads in one call: it is packed
        better (scoring.py).

        Args:
            forced: (tokens of an answer, a target) → the value of verbatim lookup.
            memo: what the base LM and z = 0 made of earlier texts, shared under one measure.
        """
        memo = {} if memo is None else memo
        targets = [tuple(target) if isinstance(target, list) else target for target in targets]
        wanted, derived = set(systems), {*SCOPED} & set(systems)
        prompts = self.prompts
        decided = self.in_scope.reshape(len(prompts), -1)
        inside = decided.any(axis=1)
        near = [
            self.editor.written(*fact) if fact is not None and let else None
            for fact, let in zip(self.nearest, inside, strict=True)
        ]
        texts = {"base": prompts, "prompt": in_front(self.facts, prompts)}
        texts["lookup"] = in_front(near, prompts)
        reads = wanted | ({self.outside} if derived else set())
        sides = {name: side for name, side in texts.items() if name in reads}
        values = _once(measure, sides, targets, memo.setdefault("base", {}), lambda rows: None)
        if "zero" in reads:
            once = memo.setdefault("zero", {})
            values |= _once(measure, {"zero": prompts}, targets, once, self.editor.zero)
        # Without `open`, what is out of scope is not decoded a second time.
        everything = "open" in wanted
        rows = np.arange(len(inside)) if everything else np.flatnonzero(inside)
        if everything or "larimar" in wanted and len(rows):
            chosen, own = ([each[row] for row in rows] for each in (prompts, targets))
            through = measure(chosen, own, self.condition(rows))
            values["open"] = through if everything else values[self.outside].copy()
            values["open"][rows] = through
        if derived:
            outside = values[self.outside]
            # Of one value a prompt there is one decision; of c values, one or c.
            let = decided[:, 0] if outside.ndim == 1 else decided
            values["verbatim"] = _array(
                [
                    value if fact is None else forced(self.editor.tokens(fact[1]), target)
                    for fact, target, value in zip(self.nearest, targets, outside, strict=True)
                ]
            )
            values["larimar"] = values.get("open", outside)
            for name in derived:
                values[name] = np.where(let, values[name], outside)
        for name, models in self.peers.items():
            values[name] = measure(prompts, targets, EditedRows(models))
        return {name: values[name] for name in (*systems, *self.peers)}

    def rows(
        self,
        values: Mapping[str, np.ndarray],
        metrics: Callable[[Mapping[str, Any], Any], Mapping[str, Any]],
        of_memory: Sequence[Mapping[str, Any]] = (),
    ) -> Iterator[dict[str, Any]]:
        """Yield a row for each query and system: its columns, and what `metrics` makes of them and
        of the system's value; under `larimar` the scope decision, the mean over its candidates.

        Args:
            of_memory: more columns of each query, for the rows of memories.
        """
        for row, fixed in enumerate(self.columns):
            scope = {"scope_score": self.scope_score[row], "in_scope": self.in_scope[row]}
            for system, each in values.items():
                if system == "prompt" and self.facts[row] is None:
                    continue
                extra = dict(of_memory[row]) if of_memory and system in MEMORIES else {}
                if system == "larimar":
                    extra |= {name: float(np.mean(value)) for name, value in scope.items()}
                yield {**fixed, "system": system, **metrics(fixed, each[row]), **extra}

    def take(self, rows: np.ndarray) -> "Queries":
        """Return the chosen queries, in the order of `rows`; a query may be taken several times."""
        return dataclasses.replace(
            self,
            columns=[self.columns[row] for row in rows],
            facts=[self.facts[row] for row in rows],
            nearest=[self.nearest[row] for row in rows],
            scope_score=self.scope_score[rows],
            in_scope=self.in_scope[rows],
            condition=lambda chosen: self.condition(rows[chosen]),
            peers={name: [each[row] for row in rows] for name, each in self.peers.items()},
        )


def in_front(facts: Sequence[str | None], prompts: Sequence[str]) -> list[str]:
    """Return each prompt with its fact as a sentence in front of it; None leaves the prompt as it
    is."""
    return [
        prompt if fact is None else f"{fact.rstrip('.')}. {prompt}"
        for fact, prompt in zip(facts, prompts, strict=True)
    ]


def _once(
    measure: Measure,
    sides: Mapping[str, Sequence[str]],
    targets: Sequence[Any],
    memo: dict[tuple[str, Any], Any],
    condition: Callable[[int], Any],
) -> dict[str, np.ndarray]:
    """Measure each text once for each of its targets, all in one call, and return the values of
    every side."""
    rows = {name: list(zip(side, targets, strict=True)) for name, side in sides.items()}
    unique = dict.fromkeys(key for keys in rows.values() for key in keys)
    fresh = [key for key in unique if key not in memo]
    if fresh:
        texts, wanted = [text for text, _ in fresh], [target for _, target in fresh]
        memo |= zip(fresh, measure(texts, wanted, condition(len(fresh))), strict=True)
    return {name: _array([memo[key] for key in keys]) for name, keys in rows.items()}


def _array(values: Sequence[Any]) -> np.ndarray:
    return np.asarray(values, object if values and isinstance(values[0], str) else None)


def _agreement(answer: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """Whether each of a target's tokens is that of the answer at the same place."""
    return np.asarray([answer[n : n + 1] == target[n : n + 1] for n in range(len(target))])
