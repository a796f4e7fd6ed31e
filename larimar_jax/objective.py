"""The training objective (Eq. 1), one named term each."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from larimar_jax import layers
from larimar_jax.config import ObjectiveConfig
from larimar_jax.latent_layout import Condition
from larimar_jax.losses import cross_entropy, fill, weighted_cross_entropy
from larimar_jax.model import Larimar


def counts(batch: dict[str, Array], weights: ObjectiveConfig) -> dict[str, Float[Array, ""]]:
    """Return what the terms of a batch are divided by: tokens for cross-entropies, facts for the KL."""
    mask = batch["decoder_mask"][..., 1:]
    tokens = mask.size if weights.count_padding else mask.sum()
    facts = batch["encoder_mask"].any(axis=-1).sum()
    return {
        name: jnp.maximum(jnp.asarray(n, jnp.int32), 1).astype(jnp.float32)
        for name, n in (("tokens", tokens), ("facts", facts))
    }


def loss(
    model: Larimar,
    memory,
    batch: dict[str, Array],
    keys: Key[Array, " B"] | None,
    weights: ObjectiveConfig,
    beta: Float[Array, ""],
    *,
    divide: dict[str, Float[Array, ""]] | None = None,
    product_dtype: DTypeLike | None = None,
    vocabulary_multiple: int = 1,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return Eq. 1, negated so that it is minimised: B episodes of E facts, each with its own memory.

    Where JAX traces under a training mesh, each device reads back its own episodes.

    Args:
      batch: encoder_tokens int32 [B,E,S], encoder_mask bool [B,E,S], decoder_tokens int32 [B,E,T]
        (`<BOS> text <EOS>`), decoder_mask bool [B,E,T].
      keys: one per episode, for the observation noise ξ and the addressing noise σ_W; None for
        neither.
      beta: the weight of the KL term at this step.
      divide: the `counts` of a larger batch that this one is a part of: the parts' losses then add
        up to its loss.
      product_dtype: what the factors of the towers' products with kernels are rounded to.
      vocabulary_multiple: what the number of tokens is filled up to a multiple of (`losses.fill`).

    Returns:
      The loss and its terms: reconstruction, autoencoding, kl and language, in nats; the
      cross-entropies per token, the KL per fact. A term whose weight is 0 is not computed.
    """
    divide = counts(batch, weights) if divide is None else divide
    encodings = model.encode(batch["encoder_tokens"], batch["encoder_mask"], product_dtype)
    reading = read_back(model, memory, encodings, keys)
    latents = {
        "reconstruction": reading.latent,
        "autoencoding": encodings,
        "language": jnp.zeros_like(encodings),
    }
    names = [name for name in latents if getattr(weights, name) != 0.0]
    # One decoder pass over all routes: the rows are independent, and one large GEMM beats three.
    # Routes lie beside each other within an episode, so that rows stay on their episode's device.
    rows = (encodings.shape[0], len(names), encodings.shape[1])
    stacked = jnp.stack([latents[name] for name in names], axis=1).reshape(math.prod(rows), -1)

    def tiled(array):
        wide = jnp.broadcast_to(array[:, None], (*rows, array.shape[-1]))
        return wide.reshape(math.prod(rows), -1)

    tokens, mask = tiled(batch["decoder_tokens"]), tiled(batch["decoder_mask"])[:, 1:]
    shares = jnp.array([getattr(weights, name) for name in names], jnp.float32) / divide["tokens"]
    by_row = jnp.broadcast_to(shares[None, :, None], rows).reshape(-1)
    condition = model.condition(stacked)
    hidden, _ = model.hidden(tokens[:, :-1], condition, product_dtype=product_dtype)
    head = fill(model.decoder.to_logits, vocabulary_multiple)
    total, entropies = weighted_cross_entropy(
        head if product_dtype is None else head._replace(dtype=product_dtype),
        hidden,
        tokens[:, 1:],
        jnp.where(mask, by_row[:, None], 0.0),
        whole=layers.row_ways() > 1,
    )
    sums = jnp.where(mask, entropies, 0.0).reshape(*rows, -1).sum(axis=(0, 2, 3))
    terms = {name: sums[i] / divide["tokens"] for i, name in enumerate(names)}
    present = batch["encoder_mask"].any(axis=-1)
    divergence = addressing_kl(reading.weights, reading.log_variance, weights.free_bits)
    terms["kl"] = jnp.where(present, divergence, 0.0).sum() / divide["facts"]
    return total + beta * terms["kl"], terms


