"""One step: the state that it changes, its loss and gradients, and what jit compiles."""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from larimar_jax import layers, model, objective
from larimar_jax.config import Config, make_memory
from larimar_jax.model import AbstractModel
from larimar_jax.train import optimizer, sharding
from larimar_jax.train.flops import count_flops

Metrics = dict[str, Array]

# Parameters of towers that every product, look-up or sum rounds to the compute dtype.
_ROUNDED = re.compile(
    r"^(encoder/layers/.*/kernel|decoder/(layers/.*/|head/|word/)(kernel|embedding))$"
)

# Weight of a new loss in the running mean that a spike is measured against: about 50 steps.
_MEAN_RATE = 0.02


class TrainState(NamedTuple):
    """What a step changes; also its shapes or its shardings, as a pytree of the same form.

    step: int32 scalar, how many steps are done. params: the trained ones, by path. optimizer:
    optax's state. average: their exponential moving average, by path; empty without `train.ema`.
    loss: float32 scalar, the running mean of the losses of good steps; inf before the first.
    """

    step: Any
    params: dict[str, Any]
    optimizer: Any
    average: dict[str, Any]
    loss: Any

    @property
    def evaluated(self) -> dict[str, Any]:
        """The parameters that are evaluated and exported: the average where there is one."""
        return self.average or self.params


def initialise(
    config: Config, mesh: Mesh, needed: Collection[str] | None = None
) -> tuple[AbstractModel, dict[str, Any]]:
    """Return the model and its parameters, each where its sharding rule puts it.

    Without pretrained towers they are created on the devices that will hold them, so that no host
    ever holds the whole model; with them, the files stream onto those devices.

    Args:
        needed: paths, where a checkpoint has the others: a pretrained tower of which none is needed is
            not loaded, and its parameters are ShapeDtypeStructs with shardings.
    Raises:
        ShardingRuleError: the rules do not fit the parameters.
        FileNotFoundError: a tower's `source` is not installed.
    """
    key, abstract = jax.random.key(config.train.seed), AbstractModel(model.abstract(config))
    where = sharding.parameter_shardings(config, abstract, mesh)
    loaded = [n for n in ("encoder", "decoder") if getattr(config.model, n).source is not None]
    if not loaded:
        create = jax.jit(
            lambda: dict(model.parameters(model.build(config, key))), out_shardings=where
        )
        return abstract, create()
    # Low-rank factors are put into a tower that is there.
    names = [n for n in abstract.parameters if needed is None or n in needed or "/lora_" in n]
    shapes = {
        tower: getattr(abstract.module, tower)
        for tower in loaded
        if not any(name.startswith(f"{tower}/") for name in names)
    }
    built = model.build(config, key, lambda name, _: where[name], shapes)
    for tower in shapes:
        delattr(built, tower)
    parameters = dict(model.parameters(built))
    parameters = jax.device_put(parameters, {name: where[name] for name in parameters})
    return abstract, _placed(abstract.parameters, where) | parameters


