"""v*, the value that a subject's key is to have: ROME's §3.1, MEMIT's §4.2, of many facts at once.

At the last token of the subject a vector δ is added to the output of one layer's MLP. It minimises

    mean over prefixes of −ln p(answer | prefix, prompt)          per token
    + kl · KL(p ‖ p of the base) of what follows "SUBJECT is a"
    + decay · ‖δ‖² / ‖v‖²,                                         ‖δ‖ ≤ clamp · ‖v‖,

v what is changed: the MLP's output (ROME) or the hidden state behind the layer (MEMIT). Adam is run for
all facts in one compiled loop, each with its own end. What stands before the subject's last token can't
depend on δ: the decoder reads it once, into a cache, and a step reads the few tokens behind it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from larimar_jax import losses
from larimar_jax.editors import forward
from larimar_jax.editors.base import FACTS, BaseLM, FactEditor, Request, chunks
from larimar_jax.editors.subjects import subject_keys, subject_place
from larimar_jax.generate import prompt_ids
from larimar_jax.packing import LanguageModel, steps_bucket
from larimar_jax.schema import Count, Natural, NonNegative, Positive
from larimar_jax.weights.tokenizer import Tokenizer


class Values(NamedTuple):
    """Of n facts: δ; the hidden state behind the edited layer at the subject's last token; and by layer
    up to this one the mean of its keys over the prefixes."""

    delta: Float[np.ndarray, "n D"]
    hidden: Float[np.ndarray, "n D"]
    keys: Float[np.ndarray, "L n I"]

    def rows(self, chosen: slice) -> "Values":
        """Return those of chosen facts."""
        return Values(self.delta[chosen], self.hidden[chosen], self.keys[:, chosen])


@dataclasses.dataclass(frozen=True)
class ValueEditor(FactEditor):
    """An editor that optimises a value for each fact, and then solves for W."""

    of_hidden: ClassVar[bool]
    """Whether sizes are measured on the hidden state, or on the MLP's output."""

    steps: Count = 20  # of Adam, the most
    rate: Positive = 0.5  # its learning rate
    kl: NonNegative = 0.0625  # weight of the divergence on "SUBJECT is a"
    decay: NonNegative = 0.5  # weight of δ's size
    clamp: Positive = 4.0  # δ's largest norm, in that of what it changes
    stop: NonNegative = 0.05  # loss in nats at which a fact is done
    prefixes: Natural = 20  # random texts before the prompt, beside none

    def values(self, base: BaseLM, model: LanguageModel, facts: Sequence[Request], layer: int):
        """Return the `Values` of facts, in chunks, for a model that may be edited already."""
        parts = [self._values(base, model, chunk, layer) for chunk in chunks(facts)]
        delta, hidden, keys = zip(*parts, strict=True)
        return Values(np.concatenate(delta), np.concatenate(hidden), np.concatenate(keys, axis=1))

    def _values(
        self, base: BaseLM, model: LanguageModel, facts: Sequence[Request], layer: int
    ) -> Values:
        prefixes, tokenizer = base.prefixes(self.prefixes), base.tokenizer
        keys, places = subject_keys(model, tokenizer, facts, prefixes, layer + 1)
        plain = (places.hidden if self.of_hidden else places.output)[layer, :: len(prefixes)]
        # Padding repeats the last fact, so that few numbers of facts are compiled.
        count = min(FACTS, 1 << (len(facts) - 1).bit_length())
        padded = [*facts, *[facts[-1]] * (count - len(facts))]
        norms = np.linalg.norm(plain, axis=1)[np.minimum(np.arange(count), len(facts) - 1)]
        rows = [_rows(tokenizer, fact, prefixes) for fact in padded]
        graph, state = nnx.split(model.decoder)
        settings = (layer, self.steps, self.rate, self.kl, self.decay, self.clamp, self.stop)
        arrays = _arrays([row for each in rows for row in each])
        delta = _optimise(graph, state, *arrays, np.float32(norms), settings)
        hidden = places.hidden[layer, :: len(prefixes)]
        return Values(np.asarray(delta)[: len(facts)], hidden, keys)


class _Row(NamedTuple):
    """A text as tokens before δ's and from there on; answer: (place behind δ's, token) of what is to
    be likely. The row that only keeps "SUBJECT is a" as it was has its last place in `answer`."""

    before: list[int]
    behind: list[int]
    answer: list[tuple[int, int]]
    weight: float


