"""Larimar: the only place where encoder, memory and decoder meet (§2, §10)."""

import dataclasses
import math
import types
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import decoders, encoders, lora, weights
from larimar_jax.config import Config, make_memory
from larimar_jax.decoders.decoder import Cache, Prefix, Tree
from larimar_jax.decoders.reader import Reader, ReaderConfig
from larimar_jax.latent_layout import Condition, TokenEvidence
from larimar_jax.memory.base import MemoryParams
from larimar_jax.weights import model_file

_KINDS = {"encoder": encoders, "decoder": decoders}
Towers = Mapping[str, nnx.Module]  # by "encoder" and "decoder"
NO_TOWERS: Towers = types.MappingProxyType({})


class PriorMemory(nnx.Module):
    """M₀ and what log σ_W² is made of (§1, §3): the learned parameters of the memory.

    Raises:
      ValueError: M_ref is not M₀. Nothing learns such a one, and a model has no place for it.
    """

    def __init__(self, params: MemoryParams):
        if params.reference_memory is not None:
            raise ValueError("a model's memory is addressed by M₀; give M_ref to its states alone")
        for field in dataclasses.fields(params):
            value = getattr(params, field.name)
            setattr(self, field.name, None if value is None else nnx.Param(value))

    def params(self) -> MemoryParams:
        """Return the parameters as the memory's functions take them."""
        parameters = {f.name: getattr(self, f.name) for f in dataclasses.fields(MemoryParams)}
        return MemoryParams(**{n: None if p is None else p[...] for n, p in parameters.items()})


class Larimar(nnx.Module):
    """Encoder e, decoder d, the projections between them, and the memory's parameters."""

    def __init__(
        self,
        encoder: nnx.Module,
        decoder: nnx.Module,
        memory_params: MemoryParams,
        *,
        latent: int,
        slots_per_layer: int,
        tied_slots: bool,
        conditioning: str = "both",
        reader: ReaderConfig | None = None,
        rngs: nnx.Rngs,
    ):
        c = decoder.config
        parts = 1 if tied_slots else 2  # key and value
        self.slot_shape = (c.depth, slots_per_layer, parts, c.kv_heads, c.head_size)
        self.encoder, self.decoder, self.conditioning = encoder, decoder, conditioning
        # Square and from a sentence encoder: start as the identity, so that latents are its sentence
        # embeddings until training finds better ones.
        square, width = encoder.config.width == latent, encoder.config.width
        draw = (lambda *_: jnp.eye(latent)) if square else nnx.initializers.lecun_normal()
        # What goes into the memory is rounded as little as its algebra, on a GPU too.
        exact = dict(precision=jax.lax.Precision.HIGHEST, use_bias=False, rngs=rngs)
        self.to_latent = nnx.Linear(width, latent, kernel_init=draw, **exact)
        if reader is not None:
            self.reader = Reader(reader, width, latent, c.width, rngs)
        else:
            size, draw = math.prod(self.slot_shape), nnx.initializers.normal(0.02)
            self.to_slots = nnx.Linear(latent, size, use_bias=False, rngs=rngs)
            without = dict(use_bias=False, kernel_init=draw, rngs=rngs)
            self.to_embedding = nnx.Linear(latent, c.width, **without)
        self.memory = PriorMemory(memory_params)

    def embed(
        self,
        tokens: Int[Array, "*rows S"],
        mask: Bool[Array, "*rows S"],
        product_dtype: DTypeLike | None = None,
    ) -> Float[Array, "*rows H"]:
        """Return the encoder's pooled output, float32; what the scope detector compares (§6)."""
        flat = (tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]))
        pooled = self.encoder(*flat, product_dtype)
        return pooled.astype(jnp.float32).reshape(*tokens.shape[:-1], -1)

    def encode(
        self,
        tokens: Int[Array, "*rows S"],
        mask: Bool[Array, "*rows S"],
        product_dtype: DTypeLike | None = None,
    ) -> Float[Array, "*rows C"]:
        """Return Z = e(X), float32. A row without a token is padding and encodes to exactly zero.

        Args:
          product_dtype: what the factors of products with kernels are rounded to (`layers.product`).
        """
        latent = self.to_latent(self.embed(tokens, mask, product_dtype))
        return jnp.where(mask.any(axis=-1, keepdims=True), latent, 0.0)

    def condition(
        self,
        latent: Float[Array, "B C"],
        active: Bool[Array, " B"] | None = None,
        evidence: TokenEvidence | None = None,
        answer: Float[Array, "B R"] | None = None,
    ) -> Condition:
        """Return memory slots and embedding of a latent (§2), with what was read of the answer.

        A zero latent is the paper's "no memory" (z = 0): the slot is there and holds zeros. A row whose
        `active` is False is decoded as by the untouched base LM (`decoders.decoder.Prefix`).
        """
        if hasattr(self, "reader"):
            return Condition(None, evidence, answer)
        rows, dtype = latent.shape[0], self.decoder.dtype
        to_slots, to_embedding = (
            latent if self.conditioning in ("both", way) else jnp.zeros_like(latent)
            for way in ("slots", "embedding")
        )
        slots = self.to_slots(to_slots).reshape(rows, *self.slot_shape).swapaxes(0, 1).astype(dtype)
        prefix = Prefix(
            embedding=self.to_embedding(to_embedding).astype(dtype),
            key=slots[:, :, :, 0],
            value=slots[:, :, :, -1],
            active=jnp.ones((rows,), bool) if active is None else active,
        )
        return Condition(prefix, evidence, answer)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        condition: Condition | None = None,
        cache: Cache | None = None,
        start: Int[Array, " B"] | None = None,
        tree: Tree | None = None,
        product_dtype: DTypeLike | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Return the decoder's last hidden states, as `Decoder.hidden`; no condition is the base LM."""
        prefix = None if condition is None else condition.prefix
        return self.decoder.hidden(tokens, prefix, cache, start, tree, product_dtype)