class TrainStep:
    """The compiled step of a run, and where its arguments live.

    Attributes:
        trained, frozen: parameter paths by their role; names of `trained` in the model's order.
        state_shardings: a TrainState of NamedShardings.
        step: (state, frozen, batch) → (state, metrics), compiled; the state is donated.
        init: trained parameters → the state before the first step, compiled.
    Raises:
        ValueError: a part of the batch (train.accumulate) does not divide over the mesh.
    """

    def __init__(self, config: Config, abstract: AbstractModel, mesh: Mesh):
        if config.model.reader is not None:
            raise ValueError(
                "model.reader: a reader is fitted to frozen towers (`larimar train` does it) and not "
                "trained by Eq. 1. Take a config without one."
            )
        self.config, self.abstract, self.mesh = config, abstract, mesh
        self._memory = make_memory(config)
        self._optimizer = optimizer.make(config.train)
        self._rate = optimizer.learning_rate(config.train)
        self._flops: dict[tuple[int, ...], int] = {}
        _check_batch(config, mesh)
        where = sharding.parameter_shardings(config, abstract, mesh)
        # The split is what the optimiser sees: its own state, and the gradients on their way to it.
        self._split, self.frozen_shardings = optimizer.partition(where, config.train.frozen)
        self.trained, self.frozen = list(self._split), list(self.frozen_shardings)
        held = self._split
        if config.train.layout == "zero2":
            held = sharding.whole_along(held, "fsdp")
            self.frozen_shardings = sharding.whole_along(self.frozen_shardings, "fsdp")
        shapes = {name: abstract.parameters[name] for name in self.trained}
        whole = sharding.replicated(mesh)

        def place(path, slot):
            # A slot lies under its parameter's name. Adafactor's statistics, rows and columns of a
            # parameter, are small: whole everywhere.
            names = [key.key for key in path if getattr(key, "key", None) in shapes]
            alike = names and slot.shape == shapes[names[-1]].shape
            return self._split[names[-1]] if alike else whole

        self.state_shardings = TrainState(
            step=whole,
            params=held,
            optimizer=jax.tree_util.tree_map_with_path(
                place, jax.eval_shape(self._optimizer.init, shapes)
            ),
            average=self._split if config.train.ema else {},
            loss=whole,
        )
        fields = ("encoder_tokens", "encoder_mask", "decoder_tokens", "decoder_mask")
        self.batch_shardings = dict.fromkeys(fields, NamedSharding(mesh, sharding.BATCH))
        self.init: Callable[[dict[str, Array]], TrainState] = jax.jit(
            self._init, in_shardings=(self._split,), out_shardings=self.state_shardings
        )
        self.step: Callable[..., tuple[TrainState, Metrics]] = jax.jit(
            self._step,
            in_shardings=(self.state_shardings, self.frozen_shardings, self.batch_shardings),
            out_shardings=(self.state_shardings, whole),
            donate_argnums=0,
        )

    def abstract_state(self) -> TrainState:
        """Return the state as ShapeDtypeStructs with shardings: what a restore asks for."""
        shapes = {name: self.abstract.parameters[name] for name in self.trained}
        return _placed(jax.eval_shape(self._init, shapes), self.state_shardings)

    def arguments(
        self, episode: int, *lengths: int
    ) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """Return what `step` takes for episodes of this size, as ShapeDtypeStructs with shardings.

        Args:
            lengths: S and T; none are the largest.
        """
        data = self.config.data
        lengths = lengths or (data.encoder_tokens, data.decoder_tokens)
        batch = {
            f"{tower}_{kind}": jax.ShapeDtypeStruct((data.batch, episode, length), dtype)
            for tower, length in zip(("encoder", "decoder"), lengths, strict=True)
            for kind, dtype in (("tokens", jnp.int32), ("mask", jnp.bool_))
        }
        shapes = {name: self.abstract.parameters[name] for name in self.frozen}
        frozen = {n: leaf.update(dtype=self._held_dtype(n)) for n, leaf in shapes.items()}
        frozen = _placed(frozen, self.frozen_shardings)
        return self.abstract_state(), frozen, _placed(batch, self.batch_shardings)

    def flops(self, *shape: int) -> int:
        """Return FLOPs of a step's matrix products on all devices, without what remat repeats.

        Args:
            shape: as of `arguments`.
        """
        if shape not in self._flops:
            lean = self
            if self.config.model.remat != "none":
                plain = dataclasses.replace(self.config.model, remat="none")
                config = dataclasses.replace(self.config, model=plain)
                lean = TrainStep(config, AbstractModel(model.abstract(config)), self.mesh)
            self._flops[shape] = count_flops(lean._step, *lean.arguments(*shape))
        return self._flops[shape]

    def freeze(self, parameters: Mapping[str, Array]) -> dict[str, Array]:
        """Return the frozen ones of all parameters, where and in the dtype that a step wants."""
        held = {n: parameters[n].astype(self._held_dtype(n)) for n in self.frozen}
        return jax.device_put(held, self.frozen_shardings)

    def _held_dtype(self, name: str) -> Any:
        """Return the dtype of a frozen parameter: of a tower's source, rounded as at every use."""
        towers = {"encoder": self.config.model.encoder, "decoder": self.config.model.decoder}
        tower = towers.get(name.split("/")[0])
        is_rounded = tower is not None and tower.source is not None and _ROUNDED.search(name)
        return jnp.dtype(self.config.model.dtype if is_rounded else jnp.float32)

    def loss(self, params, frozen, batch, keys, weights, beta, **options):
        """Return Eq. 1 and its terms (`objective.loss`), on the mesh of this step."""
        # Models know no mesh: they split rows over the mesh that JAX traces under.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self._loss(params, frozen, batch, keys, weights, beta, **options)

    def _loss(self, params, frozen, batch, keys, weights, beta, **options):
        larimar = self.abstract.model({**params, **frozen})
        return objective.loss(larimar, self._memory, batch, keys, weights, beta, **options)

    def _init(self, params: dict[str, Array]) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            optimizer=self._optimizer.init(params),
            average=dict(params) if self.config.train.ema else {},
            loss=jnp.full((), jnp.inf, jnp.float32),
        )

    def _step(self, state: TrainState, frozen: dict[str, Array], batch: dict[str, Array], key=None):
        config = self.config
        key = jax.random.key(config.train.seed) if key is None else key
        # A function of seed and step alone, so that a resumed run needs no random state.
        rng = jax.random.fold_in(key, state.step)
        keys = jax.random.split(rng, config.data.batch)
        # Every device draws all keys: split over devices, drawing them would take an exchange.
        keys = jax.lax.with_sharding_constraint(keys, sharding.replicated(self.mesh))
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
        mean = jnp.where(jnp.isinf(state.loss), loss, state.loss + _MEAN_RATE * (loss - state.loss))
        stepped = TrainState(count, params, slots, self._average(state, params, count), mean)
        # A bad step changes nothing, so that what is saved afterwards is sound.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        spike = config.train.spike
        sound = finite & (loss <= state.loss + spike) if spike else finite
        metrics = {
            "loss": loss,
            "terms": terms,
            "beta": beta,
            # By the optimiser's own count: a skipped step does not move it.
            "learning_rate": self._rate(
                optax.tree_utils.tree_get_all_with_path(state.optimizer, "count")[0][1]
            ),
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
        """Return ((loss, terms), gradients) of the batch, computed in `train.accumulate` parts."""
        config, parts = self.config, self.config.train.accumulate
        divide = objective.counts(batch, config.objective)

        def gradients_of(loss, params, frozen, divide, beta, *episodes):
            def loss_of(params: dict[str, Array]):
                options = dict(divide=divide, product_dtype=config.train.products)
                options["vocabulary_multiple"] = config.train.vocabulary_multiple
                return loss(params, frozen, *episodes, config.objective, beta, **options)

            return jax.value_and_grad(loss_of, has_aux=True)(params)

        def reduced(*arguments):
            # Gradients summed over devices, each where its part of the optimiser is.
            value, gradients = gradients_of(self.loss, *arguments)
            return value, jax.lax.with_sharding_constraint(gradients, self._split)

        def summed(gradients_of, sharding, *arguments):
            *shared, batch, keys = arguments

            def part(array):
                # Every device's episodes are spread over all parts, so that no episode has to move.
                array = array.reshape(array.shape[0] // parts, parts, *array.shape[1:])
                array = array.swapaxes(0, 1)
                return jax.lax.with_sharding_constraint(array, sharding) if sharding else array

            def add(total, episodes):
                return jax.tree.map(jnp.add, total, gradients_of(*shared, *episodes)), None

            episodes = jax.tree.map(part, (batch, keys))
            shapes = jax.eval_shape(gradients_of, *shared, *jax.tree.map(lambda a: a[0], episodes))
            value, gradients = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
            if sharding:
                gradients = jax.lax.with_sharding_constraint(gradients, self._split)
            return jax.lax.scan(add, (value, gradients), episodes)[0]

        arguments = (params, frozen, divide, beta, batch, keys)
        if parts == 1:
            return reduced(*arguments)
        if config.train.layout != "zero2" or self.mesh.shape["tensor"] > 1:
            return summed(reduced, NamedSharding(self.mesh, sharding.PARTS), *arguments)

        def alone(*arguments):
            # A device that holds all parameters sums its own parts, and the devices meet once.
            local = functools.partial(gradients_of, self._loss)
            return jax.lax.psum(summed(local, None, *arguments), layers.ROW_AXES)

        specs = (P(), P(), P(), P(), sharding.BATCH, sharding.BATCH)
        value, gradients = jax.shard_map(
            alone, mesh=self.mesh, in_specs=specs, out_specs=P(), check_vma=False
        )(*arguments)
        return value, jax.lax.with_sharding_constraint(gradients, self._split)

    def _average(self, state: TrainState, params: dict[str, Array], count: Array):
        # Early on the average is of few steps, so that it does not hold on to the start.
        done = count.astype(jnp.float32)
        decay = jnp.minimum(self.config.train.ema, (1.0 + done) / (10.0 + done))
        return {n: params[n] + decay * (mean - params[n]) for n, mean in state.average.items()}


def _placed(shapes: Any, where: Any) -> Any:
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, where)


def _check_batch(config: Config, mesh: Mesh) -> None:
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
