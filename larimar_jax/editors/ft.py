"""FT-L: constrained fine-tuning of one MLP, ROME's baseline (Meng et al. 2022, §3.2; Zhu et al. 2020).

min −ln p(answer | prompt) over ΔW of one layer's W, ‖ΔW‖_∞ ≤ ε, by Adam.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from larimar_jax import losses
from larimar_jax.editors import forward
from larimar_jax.editors.base import (
    BaseLM,
    Change,
    EditedModel,
    FactEditor,
    Request,
    answer_rows,
    chunks,
)
from larimar_jax.packing import LanguageModel
from larimar_jax.schema import Count, NonNegative, Positive


@dataclasses.dataclass(frozen=True)
class FT(FactEditor):
    """Fine-tuning of one layer under a bound on every weight's change."""

    layer: int | None = None  # None: the first, as in ROME's baseline for GPT-2 XL
    steps: Count = 25  # of Adam, the most
    rate: Positive = 5e-4  # its learning rate
    bound: Positive = 5e-4  # ε, the most that a weight changes
    stop: NonNegative = 0.01  # loss in nats a token at which a fact is done

    def each(self, base: BaseLM, facts: Sequence[Request]) -> list[EditedModel]:
        """Return the base with each edit alone, each with a ΔW of its own."""
        layer = base.layer(self.layer, 0.0)
        trained = (self._train(base, base.model, chunk, layer) for chunk in chunks(facts))
        changes = [change for chunk in trained for change in chunk]
        return [self.start(base).plus(Change({layer: (change,)})) for change in changes]

    def apply(self, edited: EditedModel, facts: Sequence[Request]) -> EditedModel:
        """Return the model fine-tuned on all facts together: one ΔW, on their mean loss."""
        layer = edited.base.layer(self.layer, 0.0)
        (change,) = self._train(edited.base, edited.model(), facts, layer, together=True)
        return edited.plus(Change({layer: (change,)}))

    def _train(
        self,
        base: BaseLM,
        model: LanguageModel,
        facts: Sequence[Request],
        layer: int,
        together: bool = False,
    ) -> Float[Array, "n I D"]:
        tokens, targets, weights = answer_rows(base.tokenizer, facts)
        graph, state = nnx.split(model.decoder)
        settings = (layer, self.steps, self.rate, self.bound, self.stop, together)
        return _train(graph, state, tokens, targets, weights, settings)[: len(facts)]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _train(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "R T"],
    targets: Int[Array, "R T"],
    weights: Float[Array, "R T"],
    settings: tuple,
) -> Float[Array, "n I D"]:
    """Return ΔW of each row, or one of all rows."""
    layer, steps, rate, bound, stop, together = settings
    decoder = nnx.merge(graph, state)
    shape = decoder.layers.down.kernel[layer].shape
    is_fact = (weights.sum(axis=1) > 0).astype(jnp.float32)

    def losses_of(change):
        def add(key, output):
            return output + jnp.matmul(key, change.astype(key.dtype))

        hidden, _ = forward.tap(decoder, layer, add).hidden(tokens)
        entropies = losses.cross_entropy(decoder.to_logits, hidden, targets)
        each = (entropies * weights).sum(axis=1)
        return (each.sum() / is_fact.sum())[None] if together else each

    start = jnp.zeros((1 if together else len(tokens), *shape), jnp.float32)
    return forward.minimise(
        losses_of,
        start,
        steps=steps,
        rate=rate,
        stop=stop,
        project=lambda change: jnp.clip(change, -bound, bound),
    )