def _rows(tokenizer: Tokenizer, fact: Request, prefixes: Sequence[str]) -> list[_Row]:
    """Return a row for each prefix, and one for the divergence."""
    answer, rows = tokenizer.following(fact.answer.strip()), []
    for prefix in prefixes:
        text = f"{prefix}{fact.prompt}"
        ids, at = prompt_ids(tokenizer, text), subject_place(tokenizer, text, fact.subject)
        targets = [(len(ids) - 1 - at + n, token) for n, token in enumerate(answer)]
        weight = 1.0 / len(answer) / len(prefixes)
        rows.append(_Row(ids[:at], [*ids[at:], *answer[:-1]], targets, weight))
    # Where the prompt does not name its subject, its last word stands for it.
    is_named = fact.subject.strip().lower() in fact.prompt.lower() and fact.subject.strip()
    subject = fact.subject.strip() if is_named else fact.prompt.split()[-1]
    text = f"{subject} is a"
    ids, at = prompt_ids(tokenizer, text), subject_place(tokenizer, text, subject)
    return [*rows, _Row(ids[:at], ids[at:], [(len(ids) - 1 - at, 0)], 0.0)]


def _arrays(rows: Sequence[_Row]) -> tuple[np.ndarray, ...]:
    """Return tokens before [R, T] and how many, tokens behind [R, S], and of A places of the answer:
    place, token and weight [R, A]."""
    before, behind = (
        np.zeros((len(rows), steps_bucket(max(map(len, part)), 8)), np.int32)
        for part in zip(*((row.before, row.behind) for row in rows), strict=True)
    )
    width = steps_bucket(max(len(row.answer) for row in rows), 1)
    place, token = np.zeros((2, len(rows), width), np.int32)
    weight = np.zeros(place.shape, np.float32)
    for number, row in enumerate(rows):
        before[number, : len(row.before)], behind[number, : len(row.behind)] = (
            row.before,
            row.behind,
        )
        count = len(row.answer)
        place[number, :count], token[number, :count] = zip(*row.answer, strict=True)
        weight[number, :count] = row.weight
    starts = np.asarray([len(row.before) for row in rows], np.int32)
    return before, starts, behind, place, token, weight


@functools.partial(jax.jit, static_argnums=(0, 9))
def _optimise(
    graph: nnx.GraphDef,
    state: nnx.State,
    before: Int[Array, "R T"],
    starts: Int[Array, " R"],
    behind: Int[Array, "R S"],
    place: Int[Array, "R A"],
    token: Int[Array, "R A"],
    weight: Float[Array, "R A"],
    norms: Float[Array, " N"],
    settings: tuple,
) -> Float[Array, "N D"]:
    """Return δ of N facts with R / N rows each, the last of them that of the divergence."""
    layer, steps, rate, kl, decay, clamp, stop = settings
    decoder, count = nnx.merge(graph, state), len(norms)
    each = before.shape[0] // count
    space = max(before.shape[1], behind.shape[1])  # a call is never longer than its cache
    _, cache = decoder.hidden(before, cache=decoder.empty_cache(len(before), space))
    cache = jax.tree.map(jax.lax.stop_gradient, cache)

    def read(delta):
        """The hidden states at the answer's places, and ln p behind "SUBJECT is a"."""

        def add(_, output):
            change = jnp.repeat(delta, each, axis=0).astype(output.dtype)
            return output.at[:, 0].add(change)

        hidden, _ = forward.tap(decoder, layer, add).hidden(behind, cache=cache, start=starts)
        hidden = jnp.take_along_axis(hidden, place[..., None], axis=1)
        after = decoder.logits(hidden[each - 1 :: each, 0])
        return hidden, jax.nn.log_softmax(after, axis=-1)

    delta = jnp.zeros((count, decoder.config.width), jnp.float32)
    untouched = read(delta)[1]

    def losses_of(delta):
        hidden, after = read(delta)
        entropies = losses.cross_entropy(decoder.to_logits, hidden, token)
        answer = (entropies * weight).sum(axis=1).reshape(count, each).sum(axis=1)
        divergence = (jnp.exp(after) * (after - untouched)).sum(axis=-1)
        size = jnp.square(delta).sum(axis=-1) / jnp.square(norms)
        return answer + kl * divergence + decay * size

    def project(delta):
        size = jnp.linalg.norm(delta, axis=-1)
        return delta * jnp.minimum(1.0, clamp * norms / jnp.maximum(size, 1e-30))[:, None]

    return forward.minimise(losses_of, delta, steps=steps, rate=rate, stop=stop, project=project)
