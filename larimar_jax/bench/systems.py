"""Larimar and its controls, side by side on the same prompts and weights.

    base      the untouched language model
    zero      z = 0: the memory slot is there and holds zeros
    prompt    the right fact in front of the prompt, whatever the scope detector decides
    lookup    the nearest written fact in front of the prompts that the scope detector lets through,
    and no matrix verbatim  the nearest written fact's answer, forced token by token on the prompts
              that it lets through: no matrix, and no decoder's say
    larimar   memory-conditioned decoding of the prompts that it lets through
    open      memory-conditioned decoding of every prompt

What is out of scope is decoded by the base LM (protocol `rome`) or with z = 0 (protocol `released`,
as the authors' code does it).

**Verbatim lookup.** Forced are the answer's tokens and then the end of the text, by place, whatever
stands before: at place j the forced token has probability 1, and every other token, clipped,
e^−FLOOR. So of a target of n tokens, m of them not the forced ones, ℓ = m·FLOOR/n and the accuracy
is 1 − m/n; S and M follow (two targets that are forced alike tie, and a tie fails); its
continuation is the answer and nothing else.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Key

from larimar_jax.bench.editor import Editor, LarimarEditor, Recall
from larimar_jax.bench.fact_store import FactStore
from larimar_jax.pipeline import Pipeline, load

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
# What a memory has to be worth more than, as a note names it.
LOOKUPS = {"lookup": "the lookup", "verbatim": "verbatim lookup"}
# −ln p of a token that is not the forced one, in nats: finite, and far beyond what a decoder gives.
FLOOR = 100.0

Mode = Literal["rome", "released"]
MODE = (
    "rome: the scope decision sees the prompt only, and what is out of scope is decoded by the "
    "untouched LM; released: "
    "as the authors' code does it, with the prompt and each candidate, and z = 0 out of scope"
)
# (prompts, their targets, the condition or None for the base LM) → n values, an array [n, …].
Measure = Callable[[Sequence[str], Sequence[Any], Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Queries:
    """R prompts, and what each system is given of them.

    facts: the right fact of each, as a text; None where there is none. nearest: the (prompt,
    answer) that is nearest to each in the memory; None where it is empty. scope_score, in_scope:
    [R], or [R, c] where c candidates are decided apart. condition: positions [n] → what the memory
    hands to the decoder. outside: the system that decodes what is out of scope.
    """

    editor: Editor
    prompts: Sequence[str]
    facts: Sequence[str | None]
    nearest: Sequence[tuple[str, str] | None]
    scope_score: np.ndarray
    in_scope: np.ndarray
    condition: Callable[[np.ndarray], Any]
    outside: Literal["base", "zero"] = "base"

    def score(
        self, pairs: Sequence[Sequence[str]], systems=SYSTEMS, memo=None
    ) -> dict[str, np.ndarray]:
        """Return ℓ of c candidates a prompt by system, in nats [R, c]."""

        def forced(answer: list[int], candidates: Sequence[str]) -> list[float]:
            return [
                FLOOR * (1.0 - _agreement(answer, self.editor.tokens(text))) for text in candidates
            ]

        return self.measure(self.editor.score, pairs, forced, systems, memo)

    def accuracy(self, targets: Sequence[str], systems=SYSTEMS, memo=None) -> dict[str, np.ndarray]:
        """Return the share of each target's tokens that are the likeliest, by system [R]."""

        def forced(answer: list[int], target: str) -> float:
            return _agreement(answer, self.editor.tokens(target))

        return self.measure(self.editor.accuracy, targets, forced, systems, memo)

    def hits(
        self, targets: Sequence[str], places: Sequence[int], systems=SYSTEMS
    ) -> dict[str, np.ndarray]:
        """Return whether the token at a place of each target is the likeliest, by system [R]."""

        def forced(answer: list[int], target: tuple[str, int]) -> float:
            text, place = target
            return float(self.editor.tokens(text)[place : place + 1] == answer[place : place + 1])

        def hits(prompts, targets, condition):
            texts, places = zip(*targets, strict=True)
            return self.editor.hits(prompts, texts, places, condition)

        return self.measure(hits, list(zip(targets, places, strict=True)), forced, systems)

    def generate(
        self, tokens: int | Sequence[int], systems=SYSTEMS, memo=None
    ) -> dict[str, np.ndarray]:
        """Return greedy continuations by system, an array of texts [R]. tokens: the most, of all or
        of each."""
        limits = [tokens] * len(self.prompts) if isinstance(tokens, int) else list(tokens)

        def generate(prompts, limits, condition):
            return np.asarray(self.editor.generate(prompts, condition, limits), object)

        def forced(answer: list[int], limit: int) -> str:
            return self.editor.text(answer[:limit])

        return self.measure(generate, limits, forced, systems, memo)

    def measure(
        self,
        measure: Measure,
        targets: Sequence[Any],
        forced: Callable[[list[int], Any], Any],
        systems: Sequence[str] = SYSTEMS,
        memo: dict[str, dict] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return what a measure makes of every prompt and its target, by system.

        A text that several controls have, such as that of a lookup which finds the right fact, is
        measured once for
        each target, and all that the base LM reads in one call: it is packed better (scoring.py).

        Args:
            forced: (tokens of an answer, a target) → the value of verbatim lookup.
            memo: what the base LM and z = 0 made of earlier texts, to be shared by Queries under
                one measure.
        """
        memo = {} if memo is None else memo
        targets = [tuple(target) if isinstance(target, list) else target for target in targets]
        wanted, derived = set(systems), {"lookup", "verbatim", "larimar"} & set(systems)
        inside = self.in_scope.reshape(len(self.prompts), -1).any(axis=1)
        near = [
            self.editor.written(*fact) if fact is not None and let else None
            for fact, let in zip(self.nearest, inside, strict=True)
        ]
        texts = {"base": self.prompts, "prompt": in_front(self.facts, self.prompts)}
        texts["lookup"] = in_front(near, self.prompts)
        reads = wanted | ({self.outside} if derived else set())
        sides = {name: side for name, side in texts.items() if name in reads}
        values = _once(measure, sides, targets, memo.setdefault("base", {}), lambda rows: None)
        if "zero" in reads:
            once = memo.setdefault("zero", {})
            values |= _once(measure, {"zero": self.prompts}, targets, once, self.editor.zero)
        if "open" in wanted or self.in_scope.ndim > 1 and "larimar" in wanted:
            rows = np.arange(len(self.prompts))
            values["open"] = measure(self.prompts, targets, self.condition(rows))
        if not derived:
            return {name: values[name] for name in systems}
        outside = values[self.outside]
        # Of one value a prompt there is one decision; of c values, one or c.
        decided = self.in_scope.reshape(len(self.prompts), -1)
        let = decided[:, 0] if outside.ndim == 1 else decided
        if "lookup" in wanted:
            values["lookup"] = np.where(let, values["lookup"], outside)
        if "verbatim" in wanted:
            answers = [
                None if fact is None else self.editor.tokens(fact[1]) for fact in self.nearest
            ]
            rows = zip(answers, targets, outside, strict=True)
            forced_values = [
                value if answer is None else forced(answer, target)
                for answer, target, value in rows
            ]
            values["verbatim"] = np.where(let, np.asarray(forced_values, outside.dtype), outside)
        if "larimar" in wanted:
            if "open" in values:
                through = values["open"]
            else:  # What is out of scope is not decoded a second time.
                through, rows = outside.copy(), np.flatnonzero(inside)
                if len(rows):
                    prompts, inner = (
                        [each[row] for row in rows] for each in (self.prompts, targets)
                    )
                    through[rows] = measure(prompts, inner, self.condition(rows))
            values["larimar"] = np.where(let, through, outside)
        return {name: values[name] for name in systems}

    def take(self, rows: np.ndarray) -> "Queries":
        """Return the chosen queries, in the order of `rows`; a query may be taken several times."""
        return dataclasses.replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            facts=[self.facts[row] for row in rows],
            nearest=[self.nearest[row] for row in rows],
            scope_score=self.scope_score[rows],
            in_scope=self.in_scope[rows],
            condition=lambda chosen: self.condition(rows[chosen]),
        )

    def scope(self, row: int) -> dict[str, float]:
        """Return columns of the scope decision of a prompt; the means over its candidates."""
        decided = {"scope_score": self.scope_score[row], "in_scope": self.in_scope[row]}
        return {name: float(np.mean(value)) for name, value in decided.items()}


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
    fresh = [
        key
        for key in dict.fromkeys(key for keys in rows.values() for key in keys)
        if key not in memo
    ]
    if fresh:
        texts, wanted = [text for text, _ in fresh], [target for _, target in fresh]
        memo |= zip(fresh, measure(texts, wanted, condition(len(fresh))), strict=True)
    return {name: _array([memo[key] for key in keys]) for name, keys in rows.items()}


def _array(values: Sequence[Any]) -> np.ndarray:
    return np.asarray(values, object if values and isinstance(values[0], str) else None)


def _agreement(answer: Sequence[int], target: Sequence[int]) -> float:
    """The share of a target's tokens that are those of the answer at the same places."""
    return float(np.mean([answer[n : n + 1] == target[n : n + 1] for n in range(len(target))]))


class Systems:
    """The edited model of a run, under every system."""

    def __init__(self, editor: Editor | Pipeline):
        self.editor: Any = LarimarEditor(editor) if isinstance(editor, Pipeline) else editor
        self._cache: dict[str, tuple[Any, Any]] = {}

    @property
    def model(self) -> Pipeline:
        """Larimar itself, for benchmarks of more than an editor does."""
        return self.editor.model

    def single_edits(
        self,
        facts: Sequence[tuple[str, str]],
        queries: Sequence[Sequence[str]],
        *,
        mode: Mode = "rome",
        asking: Sequence[Sequence[str]] | None = None,
        scoped: Sequence[Sequence[str]] | None = None,
        wordings: Sequence[Sequence[str]] = (),
        **options: Any,
    ) -> Queries:
        """Write each case's fact into a memory of its own, and return the queries of all cases in
        one row.

        Args:
            facts: (prompt, answer) of each case. queries: prompts of each case.
            mode: what decodes out of scope: the base LM (rome), or z = 0 (released).
            asking: what the memory is asked, where that is not the query itself. scoped: of each
                query in one row, the c texts that the scope detector compares with the written fact
                (§6), each of them decided apart.
            wordings: of each case, in which its fact is written too. The controls are given its
                prompt's.
            options: of the editor's `recall`.
        """
        prompts = [prompt for row in queries for prompt in row]
        owners = [fact for fact, row in zip(facts, queries, strict=True) for _ in row]
        if scoped is None:
            recall = self.editor.recall(facts, queries, wordings, **options)
            rows = np.arange(len(prompts))
            score, inside = recall.scope_score, recall.in_scope
        else:
            recall, rows, columns = self._scoped(facts, asking or queries, scoped, wordings)
            score, inside = recall.scope_score[columns], recall.in_scope[columns]
        return Queries(
            self.editor,
            prompts,
            [self.editor.written(*fact) for fact in owners],
            owners,
            score,
            inside,
            lambda chosen: recall.condition(rows[chosen]),
            "base" if mode == "rome" else "zero",
        )

    def _scoped(self, facts, asking, scoped, wordings) -> tuple[Recall, np.ndarray, np.ndarray]:
        """Recall with, behind what the memory of each case is asked, what the scope detector sees
        of it; the rows of the first, and of the second [R, c]."""
        texts, rows, columns, query, place = [], [], [], 0, 0
        for row in asking:
            candidates = scoped[query : query + len(row)]
            query += len(row)
            texts.append([*row, *(text for pair in candidates for text in pair)])
            rows += range(place, place + len(row))
            place += len(row)
            for pair in candidates:
                columns.append(range(place, place + len(pair)))
                place += len(pair)
        recall = self.editor.recall(facts, texts, wordings, by_text=True)
        return (
            recall,
            np.asarray(rows, np.int64),
            np.asarray([list(pair) for pair in columns], np.int64),
        )

    def shared_memory(
        self,
        store: FactStore,
        prompts: Sequence[str],
        facts: Sequence[str | None],
        *,
        scoped: bool = True,
    ) -> Queries:
        """Return queries of one memory of many facts.

        Args:
            facts: the right one of each prompt, as a text.
            scoped: whether the scope detector decides; without, all is let through.
        """
        return self.shared_memories([(store, prompts, facts)], scoped=scoped)

    def shared_memories(
        self,
        parts: Sequence[tuple[FactStore, Sequence[str], Sequence[str | None]]],
        *,
        scoped: bool = True,
    ) -> Queries:
        """Return the queries of several memories in one row; each part is as in `shared_memory`."""
        reads = [store.read(prompts) for store, prompts, _ in parts]
        latents = np.concatenate([latent for latent, _ in reads])
        matches = [match for _, match in reads]
        inside = [match.within(self.model.scope_threshold) for match in matches]
        return Queries(
            self.editor,
            [prompt for _, prompts, _ in parts for prompt in prompts],
            [fact for _, _, facts in parts for fact in facts],
            [
                store.facts[number] if number >= 0 else None
                for (store, _, _), match in zip(parts, matches, strict=True)
                for number in match.key
            ],
            np.concatenate([match.score for match in matches]),
            np.concatenate(inside) if scoped else np.ones(len(latents), bool),
            lambda rows: self.model.condition(latents[rows]),
        )

    def cached(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """Return `make()`, or what it returned before under the same name and key; one value a name
        is held."""
        if name not in self._cache or self._cache[name][0] != key:
            self._cache[name] = key, make()
        return self._cache[name][1]


def of_task(task: Any) -> Systems:
    """Return the systems of the model that a task names."""
    return Systems(load(task.model, task.overrides))


def case_keys(seed: int, case_ids: Sequence[int]) -> Key[Array, " n"]:
    """Return the key of each case, the seed's with the case's id folded in, so that what a case
    draws depends on nothing beside it."""
    ids = np.asarray([number % 2**32 for number in case_ids], np.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), ids)
