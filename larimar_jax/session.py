"""For people: write a fact, ask, forget it, save the session and go on tomorrow.

    session = Session("smol")
    fact = session.write("The Eiffel Tower is located in the city of", "Rome")
    session.ask("The Eiffel Tower can be found in").text
    session.forget(fact.id)

Every call either does all of its work, or raises and leaves the session as it was.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from larimar_jax import scope, session_file
from larimar_jax.memory import diagnostics, rls
from larimar_jax.memory.base import Prepared
from larimar_jax.memory.streaming import Streaming, StreamingState
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
    MemoryNotFinite,
    UnknownFact,
    WrongModel,
)

# Cosine of two prompts from which one is easily taken for the other.
_NEAR = 0.95


class _Recall(NamedTuple):
    """What the memory reads for each prompt; a fact of None leaves it to the base LM."""

    facts: list[int | None]
    scores: list[float]
    condition: Condition | None
    milliseconds: dict[str, float]


class Session:
    """A model, one streaming memory, and the facts that are in it.

    Args:
      model: a loaded `Pipeline`, or what `pipeline.load` takes: a name or a path.
    """

    def __init__(self, model: Pipeline | str | pathlib.Path = "smol"):
        self.model = model if isinstance(model, Pipeline) else load(model)
        memory, prepared = self.model.memory, self.model.prepared
        self._memory = rls.init(memory, prepared, memory.empty(prepared))
        self._ledger = Ledger(self.model.source, self.model.fingerprint)

    @property
    def state(self) -> StreamingState:
        """The memory, solved anew."""
        return rls.to_state(self.model.memory, self.model.prepared, self._memory)

    def write(self, prompt: str, answer: str, rephrasings: Sequence[str] = ()) -> Fact:
        """Write a fact (Eqs. 3–4, α = +1): keys are prompts, values prompt + answer.

        A prompt that is already written is corrected: its former fact is forgotten first.

        Raises:
          EmptyFact, TextTooLong, EncodingNotFinite, MemoryNotFinite: nothing is written.
        """
        if isinstance(rephrasings, str):
            raise TypeError("rephrasings is a list of texts, not one text")
        prompts = tuple(" ".join(text.split()) for text in (prompt, *rephrasings))
        answer = " ".join(answer.split())
        if not all(prompts) or not answer:
            raise EmptyFact(
                f"A fact needs a prompt and an answer; got prompts {list(prompts)} and answer "
                f"{answer!r}. Give both, such as 'The capital of France is' and 'Lyon'."
            )
        count = len(prompts)
        texts = [*prompts, *(f"{text} {answer}" for text in prompts)]
        encodings = self.model.encode(texts, [None] * count + [answer] * count)
        latent = encodings.latent
        rows = FactRows(encodings.embedding[:count], latent[:count], latent[count:])
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
        memory, milliseconds = self._with(memory, rows)
        fact = Fact(ledger.next_id, prompts[0], answer, prompts[1:])
        ledger = ledger.with_fact(fact, rows, milliseconds, note)
        self._memory, self._ledger = memory, ledger
        return fact

    def forget(self, fact_id: int) -> Forgotten:
        """Take a fact out of the memory (Eqs. 3–4, α = −1), as if it had never been written, and
        certify it.

        Raises:
          UnknownFact: it is not there: never written, or forgotten before.
          MemoryNotFinite: nothing is forgotten.
        """
        facts = self._ledger.facts
        if fact_id not in facts:
            forgotten = any(past.fact.id == fact_id for past in self._ledger.history)
            known = ", ".join(map(str, facts)) or "none"
            raise UnknownFact(
                f"There is no fact {fact_id} to forget: it was "
                f"{'forgotten before' if forgotten else 'never written'}. Facts in memory: {known}."
            )
        fact, rows = facts[fact_id], self._ledger.rows[fact_id]
        memory, milliseconds = self._without(self._memory, rows)
        solved = (self.model.memory, self.model.prepared, self._memory.state, memory.state)
        certificate = diagnostics.certify(*solved, rows.key[:1])
        forgotten = Forgotten(fact, float(certificate.distance), float(certificate.leverage))
        self._memory, self._ledger = memory, self._ledger.without(fact, milliseconds)
        return forgotten

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
        return self.model.score(prompts, candidates, self._recall(prompts).condition)

    def _recall(self, prompts: Sequence[str]) -> _Recall:
        """Return scope decision and readout of each prompt, by its `scope.question`."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of texts; ask() takes one")
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

    def _with(self, memory: rls.RLSState, rows: FactRows) -> tuple[rls.RLSState, float]:
        """Return the memory with a fact's rows, and the milliseconds that writing took."""
        begin, model = time.perf_counter(), self.model
        for key, value in zip(rows.key, rows.value, strict=True):
            # The statistics and the solution stay where they are: what moves is a few rows.
            pending, is_due, is_finite = _write(model.memory, model.prepared, memory, key, value)
            memory = dataclasses.replace(memory, pending=pending)
            if is_due:
                memory = rls.refactorize(model.memory, model.prepared, memory)
                is_finite = jnp.isfinite(memory.state.solution).all()
            if not is_finite:
                raise self._not_finite("write")
        return memory, _since(begin)

    def _without(self, memory: rls.RLSState, rows: FactRows) -> tuple[rls.RLSState, float]:
        """Return the memory without a fact's rows, solved, and the milliseconds that forgetting took."""
        begin, model = time.perf_counter(), self.model
        keys, values = _padded(rows.key), _padded(rows.value)
        after = rls.forget(model.memory, model.prepared, memory, keys, values)
        is_finite = jnp.isfinite(after.state.solution).all()
        if after.state.refused > memory.state.refused or not is_finite:
            raise self._not_finite("forget")
        return after, _since(begin)

    def _not_finite(self, action: str) -> MemoryNotFinite:
        return MemoryNotFinite(
            f"The memory could not {action} this in float32, and stays as it was. Its ridge "
            f"({float(self.model.memory.ridge):g}) is too small for what is written: load the model "
            "with a larger editing.ridge and write the facts again."
        )

    def history(self) -> list[Event]:
        """Return every write and forget so far, in order."""
        return [*self._ledger.history]

    def save(self, path: str | pathlib.Path) -> None:
        """Write the session to one file, whole or not at all."""
        session_file.save(path, self._ledger, _named(self.state))

    @classmethod
    def load(cls, path: str | pathlib.Path, model: Pipeline | None = None) -> "Session":
        """Open a saved session; its memory is the saved one bit for bit.

        Args:
          path: what `save` wrote.
          model: the model it was saved under, where it is loaded already; default: by its name.

        Raises:
          FileNotFoundError, DamagedSession.
          WrongModel: another model's encodings mean other things.
        """
        ledger, arrays = session_file.load(path)
        session = cls(load(ledger.model) if model is None else model)
        model = session.model
        if model.fingerprint != ledger.fingerprint:
            raise WrongModel(
                f"{path} was saved under {ledger.model!r}, fingerprint {ledger.fingerprint[:12]}; "
                f"the model here is {model.source!r}, {model.fingerprint[:12]}. What "
                "one model wrote another can not read: load that model, or write the facts again."
            )
        names = _named(session._memory.state)
        session_file.require(path, arrays, list(names))
        leaves = [jax.device_put(arrays[name]) for name in names]
        state = jax.tree.unflatten(jax.tree.structure(session._memory.state), leaves)
        session._memory = rls.init(model.memory, model.prepared, state)
        session._ledger = dataclasses.replace(ledger, model=model.source)
        return session

    # Last in the class: below it, `list` in an annotation would be this method.
    def list(self) -> list[Fact]:
        """Return the facts in memory, in the order of writing."""
        return [*self._ledger.facts.values()]


@jax.jit
def _write(
    memory: Streaming, prepared: Prepared, now: rls.RLSState, key: Array, value: Array
) -> tuple[rls.Pending, Bool[Array, ""], Bool[Array, ""]]:
    """Return the pending writes with this one, whether to factorise, and whether all is finite.

    Compiled as one, `rls.write` does not return copies of the arrays that a write leaves as they are.
    """
    written, _, is_due = rls.write(memory, prepared, now, key, value)
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(written.pending)]
    return written.pending, is_due, jnp.stack(finite).all()


def _padded(rows: Float[np.ndarray, "n C"]) -> Float[np.ndarray, "m C"]:
    """Return rows and zero rows after them, so that few numbers of rows are compiled for."""
    return np.pad(rows, ((0, steps_bucket(len(rows), 1) - len(rows)), (0, 0)))


def _named(state: StreamingState) -> dict[str, np.ndarray]:
    """Return the leaves of a state by their names in a saved session, such as memory/factor."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {f"memory/{keystr(path)}": np.asarray(leaf) for path, leaf in leaves}


def _since(begin: float) -> float:
    """Return the milliseconds since a `time.perf_counter()`."""
    return 1e3 * (time.perf_counter() - begin)
