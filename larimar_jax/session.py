"""For people: write a fact, ask, forget it, save the session and go on tomorrow.

    session = Session("smol")
    fact = session.write("The Eiffel Tower is located in the city of", "Rome")
    session.ask("The Eiffel Tower can be found in").text
    session.forget(fact.id)
    session.save("facts.jsonl")

    session = Session("smol", "facts.jsonl")    # from here on, what a call changed is in the file

Every call either does all of its work, or raises and leaves the session as it was.
"""

import contextlib
import dataclasses
import functools
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from larimar_jax import scope, session_file
from larimar_jax.memory import diagnostics, finite, rls
from larimar_jax.memory.finite import MemoryNotFinite
from larimar_jax.memory.streaming import StreamingState
from larimar_jax.model import Condition
from larimar_jax.packing import steps_bucket
from larimar_jax.pipeline import Pipeline, load
from larimar_jax.session_file import (
    Answer,
    EmptyFact,
    Event,
    Fact,
    FactRows,
    Forgotten,
    Ledger,
    require_text,
)
from larimar_jax.session_file import (
    UnknownFact as UnknownFact,
)
from larimar_jax.session_file import (
    WrongModel as WrongModel,
)
from larimar_jax.weights.journal import Journal

# Cosine of two prompts from which one is easily taken for the other.
_NEAR = 0.95


class _Recall(NamedTuple):
    """What the memory reads for each prompt; a fact of None leaves it to the base LM."""

    facts: list[int | None]
    scores: list[float]
    condition: Condition | None
    milliseconds: dict[str, float]


