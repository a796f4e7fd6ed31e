"""Larimar: the only place where encoder, memory and decoder meet (§2, §10)."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import decoders, encoders, weights
from larimar_jax.config import Config, make_memory
from larimar_jax.layers import Cache, Prefix
from larimar_jax.memory.contract import MemoryParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """All that a read hands to the decoder, one row per sequence.

    prefix: memory slots and embedding made from the latent (§2). word: the innovation in the space of
    the decoder's token embeddings, zero where there is none (§10).
    """

    prefix: Prefix
    word: Float[Array, "B D"]

    def rows(self, index: Int[Array, " R"]) -> "Condition":
        """The condition of chosen rows, in the order of `index`."""
        prefix = Prefix(
            embedding=self.prefix.embedding[index],
            key=self.prefix.key[:, index],
            value=self.prefix.value[:, index],
            active=self.prefix.active[index],
        )
        return Condition(prefix=prefix, word=self.word[index])


class PriorMemory(nnx.Module):
    """M₀ and log σ_W², the learned parameters of the memory (§1)."""

    def __init__(self, params: MemoryParams):
        self.prior = nnx.Param(params.prior)
        self.log_variance = nnx.Param(params.log_variance)

    def params(self) -> MemoryParams:
        return MemoryParams(prior=self.prior[...], log_variance=self.log_variance[...])


class VocabularyRoute(nnx.Module):
    """The innovation, read as a direction in the decoder's embedding space (§10; ours, not the paper's).

    The logits gain `gain · cos(word, embedding of v)`. A decoder's token embeddings share a large mean
    that would tilt every cosine, so `centre` is taken off first.
    """

    def __init__(self, latent: int, width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (latent, width)))
        self.centre = nnx.Param(jnp.zeros((width,)))
        self.gain = nnx.Param(jnp.zeros(()))

    def word(self, innovation: Float[Array, "B C"]) -> Float[Array, "B D"]:
        word = innovation @ self.kernel[...]
        norm = jnp.linalg.norm(word, axis=-1, keepdims=True)
        # A row without innovation stays exactly zero and so changes no logit.
        return jnp.where(norm > 1e-6, word / jnp.maximum(norm, 1e-6), 0.0)

    def bonus(self, word: Float[Array, "B D"], embeddings: Float[Array, "V D"]) -> Float[Array, "B V"]:
        centred = embeddings - self.centre[...]
        norms = jnp.linalg.norm(centred, axis=-1)
        return self.gain[...] * (word @ centred.T) / jnp.maximum(norms, 1e-6)


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
        vocabulary_route: bool,
        rngs: nnx.Rngs,
    ):
        width, depth = decoder.config.width, decoder.config.depth
        self.slot_shape = (depth, slots_per_layer, 1 if tied_slots else 2)
        self.slot_shape += (decoder.config.kv_heads, decoder.config.head_size)
        slot_size = slots_per_layer * (1 if tied_slots else 2) * self.slot_shape[3] * self.slot_shape[4]
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
        self.vocabulary = VocabularyRoute(latent, width, rngs=rngs) if vocabulary_route else None

    def encode(self, tokens: Int[Array, "*rows S"], mask: Bool[Array, "*rows S"]) -> Float[Array, "*rows C"]:
        """Z = e(X), float32. A row without a token is padding and encodes to exactly zero."""
        flat_tokens = tokens.reshape(-1, tokens.shape[-1])
        flat_mask = mask.reshape(-1, mask.shape[-1])
        latent = self.to_latent(self.encoder(flat_tokens, flat_mask).astype(jnp.float32))
        latent = jnp.where(flat_mask.any(axis=-1, keepdims=True), latent, 0.0)
        return latent.reshape(*tokens.shape[:-1], -1)

    def condition(
        self,
        latent: Float[Array, "B C"],
        innovation: Float[Array, "B C"] | None = None,
        active: Bool[Array, " B"] | None = None,
    ) -> Condition:
        """Latent → memory slots and embedding (§2); innovation → vocabulary direction (§10).

        A zero latent is the paper's "no memory" (z = 0): the slot is there and holds zeros. A row whose
        `active` is False is decoded exactly as by the untouched base LM.
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
        if innovation is None or self.vocabulary is None:
            word = jnp.zeros((rows, self.decoder.config.width))
        else:
            word = jnp.where(active[:, None], self.vocabulary.word(innovation), 0.0)
        return Condition(prefix=prefix, word=word)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        condition: Condition | None = None,
        cache: Cache | None = None,
        start: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Last hidden states of the decoder; `condition=None` is the untouched base LM."""
        prefix = None if condition is None else condition.prefix
        return self.decoder.hidden(tokens, prefix, cache, start)

    def bonus(self, condition: Condition | None) -> Float[Array, "B V"] | None:
        """What the vocabulary route adds to every position's logits, or None where there is no route."""
        if condition is None or self.vocabulary is None:
            return None
        return self.vocabulary.bonus(condition.word, self.decoder.embeddings.astype(jnp.float32))


def build(config: Config, key: jax.Array) -> Larimar:
    """A model from its config: towers with a `source` are loaded, everything else initialised.

    Without sources it is pure and works under `jax.jit` and `nnx.eval_shape`.

    Raises:
      FileNotFoundError: where a source's package is not installed; the message names the command.
    """
    rngs = nnx.Rngs(params=key)
    dtype = jnp.dtype(config.model.dtype)
    encoder = _tower(config.model.encoder, encoders, weights.load_encoder, config, rngs, dtype)
    decoder = _tower(config.model.decoder, decoders, weights.load_decoder, config, rngs, dtype)
    return Larimar(
        encoder,
        decoder,
        make_memory(config).init(rngs.params()),
        latent=config.model.latent,
        slots_per_layer=config.model.slots_per_layer,
        tied_slots=config.model.tied_slots,
        vocabulary_route=config.model.vocabulary_route,
        rngs=rngs,
    )


def _tower(tower, module, load, config: Config, rngs: nnx.Rngs, dtype) -> nnx.Module:
    if tower.source is not None:
        return load(tower.source, dtype=dtype, remat=config.model.remat)[0]
    family = module.families()[tower.family]
    return family.MODEL(tower.sizes, dtype=dtype, remat=config.model.remat, rngs=rngs)


def parameters(model: nnx.Module) -> Mapping[str, Array]:
    """Every parameter by its '/'-joined path, the name that freezing and sharding rules see."""
    state = nnx.state(model, nnx.Param)
    return {
        "/".join(str(part) for part in path): leaf[...] for path, leaf in nnx.to_flat_state(state)
    }