def read_back(
    model: Larimar, memory, encodings: Float[Array, "B E C"], keys: Key[Array, " B"] | None
):
    """Write each episode into its own memory and read every fact back by its own encoding (§3)."""
    # Gathered before anything is solved: of a split M₀, XLA would make exchanges in the solver's loops,
    # and devices that come to them in different orders would wait for each other for ever.
    params = jax.tree.map(layers.gather, model.memory.params())
    with jax.named_scope("memory"):
        prepared = memory.prepare(params, few_encodings=True)

        def read_episode(prepared, episode, key=None):
            noise, weight = (None, None) if key is None else jax.random.split(key)
            state = memory.write(prepared, memory.empty(prepared), episode, episode, rng=noise)
            return memory.read(prepared, state, episode, rng=weight)

        arrays = (encodings,) if keys is None else (encodings, keys)
        return _per_episode(read_episode)(prepared, *arrays)


def _per_episode(function: Callable) -> Callable:
    """Map f(shared, an episode's arrays…) over episodes, each on its device without a collective."""

    def mapped(shared, *episodes):
        each = jax.vmap(function, in_axes=(None, *(0 for _ in episodes)))
        if layers.row_ways():
            rows = PartitionSpec(layers.ROW_AXES)
            specs = (PartitionSpec(), *(rows for _ in episodes))
            # Unchecked: a scan over facts may begin with what is the same on all devices.
            each = jax.shard_map(each, in_specs=specs, out_specs=rows, check_vma=False)
        return each(shared, *episodes)

    return mapped


def untouched(
    model: Larimar, batch: dict[str, Array], divide: dict[str, Float[Array, ""]]
) -> Float[Array, ""]:
    """Return nats per token of the texts to the base LM: no slot and no embedding, without memory."""
    tokens, mask = (
        batch[name].reshape(-1, batch[name].shape[-1])
        for name in ("decoder_tokens", "decoder_mask")
    )
    return token_losses(model, tokens, mask, None).sum() / divide["tokens"]


def token_losses(
    model: Larimar,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    condition: Condition | None,
) -> Float[Array, "B T-1"]:
    """Return −ln p(token t+1 | tokens ≤ t, condition) in nats, zero at padding, float32."""
    hidden, _ = model.hidden(tokens[:, :-1], condition)
    split = layers.row_ways() > 1
    entropies = cross_entropy(model.decoder.to_logits, hidden, tokens[:, 1:], whole=split)
    return jnp.where(mask[:, 1:], entropies, 0.0)


def addressing_kl(
    mean: Float[Array, "*facts K"], log_variance: Float[Array, "*facts K"], free_bits: float
) -> Float[Array, "*facts"]:
    """Return KL(q(W) ‖ N(0, I)) in nats: summed over the K slots, each at least `free_bits`."""
    element = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
    return jnp.maximum(element, free_bits).sum(axis=-1)


def beta_schedule(
    step: Int[Array, ""], total_steps: int, peak: float, cycles: int
) -> Float[Array, ""]:
    """Return β of a step (§5): each cycle is 0 for half, rises for a quarter, then stays at `peak`.

    `cycles = 0` holds β at `peak` throughout.
    """
    if cycles == 0:
        return jnp.float32(peak)
    progress = step.astype(jnp.float32) * (cycles / total_steps)
    within = progress - jnp.floor(progress)
    return jnp.float32(peak) * jnp.clip((within - 0.5) * 4.0, 0.0, 1.0)
