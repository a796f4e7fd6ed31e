"""Larimar: the only place where encoder, memory and decoder meet (§2, §10)."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import decoders, encoders, lora, weights
from larimar_jax.answer_code import TokenEvidence
from larimar_jax.config import Config, make_memory
from larimar_jax.decoders.base import Tree
from larimar_jax.layers import Cache, Prefix
from larimar_jax.memory.base import MemoryParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """All that a read hands to the decoder, one row per sequence.

    prefix: memory slots and embedding made from the latent (§2). spelled: the tokens of the answer
    (answer_code.py), where the memory keeps them.
    """

    prefix: Prefix
    evidence: TokenEvidence | None = None

    def rows(self, index: Int[Array, " R"]) -> "Condition":
        """The condition of chosen rows, in the order of `index`."""
        prefix = Prefix(
            embedding=self.prefix.embedding[index],
            key=self.prefix.key[:, index],
            value=self.prefix.value[:, index],
            active=self.prefix.active[index],
        )
        evidence = None if self.evidence is None else self.evidence.rows(index)
        return Condition(prefix=prefix, evidence=evidence)


class PriorMemory(nnx.Module):
    """M₀ and what log σ_W² is made of (§1, §3): the learned parameters of the memory.

    Raises:
      ValueError: M_ref is not M₀. Nothing learns such a one, and a model has no place for it.
    """

    def __init__(self, params: MemoryParams):
        if params.reference_memory is not None:
            raise ValueError("a model's memory is addressed by M₀; give M_ref to its states alone")
        by_query, by_memory = params.variance_by_query, params.variance_by_memory
        self.prior_memory = nnx.Param(params.prior_memory)
        self.log_variance = nnx.Param(params.log_variance)
        self.variance_by_query = None if by_query is None else nnx.Param(by_query)
        self.variance_by_memory = None if by_memory is None else nnx.Param(by_memory)

    def params(self) -> MemoryParams:
        by_query, by_memory = self.variance_by_query, self.variance_by_memory
        return MemoryParams(
            prior_memory=self.prior_memory[...],
            log_variance=self.log_variance[...],
            variance_by_query=None if by_query is None else by_query[...],
            variance_by_memory=None if by_memory is None else by_memory[...],
        )


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
        rngs: nnx.Rngs,
    ):
        width, depth = decoder.config.width, decoder.config.depth
        self.slot_shape = (depth, slots_per_layer, 1 if tied_slots else 2)
        self.slot_shape += (decoder.config.kv_heads, decoder.config.head_size)
        slot_size = (
            slots_per_layer * (1 if tied_slots else 2) * self.slot_shape[3] * self.slot_shape[4]
        )
        self.encoder = encoder
        self.decoder = decoder
        # Square and from a sentence encoder: start as the identity, so that latents are its sentence
        # embeddings until training finds better ones.
        same = encoder.config.width == latent
        initial = nnx.initializers.lecun_normal() if not same else lambda *_: jnp.eye(latent)
        self.to_latent = nnx.Linear(
            encoder.config.width, latent, use_bias=False, kernel_init=initial, rngs=rngs
        )
        self.to_slots = nnx.Linear(latent, depth * slot_size, use_bias=False, rngs=rngs)
        self.to_embedding = nnx.Linear(
            latent, width, use_bias=False, kernel_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.memory = PriorMemory(memory_params)

    def embed(
        self, tokens: Int[Array, "*rows S"], mask: Bool[Array, "*rows S"]
    ) -> Float[Array, "*rows H"]:
        """The encoder's pooled output, float32; what the scope detector compares (§6)."""
        flat = self.encoder(tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]))
        return flat.astype(jnp.float32).reshape(*tokens.shape[:-1], -1)

    def encode(
        self, tokens: Int[Array, "*rows S"], mask: Bool[Array, "*rows S"]
    ) -> Float[Array, "*rows C"]:
        """Z = e(X), float32. A row without a token is padding and encodes to exactly zero."""
        latent = self.to_latent(self.embed(tokens, mask))
        return jnp.where(mask.any(axis=-1, keepdims=True), latent, 0.0)

    def condition(
        self,
        latent: Float[Array, "B C"],
        active: Bool[Array, " B"] | None = None,
        evidence: TokenEvidence | None = None,
    ) -> Condition:
        """Latent → memory slots and embedding (§2), with what is spelled.

        A zero latent is the paper's "no memory" (z = 0): the slot is there and holds zeros. A row whose
        `active` is False is decoded as by the untouched base LM (`layers.Prefix`).
        """
        rows = latent.shape[0]
        active = jnp.ones((rows,), bool) if active is None else active
        slots = self.to_slots(latent).reshape(rows, *self.slot_shape).swapaxes(0, 1)
        dtype = self.decoder.dtype
        key, value = slots[:, :, :, 0], slots[:, :, :, -1]
        prefix = Prefix(
            embedding=self.to_embedding(latent).astype(dtype),
            key=key.astype(dtype),
            value=value.astype(dtype),
            active=active,
        )
        return Condition(prefix=prefix, evidence=evidence)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        condition: Condition | None = None,
        cache: Cache | None = None,
        start: Int[Array, " B"] | None = None,
        tree: Tree | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Last hidden states of the decoder; `condition=None` is the untouched base LM."""
        prefix = None if condition is None else condition.prefix
        return self.decoder.hidden(tokens, prefix, cache, start, tree)


def build(config: Config, key: jax.Array, where: weights.Where | None = None) -> Larimar:
    """A model from its config: towers with a `source` are loaded, everything else initialised.

    Without sources it is pure and works under `jax.jit` and `nnx.eval_shape`.

    Args:
      where: the sharding of each loaded parameter, by its '/'-joined path in the model and its
        shape; loading then streams onto the devices. None is one device.

    Raises:
      FileNotFoundError: where a source's package is not installed; the message names the command.
      ValueError: a source whose sizes are not those that the config gives with it; names them.
    """
    rngs, loaded = nnx.Rngs(params=key), load_towers(config, where)
    dtype, remat = jnp.dtype(config.model.dtype), config.model.remat
    made = {
        name: loaded[name][0]
        if name in loaded
        else kind.family(tower.family).MODEL(tower.sizes, dtype=dtype, remat=remat, rngs=rngs)
        for name, (tower, kind, _) in _towers(config).items()
    }
    return _assemble(config, **made, rngs=rngs)


def load_towers(
    config: Config, where: weights.Where | None = None
) -> dict[str, tuple[nnx.Module, weights.Tokenizer]]:
    """The towers with a `source`, by "encoder" and "decoder", and their tokenizers.

    Args:
      where: as in `build`.

    Raises:
      FileNotFoundError, ValueError: as `build`.
    """
    dtype, remat = jnp.dtype(config.model.dtype), config.model.remat
    found = {}
    for name, (tower, kind, load) in _towers(config).items():
        if tower.source is None:
            continue
        if tower.sizes is not None:
            _same_sizes(f"model.{name}", tower, *weights.sizes(tower.source, kind))
        inside = None if where is None else functools.partial(_inside, where, name)
        found[name] = load(tower.source, dtype=dtype, remat=remat, where=inside)
    return found


def _inside(where: weights.Where, tower: str, path: str, shape: tuple[int, ...]) -> Any:
    return where(f"{tower}/{path}", shape)


def _towers(config: Config) -> dict[str, tuple[Any, types.ModuleType, Callable[..., Any]]]:
    """Of each tower what the config says, its kind, and what loads it."""
    return {
        "encoder": (config.model.encoder, encoders, weights.load_encoder),
        "decoder": (config.model.decoder, decoders, weights.load_decoder),
    }


def abstract(
    config: Config, loaded: Mapping[str, nnx.Module] = types.MappingProxyType({})
) -> Larimar:
    """The model that `build` makes, of shapes alone; of sources no tensor is read.

    Args:
      loaded: towers that are there already, and need not be looked up.

    Raises:
      FileNotFoundError: where a source is not there and its sizes are not in the config.
    """
    known = {}
    for name, (tower, kind, _) in _towers(config).items():
        if name in loaded:
            continue
        if tower.sizes is None:
            known[name] = weights.sizes(tower.source, kind)
        else:
            known[name] = (kind.family(tower.family), tower.sizes)
    dtype, remat = jnp.dtype(config.model.dtype), config.model.remat

    def make(loaded: dict[str, nnx.Module]) -> Larimar:
        rngs = nnx.Rngs(params=0)
        made = {
            name: family.MODEL(sizes, dtype=dtype, remat=remat, rngs=rngs)
            for name, (family, sizes) in known.items()
        }
        return _assemble(config, **made, **loaded, rngs=rngs)

    return nnx.eval_shape(make, dict(loaded))


def _assemble(
    config: Config, encoder: nnx.Module, decoder: nnx.Module, *, rngs: nnx.Rngs
) -> Larimar:
    made = Larimar(
        encoder,
        decoder,
        make_memory(config).init(rngs.params()),
        latent=config.model.latent,
        slots_per_layer=config.model.slots_per_layer,
        tied_slots=config.model.tied_slots,
        rngs=rngs,
    )
    if config.model.lora is not None:
        lora.attach(made, config.model.lora, rngs)
    return made


def _same_sizes(where: str, tower, family, sizes) -> None:
    told = {"family": tower.family, **dataclasses.asdict(tower.sizes)}
    found = {"family": family.__name__.rpartition(".")[2], **dataclasses.asdict(sizes)}
    differ = [
        f"{key}: {told.get(key)!r} in the config, {found.get(key)!r} in the weights"
        for key in sorted(told.keys() | found.keys())
        if told.get(key) != found.get(key)
    ]
    if differ:
        raise ValueError(
            f"{where}: the weights {tower.source!r} are not of the sizes that the config gives:\n  "
            + "\n  ".join(differ)
        )


def parameters(model: nnx.Module) -> Mapping[str, Array]:
    """Every parameter by its '/'-joined path, the name that freezing and sharding rules see."""
    state = nnx.state(model, nnx.Param)
    return {
        "/".join(str(part) for part in path): leaf[...] for path, leaf in nnx.to_flat_state(state)
    }


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
                + ", ".join("/".join(map(str, path)) for path, _ in nnx.to_flat_state(rest))
            )
        self._flat = list(nnx.to_flat_state(params))
        self.parameters: dict[str, jax.ShapeDtypeStruct] = {
            "/".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in self._flat
        }

    def model(self, values: Mapping[str, Array]) -> Larimar:
        """Return the model with these parameters (all of them)."""
        state = nnx.from_flat_state(
            (path, leaf.replace(values["/".join(map(str, path))])) for path, leaf in self._flat
        )
        return nnx.merge(self._graph, state)
