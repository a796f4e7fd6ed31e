"""A session's facts, events and answers, its errors, and what its file holds; needs no model.

The file is a journal (weights/journal.py): a line for each call that changed the session, with the rows
of what it wrote. A memory is replayed from the rows of the facts that are in, and nothing is encoded
again.
"""

import dataclasses
import datetime
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from larimar_jax.weights import journal
from larimar_jax.weights.journal import DamagedSession as DamagedSession
from larimar_jax.weights.journal import Journal
from larimar_jax.weights.journal import SaveFailed as SaveFailed

Source = Mapping[str, str] | None


class EmptyFact(ValueError):
    """A fact without a prompt or without an answer."""


class NotText(TypeError):
    """A prompt or an answer that is no text, such as a number."""


class NotUnicode(ValueError):
    """A text of bytes that are not UTF-8."""


class UnknownFact(KeyError):
    """A fact that is not in the memory."""

    def __str__(self) -> str:
        return self.args[0]


class WrongModel(ValueError):
    """A session that was saved under another model."""


def require_model(path: Path, ledger: "Ledger", source: str, fingerprint: str) -> None:
    """Raise WrongModel where the ledger of a file is not of the model with this fingerprint."""
    if fingerprint != ledger.fingerprint:
        raise WrongModel(
            f"{path} was saved under {ledger.model!r}, fingerprint {ledger.fingerprint[:12]}; the "
            f"model here is {source!r}, {fingerprint[:12]}. What one model wrote another can not "
            "read: load that model, or write the facts again."
        )


def require_text(name: str, text: Any) -> None:
    """Raise NotText or NotUnicode where `text` is none that can be encoded."""
    if not isinstance(text, str):
        kind = type(text).__name__
        raise NotText(f"{name} is the {kind} {text!r} and has to be a text: give {str(text)!r}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotUnicode(
            f"{name} {text!r} holds bytes that are not UTF-8. Convert it, as with `iconv -f latin1 "
            "-t utf-8`, or set the terminal to UTF-8."
        ) from error


def require_questions(prompts: Any) -> None:
    """Raise NotText, NotUnicode or EmptyFact where one of several prompts is none to continue."""
    for prompt in prompts:
        require_text("prompt", prompt)
    if not all(prompt.strip() for prompt in prompts):
        raise EmptyFact("A question needs text to continue; a prompt is empty.")


