"""GRACE: a codebook at one layer (Hartvigsen et al. 2023, arXiv 2211.11031). No weight changes.

The key of a prompt is what goes into the layer's last map at its last token. Where it lies within ε of
an edit's key, by Euclidean distance, the edit's value is the map's output on all tokens of the prompt;
elsewhere the base LM runs. A value is trained by Adam on −ln p(answer | prompt). A new edit whose
nearest key is at distance d

    d > ε₀ + ε of that key      is a new key with radius ε₀;
    has the same answer         adds no key: the nearest one's radius grows to d, if it is less;
    has another answer          is a new key, and both radii are cut to d / 2.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from larimar_jax import losses
from larimar_jax.decoders.decoder import Cache, Decoder, Tree
from larimar_jax.editors import forward
from larimar_jax.editors.base import BaseLM, EditedModel, FactEditor, Request, answer_rows, chunks
from larimar_jax.generate import prompt_ids
from larimar_jax.packing import LanguageModel
from larimar_jax.schema import Count, NonNegative, Positive


class Entry(NamedTuple):
    """A trained edit, as it comes to the codebook."""

    key: Float[np.ndarray, " I"]
    value: Float[np.ndarray, " D"]
    answer: str


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook(EditedModel):
    """A base LM with n keys at a layer, their values, radii and answers."""

    layer: int = 0
    radius: float = 1.0
    keys: Float[np.ndarray, "n I"] | None = None
    values: Float[np.ndarray, "n D"] | None = None
    radii: Float[np.ndarray, " n"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    answers: tuple[str, ...] = ()

    def untouched(self) -> "Codebook":
        """Return the codebook without entries."""
        return Codebook(self.base, layer=self.layer, radius=self.radius)

    def plus(self, entry: Entry) -> "Codebook":
        """Return the codebook with one more edit, by the rule of the radii."""
        radius, radii = self.radius, self.radii.copy()
        taken = dataclasses.replace(self, changes=(*self.changes, entry), radii=radii)
        near, distance = self.nearest(entry.key) if len(radii) else (-1, np.inf)
        if len(radii) and distance <= radius + radii[near]:
            if self.answers[near] == entry.answer:
                radii[near] = max(radii[near], distance)
                return taken
            radius = min(radius, distance / 2)
            radii[near] = min(radii[near], distance / 2)
        keys, values = (
            new[None] if old is None else np.concatenate([old, new[None]])
            for old, new in ((self.keys, entry.key), (self.values, entry.value))
        )
        radii, answers = np.append(radii, radius), (*self.answers, entry.answer)
        return dataclasses.replace(taken, keys=keys, values=values, radii=radii, answers=answers)

    def nearest(self, key: Float[np.ndarray, " I"]) -> tuple[int, float]:
        """Return the nearest entry, of equally near ones the newest, and its distance."""
        distances = np.linalg.norm(np.float64(self.keys) - key, axis=1)
        near = len(distances) - 1 - int(distances[::-1].argmin())
        return near, float(distances[near])

    def models(self, prompts: Sequence[str]) -> list[LanguageModel]:
        """Return what decodes each prompt: the base LM itself where no key is near enough."""
        model, decoders = self.base.model, {}
        if not len(self.radii) or not prompts:
            return [model] * len(prompts)
        rows = [prompt_ids(self.base.tokenizer, prompt) for prompt in prompts]
        keys, models = last_places(model, rows, self.layer).key[self.layer], []
        for key, row in zip(keys, rows, strict=True):
            near, distance = self.nearest(key)
            place = (near, len(row))
            if distance <= self.radii[near] and place not in decoders:
                value = jnp.asarray(self.values[near])
                decoders[place] = CodebookDecoder(model.decoder, self.layer, value, len(row))
            models.append(decoders[place] if distance <= self.radii[near] else model)
        return models


class CodebookDecoder(nnx.Module):
    """A decoder with a value for a layer's output on the first `length` tokens of every text."""

    def __init__(self, decoder: Decoder, layer: int, value: Float[Array, " D"], length: int):
        self.decoder, self.layer = decoder, layer
        # As data: other values and lengths compile nothing.
        self.value, self.length = nnx.Variable(value), nnx.Variable(jnp.int32(length))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        condition: None = None,
        cache: Cache | None = None,
        start: Int[Array, " B"] | None = None,
        tree: Tree | None = None,
        product_dtype: DTypeLike | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Return what `Decoder.hidden` returns, without a prefix."""
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] if tree is None else tree.index
        index = index if start is None else index + start[:, None]
        is_prompt = (index < self.length[...])[..., None]
        value = self.value[...]

        def put(_, output):
            return jnp.where(is_prompt, value.astype(output.dtype), output)

        tapped = forward.tap(self.decoder, self.layer, put)
        how = dict(cache=cache, start=start, tree=tree, product_dtype=product_dtype)
        return tapped.hidden(tokens, **how)


@dataclasses.dataclass(frozen=True)
class GRACE(FactEditor):
    """A codebook of trained values at one layer."""

    layer: int | None = None  # None: at 35/48 of the depth
    radius: Positive = 1.0  # ε₀, on the scale of the model's keys
    steps: Count = 100  # of Adam
    rate: Positive = 1.0  # its learning rate
    stop: NonNegative = 0.0  # loss in nats a token at which a value is done; 0 is never

    def start(self, base: BaseLM) -> Codebook:
        """Return the base LM with an empty codebook."""
        return Codebook(base, layer=base.layer(self.layer, 35 / 48), radius=self.radius)

    def each(self, base: BaseLM, facts: Sequence[Request]) -> list[EditedModel]:
        """Return for each fact a codebook of its own."""
        return [self.start(base).plus(entry) for entry in self._entries(base, facts)]

    def apply(self, edited: EditedModel, facts: Sequence[Request]) -> EditedModel:
        """Return the codebook after each edit in turn."""
        return functools.reduce(type(edited).plus, self._entries(edited.base, facts), edited)

    def _entries(self, base: BaseLM, facts: Sequence[Request]) -> list[Entry]:
        layer, entries = base.layer(self.layer, 35 / 48), []
        for chunk in chunks(facts):
            rows = [prompt_ids(base.tokenizer, fact.prompt) for fact in chunk]
            places = last_places(base.model, rows, layer)
            arrays = answer_rows(base.tokenizer, chunk)
            # Values begin as what the map gives; rows of padding begin at 0.
            start, lengths = np.zeros((len(arrays[0]), places.output.shape[2]), np.float32), []
            start[: len(chunk)] = places.output[layer]
            lengths = np.zeros(len(start), np.int32)
            lengths[: len(chunk)] = [len(row) for row in rows]
            graph, state = nnx.split(base.model.decoder)
            settings = (layer, self.steps, self.rate, self.stop)
            values = np.asarray(_train(graph, state, *arrays, start, lengths, settings))
            trained = zip(places.key[layer], values, chunk, strict=False)
            entries += [Entry(key, value, fact.answer) for key, value, fact in trained]
        return entries


def last_places(model: LanguageModel, rows: Sequence[list[int]], layer: int) -> forward.Places:
    """Return what the layers up to this one have at the last token of each row."""
    return forward.at_tokens(model, rows, [len(row) - 1 for row in rows], layer + 1)


@functools.partial(jax.jit, static_argnums=(0, 7))
def _train(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "R T"],
    targets: Int[Array, "R T"],
    weights: Float[Array, "R T"],
    start: Float[Array, "R D"],
    lengths: Int[Array, " R"],
    settings: tuple[Any, ...],
) -> Float[Array, "R D"]:
    """Return the value of each row that makes its answer likely."""
    layer, steps, rate, stop = settings
    decoder = nnx.merge(graph, state)
    is_prompt = (jnp.arange(tokens.shape[1]) < lengths[:, None])[..., None]

    def losses_of(values):
        def put(_, output):
            return jnp.where(is_prompt, values[:, None].astype(output.dtype), output)

        hidden, _ = forward.tap(decoder, layer, put).hidden(tokens)
        entropies = losses.cross_entropy(decoder.to_logits, hidden, targets)
        return (entropies * weights).sum(axis=1)

    return forward.minimise(losses_of, start, steps=steps, rate=rate, stop=stop)
