"""A session's facts, events and answers, its errors, and the file that holds it; needs no model."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import numpy as np

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


def event(kind: str, fact: Fact, milliseconds: float, note: str = "") -> Event:
    """Return an event of now."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Event(kind, fact, now, milliseconds, note)


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
class Saved:
    """A session as its file holds it. arrays: the rows of each fact as fact/ID/NAME, and the memory's
    leaves as memory/NAME."""

    model: str
    fingerprint: str
    next_id: int
    facts: list[Fact]
    history: list[Event]
    arrays: dict[str, np.ndarray]


def save(path: str | Path, saved: Saved) -> None:
    """Write a session to one file, whole or not at all."""
    meta = {f.name: getattr(saved, f.name) for f in dataclasses.fields(saved) if f.name != "arrays"}
    for name in ("facts", "history"):
        meta[name] = [dataclasses.asdict(item) for item in meta[name]]
    model_file.save_exported(path, saved.arrays, {"kind": "session", **meta})


def load(path: str | Path) -> Saved:
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
    meta["facts"] = [_fact(values) for values in meta["facts"]]
    meta["history"] = [
        Event(**{**values, "fact": _fact(values["fact"])}) for values in meta["history"]
    ]
    return Saved(**meta, arrays=arrays)


def _fact(values: dict[str, Any]) -> Fact:
    """Return a fact from what JSON made of it."""
    return Fact(**{**values, "rephrasings": tuple(values["rephrasings"])})
