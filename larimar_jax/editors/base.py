"""The contract of an editor: facts in, an edited model out, and the way back.

An edit changes W, the last map of a layer's MLP (`down`): it takes a key k to a value k W (+ bias).
Every decoder family has one. W is held as it is applied, [inputs I, outputs D], which is the transpose
of the papers' W.
"""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from larimar_jax import generate
from larimar_jax.editors import forward, moments
from larimar_jax.packing import LanguageModel
from larimar_jax.weights.tokenizer import Tokenizer

# Tokens of the random texts that stand before a prompt, in turn.
PREFIX_TOKENS = (5, 10)
# Facts that are optimised together.
FACTS = 8


class Request(NamedTuple):
    """A prompt, the subject in it, and the answer that the model is to give from now on."""

    prompt: str
    subject: str
    answer: str


class BaseLM:
    """The untouched language model with what editors need of it, each computed once."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._moments: dict[int, moments.Moments] = {}

    @property
    def depth(self) -> int:
        """The number of layers."""
        return self.model.decoder.config.depth

    def layer(self, chosen: int | None, share: float) -> int:
        """Return a layer: the chosen one, or the one at this share of the depth.

        Raises:
            ValueError: the model has no such layer.
        """
        layer = round(share * self.depth) if chosen is None else chosen
        if not 0 <= layer < self.depth:
            raise ValueError(
                f"there is no layer {layer} to edit: the decoder has layers 0 to {self.depth - 1}"
            )
        return layer

    def kernel(self, layer: int) -> Float[Array, "I D"]:
        """Return a layer's W."""
        return self.model.decoder.layers.down.kernel[layer]

    @functools.cached_property
    def digest(self) -> str:
        """What tells the decoder's parameters from others."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(nnx.state(self.model.decoder, nnx.Param)):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()[:32]

    @functools.cache  # noqa: B019  A base lives as long as its run.
    def prefixes(self, count: int) -> list[str]:
        """Return texts that stand before a prompt: none, and `count` short ones that the model drew."""
        limits = [PREFIX_TOKENS[n % len(PREFIX_TOKENS)] for n in range(count)]
        options = dict(temperature=1.0, top_k=5, rng=jax.random.key(0), stop=())
        texts = generate.generate(
            self.model, self.tokenizer, [""] * count, max_tokens=limits, **options
        )
        return ["", *(f"{' '.join(text.split())}. " for text in texts)]

    def moments(self, layers: Sequence[int]) -> dict[int, moments.Moments]:
        """Return the second moments of layers' keys, computed now where no earlier run has."""
        if missing := [layer for layer in layers if layer not in self._moments]:
            self._moments |= moments.load(self, missing)
        return {layer: self._moments[layer] for layer in layers}


class Change(NamedTuple):
    """What an edit adds to W, by layer: ΔW as factors whose product it is. keys: of its facts [I n]."""

    factors: Mapping[int, tuple[Float[Array, "_ _"], ...]]
    keys: Mapping[int, Float[np.ndarray, "I n"]] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True, eq=False)
class EditedModel:
    """A base LM after edits, each of them in `changes`, the oldest first.

    kernels: W of the layers that are changed.
    """

    base: BaseLM
    changes: tuple[Any, ...] = ()
    kernels: Mapping[int, Float[Array, "I D"]] = dataclasses.field(default_factory=dict)

    def plus(self, change: Change) -> "EditedModel":
        """Return the model with one more change."""
        kernels = dict(self.kernels)
        for layer, factors in change.factors.items():
            product = functools.reduce(functools.partial(jnp.matmul, precision="highest"), factors)
            kernels[layer] = kernels.get(layer, self.base.kernel(layer)) + product
        return EditedModel(self.base, (*self.changes, change), kernels)

    def revert(self) -> "EditedModel":
        """Return the model before its last change, bit for bit: earlier ones are made once more.

        Raises:
            ValueError: nothing was edited.
        """
        if not self.changes:
            raise ValueError("nothing was edited, so there is no edit to take back")
        return functools.reduce(type(self).plus, self.changes[:-1], self.untouched())

    def untouched(self) -> "EditedModel":
        """Return the base LM before any edit."""
        return EditedModel(self.base)

    def models(self, prompts: Sequence[str]) -> list[LanguageModel]:
        """Return what decodes each prompt; prompts of one object are decoded together."""
        return [self.model()] * len(prompts)

    def model(self) -> LanguageModel:
        """Return the language model with these kernels; all other parameters are the base's."""
        if not self.kernels:
            return self.base.model
        model = nnx.merge(*nnx.split(self.base.model))
        down = model.decoder.layers.down
        layers = np.asarray(sorted(self.kernels))
        changed = jnp.stack([self.kernels[int(layer)] for layer in layers])
        # A parameter of its own: the other model has the same one.
        down.kernel = down.kernel.replace(down.kernel[...].at[layers].set(changed))
        return model


class FactEditor:
    """An editor: a frozen dataclass whose fields are its settings, in a file of this folder."""

    def each(self, base: BaseLM, facts: Sequence[Request]) -> list[EditedModel]:
        """Return for each fact the base LM with that one edit; what is optimised is so in batches."""
        raise NotImplementedError(f"{type(self).__name__} does not define `each`")

    def apply(self, edited: EditedModel, facts: Sequence[Request]) -> EditedModel:
        """Return a model with all facts edited in; `start` makes an untouched one."""
        raise NotImplementedError(f"{type(self).__name__} does not define `apply`")

    def needs_moments(self, base: BaseLM) -> tuple[int, ...]:
        """Return the layers whose second moments of keys it uses."""
        return ()

    def start(self, base: BaseLM) -> EditedModel:
        """Return the base LM before any edit."""
        return EditedModel(base)


def chunks(facts: Sequence[Request]) -> list[Sequence[Request]]:
    """Return facts in parts that are optimised together."""
    return [facts[n : n + FACTS] for n in range(0, len(facts), FACTS)]


def answer_rows(
    tokenizer: Tokenizer, facts: Sequence[Request]
) -> tuple[Int[np.ndarray, "R T"], Int[np.ndarray, "R T"], Float[np.ndarray, "R T"]]:
    """Return prompts with answers as tokens, what follows each token, and the weight of that: 1 / n at
    the n tokens of an answer, so that a row sums up to ℓ."""
    rows = []
    for fact in facts:
        prompt = generate.prompt_ids(tokenizer, fact.prompt)
        rows.append((len(prompt) - 1, prompt, tokenizer.following(fact.answer.strip())))
    tokens = forward.padded([[*prompt, *answer[:-1]] for _, prompt, answer in rows])
    targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    for row, (begin, _, answer) in enumerate(rows):
        targets[row, begin : begin + len(answer)] = answer
        weights[row, begin : begin + len(answer)] = 1.0 / len(answer)
    return tokens, targets, weights