def build(
    config: Config, key: jax.Array, where: weights.Where | None = None, shapes: Towers = NO_TOWERS
) -> Larimar:
    """Return a model from its config: towers with a `source` loaded, everything else initialised.

    Without sources it is pure and works under `jax.jit` and `nnx.eval_shape`.

    Args:
      where: the sharding of each loaded parameter, by its '/'-joined path in the model and its
        shape; loading then streams onto the devices. None is one device.
      shapes: towers that stay shapes, and are not loaded.

    Raises:
      FileNotFoundError: where a source's package is not installed; the message names the command.
      ValueError: a source whose sizes are not those that the config gives with it; names them.
    """
    loaded = {name: tower for name, (tower, _) in load_towers(config, where, shapes).items()}
    return _create(config, loaded | dict(shapes), nnx.Rngs(params=key))


def load_towers(
    config: Config, where: weights.Where | None = None, without: Container[str] = ()
) -> dict[str, tuple[nnx.Module, weights.Tokenizer]]:
    """Return the towers with a `source`, by "encoder" and "decoder", and their tokenizers.

    Args:
      where: as in `build`. without: names of towers that are not loaded.

    Raises:
      FileNotFoundError, ValueError: as `build`.
    """
    towers = {}
    for name, (tower, kind, how) in _towers(config).items():
        if tower.source is None or name in without:
            continue
        if tower.sizes is not None:
            _check_source(name, tower, kind)
        inside = where and (lambda path, shape, name=name: where(f"{name}/{path}", shape))
        load = getattr(weights, f"load_{name}")
        towers[name] = load(tower.source, **how, where=inside)
    return towers


def check_sources(config: Config) -> None:
    """Check that each source is there, with a tokenizer that fits, and of the sizes in the config.

    No tensor is read. Raises as `build`."""
    for name, (tower, kind, _) in _towers(config).items():
        if tower.source is not None:
            _check_source(name, tower, kind)


def _check_source(name: str, tower: Any, kind: types.ModuleType) -> None:
    family, sizes = weights.sizes(tower.source, kind)
    if tower.sizes is None:
        return
    wanted = {"family": tower.family, **dataclasses.asdict(tower.sizes)}
    actual = {"family": family.__module__.rpartition(".")[2], **dataclasses.asdict(sizes)}
    if differing := [
        f"{key}: {wanted.get(key)!r} in the config, {actual.get(key)!r} in the weights"
        for key in sorted(wanted.keys() | actual.keys())
        if wanted.get(key) != actual.get(key)
    ]:
        raise ValueError(
            f"model.{name}: the weights {tower.source!r} are not of the sizes that the config "
            "gives:\n  " + "\n  ".join(differing)
        )


