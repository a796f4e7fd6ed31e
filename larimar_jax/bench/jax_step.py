"""This project's side of `bench/training.py`: its training step, and parts of it."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from larimar_jax import config as configs
from larimar_jax import decoders, encoders, objective, weights
from larimar_jax.data import episodes, store
from larimar_jax.memory.base import Reading
from larimar_jax.settings import Config, TowerConfig
from larimar_jax.train import sharding
from larimar_jax.train.step import TrainStep, initialise

# Size of the numbers that the second factors of low-rank changes are given.
_CHANGE = 0.01


def with_sizes(config: Config) -> Config:
    """The config with the family and the sizes of towers that it names by their weights alone.

    Raises:
        FileNotFoundError: the weights are not installed; the message names the command.
    """

    def known(tower: TowerConfig, kind: ModuleType) -> TowerConfig:
        if tower.sizes is not None:
            return tower
        family, sizes = weights.sizes(tower.source, kind)
        name = family.__name__.rpartition(".")[2]
        return dataclasses.replace(tower, family=name, sizes=sizes)

    model = dataclasses.replace(
        config.model,
        encoder=known(config.model.encoder, encoders),
        decoder=known(config.model.decoder, decoders),
    )
    return dataclasses.replace(config, model=model)


class Tokens(NamedTuple):
    """Ids int32 and mask bool, [N, T]."""

    ids: np.ndarray
    mask: np.ndarray


class _Ids:
    """In place of a tokenizer: a text is the number of its tokens, which are drawn at random."""

    def __init__(self, vocabulary: int, around: int, seed: int):
        # Special tokens last, as a decoder's are; `around` of them frame a text.
        self.pad, self.bos, self.eos = range(vocabulary - 3, vocabulary)
        self._vocabulary, self._around = vocabulary - 3, around
        self._draw = np.random.default_rng(seed)

    def encode(self, texts: Sequence[str]) -> Tokens:
        lengths = np.array([int(text) - self._around for text in texts])
        shape = (len(texts), int(lengths.max()))
        ids = self._draw.integers(1, self._vocabulary, shape, dtype=np.int32)
        return Tokens(ids, np.arange(shape[1]) < lengths[:, None])


def draw_pieces(config: Config, count: int, folder: Path) -> store.Store:
    """A store on disk, as a corpus would have it, of random tokens: half the room to all of it."""
    data, model = config.data, config.model
    room = min(data.encoder_tokens, data.decoder_tokens)
    lengths = np.random.default_rng(data.seed).integers(room // 2, room + 1, count)
    recipe = store.Recipe(
        "random", "training", data.unit, "random", "random", data.encoder_tokens, data.decoder_tokens
    )
    encoder = _Ids(model.encoder.sizes.vocab_size, 0, data.seed)
    decoder = _Ids(model.decoder.sizes.vocab_size, 2, data.seed + 1)
    return store.open_or_make(recipe, map(str, lengths), encoder, decoder, folder=folder)


class _NoMemory:
    """In place of a memory: a read is the query itself, addressed by its first K numbers."""

    def __init__(self, memory: Any):
        self._slots = memory.slots

    def prepare(self, params: Any, *, brief: bool) -> Any:
        return params

    def empty(self, prepared: Any) -> None:
        return None

    def write(self, prepared: Any, state: None, keys: Any, values: Any, rng: Any = None) -> None:
        return None

    def read(self, prepared: Any, state: None, queries: jax.Array, rng: Any = None) -> Reading:
        weights = jnp.resize(queries, (queries.shape[0], self._slots))
        variance = jnp.broadcast_to(prepared.log_variance, weights.shape)
        return Reading(queries, weights, variance, jnp.ones(queries.shape[0], jnp.float32))


class WithoutMemory(TrainStep):
    """A step in which latents reach the decoder without passing the memory."""

    def __init__(self, config: Config, skeleton: Any, mesh: jax.sharding.Mesh):
        super().__init__(config, skeleton, mesh)
        self._memory = _NoMemory(self._memory)


class Ours:
    """`train.step` on one device, and parts of it.

    batch: the constant one, numpy, as `episodes.episodes` yields it. flops: of the matrix products in
    the traced step.
    """

    def __init__(self, config: Config):
        self._config, self._mesh = config, sharding.make_mesh(config.train.mesh, jax.devices()[:1])
        self._skeleton, parameters = initialise(config, self._mesh)
        parameters |= _changes(parameters, config.data.seed)
        self._stepper = TrainStep(config, self._skeleton, self._mesh)
        self._without = WithoutMemory(config, self._skeleton, self._mesh)
        self._frozen = self._stepper.freeze(parameters)
        self._state = self._stepper.begin({n: parameters[n] for n in self._stepper.trained})
        episode, batch = config.data.episode[0], config.data.batch
        self._folder = tempfile.TemporaryDirectory(prefix="larimar-bench-")
        pieces = draw_pieces(config, 64 * episode * batch, Path(self._folder.name))
        data = config.data
        self._stream = iter(
            episodes.episodes(pieces, data.episode, batch, data.seed, workers=data.workers)
        )
        self.batch: dict[str, np.ndarray] = next(self._stream)
        self.flops: int = self._stepper.flops(episode)
        self._constant = sharding.place_batch(self.batch, self._mesh)
        draw = np.random.default_rng(0)
        shape = (batch, episode, config.model.latent)
        self._encodings = jnp.asarray(draw.standard_normal(shape, dtype=np.float32))
        self._memory_pass = jax.jit(self._memory_gradients)

    def model(self):
        """The model of the parameters as they now are."""
        return self._skeleton.model({**self._state.params, **self._frozen})

    def losses(self) -> dict[str, float]:
        """Loss, its terms and the gradients' norm on the constant batch, without any noise."""
        goal, memory = self._config.objective, configs.make_memory(self._config)

        def loss(params, batch):
            model = self._skeleton.model({**params, **self._frozen})
            return objective.losses(model, memory, batch, None, goal, jnp.float32(goal.kl))

        def both(params, batch):
            (total, terms), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
            squares = (jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients))
            return {"loss": total, **terms, "gradient_norm": jnp.sqrt(sum(squares))}

        found = jax.jit(both)(self._state.params, self._constant)
        return {name: float(value) for name, value in found.items()}

    def step(self) -> None:
        """One step on the constant batch."""
        self._run(self._stepper, self._constant)

    def step_of_pipeline(self) -> None:
        """One step on the next batch of the input pipeline."""
        self._run(self._stepper, sharding.place_batch(next(self._stream), self._mesh))

    def step_without_memory(self) -> None:
        """One step in which latents reach the decoder without passing the memory."""
        self._run(self._without, self._constant)

    def memory(self) -> None:
        """Write and read of the batch's episodes, and the gradients of both."""
        jax.block_until_ready(self._memory_pass(self._state.params, self._encodings))

    def _run(self, stepper: TrainStep, batch: Mapping[str, jax.Array]) -> None:
        self._state, metrics = stepper.step(self._state, self._frozen, batch)
        jax.block_until_ready((self._state, metrics))

    def _memory_gradients(self, params, encodings):
        memory = configs.make_memory(self._config)
        keys = jax.random.split(jax.random.key(0), encodings.shape[0])
        mine = {name: leaf for name, leaf in params.items() if name.startswith("memory/")}

        def of(mine, encodings):
            model = self._skeleton.model({**params, **mine, **self._frozen})
            reading = objective.read_back(model, memory, encodings, keys)
            # As random a direction as any: a sum of latents has too simple a gradient.
            kl = objective.addressing_kl(reading.weights, reading.log_variance, 0.0)
            return jnp.sum(jnp.sin(reading.latent)) + jnp.sum(kl)

        return jax.grad(of, argnums=(0, 1))(mine, encodings)


def _changes(parameters: Mapping[str, jax.Array], seed: int) -> dict[str, jax.Array]:
    """Second factors of low-rank changes, drawn: at zero the first would have no gradient to compare."""
    draw = np.random.default_rng(seed)
    return {
        name: jax.device_put(
            _CHANGE * draw.standard_normal(zeros.shape, dtype=np.float32), zeros.sharding
        )
        for name, zeros in parameters.items()
        if name.endswith("/lora_out")
    }


def products(size: int, count: int, factors: str = "float32") -> Callable[[], None]:
    """Computes that many products of two [size, size] matrices, one after the other, in float32.

    factors: the dtype of the matrices.
    """
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), jnp.float32) for key in keys)
    left, right = left.astype(factors), right.astype(factors)
    product = jax.jit(lambda left, right: jnp.matmul(left, right, preferred_element_type=jnp.float32))

    def run() -> None:
        for _ in range(count):
            product(left, right).block_until_ready()

    return run
