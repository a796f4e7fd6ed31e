"""One training step, beside the same step in torch with Hugging Face towers.

Both sides begin with the same weights and take the same batch: encoder, write and read of every
episode's memory, decoder through the routes of Eq. 1 that have a weight, gradients of what is trained,
global-norm clipping, AdamW. Before anything is timed, their loss, its terms and their gradients' norm
must agree, in float32 also where a step rounds (`train.products`): rounding would hide a difference.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from larimar_jax import config as configs
from larimar_jax import objective
from larimar_jax.config import Config
from larimar_jax.model import Larimar
from larimar_jax.train import sharding
from larimar_jax.train.step import TrainStep, initialise

from . import Disagreement, timing, torch_step

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "training_step.py"
# How far loss, terms and gradient norm of the two sides may lie apart, relative to torch's.
AGREEMENT = 1e-4
# The same for the norm of gradients through a pretrained decoder, where float32 loses more digits:
# through SmolLM2, torch's gradients are 2e-4 from those in float64, and ours 5e-4.
PRETRAINED = 1e-3
# Standard deviation of the second LoRA factors: at zero the first would have no gradient to compare.
FACTOR = 0.01


def compare(config: Config, repeats: int) -> list[timing.Ratio]:
    """Return the step's ratio to torch's, and how many times as long as its memory's part it takes.

    Raises:
        ValueError: the config has what the torch side does not compute, or several episode sizes.
        FileNotFoundError: the weights of a tower are not installed.
        Disagreement: the two sides do not compute the same.
    """
    if problems := incomparable(config):
        raise ValueError("this config cannot be timed:\n  " + "\n  ".join(problems))
    ours = OurStep(config)
    theirs = torch_step.TorchStep(config, ours.model())
    pretrained = config.model.decoder.source is not None
    limit = PRETRAINED if pretrained else AGREEMENT
    distance = agreement(ours.losses(), theirs.losses(ours.batch), limit)
    sides = {"here": ours.step, "torch": lambda: theirs.step(ours.batch), "memory": ours.memory}
    for side in sides.values():
        side()
    times = timing.interleave(sides, repeats)
    losses = f"losses and gradients within {distance:.0e}"
    return [
        timing.Ratio(f"training step, {config.name}", times["torch"], times["here"], 1.0, losses),
        timing.Ratio("the step beside its memory's part", times["here"], times["memory"], None, ""),
    ]


# What torch's side computes of a config.
REQUIRED = {
    "model.dtype": "float32",
    "model.remat": "none",
    "memory.variant": "direct",
    "memory.variance": "scalar",
    "memory.query": "posterior",
    "memory.addressing": {"kind": "pseudo_inverse"},
    "train.optimizer": "adamw",
    "train.accumulate": 1,
    "train.ema": 0.0,
}


def incomparable(config: Config) -> list[str]:
    """Return what of a config the torch side does not compute, one line each."""
    values = configs.to_dict(config)
    lines = []
    for key, wanted in REQUIRED.items():
        section, name = key.split(".")
        if values[section].get(name) != wanted:
            lines.append(f"{key}: beside torch only {wanted!r}")
    if len(config.data.episode) != 1 or config.data.episode[0] > values["memory"]["slots"]:
        lines.append("data.episode: beside torch only one size of at most memory.slots facts")
    if not config.train.clip_norm > 0:
        lines.append("train.clip_norm: beside torch only above 0")
    return lines


def agreement(
    ours: Mapping[str, float], theirs: Mapping[str, float], gradients: float = AGREEMENT
) -> float:
    """Return the largest distance of two values of one name, relative to torch's.

    Args:
        gradients: how far the gradients' norms may lie apart; all else AGREEMENT.

    Raises:
        Disagreement: more than that, or not finite; names every value.
    """
    lines, distances = [], []
    for name, value in theirs.items():
        distances.append(abs(ours[name] - value) / max(abs(value), 1e-12))
        limit = gradients if name == "gradient_norm" else AGREEMENT
        if not distances[-1] <= limit:  # also where it is not a number
            lines.append(f"{name}: {ours[name]:.7g} here, {value:.7g} in torch, at most {limit:g}")
    if lines:
        raise Disagreement(
            "the two sides do not do the same work:\n  "
            + "\n  ".join(lines)
            + "\nLook for a version of"
            " transformers that computes differently, or for a change in larimar_jax/objective.py that"
            " tests/comparisons/torch_step.py does not follow."
        )
    return max(distances)


def random_batch(config: Config, model: Larimar) -> dict[str, np.ndarray]:
    """Return a batch as `data.episodes` yields it, of random tokens: half the room to all of it."""
    data, rng = config.data, np.random.default_rng(config.data.seed)
    batch = {}
    for name in ("encoder", "decoder"):
        room = getattr(data, f"{name}_tokens")
        shape = (data.batch, data.episode[0], room)
        vocabulary = getattr(model, name).config.vocab_size
        lengths = rng.integers(room // 2, room + 1, (*shape[:2], 1))
        mask = np.broadcast_to(np.arange(room) < lengths, shape)
        batch[f"{name}_tokens"] = np.int32(np.where(mask, rng.integers(1, vocabulary, shape), 0))
        batch[f"{name}_mask"] = mask
    return batch


class OurStep:
    """`train.step` on one device. batch: the constant one, numpy."""

    def __init__(self, config: Config):
        self._config, mesh = config, sharding.make_mesh(config.train.mesh, jax.devices()[:1])
        self._abstract, parameters = initialise(config, mesh)
        rng = np.random.default_rng(config.data.seed)
        for name, zeros in parameters.items():
            if name.endswith("/lora_out"):
                factor = FACTOR * rng.standard_normal(zeros.shape, dtype=np.float32)
                parameters[name] = jax.device_put(factor, zeros.sharding)
        self._step = TrainStep(config, self._abstract, mesh)
        self._frozen = self._step.freeze(parameters)
        self._state = self._step.init({n: parameters[n] for n in self._step.trained})
        self.batch = random_batch(config, self.model())
        self._placed = sharding.place_batch(self.batch, mesh)
        shape = (config.data.batch, config.data.episode[0], config.model.latent)
        self._encodings = jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
        self._memory_gradients = jax.jit(jax.grad(self._memory_loss, argnums=(0, 1)))

    def model(self):
        """Return the model of the parameters as they now are."""
        return self._abstract.model({**self._state.params, **self._frozen})

    def losses(self) -> dict[str, float]:
        """Return loss, its terms and the gradients' norm on the batch, without any noise."""
        goal, memory = self._config.objective, configs.make_memory(self._config)

        def loss(params, batch):
            model = self._abstract.model({**params, **self._frozen})
            return objective.loss(model, memory, batch, None, goal, jnp.float32(goal.kl))

        @jax.jit
        def everything(params, batch):
            (total, terms), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
            squares = (jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients))
            return {"loss": total, **terms, "gradient_norm": jnp.sqrt(sum(squares))}

        values = everything(self._state.params, self._placed)
        return {name: float(value) for name, value in values.items()}

    def step(self) -> None:
        """Take one optimiser step."""
        self._state, metrics = self._step.step(self._state, self._frozen, self._placed)
        jax.block_until_ready((self._state, metrics))

    def memory(self) -> None:
        """Write and read the batch's episodes, with the gradients of both."""
        own = {n: leaf for n, leaf in self._state.params.items() if n.startswith("memory/")}
        jax.block_until_ready(self._memory_gradients(own, self._encodings, self._state.params))

    def _memory_loss(self, own: Mapping[str, Any], encodings: jax.Array, params: Mapping[str, Any]):
        model = self._abstract.model({**params, **own, **self._frozen})
        memory = configs.make_memory(self._config)
        keys = jax.random.split(jax.random.key(0), encodings.shape[0])
        reading = objective.read_back(model, memory, encodings, keys)
        # As random a direction as any: a sum of latents has too simple a gradient.
        kl = objective.addressing_kl(reading.weights, reading.log_variance, 0.0)
        return jnp.sum(jnp.sin(reading.latent)) + jnp.sum(kl)
