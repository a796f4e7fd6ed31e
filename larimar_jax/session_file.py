"""A session's facts, events and answers, its errors, and the file that holds it; needs no model."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from larimar_jax.weights import model_file


class EmptyFact(ValueError):
    """A fact without a prompt or without an answer."""


class UnknownFact(KeyError):
    """A fact that is not in the memory."""

    def __str__(self) -> str:
        return self.args[0]


class WrongModel(ValueError):
    """A session that was saved under another model."""


class DamagedSession(ValueError):
    """A file that is no session, or a damaged one."""


class MemoryNotFinite(FloatingPointError):
    """A write or forget that float32 could not carry out; the memory stays as it was."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is written: `prompt` and every rephrasing lead to `answer`. `id` never changes."""

    id: int
    prompt: str
    answer: str
    rephrasings: tuple[str, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt and its rephrasings."""
        return (self.prompt, *self.rephrasings)

    def __str__(self) -> str:
        return f"{self.id}: {self.prompt} {self.answer}"


@dataclasses.dataclass(frozen=True)
class Event:
    """One line of the history. milliseconds: of the memory operation alone, encoding apart; the first
    of a process and shape includes its compilation. note: the fact that a write replaced, or another
    that its prompt is hard to tell from."""

    kind: str
    fact: Fact
    at: str
    milliseconds: float
    note: str = ""

    def __str__(self) -> str:
        note = f"  [{self.note}]" if self.note else ""
        return f"{self.at}  {self.kind:7}  {self.fact}  ({self.milliseconds:.1f} ms){note}"


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """A fact that was taken out, with its certificate (memory/diagnostics.py). distance: of the memory
    to one that never saw the fact, relative. leverage: the share of the fact's key that other facts
    explain: near 1 where a near-duplicate is still in, and may still be answered."""

    fact: Fact
    distance: float
    leverage: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """text: the continuation. fact: id of the fact the query is about, None out of scope. score: the
    scope detector's cosine. milliseconds: encode, read and decode, each for the whole call."""

    text: str
    in_scope: bool
    fact: int | None
    score: float
    milliseconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class FactRows:
    """The rows of a fact, so that it can be forgotten by exactly what was written."""

    embedding: Float[np.ndarray, "n H"]
    key: Float[np.ndarray, "n C"]
    value: Float[np.ndarray, "n C"]


@dataclasses.dataclass(frozen=True)
class Ledger:
    """A session but for its memory's arrays, under the model that it belongs to.

    facts, rows: of what is in memory, by id, in the order of writing. history: every write and forget.
    """

    model: str
    fingerprint: str
    next_id: int = 1
    facts: dict[int, Fact] = dataclasses.field(default_factory=dict)
    history: tuple[Event, ...] = ()
    rows: dict[int, FactRows] = dataclasses.field(default_factory=dict)

    def with_fact(self, fact: Fact, rows: FactRows, milliseconds: float, note: str) -> "Ledger":
        """Return the ledger after a write."""
        return dataclasses.replace(
            self,
            next_id=fact.id + 1,
            facts={**self.facts, fact.id: fact},
            history=(*self.history, Event("write", fact, _now(), milliseconds, note)),
            rows={**self.rows, fact.id: rows},
        )

    def without(self, fact: Fact, milliseconds: float) -> "Ledger":
        """Return the ledger after a forget."""
        facts, rows = {**self.facts}, {**self.rows}
        del facts[fact.id], rows[fact.id]
        history = (*self.history, Event("forget", fact, _now(), milliseconds))
        return dataclasses.replace(self, facts=facts, history=history, rows=rows)


def save(path: str | Path, ledger: Ledger, memory: Mapping[str, np.ndarray]) -> None:
    """Write a session and its memory's arrays (memory/NAME) to one file, whole or not at all."""
    arrays = dict(memory)
    for fact_id, rows in ledger.rows.items():
        arrays |= {f"fact/{fact_id}/{name}": array for name, array in vars(rows).items()}
    meta = {name: getattr(ledger, name) for name in ("model", "fingerprint", "next_id")}
    meta["facts"] = [dataclasses.asdict(fact) for fact in ledger.facts.values()]
    meta["history"] = [dataclasses.asdict(event) for event in ledger.history]
    model_file.save_exported(path, arrays, {"kind": "session", **meta})


def load(path: str | Path) -> tuple[Ledger, dict[str, np.ndarray]]:
    """Return what `save` wrote.

    Raises:
      FileNotFoundError, DamagedSession.
    """
    try:
        arrays, meta = model_file.load_exported(path)
    except model_file.ExportError as error:
        raise DamagedSession(f"{path} is not a whole session. {error}") from error
    if meta.pop("kind", None) != "session":
        raise DamagedSession(f"{path} holds a model and not a session. Give it to --model instead.")
    facts = {fact.id: fact for fact in map(_fact, meta.pop("facts"))}
    history = tuple(Event(**{**v, "fact": _fact(v["fact"])}) for v in meta.pop("history"))
    fields = [field.name for field in dataclasses.fields(FactRows)]
    names = {fact_id: [f"fact/{fact_id}/{field}" for field in fields] for fact_id in facts}
    require(path, arrays, sum(names.values(), []))
    rows = {fact_id: FactRows(*(arrays.pop(name) for name in names[fact_id])) for fact_id in facts}
    return Ledger(**meta, facts=facts, history=history, rows=rows), arrays


def require(path: str | Path, arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """Raise DamagedSession where a session lacks an array."""
    if missing := set(names) - set(arrays):
        raise DamagedSession(
            f"{path} lacks {', '.join(sorted(missing))}: another version of larimar-jax wrote it. "
            "Open it with that version, or write the facts again."
        )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _fact(values: dict[str, Any]) -> Fact:
    """Return a fact from what JSON made of it."""
    return Fact(**{**values, "rephrasings": tuple(values["rephrasings"])})
