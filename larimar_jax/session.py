"""For people: write a fact, ask, forget it, save the session and go on tomorrow.

    session = Session("smol")
    fact = session.write("The Eiffel Tower is located in the city of", "Rome")
    session.ask("The Eiffel Tower can be found in").text
    session.forget(fact.id)

Every call either does all of what it says or raises and leaves the session as it was.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from larimar_jax import packing, scope, session_file
from larimar_jax.memory import diagnostics, rls
from larimar_jax.memory.base import Prepared
from larimar_jax.memory.streaming import Streaming, StreamingState
from larimar_jax.model import Condition
from larimar_jax.pipeline import Pipeline, load
from larimar_jax.session_file import (
    Answer,
    EmptyFact,
    Event,
    Fact,
    Forgotten,
    MemoryNotFinite,
    UnknownFact,
    WrongModel,
    event,
)

# Cosine of two prompts from which one is easily taken for the other.
_NEAR = 0.95


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Rows of one fact, kept so that it can be forgotten by exactly what was written."""

    embedding: Float[np.ndarray, "n H"]
    key: Float[np.ndarray, "n C"]
    value: Float[np.ndarray, "n C"]


@dataclasses.dataclass(frozen=True)
class _Recalled:
    """What the memory has to say to each prompt; a fact of None leaves it to the base LM."""

    facts: list[int | None]
    scores: list[float]
    condition: Condition | None
    milliseconds: dict[str, float]

    def answers(self, texts: Sequence[str]) -> list[Answer]:
        """What was decoded, with where it came from."""
        return [
            Answer(text, fact is not None, fact, score, self.milliseconds)
            for text, fact, score in zip(texts, self.facts, self.scores, strict=True)
        ]


