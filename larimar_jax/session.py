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
import copy
import dataclasses
import pathlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from larimar_jax import latent_layout, scope, session_file
from larimar_jax.generate import Options
from larimar_jax.memory import diagnostics, finite, rls
from larimar_jax.memory.streaming import StreamingState
from larimar_jax.pipeline import Encodings, Pipeline, load
from larimar_jax.scope import Recalled
from larimar_jax.session_file import Answer, Event, Fact, FactRows, Forgotten, Ledger, Source
from larimar_jax.weights.journal import Journal

# Cosine of two prompts from which one is easily taken for the other, and of two that are one.
_NEAR, _SAME = 0.95, 1 - 1e-5


class Session:
    """A model, one streaming memory, and the facts that are in it; threads may share it.

    A question is read at the key of the fact that it matches, Eqs. 7–8 with α → 0 over the written keys:
    it reads that fact as it was written, and no blend with others. Keys are exact then, so that the
    memory needs no query noise, and less ridge than one that is read at questions.

    Args:
      model: a loaded `Pipeline`, or what `pipeline.load` takes: a name or a path.
      path: the session's file, opened if it is there and begun if not: `write`, `forget` and `purge`
        take in what other writers appended to it, and what they changed is there when they return.

    Raises:
      DamagedSession: the file is none of a session, or damaged.
      WrongModel: another model's encodings mean other things.
    """

    def __init__(
        self, model: Pipeline | str | pathlib.Path = "smol", path: str | pathlib.Path | None = None
    ):
        self.model = model if isinstance(model, Pipeline) else load(model)
        ridge = self.model.config.editing.session_ridge
        self._rule = dataclasses.replace(self.model.memory, ridge=ridge, query_noise=0.0)
        self._rls = self._rule, self.model.prepared
        memory = rls.init(*self._rls, self._rule.empty(self.model.prepared))
        # Both at once: who asks waits for no write.
        self._content = memory, Ledger(self.model.source, self.model.fingerprint)
        self._room: dict[int, float] = {}  # by id, how far a fact may move; empty after a forget
        self._lock = threading.RLock()
        self._file = None if path is None else Journal(path)
        if self._file is not None:
            self._file.begin(session_file.header(self._content[1]))
            self._refresh()

    @property
    def state(self) -> StreamingState:
        """The memory, solved anew."""
        return rls.to_state(*self._rls, self._content[0])

    def write(
        self, prompt: str, answer: str, rephrasings: Sequence[str] = (), source: Source = None
    ) -> Fact:
        """Write a fact (Eqs. 3–4, α = +1): keys are prompts, values prompt + answer.

        A prompt that is already written is corrected: its former fact is forgotten first. White space in
        an answer is part of it, around it is not. A prompt that is easily taken for another one is
        written with a `scope.NearDuplicate` warning. `source` stands in the history.

        Raises:
          EmptyFact, NotText, NotUnicode, TextTooLong, EncodingNotFinite, MemoryNotFinite, SaveFailed:
            nothing is written.
          NotKept: it would not be read back, or another fact no more; nothing is written.
        """
        prompts, answer = session_file.normalise(prompt, answer, rephrasings)
        keys, values = self.model.encode_fact(prompts, answer)
        rows = FactRows(keys.embedding[: len(prompts)], keys.latent, values.latent)
        with self._exclusively():
            (memory, ledger), room, note = self._content, self._room, ""
            places, _, written = ledger.prompts
            cosines = scope.cosines(rows.embedding[:1], written)[0] if places else np.zeros(0)
            nearest = int(cosines.argmax()) if places else 0
            # Many an encoder does not see capitals.
            key, words = rows.key[:1], prompts[0].casefold()
            same = (f for f in ledger.facts.values() if f.prompt.casefold() == words)
            alike = (f for f in same if scope.cosines(key, ledger.rows[f.id].key[:1]) >= _SAME)
            former = next(alike, None)
            if former is not None:
                note = f"replaces {former}"
                memory, milliseconds = self._without(memory, ledger.rows[former.id])
                ledger, room = ledger.without(former, milliseconds, source), {}
            elif places and cosines[nearest] >= _NEAR:
                likeness = f"fact {places[nearest][0]} (cosine {cosines[nearest]:.2f})"
                note = f"its prompt is hard to tell from that of {likeness}"
            begin = time.perf_counter()
            memory, moved = finite.write(*self._rls, memory, rows.key, rows.value)
            fact = Fact(ledger.next_id, prompts[0], answer, prompts[1:])
            ledger = ledger.with_fact(fact, rows, _since(begin), note, source)
            room = {i: left - moved for i, left in room.items()}
            memory, room = self._read_back(memory, ledger, room)
            if note and former is None:
                warnings.warn(scope.NearDuplicate(f"{fact}: {note}"), stacklevel=2)
            self._commit(memory, ledger, room)
        return fact

    def forget(self, fact_id: int, source: Source = None) -> Forgotten:
        """Take a fact out of the memory (Eqs. 3–4, α = −1), as if it had never been written, and
        certify it.

        Raises:
          UnknownFact: it is not there: never written, or forgotten before.
          MemoryNotFinite, SaveFailed: nothing is forgotten.
        """
        with self._exclusively():
            before, ledger = self._content
            fact, rows = ledger.find(fact_id)
            memory, milliseconds = self._without(before, rows)
            states = before.state, memory.state, rows.key[:1], memory.pending
            certificate = diagnostics.certify(*self._rls, *states)
            self._commit(memory, ledger.without(fact, milliseconds, source), {})
        return Forgotten(fact, float(certificate.distance), float(certificate.leverage))

    @contextlib.contextmanager
    def together(self) -> Iterator["Session"]:
        """Yield a copy whose writes and forgets are one change of this session at the end: all of them,
        or none after an error."""
        with self._exclusively():
            draft = copy.copy(self)
            draft._file = None
            yield draft
            self._commit(*draft._content, draft._room)

    def purge(self, fact_id: int | None = None) -> None:
        """Remove a forgotten fact's text from history and file, and that of all facts of its prompts
        that were forgotten; of every forgotten fact by default. The file is written anew.

        Raises:
          UnknownFact: it is in memory, or nowhere.
          SaveFailed: nothing is removed.
        """
        with self._exclusively():
            memory, ledger = self._content[0], self._content[1].without_trace(fact_id)
            if self._file is not None:
                session_file.rewrite(self._file, ledger)
            self._content = memory, ledger

    def health(self) -> diagnostics.Diagnostics:
        """Return what the memory knows of itself: whether it is exact, and whether it is full."""
        values = diagnostics.diagnose(*self._rls, self.state)
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

        def decode(prompts: Any, condition: Any, **options: Any) -> list[str]:
            pieces = []
            for (piece,) in self.model.stream(prompts, condition, **options):
                pieces.append(piece)
                on_text(piece)
            return ["".join(pieces)]

        return self._answers([prompt], decode, options)[0]

    def ask_all(self, prompts: Sequence[str], **options: Any) -> list[Answer]:
        """`ask` for many prompts in one batch."""
        return self._answers(prompts, self.model.generate, options) if prompts else []

    def _answers(
        self, prompts: Sequence[str], decode: Callable[..., list[str]], options: dict[str, Any]
    ) -> list[Answer]:
        facts, scores, tokens, _, times = recall = self.recall(prompts)
        limits = [max(Options.max_tokens, count + 1) for count in tokens]
        begin, condition = time.perf_counter(), recall.condition(self.model.condition)
        options = dict(max_tokens=limits, stop_after=tokens, cut=True) | options
        texts = decode(prompts, condition, **options)
        times["decode"], rows = _since(begin), zip(texts, facts, scores, strict=True)
        return [Answer(text, fact is not None, fact, score, times) for text, fact, score in rows]

    def score(
        self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> Float[np.ndarray, "n c"]:
        """Return −ln p per token of c candidate answers to each of n prompts, decoded as by `ask`."""
        condition = self.recall(prompts).condition(self.model.condition)
        return self.model.score(prompts, candidates, condition)

    def questions(self, prompts: Sequence[str]) -> list[str]:
        """Return the `scope.question` of each prompt."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of texts; ask() takes one")
        session_file.require_questions(prompts)
        own_words = scope.by_words(self._content[1].prompts[1])
        return [scope.question(text, own_words) for text in prompts]

    def recall(self, prompts: Sequence[str]) -> Recalled:
        """Return scope decision and readout of each prompt."""
        begin, questions = time.perf_counter(), self.questions(prompts)
        encodings = self.model.encode(questions, cut=True)
        return self.read(questions, encodings, encode=_since(begin))

    def read(self, questions: Sequence[str], encodings: Encodings, **times: float) -> Recalled:
        """`recall` of `questions` that are encoded already; with the milliseconds of what was before."""
        begin, model, (memory, ledger) = time.perf_counter(), self.model, self._content
        places, keys, written = ledger.prompts
        allowed = scope.comparable(model.relations, questions, keys)
        match = scope.nearest_key(encodings.embedding, written, allowed)
        inside = match.within(model.scope_threshold)
        matched = [places[k] if near else None for k, near in zip(match.key, inside, strict=True)]
        ids = [place and place[0] for place in matched]
        readout = np.zeros((len(questions), self._rule.latent), np.float32)
        if inside.any():
            keys = session_file.matched_keys(ledger.rows, matched, self._rule.latent)
            read = rls.read(*self._rls, memory, np.concatenate(keys))
            read = np.asarray(read).reshape(keys.shape)
            further = read[:, 1:, -model.layout.answer_code :].reshape(len(read), -1)
            readout = np.concatenate([read[:, 0], further], axis=1)[: len(questions)]
        times["read"] = _since(begin)
        answers = [ledger.facts[i].answer if i else "" for i in ids]
        tokens = [*map(len, map(model.decoder_tokenizer.following, answers))]
        code = model.config.editing.answer_code
        readout = latent_layout.within_answers(readout, model.layout, code, tokens)
        return Recalled(ids, [*map(float, match.score)], tokens, readout, times)

    def _read_back(
        self, memory: rls.RLSState, ledger: Ledger, room: dict[int, float]
    ) -> tuple[rls.RLSState, dict[int, float]]:
        """Return the memory if it gives back all facts, and how far they may move; else raise NotKept. A
        crowded one loses any of them: those are read that may have moved too far."""
        ids = [i for i in ledger.rows if not room.get(i, -1.0) >= 0]
        rows = session_file.join([ledger.rows[i] for i in ids])
        code = self.model.config.editing.answer_code
        parts = (code.positions, code.width) if code else (1, self._rule.latent)
        solved, left = finite.read_back(*self._rls, memory, rows.key, rows.value, parts)
        ends = np.cumsum([len(ledger.rows[i].key) for i in ids])
        least = dict(zip(ids, (float(own.min()) for own in np.split(left, ends[:-1])), strict=True))
        if not left.min() >= 0:
            fact = ledger.facts[min(ids, key=least.__getitem__)]
            raise finite.NotKept(
                f"With this fact in, the memory would not give back {str(fact)!r}; nothing is written. "
                f"It holds about {self._rule.slots} prompts, less if alike: word the prompt in another "
                "way, forget facts, or write to another session."
            )
        return solved, (room if solved is memory else {}) | least

    def _without(self, memory: rls.RLSState, rows: FactRows) -> tuple[rls.RLSState, float]:
        """Return the memory without a fact's rows, solved, and the milliseconds that forgetting took."""
        begin = time.perf_counter()
        return finite.forget(*self._rls, memory, rows.key, rows.value), _since(begin)

    def history(self) -> list[Event]:
        """Return every write and forget so far, in order."""
        return [*self._content[1].history]

    def save(self, path: str | pathlib.Path) -> None:
        """Write the session to one file, whole or not at all, in place of what was there.

        Raises:
          SaveFailed.
        """
        with self._exclusively():
            own, other = self._file, Journal(pathlib.Path(path))
            is_own = own is not None and own.path.resolve() == other.path.resolve()
            session_file.rewrite(own if is_own else other, self._content[1])

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
        return cls(model or name, path)

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Keep all others from changing the session and its file, and take in what they changed."""
        with self._lock, self._file.locked() if self._file else contextlib.nullcontext():
            if self._file:
                self._refresh()
            yield

    def _commit(self, memory: rls.RLSState, ledger: Ledger, room: dict[int, float]) -> None:
        """Number what is new in a ledger, append it to the file, and make it the session's."""
        ledger, new = ledger.numbered(len(self._content[1].history))
        if self._file is not None and new:
            session_file.append(self._file, new, ledger.rows)
        self._content, self._room = (memory, ledger), room

    def _refresh(self) -> None:
        """Take in what is new in the file."""
        (memory, before), model = self._content, self.model
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
                rows = session_file.join(new)
                content = *self._rls, memory, rows.key, rows.value
                at_once = not before.facts and len(new) > 1  # One is written as its writer did.
                memory = finite.load(*content) if at_once else finite.write(*content)[0]
        except finite.MemoryNotFinite:
            self._file = Journal(self._file.path)  # to be read anew
            raise
        self._content, self._room = (memory, dataclasses.replace(ledger, model=model.source)), {}

    # Last in the class: below it, `list` in an annotation would be this method.
    def list(self) -> list[Fact]:
        """Return the facts in memory, in the order of writing."""
        return [*self._content[1].facts.values()]


def _since(begin: float) -> float:
    """Return the milliseconds since a `time.perf_counter()`."""
    return 1e3 * (time.perf_counter() - begin)
