"""The edited model of a run: queries of memories of single facts, and of memories of many."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Key

from larimar_jax.bench import peers as peer_editors
from larimar_jax.bench.editor import LarimarEditor, Recall
from larimar_jax.bench.fact_store import FactStore
from larimar_jax.bench.peers import Peers
from larimar_jax.bench.queries import Queries
from larimar_jax.editors import EditedModel
from larimar_jax.pipeline import Pipeline, load

Mode = Literal["rome", "released"]
MODE = (
    "rome: the scope decision sees the prompt only, and what is out of scope is decoded by the "
    "untouched LM; released: "
    "as the authors' code does it, with the prompt and each candidate, and z = 0 out of scope"
)


class Systems:
    """The edited model of a run, under every system."""

    def __init__(self, editor: LarimarEditor | Pipeline, peers: Peers | None = None):
        self.peers = peers
        self.editor = LarimarEditor(editor) if isinstance(editor, Pipeline) else editor
        self._cache: dict[str, tuple[Any, Any]] = {}

    @property
    def model(self) -> Pipeline:
        """Larimar itself, for benchmarks of more than an editor does."""
        return self.editor.model

    def single_edits(
        self,
        facts: Sequence[tuple[str, str]],
        queries: Sequence[Sequence[Mapping[str, Any]]],
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
            facts: (prompt, answer) of each case. queries: columns of each case's queries.
            mode: what decodes out of scope: the base LM (rome), or z = 0 (released).
            asking: what the memory is asked, where that is not the query itself. scoped: of each
                query in one row, the c texts that the scope detector compares with the written fact
                (§6), each of them decided apart.
            wordings: of each case, in which its fact is written too. The controls are given its
                prompt's.
            options: of the editor's `recall`.
        """
        columns = [column for row in queries for column in row]
        prompts = [[column["prompt"] for column in row] for row in queries]
        owners = [fact for fact, row in zip(facts, queries, strict=True) for _ in row]
        if scoped is None:
            recall = self.editor.recall(facts, prompts, wordings, **options)
            rows = np.arange(len(columns))
            score, inside = recall.scope_score, recall.in_scope
        else:
            recall, rows, places = self._scoped(facts, asking or prompts, scoped, wordings)
            score, inside = recall.scope_score[places], recall.in_scope[places]
        return Queries(
            self.editor,
            columns,
            [self.editor.written(*fact) for fact in owners],
            owners,
            score,
            inside,
            lambda chosen: recall.condition(rows[chosen]),
            "base" if mode == "rome" else "zero",
            self._each(facts, [len(row) for row in queries]),
        )

    def _each(self, facts, counts: Sequence[int]) -> dict[str, list[EditedModel]]:
        """By peer, the model with each fact alone, as often as the fact has queries."""
        edited = {} if self.peers is None else self.peers.each(facts)
        return {
            name: [model for model, count in zip(models, counts, strict=True) for _ in range(count)]
            for name, models in edited.items()
        }

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
        return recall, np.asarray(rows, np.int64), np.asarray([*map(list, columns)], np.int64)

    def shared_memories(
        self,
        parts: Sequence[tuple[FactStore, Sequence[Mapping[str, Any]], Sequence[str | None]]],
        *,
        scoped: bool = True,
        in_turn: bool = False,
    ) -> Queries:
        """Return the queries of memories of many facts, all in one row.

        Args:
            parts: memories, each with the columns of its queries and the right fact of each, as a
                text.
            scoped: whether the scope detector decides; without, all is let through.
            in_turn: whether other editors edit the facts in one by one, or together.
        """
        reads = [store.read([c["prompt"] for c in columns]) for store, columns, _ in parts]
        latents = np.concatenate([latent for latent, _ in reads])
        matches = [match for _, match in reads]
        inside = [match.within(self.model.scope_threshold) for match in matches]
        return Queries(
            self.editor,
            [column for _, columns, _ in parts for column in columns],
            [fact for _, _, facts in parts for fact in facts],
            [
                store.facts[number] if number >= 0 else None
                for (store, _, _), match in zip(parts, matches, strict=True)
                for number in match.key
            ],
            np.concatenate([match.score for match in matches]),
            np.concatenate(inside) if scoped else np.ones(len(latents), bool),
            lambda rows: self.model.condition(latents[rows]),
            peers=self._after(parts, in_turn),
        )

    def _after(self, parts, in_turn: bool) -> dict[str, list[EditedModel]]:
        """By peer, the model of all facts of each query's memory."""
        edited: dict[str, list[EditedModel]] = {}
        for store, columns, _ in parts if self.peers is not None else ():
            for name, model in self.peers.after(store.facts, in_turn).items():
                edited.setdefault(name, []).extend([model] * len(columns))
        return edited

    def edits_of(self, fact: tuple[str, str]) -> dict[str, Callable[[], Any]]:
        """Return by peer what edits a fact into the base LM."""
        if self.peers is None:
            return {}
        base, facts = self.peers.base, self.peers.facts([fact])
        editors = self.peers.editors.items()
        return {name: functools.partial(each.each, base, facts) for name, each in editors}

    def cached(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """Return `make()`, or what it returned before under the same name and key; one value a name
        is held."""
        if name not in self._cache or self._cache[name][0] != key:
            self._cache[name] = key, make()
        return self._cache[name][1]


def of_task(task: Any, editor: LarimarEditor | Pipeline | None = None) -> Systems:
    """Return the systems of a task: of an editor or a pipeline, or of the model that the task names."""
    editor = load(task.model, task.overrides) if editor is None else editor
    model = editor if isinstance(editor, Pipeline) else getattr(editor, "model", None)
    return Systems(editor, peer_editors.of_task(task, model))


def case_keys(seed: int, case_ids: Sequence[int]) -> Key[Array, " n"]:
    """Return the key of each case, the seed's with the case's id folded in, so that what a case
    draws depends on nothing beside it."""
    ids = np.asarray([number % 2**32 for number in case_ids], np.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), ids)