def normalise(prompt: Any, answer: Any, rephrasings: Any) -> tuple[tuple[str, ...], str]:
    """Return a fact's prompt and rephrasings, and its answer, as they are written.

    Raises:
      EmptyFact, NotText, NotUnicode.
    """
    if isinstance(rephrasings, str) or not isinstance(rephrasings, Sequence):
        raise NotText("rephrasings is a list of texts, not one text.")
    require_text("prompt", prompt)
    require_text("answer", answer)
    for text in rephrasings:
        require_text("a rephrasing", text)
    prompts = tuple(" ".join(text.split()) for text in (prompt, *rephrasings))
    answer = answer.strip()
    if not all(prompts) or not answer:
        raise EmptyFact(
            f"A fact needs a prompt and an answer; got prompts {list(prompts)} and answer "
            f"{answer!r}. Give both, such as 'The capital of France is' and 'Lyon'."
        )
    return prompts, answer


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
    that its prompt is hard to tell from. source: who did it, from where; any fields. change: the number
    of the call that it is of; a correction is a forget and a write."""

    kind: str
    fact: Fact
    at: str
    milliseconds: float
    note: str = ""
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    change: int = 0

    def __str__(self) -> str:
        note = f"  [{self.note}]" if self.note else ""
        note += "".join(f"  {name}={text}" for name, text in self.source.items())
        head = f"{self.change:4}  {self.at}  {self.kind:7}"
        return f"{head}  {self.fact}  ({self.milliseconds:.1f} ms){note}"


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
    """The rows of a fact, so that it can be forgotten by exactly what was written.

    embedding: of its n prompts. key, value: of the prompts for each part of the answer in turn.
    """

    embedding: Float[np.ndarray, "n E"]
    key: Float[np.ndarray, "m C"]
    value: Float[np.ndarray, "m C"]


def matched_keys(
    rows: Mapping[int, FactRows], matched: Sequence[tuple[int, int] | None], width: int
) -> Float[np.ndarray, "rows parts C"]:
    """Return the keys that questions are read at, by fact and place of the prompts they match; zeros
    for None, behind the parts of an answer, and in rows behind the last question."""
    keys = [rows[i].key[n :: len(rows[i].embedding)] for i, n in filter(None, matched)]
    # Powers of two, so that few shapes are compiled for.
    parts = 1 << (max(map(len, keys), default=1) - 1).bit_length()
    padded = np.zeros((1 << (len(matched) - 1).bit_length(), parts, width), np.float32)
    for row, own in zip(np.flatnonzero([m is not None for m in matched]), keys, strict=True):
        padded[row, : len(own)] = own
    return padded


def join(rows: Sequence[FactRows]) -> FactRows:
    """Return the rows of several facts as of a single one."""
    return FactRows(*map(np.concatenate, zip(*(vars(r).values() for r in rows), strict=True)))


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

    @functools.cached_property
    def prompts(self) -> tuple[list[tuple[int, int]], list[str], Float[np.ndarray, "N E"]]:
        """Of all written prompts the ids of their facts and their places there, texts and embeddings."""
        texts = {(i, n): text for i, f in self.facts.items() for n, text in enumerate(f.prompts)}
        embeddings = [self.rows[i].embedding for i in self.facts] or [np.zeros((0, 0), np.float32)]
        return [*texts], [*texts.values()], np.concatenate(embeddings)

    def with_fact(
        self, fact: Fact, rows: FactRows, milliseconds: float, note: str, source: Source = None
    ) -> "Ledger":
        """Return the ledger after a write."""
        event = Event("write", fact, _now(), milliseconds, note, dict(source or {}))
        return self.after([(event, rows)])

    def without(self, fact: Fact, milliseconds: float, source: Source = None) -> "Ledger":
        """Return the ledger after a forget."""
        event = Event("forget", fact, _now(), milliseconds, "", dict(source or {}))
        return self.after([(event, None)])

    def after(self, records: Iterable[tuple[Event, FactRows | None]]) -> "Ledger":
        """Return the ledger after writes, with the rows that they wrote, and forgets."""
        next_id, history = self.next_id, [*self.history]
        facts, all_rows = {**self.facts}, {**self.rows}
        for event, rows in records:
            fact = event.fact
            history.append(event)
            facts.pop(fact.id, None)
            all_rows.pop(fact.id, None)
            if event.kind == "write" and rows is not None:
                facts[fact.id], all_rows[fact.id] = fact, rows
            next_id = max(next_id, fact.id + 1)
        parts = dict(next_id=next_id, facts=facts, history=tuple(history), rows=all_rows)
        return dataclasses.replace(self, **parts)

    def numbered(self, count: int) -> tuple["Ledger", tuple[Event, ...]]:
        """Return the ledger with one number for all events behind the first `count`, and these."""
        known = self.history[:count]
        change = known[-1].change + 1 if known else 1
        new = tuple(dataclasses.replace(event, change=change) for event in self.history[count:])
        return dataclasses.replace(self, history=known + new), new

    def find(self, fact_id: int) -> tuple[Fact, FactRows]:
        """Return a fact in memory and its rows.

        Raises:
          UnknownFact: it is not there: never written, or forgotten before.
        """
        if fact_id not in self.facts:
            forgotten = any(past.fact.id == fact_id for past in self.history)
            known = ", ".join(map(str, self.facts)) or "none"
            raise UnknownFact(
                f"There is no fact {fact_id} to forget: it was "
                f"{'forgotten before' if forgotten else 'never written'}. Facts in memory: {known}."
            )
        return self.facts[fact_id], self.rows[fact_id]

    def without_trace(self, fact_id: int | None) -> "Ledger":
        """Return the ledger without the history of a forgotten fact and of all forgotten facts of the
        same prompts; of every forgotten fact for None. Notes that hold a text of theirs are dropped.

        Raises:
          UnknownFact: it is in memory, or nowhere.
        """
        past = {event.fact for event in self.history} - {*self.facts.values()}
        if fact_id is not None:
            prompts = {p for fact in past if fact.id == fact_id for p in fact.prompts}
            if not prompts:
                why = "in memory: forget it first" if fact_id in self.facts else "in no history"
                raise UnknownFact(f"There is no fact {fact_id} to purge: it is {why}.")
            past = {fact for fact in past if prompts & {*fact.prompts}}
        texts = [text for fact in past for text in (*fact.prompts, fact.answer)]
        history = tuple(
            dataclasses.replace(event, note="") if any(t in event.note for t in texts) else event
            for event in self.history
            if event.fact not in past
        )
        return dataclasses.replace(self, history=history)


def read(file: Journal, ledger: Ledger) -> Ledger:
    """Return the ledger of a session's file: `ledger`, of the call before, with what was appended
    since, or a new one where the file was written anew.

    Raises:
      FileNotFoundError, DamagedSession.
    """
    header, lines = file.read()
    if header is not None:
        ledger = Ledger(**{name: header[name] for name in _HEADER})
    records = [_unpacked(values) for line in lines for values in line["events"]]
    return ledger.after(records) if records else ledger


def append(file: Journal, events: Sequence[Event], rows: Mapping[int, FactRows]) -> None:
    """Append one call's events to a file, with the rows of the facts that they wrote.

    Raises:
      SaveFailed: the file stays as it was.
    """
    file.append(_packed(events, rows))


def rewrite(file: Journal, ledger: Ledger) -> None:
    """Replace a file by a ledger's, whole or not at all.

    Raises:
      SaveFailed: the file stays as it was.
    """
    lines = (_packed([event], ledger.rows) for event in ledger.history)
    file.rewrite(header(ledger), lines)


def header(ledger: Ledger) -> dict[str, Any]:
    """Return what the first line of a ledger's file holds."""
    return {name: getattr(ledger, name) for name in _HEADER}


_HEADER = ("model", "fingerprint", "next_id")


def _packed(events: Sequence[Event], rows: Mapping[int, FactRows]) -> dict[str, Any]:
    packed = []
    for event in events:
        packed.append(dataclasses.asdict(event))
        if event.kind == "write" and event.fact.id in rows:
            arrays = vars(rows[event.fact.id])
            packed[-1]["rows"] = {name: journal.packed(array) for name, array in arrays.items()}
    return {"events": packed}


def _unpacked(values: dict[str, Any]) -> tuple[Event, FactRows | None]:
    fact, rows = values.pop("fact"), values.pop("rows", None)
    fact = Fact(**{**fact, "rephrasings": tuple(fact["rephrasings"])})
    if rows is not None:
        rows = FactRows(**{name: journal.unpacked(**array) for name, array in rows.items()})
    return Event(fact=fact, **values), rows


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