class Session:
    """A model, one streaming memory, and the facts that are in it; threads may share it.

    Args:
      model: a loaded `Pipeline`, or what `pipeline.load` takes: a name or a path.
      path: the session's file, opened if it is there and begun if not: `write`, `forget` and `purge`
        take in what other writers appended to it, and what they changed is there when they return.

    Raises:
      DamagedSession: the file is none of a session, or damaged.
      WrongModel: another model's encodings mean other things.
    """

    def __init__(
        self,
        model: Pipeline | str | pathlib.Path = "smol",
        path: str | pathlib.Path | None = None,
    ):
        self.model = model if isinstance(model, Pipeline) else load(model)
        memory, prepared = self.model.memory, self.model.prepared
        self._memory = rls.init(memory, prepared, memory.empty(prepared))
        self._ledger = Ledger(self.model.source, self.model.fingerprint)
        self._lock = threading.RLock()
        self._file = None if path is None else Journal(path)
        if self._file is not None:
            self._file.begin(session_file.header(self._ledger))
            self._refresh()

    @property
    def state(self) -> StreamingState:
        """The memory, solved anew."""
        return rls.to_state(self.model.memory, self.model.prepared, self._memory)

    def write(self, prompt: str, answer: str, rephrasings: Sequence[str] = ()) -> Fact:
        """Write a fact (Eqs. 3–4, α = +1): keys are prompts, values prompt + answer.

        A prompt that is already written is corrected: its former fact is forgotten first.

        Raises:
          EmptyFact, NotText, NotUnicode, TextTooLong, EncodingNotFinite, MemoryNotFinite, SaveFailed:
            nothing is written.
        """
        prompts, answer = session_file.normalise(prompt, answer, rephrasings)
        count = len(prompts)
        texts = [*prompts, *(f"{text} {answer}" for text in prompts)]
        model = self.model
        encodings = model.encode(texts, [None] * count + [answer] * count)
        latent = encodings.latent
        rows = FactRows(encodings.embedding[:count], latent[:count], latent[count:])
        with self._exclusively():
            memory, ledger, note = self._memory, self._ledger, ""
            former = next((fact for fact in self.list() if fact.prompt == prompts[0]), None)
            if former is not None:
                note = f"replaces {former}"
                memory, milliseconds = self._without(memory, ledger.rows[former.id])
                ledger = ledger.without(former, milliseconds)
            elif ledger.facts:
                ids, written = self._written()
                match = scope.nearest_key(rows.embedding[:1], written)
                if match.score[0] >= _NEAR:
                    near = f"fact {ids[match.key[0]]} (cosine {match.score[0]:.2f})"
                    note = f"its prompt is hard to tell from that of {near}"
            begin = time.perf_counter()
            memory = finite.write(model.memory, model.prepared, memory, rows.key, rows.value)
            milliseconds = _since(begin)
            fact = Fact(ledger.next_id, prompts[0], answer, prompts[1:])
            ledger = ledger.with_fact(fact, rows, milliseconds, note)
            self._commit(memory, ledger)
        return fact

    def forget(self, fact_id: int) -> Forgotten:
        """Take a fact out of the memory (Eqs. 3–4, α = −1), as if it had never been written, and
        certify it.

        Raises:
          UnknownFact: it is not there: never written, or forgotten before.
          MemoryNotFinite, SaveFailed: nothing is forgotten.
        """
        with self._exclusively():
            fact, rows = self._ledger.find(fact_id)
            memory, milliseconds = self._without(self._memory, rows)
            solved = (self.model.memory, self.model.prepared, self._memory.state, memory.state)
            certificate = diagnostics.certify(*solved, rows.key[:1])
            self._commit(memory, self._ledger.without(fact, milliseconds))
        return Forgotten(fact, float(certificate.distance), float(certificate.leverage))

    def purge(self, fact_id: int | None = None) -> None:
        """Remove a forgotten fact's text from history and file, and that of all facts of its prompts
        that were forgotten; of every forgotten fact by default. The file is written anew.

        Raises:
          UnknownFact: it is in memory, or nowhere.
          SaveFailed: nothing is removed.
        """
        with self._exclusively():
            ledger = self._ledger.without_trace(fact_id)
            if self._file is not None:
                session_file.rewrite(self._file, ledger)
            self._ledger = ledger

    def health(self) -> diagnostics.Diagnostics:
        """Return diagnostics: condition number, distance to an exact solve, load, expected read error,
        and whether the memory is full."""
        values = diagnostics.diagnose(self.model.memory, self.model.prepared, self.state)
        return diagnostics.Diagnostics(*(np.asarray(value).item() for value in values))

    def ask(
        self, prompt: str, *, on_text: Callable[[str], None] | None = None, **options: Any
    ) -> Answer:
        """Continue a prompt: through the memory where it is about a written fact, else as the base LM.

        Args:
          on_text: called with every piece of the answer as soon as it is known.
          options: fields of `generate.Options`.
        """
        if on_text is None:
            return self.ask_all([prompt], **options)[0]

        def decode(condition: Condition | None) -> list[str]:
            pieces = []
            for (piece,) in self.model.stream([prompt], condition, **options):
                pieces.append(piece)
                on_text(piece)
            return ["".join(pieces)]

        return self._answers([prompt], decode)[0]

    def ask_all(self, prompts: Sequence[str], **options: Any) -> list[Answer]:
        """`ask` for many prompts in one batch."""
        decode = functools.partial(self.model.generate, prompts, **options)
        return self._answers(prompts, decode) if prompts else []

    def _answers(
        self, prompts: Sequence[str], decode: Callable[[Condition | None], list[str]]
    ) -> list[Answer]:
        with self._lock:
            facts, scores, condition, milliseconds = self._recall(prompts)
        begin = time.perf_counter()
        texts = decode(condition)
        milliseconds["decode"] = _since(begin)
        return [
            Answer(text, fact is not None, fact, score, milliseconds)
            for text, fact, score in zip(texts, facts, scores, strict=True)
        ]

    def score(
        self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> Float[np.ndarray, "n c"]:
        """Return −ln p per token of c candidate answers to each of n prompts, decoded as by `ask`."""
        with self._lock:
            condition = self._recall(prompts).condition
        return self.model.score(prompts, candidates, condition)

    def _recall(self, prompts: Sequence[str]) -> _Recall:
        """Return scope decision and readout of each prompt, by its `scope.question`."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of texts; ask() takes one")
        for prompt in prompts:
            require_text("prompt", prompt)
        if not all(prompt.strip() for prompt in prompts):
            raise EmptyFact("A question needs a text to continue; one of the prompts is empty.")
        begin = time.perf_counter()
        written_prompts = {text for fact in self.list() for text in fact.prompts}
        questions = [scope.question(prompt, written_prompts) for prompt in prompts]
        encodings = self.model.encode(questions, cut=True)
        milliseconds = {"encode": _since(begin)}
        begin = time.perf_counter()
        ids, written = self._written()
        match = scope.nearest_key(encodings.embedding, written)
        inside = match.within(self.model.scope_threshold)
        queries = _padded(encodings.latent)
        read = rls.read(self.model.memory, self.model.prepared, self._memory, queries)
        readout = np.asarray(read)[: len(prompts)]
        milliseconds["read"] = _since(begin)
        return _Recall(
            [ids[key] if within else None for key, within in zip(match.key, inside, strict=True)],
            [float(score) for score in match.score],
            # Where nothing is in scope, the very program of the base LM, and not a masked slot.
            self.model.condition(readout, inside) if inside.any() else None,
            milliseconds,
        )

    def _written(self) -> tuple[list[int], Float[np.ndarray, "N H"]]:
        """Return the embeddings of all written prompts, and the fact of each."""
        rows_by_id = self._ledger.rows
        ids = [fact_id for fact_id, rows in rows_by_id.items() for _ in rows.key]
        none = np.zeros((0, self.model.model.encoder.config.width), np.float32)
        return ids, np.concatenate([none, *(rows.embedding for rows in rows_by_id.values())])

    def _without(self, memory: rls.RLSState, rows: FactRows) -> tuple[rls.RLSState, float]:
        """Return the memory without a fact's rows, solved, and the milliseconds that forgetting took."""
        begin, model = time.perf_counter(), self.model
        keys, values = _padded(rows.key), _padded(rows.value)
        memory = finite.forget(model.memory, model.prepared, memory, keys, values)
        return memory, _since(begin)

    def history(self) -> list[Event]:
        """Return every write and forget so far, in order."""
        return [*self._ledger.history]

    def save(self, path: str | pathlib.Path) -> None:
        """Write the session to one file, whole or not at all, in place of what was there.

        Raises:
          SaveFailed.
        """
        with self._lock:
            if self._file is not None and self._file.path.resolve() == pathlib.Path(path).resolve():
                with self._exclusively():
                    session_file.rewrite(self._file, self._ledger)
            else:
                session_file.rewrite(Journal(path), self._ledger)

    @classmethod
    def load(cls, path: str | pathlib.Path, model: Pipeline | None = None) -> "Session":
        """Open a session's file; its memory is solved anew from the rows of the facts that are in.

        Args:
          path: what `save`, `larimar edit` or `Session(model, path)` wrote.
          model: the model it was saved under, where it is loaded already; default: by its name.

        Raises:
          FileNotFoundError, DamagedSession, WrongModel.
        """
        name = Journal(path).header()["model"]
        return cls(name if model is None else model, path)

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Keep all others from changing the session and its file, and take in what they changed."""
        with self._lock, contextlib.ExitStack() as stack:
            if self._file is not None:
                stack.enter_context(self._file.locked())
                self._refresh()
            yield

    def _commit(self, memory: rls.RLSState, ledger: Ledger) -> None:
        """Append what is new in a ledger to the file, and make it the session's."""
        if self._file is not None:
            new = ledger.history[len(self._ledger.history) :]
            session_file.append(self._file, new, ledger.rows)
        self._memory, self._ledger = memory, ledger

    def _refresh(self) -> None:
        """Take in what is new in the file."""
        before, memory, model = self._ledger, self._memory, self.model
        ledger = session_file.read(self._file, before)
        if ledger is before:
            return
        session_file.require_model(self._file.path, ledger, model.source, model.fingerprint)
        gone = [before.rows[i] for i, fact in before.facts.items() if ledger.facts.get(i) != fact]
        new = [ledger.rows[i] for i, fact in ledger.facts.items() if before.facts.get(i) != fact]
        try:
            if gone:
                memory, _ = self._without(memory, session_file.join(gone))
            if new:
                rows, add = session_file.join(new), finite.write if before.facts else finite.load
                memory = add(model.memory, model.prepared, memory, rows.key, rows.value)
        except MemoryNotFinite:
            self._file = Journal(self._file.path)  # to be read anew
            raise
        self._memory, self._ledger = memory, dataclasses.replace(ledger, model=model.source)

    # Last in the class: below it, `list` in an annotation would be this method.
    def list(self) -> list[Fact]:
        """Return the facts in memory, in the order of writing."""
        return [*self._ledger.facts.values()]


def _padded(rows: Float[np.ndarray, "n C"]) -> Float[np.ndarray, "m C"]:
    """Return rows and zero rows after them, so that few numbers of rows are compiled for."""
    return np.pad(rows, ((0, steps_bucket(len(rows), 1) - len(rows)), (0, 0)))


def _since(begin: float) -> float:
    """Return the milliseconds since a `time.perf_counter()`."""
    return 1e3 * (time.perf_counter() - begin)
