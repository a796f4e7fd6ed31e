"""One step: the model as a flat dict of parameters, its state, and what jit compiles."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from larimar_jax import model, objective
from larimar_jax.config import Config, make_memory
from larimar_jax.train import optimizer, sharding

Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """What a step changes; also the shapes or the shardings of it, as a pytree of the same form.

    step: int32 scalar, how many steps are done. params: the trained ones, by path. optimizer:
    optax's state.
    """

    step: Any
    params: dict[str, Any]
    optimizer: Any


class Skeleton:
    """A model without its numbers: turns parameters by '/'-joined path back into a model."""

    def __init__(self, abstract: nnx.Module):
        self._graph, params, rest = nnx.split(abstract, nnx.Param, ...)
        if jax.tree.leaves(rest):
            raise TypeError(
                "the model holds variables that are no parameters, which training would lose: "
                + ", ".join("/".join(map(str, path)) for path, _ in nnx.to_flat_state(rest))
            )
        self._flat = list(nnx.to_flat_state(params))
        self.parameters: dict[str, jax.ShapeDtypeStruct] = {
            "/".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in self._flat
        }

    def model(self, parameters: Mapping[str, Array]) -> model.Larimar:
        """The model with these parameters (all of them)."""
        state = nnx.from_flat_state(
            (path, leaf.replace(parameters["/".join(map(str, path))])) for path, leaf in self._flat
        )
        return nnx.merge(self._graph, state)


def initialise(config: Config, mesh: Mesh) -> tuple[Skeleton, dict[str, Array]]:
    """The model's parameters, each where its sharding rule puts it.

    Without pretrained towers they are made on the devices that will hold them, so that no host ever
    holds the whole model; with them, the files stream onto those devices.

    Raises:
        ShardingRuleError: the rules do not fit the parameters.
        FileNotFoundError: a tower's `source` is not installed.
    """
    key = jax.random.key(config.train.seed)
    towers = (config.model.encoder, config.model.decoder)
    if any(tower.source is not None for tower in towers):
        built = model.build(config, key, sharding.where(mesh))
        where = sharding.shardings(mesh, model.parameters(built))
        return Skeleton(built), sharding.place(dict(model.parameters(built)), where)
    skeleton = Skeleton(nnx.eval_shape(lambda: model.build(config, key)))
    where = sharding.shardings(mesh, skeleton.parameters)
    make = jax.jit(lambda: dict(model.parameters(model.build(config, key))), out_shardings=where)
    return skeleton, make()


class Stepper:
    """The compiled functions of a run, and where their arguments live.

    Args:
        config: the run's config.
        skeleton: the model without its numbers.
        mesh: where to run.
    Attributes:
        trained, frozen: parameter paths by their role; names of `trained` in the model's order.
        state_shardings: a TrainState of NamedShardings.
    """

    def __init__(self, config: Config, skeleton: Skeleton, mesh: Mesh):
        self._config, self._skeleton = config, skeleton
        self._memory = make_memory(config)
        self._optimizer = optimizer.make(config.train)
        self._rate = optimizer.learning_rate(config.train)
        where = sharding.shardings(mesh, skeleton.parameters)
        trained, frozen = optimizer.partition(where, config.train.frozen)
        self.trained, self.frozen = list(trained), list(frozen)
        whole = sharding.replicated(mesh)
        slots = jax.eval_shape(
            self._optimizer.init, {name: skeleton.parameters[name] for name in trained}
        )
        self.state_shardings = TrainState(
            step=whole,
            params=trained,
            optimizer=optax.tree_map_params(
                self._optimizer,
                lambda _, place: place,
                slots,
                trained,
                transform_non_params=lambda _: whole,
            ),
        )
        batch = {
            name: sharding.batch_sharding(mesh)
            for name in ("encoder_tokens", "encoder_mask", "decoder_tokens", "decoder_mask")
        }
        self.begin: Callable[[dict[str, Array]], TrainState] = jax.jit(
            self._begin, in_shardings=(trained,), out_shardings=self.state_shardings
        )
        self.step: Callable[..., tuple[TrainState, Metrics]] = jax.jit(
            self._step,
            in_shardings=(self.state_shardings, frozen, batch),
            out_shardings=(self.state_shardings, whole),
            donate_argnums=0,
        )
        self.evaluate: Callable[..., Metrics] = jax.jit(
            self._evaluate, in_shardings=(trained, frozen, batch), out_shardings=whole
        )

    def abstract(self) -> TrainState:
        """The state as ShapeDtypeStructs that know their sharding: what a restore asks for."""
        shapes = jax.eval_shape(
            self._begin, {name: self._skeleton.parameters[name] for name in self.trained}
        )
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            self.state_shardings,
        )

    def _begin(self, params: dict[str, Array]) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, self._optimizer.init(params))

    def _step(self, state: TrainState, frozen: dict[str, Array], batch: dict[str, Array]):
        config = self._config
        # A function of seed and step alone, so that a resumed run needs no random state.
        rng = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        beta = objective.beta_schedule(
            state.step, config.train.steps, config.objective.kl, config.objective.kl_cycles
        )

        def loss_of(params: dict[str, Array]):
            larimar = self._skeleton.model({**params, **frozen})
            return objective.losses(larimar, self._memory, batch, rng, config.objective, beta)

        (loss, terms), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        # One number a parameter: their sum is the squared norm, and a NaN can be traced to it.
        squares = jnp.stack([jnp.sum(jnp.square(gradients[name])) for name in self.trained])
        norm = jnp.sqrt(jnp.sum(squares))
        updates, slots = self._optimizer.update(gradients, state.optimizer, state.params)
        stepped = TrainState(state.step + 1, optax.apply_updates(state.params, updates), slots)
        # A step that is not finite changes nothing, so that what is saved afterwards is sound.
        sound = jnp.isfinite(loss) & jnp.isfinite(norm)
        state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), stepped, state)
        metrics = {
            "loss": loss,
            "terms": terms,
            "beta": beta,
            "learning_rate": self._rate(stepped.step - 1),
            "gradient_norm": norm,
            "gradient_squares": squares,
        }
        return state, metrics

    def _evaluate(
        self, params: dict[str, Array], frozen: dict[str, Array], batch: dict[str, Array]
    ) -> Metrics:
        # All three routes whatever the run optimises: reconstruction against language is what shows
        # that the memory is used, since the latter is the same text decoded with z = 0.
        weights = dataclasses.replace(
            self._config.objective, reconstruction=1.0, autoencoding=1.0, language=1.0
        )
        larimar = self._skeleton.model({**params, **frozen})
        return objective.losses(larimar, self._memory, batch, None, weights, jnp.float32(0.0))[1]