def abstract(config: Config, loaded: Towers = NO_TOWERS) -> Larimar:
    """Return the model of `build` as shapes alone; no tensor of a source is read.

    Args:
      loaded: towers that are there already, and need not be looked up.

    Raises:
      FileNotFoundError: where a source is not there and its sizes are not in the config.
    """
    return nnx.eval_shape(lambda towers: _create(config, towers, nnx.Rngs(params=0)), dict(loaded))


def parameters(model: nnx.Module) -> Mapping[str, Array]:
    """Return every parameter by its '/'-joined path, the name that freezing and sharding rules match."""
    return {_join(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _join(path: tuple) -> str:
    return "/".join(map(str, path))


def _towers(config: Config) -> dict[str, tuple[Any, types.ModuleType, dict[str, Any]]]:
    """Return each tower's config, its kind, and what it is built with beside its sizes."""
    how = {"dtype": jnp.dtype(config.model.dtype), "remat": config.model.remat}
    return {n: (getattr(config.model, n), kind, how) for n, kind in _KINDS.items()}


def _create(config: Config, loaded: Mapping[str, nnx.Module], rngs: nnx.Rngs) -> Larimar:
    """Return a model with these towers loaded, and everything else initialised."""
    towers = dict(loaded)
    for name, (tower, kind, how) in _towers(config).items():
        if name in towers:
            continue
        if tower.sizes is None:
            family, sizes = weights.sizes(tower.source, kind)
        else:
            family, sizes = kind.families()[tower.family], tower.sizes
        towers[name] = family(sizes, **how, rngs=rngs)
    larimar = Larimar(
        **towers,
        memory_params=make_memory(config).init(rngs.params()),
        latent=config.model.latent,
        slots_per_layer=config.model.slots_per_layer,
        tied_slots=config.model.tied_slots,
        conditioning=config.model.conditioning,
        reader=config.model.reader,
        rngs=rngs,
    )
    if config.model.lora is not None:
        lora.attach(larimar, config.model.lora, rngs)
    return larimar


class AbstractModel:
    """A model without its numbers, which turns parameters by '/'-joined path back into a model.

    Args:
      module: the model as `abstract` makes it.

    Attributes:
      parameters: ShapeDtypeStructs by path.
      max_tokens: how many tokens the decoder takes beside a memory slot.

    Raises:
      TypeError: the model holds variables that are no parameters.
    """

    def __init__(self, module: nnx.Module):
        self.module = module
        self.max_tokens: int = module.decoder.config.max_length - 1
        self._graph, params, rest = nnx.split(module, nnx.Param, ...)
        if jax.tree.leaves(rest):
            raise TypeError(
                "the model holds variables that are no parameters, which training would lose: "
                + ", ".join(_join(path) for path, _ in nnx.to_flat_state(rest))
            )
        self._flat = list(nnx.to_flat_state(params))
        self.parameters: dict[str, jax.ShapeDtypeStruct] = {
            _join(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in self._flat
        }

    def model(self, values: Mapping[str, Array]) -> Larimar:
        """Return the model with these parameters (all of them)."""
        flat = ((path, leaf.replace(values[_join(path)])) for path, leaf in self._flat)
        return nnx.merge(self._graph, nnx.from_flat_state(flat))


def restore(
    config: Config, towers: Mapping[str, nnx.Module], arrays: Mapping[str, Any], path: Any
) -> Larimar:
    """Return the model with the parameters of loaded towers, and all its others from a file's arrays.

    Raises:
      ExportError: file and model do not have the same parameters; names every one that does not fit.
    """
    # Every parameter is in a file, and drawing them first would be for nothing.
    skeleton = AbstractModel(abstract(config, towers))
    loaded = tuple(f"{name}/" for name in towers)
    shapes = {name: leaf.shape for name, leaf in skeleton.parameters.items()}
    problems = [f"{n}: missing" for n in shapes if n not in arrays and not n.startswith(loaded)]
    problems += [
        f"{name}: {array.shape} in the file, {shapes.get(name, 'no such parameter')} in the model"
        for name, array in arrays.items()
        if array.shape != shapes.get(name)
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise model_file.ExportError(f"{path} does not fit its own config:\n  {lines}")
    values = {
        f"{name}/{place}": array
        for name, tower in towers.items()
        for place, array in parameters(tower).items()
    }
    return skeleton.model(values | jax.device_put(dict(arrays)))
