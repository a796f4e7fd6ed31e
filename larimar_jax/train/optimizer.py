"""The optimiser with warm-up, decay and clipping, over the trained parameters and no others."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from larimar_jax import lora
from larimar_jax.config import TrainConfig

Leaf = TypeVar("Leaf")
Schedule = Callable[[jax.Array], jax.Array]


class FreezeError(ValueError):
    """A freezing pattern that matches no parameter, or patterns that leave nothing to train."""


def partition(
    parameters: Mapping[str, Leaf], frozen: Sequence[str]
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Split parameters into (trained, frozen) by regexes on their '/'-joined paths.

    Frozen parameters stay out of the differentiated arguments, so that they cost neither a gradient
    nor optimiser state. Low-rank factors are trained and the maps that they change are frozen,
    whatever the patterns are.

    Raises:
        FreezeError: a regex that matches nothing (all are named), or all parameters are frozen.
    """
    patterns = [re.compile(pattern) for pattern in frozen]
    idle = [p.pattern for p in patterns if not any(map(p.search, parameters))]
    if idle:
        raise FreezeError(
            f"train.frozen matches no parameter: {', '.join(map(repr, idle))}. The parameters are:"
            "\n  " + "\n  ".join(sorted(parameters))
        )
    held = {name for name in parameters if any(p.search(name) for p in patterns)}
    held = {name for name in held | lora.changed(parameters) if not lora.is_factor(name)}
    if len(held) == len(parameters):
        raise FreezeError("train.frozen freezes every parameter; nothing is left to train.")
    trained = {name: leaf for name, leaf in parameters.items() if name not in held}
    return trained, {name: leaf for name, leaf in parameters.items() if name in held}


def learning_rate(train: TrainConfig) -> Schedule:
    """Return the schedule: linear warm-up to the peak, then "cosine", "linear" or "constant" decay.

    The first step already has 1/warmup of the peak: a step at rate 0 would be wasted.

    Raises:
        ValueError: a warm-up longer than the run.
    """
    if train.warmup_steps > train.steps:
        raise ValueError(
            f"train.warmup_steps ({train.warmup_steps}) is more than train.steps ({train.steps})"
        )
    peak, warmup, rest = train.learning_rate, train.warmup_steps, train.steps - train.warmup_steps
    rising = optax.linear_schedule(peak / max(1, warmup), peak, max(0, warmup - 1))
    falling = {
        "cosine": optax.cosine_decay_schedule(peak, max(1, rest)),
        "linear": optax.linear_schedule(peak, 0.0, max(1, rest)),
        "constant": optax.constant_schedule(peak),
    }
    rate = optax.join_schedules([rising, falling[train.decay]], [warmup])
    # As a float: optax multiplies an integer step by π, which strict promotion forbids.
    return lambda step: rate(jnp.asarray(step, jnp.float32))


# Decay pulls towards zero: right for matrices, wrong for scales and biases, and for the prior
# memory, where it would pull σ_W to 1, and M₀, which cancels in a read (§3), away from its start.
_UNDECAYED = re.compile(r"(^memory/|(^|/)(bias|scale)$)")

# What maps hidden states to hidden states: no embedding, and no map to logits.
_ORTHOGONAL = re.compile(r"(?<!/head)/kernel$")


def is_decayed(name: str) -> bool:
    """Return whether weight decay applies to the parameter of this '/'-joined path."""
    return _UNDECAYED.search(name) is None


def make(train: TrainConfig) -> optax.GradientTransformation:
    """Return AdamW, Adam, Adafactor or Muon with global-norm clipping, for a dict of parameters by path.

    A clip_norm of 0 clips nothing. Adafactor (arXiv 1804.04235) has no momentum and stores a row and
    a column of second moments per matrix. Its rate is not scaled by the parameter's size and its
    decay is multiplied by the rate, so that both settings mean what they mean for AdamW. Muon
    orthogonalises the momentum of kernels between hidden states; its updates are scaled to AdamW's
    usual size (0.2, arXiv 2502.16982). All else, embeddings among it, takes Adam's with
    Nesterov momentum and no decay.
    """
    rate = learning_rate(train)

    def mask(parameters):
        return {name: is_decayed(name) for name in parameters}

    def kernels(parameters):
        # The last two axes are in and out; one before them is that of stacked layers.
        return {
            name: contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
            if _ORTHOGONAL.search(name)
            else None
            for name, leaf in parameters.items()
        }

    kinds = {
        "adamw": lambda: optax.adamw(rate, weight_decay=train.weight_decay, mask=mask),
        "adam": lambda: optax.adam(rate),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(train.weight_decay, mask=mask),
            optax.scale_by_learning_rate(rate),
        ),
        "muon": lambda: contrib.muon(
            rate,
            weight_decay=train.weight_decay,
            muon_weight_dimension_numbers=kernels,
            consistent_rms=0.2,
        ),
    }
    clip = [optax.clip_by_global_norm(train.clip_norm)] if train.clip_norm else []
    inner = optax.chain(*clip, kinds[train.optimizer]())

    def update(gradients, state, parameters=None):
        # Optax raises float decays to integer step counts, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(gradients, state, parameters)

    return optax.GradientTransformation(inner.init, update)
