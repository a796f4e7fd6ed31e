"""One step: the model as a flat dict of parameters, its state, and what jit compiles."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from larimar_jax import linalg, model, objective
from larimar_jax.config import Config, make_memory
from larimar_jax.model import AbstractModel
from larimar_jax.train import edits, flops, optimizer, sharding

Metrics = dict[str, Array]


# Weight of a new loss in the running mean that a spike is measured against: about 50 steps.
_NEW = 0.02


class TrainState(NamedTuple):
    """What a step changes; also the shapes or the shardings of it, as a pytree of the same form.

    step: int32 scalar, how many steps are done. params: the trained ones, by path. optimizer:
    optax's state. average: their exponential moving average, by path; empty without `train.ema`.
    loss: float32 scalar, the running mean of the losses of steps that counted; inf before the first.
    """

    step: Any
    params: dict[str, Any]
    optimizer: Any
    average: dict[str, Any]
    loss: Any


def shardings(abstract: AbstractModel, config: Config, mesh: Mesh) -> dict[str, NamedSharding]:
    """Return where each parameter is split, before `train.layout` has its say."""
    rules = sharding.rules(abstract.module, config.train.memory_layout)
    return sharding.shardings(mesh, abstract.parameters, rules)


def initialise(config: Config, mesh: Mesh) -> tuple[AbstractModel, dict[str, Array]]:
    """The model's parameters, each where its sharding rule puts it.

    Without pretrained towers they are made on the devices that will hold them, so that no host ever
    holds the whole model; with them, the files stream onto those devices.

    Raises:
        ShardingRuleError: the rules do not fit the parameters.
        FileNotFoundError: a tower's `source` is not installed.
    """
    key = jax.random.key(config.train.seed)
    skeleton = AbstractModel(model.abstract(config))
    where = shardings(skeleton, config, mesh)
    towers = (config.model.encoder, config.model.decoder)
    if any(tower.source is not None for tower in towers):
        built = model.build(config, key, lambda name, _: where[name])
        return skeleton, sharding.place(dict(model.parameters(built)), where)
    make = jax.jit(lambda: dict(model.parameters(model.build(config, key))), out_shardings=where)
    return skeleton, make()


class TrainStep:
    """The compiled functions of a run, and where their arguments live.

    Args:
        config: the run's config.
        skeleton: the model without its numbers.
        mesh: where to run.
    Attributes:
        trained, frozen: parameter paths by their role; names of `trained` in the model's order.
        state_shardings: a TrainState of NamedShardings.
        arguments: ShapeDtypeStructs of what `step` takes, with their shardings, for an episode size.
    Raises:
        ValueError: a part of the batch (train.accumulate) does not divide over the mesh.
    """

    def __init__(self, config: Config, skeleton: AbstractModel, mesh: Mesh):
        self._config, self._skeleton, self._mesh = config, skeleton, mesh
        self._memory = make_memory(config)
        self._flops: dict[int, int] = {}
        self._optimizer = optimizer.make(config.train)
        self._rate = optimizer.learning_rate(config.train)
        _check_parts(config, mesh)
        where = shardings(skeleton, config, mesh)
        split, self._frozen = optimizer.partition(where, config.train.frozen)
        self.trained, self.frozen = list(split), list(self._frozen)
        whole = sharding.replicated(mesh)
        # What the optimiser sees: its own state, and the gradients on their way to it.
        self._split = split
        held = split
        if config.train.layout == "zero2":
            held = {name: sharding.without(place, "fsdp") for name, place in split.items()}
            self._frozen = {n: sharding.without(p, "fsdp") for n, p in self._frozen.items()}
        shapes = {name: skeleton.parameters[name] for name in split}
        slots = jax.eval_shape(self._optimizer.init, shapes)
        self.state_shardings = TrainState(
            step=whole,
            params=held,
            optimizer=optax.tree_map_params(
                self._optimizer,
                lambda slot, place, like: sharding.fitting(place, slot.shape, like.shape),
                slots,
                split,
                shapes,
                transform_non_params=lambda _: whole,
            ),
            average=split if config.train.ema else {},
            loss=whole,
        )
        fields = ("encoder_tokens", "encoder_mask", "decoder_tokens", "decoder_mask")
        self._batch = {name: sharding.batch_sharding(mesh) for name in fields}
        self.begin: Callable[[dict[str, Array]], TrainState] = jax.jit(
            self._begin, in_shardings=(split,), out_shardings=self.state_shardings
        )
        self.step: Callable[..., tuple[TrainState, Metrics]] = jax.jit(
            self._step,
            in_shardings=(self.state_shardings, self._frozen, self._batch),
            out_shardings=(self.state_shardings, whole),
            donate_argnums=0,
        )
        # What `step` compiles, for whoever wants to look inside.
        self.traced: Callable[..., tuple[TrainState, Metrics]] = self._step
        self.evaluate: Callable[..., Metrics] = jax.jit(
            self._evaluate, in_shardings=(None, self._frozen, self._batch), out_shardings=whole
        )

        self.edit: Callable[..., Metrics] = jax.jit(
            self._edits, in_shardings=(None, self._frozen, whole), out_shardings=whole
        )

    def abstract(self) -> TrainState:
        """The state as ShapeDtypeStructs that know their sharding: what a restore asks for."""
        shapes = jax.eval_shape(
            self._begin, {name: self._skeleton.parameters[name] for name in self.trained}
        )
        return _placed(shapes, self.state_shardings)

    def arguments(self, episode: int) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """What `step` takes for episodes of this size, as ShapeDtypeStructs with their shardings."""
        data = self._config.data
        batch = {
            f"{tower}_{kind}": jax.ShapeDtypeStruct((data.batch, episode, length), dtype)
            for tower, length in (
                ("encoder", data.encoder_tokens),
                ("decoder", data.decoder_tokens),
            )
            for kind, dtype in (("tokens", jnp.int32), ("mask", jnp.bool_))
        }
        frozen = {name: self._skeleton.parameters[name] for name in self.frozen}
        return self.abstract(), _placed(frozen, self._frozen), _placed(batch, self._batch)

    def flops(self, episode: int) -> int:
        """FLOPs of a step's matrix products on all devices, without what remat computes again."""
        if episode not in self._flops:
            config, stepper = self._config, self
            if config.model.remat != "none":
                lean = dataclasses.replace(config.model, remat="none")
                config = dataclasses.replace(config, model=lean)
                stepper = TrainStep(config, AbstractModel(model.abstract(config)), self._mesh)
            self._flops[episode] = flops.count(stepper.traced, *stepper.arguments(episode))
        return self._flops[episode]

    def freeze(self, parameters: Mapping[str, Array]) -> dict[str, Array]:
        """The frozen ones of all parameters, where a step wants them."""
        return sharding.place({name: parameters[name] for name in self.frozen}, self._frozen)

    def _begin(self, params: dict[str, Array]) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            optimizer=self._optimizer.init(params),
            average=dict(params) if self._config.train.ema else {},
            loss=jnp.full((), jnp.inf, jnp.float32),
        )

    def _step(self, state: TrainState, frozen: dict[str, Array], batch: dict[str, Array]):
        config = self._config
        # A function of seed and step alone, so that a resumed run needs no random state.
        rng = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        keys = jax.random.split(rng, config.data.batch)
        # Every device draws all keys: split over devices, drawing them would take an exchange.
        keys = jax.lax.with_sharding_constraint(keys, sharding.replicated(self._mesh))
        beta = objective.beta_schedule(
            state.step, config.train.steps, config.objective.kl, config.objective.kl_cycles
        )
        (loss, terms), gradients = self._gradients(state.params, frozen, batch, keys, beta)
        # One number a parameter: their sum is the squared norm, and a NaN can be traced to it.
        squares = jnp.stack([jnp.sum(jnp.square(gradients[name])) for name in self.trained])
        norm = jnp.sqrt(jnp.sum(squares))
        updates, slots = self._optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.step + 1
        stepped = TrainState(
            count,
            params,
            slots,
            self._averaged(state.average, params, count),
            jnp.where(jnp.isinf(state.loss), loss, state.loss + _NEW * (loss - state.loss)),
        )
        # A bad step changes nothing, so that what is saved afterwards is sound.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        spike = config.train.spike
        sound = finite & (loss <= state.loss + spike) if spike else finite
        metrics = {
            "loss": loss,
            "terms": terms,
            "beta": beta,
            # Of the optimiser's own count: a step that was skipped does not move it.
            "learning_rate": self._rate(_count(state.optimizer)),
            "gradient_norm": norm,
            "gradient_squares": squares,
            "sound": sound,
            "usual_loss": state.loss,
        }
        state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), stepped, state)
        if config.train.on_bad_step == "skip":
            state = state._replace(step=count)
        return state, metrics

    def _gradients(self, params, frozen, batch, keys, beta):
        """((loss, terms), gradients) of the whole batch, computed in `train.accumulate` parts."""
        config = self._config
        divide = objective.counts(batch, config.objective)

        def loss_of(params: dict[str, Array], batch, keys):
            how = dict(divide=divide, product_dtype=config.train.products)
            return self._loss(params, frozen, batch, keys, config.objective, beta, **how)

        graded = jax.value_and_grad(loss_of, has_aux=True)
        parts = config.train.accumulate
        if parts == 1:
            found, gradients = graded(params, batch, keys)
            return found, self._reduced(gradients)

        def part(array):
            # Every device's episodes are spread over all parts, so that none has to move.
            array = array.reshape(array.shape[0] // parts, parts, *array.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(array, sharding.part_sharding(self._mesh))

        def add(total, episodes):
            found = graded(params, *episodes)
            found = (found[0], self._reduced(found[1]))
            return jax.tree.map(jnp.add, total, found), None

        shapes = jax.eval_shape(
            graded, params, *jax.tree.map(lambda a: a[: a.shape[0] // parts], (batch, keys))
        )
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        zero = (zero[0], self._reduced(zero[1]))
        return jax.lax.scan(add, zero, jax.tree.map(part, (batch, keys)))[0]

    def _reduced(self, gradients: dict[str, Array]) -> dict[str, Array]:
        """Gradients summed over devices, each where its part of the optimiser is."""
        return jax.lax.with_sharding_constraint(gradients, self._split)

    def _averaged(self, average: dict[str, Array], params: dict[str, Array], count: Array):
        # Early on the average is of few steps, so that it does not hold on to the start.
        done = count.astype(jnp.float32)
        kept = jnp.minimum(self._config.train.ema, (1.0 + done) / (10.0 + done))
        return {name: params[name] + kept * (old - params[name]) for name, old in average.items()}

    def _evaluate(
        self, params: dict[str, Array], frozen: dict[str, Array], batch: dict[str, Array]
    ) -> Metrics:
        # All three routes whatever the run optimises: reconstruction against language is what shows
        # that the memory is used, since the latter is the same text decoded with z = 0.
        weights = dataclasses.replace(
            self._config.objective, reconstruction=1.0, autoencoding=1.0, language=1.0
        )
        terms = self._loss(params, frozen, batch, None, weights, jnp.float32(0.0))[1]
        larimar = self._skeleton.model({**params, **frozen})
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
            base = objective.untouched(larimar, batch, objective.counts(batch, weights))
        condition = linalg.matrix_condition(larimar.memory.prior_memory[...])
        return {**terms, "base": base, "memory_condition": condition}

    def _edits(
        self, params: dict[str, Array], frozen: dict[str, Array], texts: dict[str, Array]
    ) -> Metrics:
        larimar = self._skeleton.model({**params, **frozen})
        return edits.score(larimar, texts, self._config.editing)

    def _loss(self, params, frozen, batch, keys, weights, beta, **how):
        larimar = self._skeleton.model({**params, **frozen})
        # Models know no mesh: they split rows over whichever JAX traces under.
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
            return objective.loss(larimar, self._memory, batch, keys, weights, beta, **how)


def _count(slots: Any) -> Array:
    """How many updates the optimiser has made."""
    return optax.tree_utils.tree_get_all_with_path(slots, "count")[0][1]


def _placed(shapes: Any, where: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        where,
    )


def _check_parts(config: Config, mesh: Mesh) -> None:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    batch, parts = config.data.batch, config.train.accumulate
    if ways % jax.process_count():
        raise ValueError(
            f"train.mesh has {ways} devices along data and fsdp, which {jax.process_count()} processes "
            "do not divide: tensor would split an episode over hosts. Give it at most a host's devices."
        )
    if batch % (ways * parts):
        raise ValueError(
            f"data.batch is {batch}: its {parts} part(s) (train.accumulate) do not divide over the"
            f" {ways} devices of the mesh's data and fsdp axes (train.mesh). Take a batch that is a"
            f" multiple of {ways * parts}."
        )
