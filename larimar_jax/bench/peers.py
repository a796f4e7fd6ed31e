"""Editors of other papers beside Larimar and its controls, on the decoder that Larimar edits.

Of a benchmark's task `--editors rome,grace` makes further systems of these names: same prompts, same
weights, same rows. What is decoded under one of them has `EditedRows` for its condition.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from larimar_jax import editors
from larimar_jax.editors import BaseLM, EditedModel, FactEditor, Request
from larimar_jax.packing import LanguageModel
from larimar_jax.pipeline import Pipeline

# Models of many facts that are held, the newest.
_HELD = 16


@dataclasses.dataclass(frozen=True, eq=False)
class EditedRows:
    """A condition: the edited model that decodes each of n prompts."""

    models: Sequence[EditedModel]

    def groups(self, prompts: Sequence[str]) -> Iterator[tuple[LanguageModel, list[int]]]:
        """Yield what decodes, and the rows that it decodes together."""
        of_model: dict[int, list[int]] = {}
        for row, edited in enumerate(self.models):
            of_model.setdefault(id(edited), []).append(row)
        for rows in of_model.values():
            decoders = self.models[rows[0]].models([prompts[row] for row in rows])
            together: dict[int, tuple[LanguageModel, list[int]]] = {}
            for row, decoder in zip(rows, decoders, strict=True):
                together.setdefault(id(decoder), (decoder, []))[1].append(row)
            yield from together.values()


def by_model(
    model: Pipeline,
    prompts: Sequence[str],
    condition: Any,
    decode: Callable[[Pipeline, Any, Sequence[int]], Sequence[Any]],
) -> Any:
    """Return `decode(model, condition, rows)` of all rows; under `EditedRows` that of each edited model
    without a condition, a list of the values of the rows, in order."""
    if not isinstance(condition, EditedRows):
        return decode(model, condition, range(len(prompts)))
    values: list[Any] = [None] * len(prompts)
    for decoder, rows in condition.groups(prompts):
        edited = copy.copy(model)
        edited.model = decoder
        for row, value in zip(rows, decode(edited, None, rows), strict=True):
            values[row] = value
    return values


class Peers:
    """The editors of a run, and the models that they make.

    Args:
        subjects: of prompts; a prompt that is not among them has the longest of these in it.
    """

    def __init__(
        self, model: Pipeline, chosen: Mapping[str, FactEditor], subjects: Mapping[str, str]
    ):
        self.base = BaseLM(model.model, model.decoder_tokenizer)
        self.editors, self._subjects = chosen, subjects
        self._longest_first = sorted(set(subjects.values()), key=len, reverse=True)
        self._held: dict[tuple[str, bool, tuple], EditedModel] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the numbers of each editor, the text behind its second moments among it."""
        settings = {}
        for name, editor in self.editors.items():
            moments = self.base.moments(editor.needs_moments(self.base))
            texts = {str(layer): [m.corpus, m.tokens] for layer, m in moments.items()}
            settings[name] = dataclasses.asdict(editor) | {"moments": texts}
        return settings

    def facts(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Return (prompt, answer) pairs with their subjects; "" where none is known."""
        return [Request(prompt, self._subject(prompt), answer) for prompt, answer in pairs]

    def _subject(self, prompt: str) -> str:
        within = (subject for subject in self._longest_first if subject and subject in prompt)
        return self._subjects.get(prompt) or next(within, "")

    def each(self, pairs: Sequence[tuple[str, str]]) -> dict[str, list[EditedModel]]:
        """Return by editor a model of each fact alone."""
        facts = self.facts(pairs)
        return {name: editor.each(self.base, facts) for name, editor in self.editors.items()}

    def after(self, pairs: Sequence[tuple[str, str]], in_turn: bool) -> dict[str, EditedModel]:
        """Return by editor the model of all facts, edited in one by one or together; one by one goes on
        where the last such model has the first of the facts."""
        return {name: self._after(name, tuple(pairs), in_turn) for name in self.editors}

    def _after(self, name: str, pairs: tuple, in_turn: bool) -> EditedModel:
        if (name, in_turn, pairs) in self._held:
            return self._held[name, in_turn, pairs]
        editor, done = self.editors[name], ()
        edited = editor.start(self.base)
        for held, streamed, before in list(self._held) if in_turn else ():
            if (held, streamed) == (name, True):
                model = self._held.pop((held, streamed, before))
                if pairs[: len(before)] == before:
                    done, edited = before, model
        facts = self.facts(pairs[len(done) :])
        parts = [[fact] for fact in facts] if in_turn else [facts]
        for part in filter(None, parts):
            edited = editor.apply(edited, part)
        self._held[name, in_turn, pairs] = edited
        if len(self._held) > _HELD * len(self.editors):
            del self._held[next(iter(self._held))]
        return edited


def of_task(task: Any, model: Pipeline | None) -> Peers | None:
    """Return the editors that a task names, of a model's decoder; None where it names none."""
    if not getattr(task, "editors", ""):
        return None
    chosen = editors.build(task.editors, task.editor_settings)
    return Peers(model, chosen, {record.prompt: record.subject for record in task.records})