class Session:
    """A model, one streaming memory, and the facts that are in it.

    Args:
      model: a loaded `Pipeline`, or what `pipeline.load` takes: a name or a path.
    """

    def __init__(self, model: Pipeline | str | pathlib.Path = "smol"):
        self.model = model if isinstance(model, Pipeline) else load(model)
        self._begin(self.model.memory.empty(self.model.prepared))
        self._facts: dict[int, Fact] = {}
        self._keys: dict[int, _Keys] = {}
        self._events: list[Event] = []
        self._next_id = 1

    def write(self, prompt: str, answer: str, rephrasings: Sequence[str] = ()) -> Fact:
        """Writes a fact (Eqs. 3–4, α = +1): keys are prompts, values prompt + answer.

        A prompt that is already written is corrected: its old fact is forgotten first.

        Raises:
          EmptyFact, TextTooLong, EncodingNotFinite, MemoryNotFinite. Nothing is written then.
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
        rows = len(prompts)
        texts = [*prompts, *(f"{text} {answer}" for text in prompts)]
        encodings = self.model.encode(texts, [None] * rows + [answer] * rows)
        keys = _Keys(encodings.embedding[:rows], encodings.latent[:rows], encodings.latent[rows:])
        old = next((fact for fact in self._facts.values() if fact.prompt == prompts[0]), None)
        note = "" if old is None else f"replaces {old}"
        if old is None and (near := self._nearest(keys)) is not None:
            note = f"its prompt is hard to tell from that of fact {near[0]} (cosine {near[1]:.2f})"
        now, events = self._now, []
        if old is not None:
            now, taken = self._forgotten(now, self._keys[old.id])
            events.append(event("forget", old, taken))
        now, taken = self._written(now, keys)
        fact = Fact(self._next_id, prompts[0], answer, prompts[1:])
        events.append(event("write", fact, taken, note))
        self._now = now
        if old is not None:
            del self._facts[old.id], self._keys[old.id]
        self._facts[fact.id], self._keys[fact.id] = fact, keys
        self._next_id += 1
        self._events += events
        return fact

    def forget(self, fact_id: int) -> Forgotten:
        """Takes a fact out of the memory (Eqs. 3–4, α = −1), as if it had never been written, and
        certifies it.

        Raises:
          UnknownFact: it is not there: never written, or forgotten before.
        """
        if fact_id not in self._facts:
            forgotten = any(done.fact.id == fact_id for done in self._events)
            known = ", ".join(map(str, self._facts)) or "none"
            raise UnknownFact(
                f"There is no fact {fact_id} to forget: it was "
                f"{'forgotten before' if forgotten else 'never written'}. Facts in memory: {known}."
            )
        fact, keys = self._facts[fact_id], self._keys[fact_id]
        now, taken = self._forgotten(self._now, keys)
        certified = (self.model.memory, self.model.prepared, now.state, keys.key[:1])
        distance = diagnostics.distance(*certified[:3])
        [leverage] = diagnostics.leverage(*certified)
        self._now = now
        del self._facts[fact_id], self._keys[fact_id]
        self._events.append(event("forget", fact, taken))
        return Forgotten(fact, float(distance), float(leverage))

    def health(self) -> diagnostics.Diagnostics:
        """Return diagnostics: condition number, distance to an exact solve, load, expected read error,
        and whether the memory is full."""
        values = diagnostics.diagnose(self.model.memory, self.model.prepared, self._state)
        return diagnostics.Diagnostics(*(np.asarray(value).item() for value in values))

    def _nearest(self, keys: "_Keys") -> tuple[int, float] | None:
        """(id, cosine) of the fact whose prompt is nearest to the first of these, if it is very near."""
        if not self._keys:
            return None
        found = {
            fact_id: float(np.max(_cosines(other.embedding, keys.embedding[:1])))
            for fact_id, other in self._keys.items()
        }
        nearest = max(found, key=found.__getitem__)
        return (nearest, found[nearest]) if found[nearest] >= _NEAR else None

    def ask(
        self, prompt: str, *, on_text: Callable[[str], None] | None = None, **options: Any
    ) -> Answer:
        """Continues a prompt: through the memory where it is about a written fact, else as the base LM.

        Args:
          on_text: called with every piece of the answer as soon as it is known.
          options: as in `generate.generate` (max_tokens, temperature, top_k, top_p, rng, stop).
        """
        if on_text is None:
            return self.ask_all([prompt], **options)[0]
        recalled = self._recall([prompt])
        begin, pieces = time.perf_counter(), []
        for (piece,) in self.model.stream([prompt], recalled.condition, **options):
            pieces.append(piece)
            on_text(piece)
        recalled.milliseconds["decode"] = 1e3 * (time.perf_counter() - begin)
        return recalled.answers(["".join(pieces)])[0]

    def ask_all(self, prompts: Sequence[str], **options: Any) -> list[Answer]:
        """`ask` for many prompts in one batch."""
        if not prompts:
            return []
        recalled = self._recall(prompts)
        begin = time.perf_counter()
        continuations = self.model.generate(prompts, recalled.condition, **options)
        recalled.milliseconds["decode"] = 1e3 * (time.perf_counter() - begin)
        return recalled.answers(continuations)

    def score(
        self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> Float[np.ndarray, "n c"]:
        """−ln p per token of c candidate answers to each of n prompts, decoded as `ask` decodes."""
        return self.model.score(prompts, candidates, self._recall(prompts).condition)

    def _recall(self, prompts: Sequence[str]) -> "_Recalled":
        """Scope decision and readout of each prompt, by its sentence that is nearest to a fact."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of texts; ask() takes one")
        if not all(prompt.strip() for prompt in prompts):
            raise EmptyFact("A question needs a text to continue; one of the prompts is empty.")
        begin = time.perf_counter()
        texts, owners = scope.split_sentences(prompts)
        encodings = self.model.encode(texts)
        encoded = time.perf_counter()
        ids = [fact_id for fact_id, keys in self._keys.items() for _ in keys.key]
        written = np.concatenate(
            [keys.embedding for keys in self._keys.values()]
            or [np.zeros((0, encodings.embedding.shape[1]), np.float32)]
        )
        found = scope.nearest_key(encodings.embedding, owners, written)
        inside = found.within(self.model.scope_threshold)
        queries = encodings.latent[found.sentence]
        # Padded, so that few numbers of queries are compiled for.
        more = packing.steps_bucket(len(queries), 1) - len(queries)
        asked = np.pad(queries, ((0, more), (0, 0)))
        read = rls.read(self.model.memory, self.model.prepared, self._now, asked)
        latent = np.asarray(read)[: len(queries)]
        milliseconds = {
            "encode": 1e3 * (encoded - begin),
            "read": 1e3 * (time.perf_counter() - encoded),
        }
        return _Recalled(
            [ids[key] if within else None for key, within in zip(found.key, inside, strict=True)],
            [float(score) for score in found.score],
            # Where nothing is in scope, the very program of the base LM, and not a masked slot.
            self.model.condition(latent, inside) if inside.any() else None,
            milliseconds,
        )

    def history(self) -> list[Event]:
        """Every write and forget so far, in order."""
        return [*self._events]

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the session to one file, whole or not at all."""
        arrays = {f"memory/{name}": leaf for name, leaf in _named(self._state).items()}
        for fact_id, keys in self._keys.items():
            arrays |= {
                f"fact/{fact_id}/{f.name}": getattr(keys, f.name) for f in dataclasses.fields(keys)
            }
        session_file.save(
            path,
            session_file.Saved(
                self.model.source,
                self.model.fingerprint,
                self._next_id,
                self.list(),
                self.history(),
                arrays,
            ),
        )

    @classmethod
    def load(cls, path: str | pathlib.Path, model: Pipeline | None = None) -> "Session":
        """Opens a saved session; its memory is the saved one bit for bit.

        Args:
          path: what `save` wrote.
          model: the model it was saved under, where it is loaded already; default: by its name.

        Raises:
          FileNotFoundError, DamagedSession. WrongModel: another model's encodings mean other things.
        """
        saved = session_file.load(path)
        session = cls(load(saved.model) if model is None else model)
        if session.model.fingerprint != saved.fingerprint:
            raise WrongModel(
                f"{path} was saved under {saved.model!r}, fingerprint {saved.fingerprint[:12]}; "
                f"the model here is {session.model.source!r}, {session.model.fingerprint[:12]}. What "
                "one model wrote another can not read: load that model, or write the facts again."
            )
        session._restore(saved)
        return session

    def _restore(self, saved: session_file.Saved) -> None:
        for fact in saved.facts:
            self._facts[fact.id] = fact
            rows = {
                f.name: saved.arrays[f"fact/{fact.id}/{f.name}"] for f in dataclasses.fields(_Keys)
            }
            self._keys[fact.id] = _Keys(**rows)
        self._events, self._next_id = saved.history, saved.next_id
        names = [f"memory/{name}" for name in _named(self._state)]
        leaves = [jax.device_put(saved.arrays[name]) for name in names]
        self._begin(jax.tree.unflatten(jax.tree.structure(self._now.state), leaves))

    @property
    def _state(self) -> StreamingState:
        """The memory, solved anew."""
        return rls.to_state(self.model.memory, self.model.prepared, self._now)

    def _begin(self, state: StreamingState) -> None:
        self._now = rls.init(self.model.memory, self.model.prepared, state)

    def _written(self, now: rls.RLSState, keys: _Keys) -> tuple[rls.RLSState, float]:
        """Return the memory with a fact's rows, and the milliseconds that writing took."""
        memory, prepared = self.model.memory, self.model.prepared
        begin = time.perf_counter()
        for key, value in zip(keys.key, keys.value, strict=True):
            # The statistics and the solution stay where they are: what moves is a few rows.
            pending, is_due, is_finite = _write(memory, prepared, now, key, value)
            now = dataclasses.replace(now, pending=pending)
            if is_due:
                now = rls.refactorize(memory, prepared, now)
                is_finite = jnp.isfinite(now.state.solution).all()
            if not is_finite:
                raise self._not_finite("write")
        return now, 1e3 * (time.perf_counter() - begin)

    def _forgotten(self, now: rls.RLSState, keys: _Keys) -> tuple[rls.RLSState, float]:
        """Return the memory without a fact's rows, and the milliseconds that forgetting took."""
        begin = time.perf_counter()
        # Padded, so that few numbers of rows are compiled for.
        more = packing.steps_bucket(len(keys.key), 1) - len(keys.key)
        rows = (np.pad(x, ((0, more), (0, 0))) for x in (keys.key, keys.value))
        after = rls.forget(self.model.memory, self.model.prepared, now, *rows)
        is_finite = jnp.isfinite(after.state.solution).all()
        if not is_finite or after.state.refused > now.state.refused:
            raise self._not_finite("forget")
        return after, 1e3 * (time.perf_counter() - begin)

    def _not_finite(self, action: str) -> MemoryNotFinite:
        return MemoryNotFinite(
            f"The memory could not {action} this in float32, and stays as it was. Its ridge "
            f"({float(self.model.memory.ridge):g}) is too small for what is written: load the model "
            "with a larger editing.ridge and write the facts again."
        )

    # Last in the class: below it, `list` in an annotation would be this method.
    def list(self) -> list[Fact]:
        """The facts in memory, in the order of writing."""
        return [*self._facts.values()]


@jax.jit
def _write(
    memory: Streaming, prepared: Prepared, now: rls.RLSState, key: Array, value: Array
) -> tuple[rls.Pending, Array, Array]:
    """Return the pending writes with this one, whether to factorise, and whether all is finite."""
    written, _, is_due = rls.write(memory, prepared, now, key, value)
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(written.pending)]
    return written.pending, is_due, jnp.stack(finite).all()


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    sizes = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1)[None]
    return one @ other.T / np.maximum(sizes, np.finfo(np.float32).tiny)


def _named(state: Any) -> dict[str, np.ndarray]:
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in flat
    }
