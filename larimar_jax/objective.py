"""The training objective (Eq. 1), one named term each."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from larimar_jax import layers
from larimar_jax.config import ObjectiveConfig
from larimar_jax.losses import entropies as head_entropies
from larimar_jax.losses import weighted
from larimar_jax.model import Condition, Larimar

# Maps f(shared, an episode's arrays…) over episodes; a mesh maps it device by device.
Over = Callable[[Callable], Callable]


def over_rows(function: Callable) -> Callable:
    """The map over episodes where there is no mesh: `vmap`."""

    def mapped(shared, *episodes):
        return jax.vmap(function, in_axes=(None, *(0 for _ in episodes)))(shared, *episodes)

    return mapped


def counts(batch: dict[str, Array], weights: ObjectiveConfig) -> dict[str, Float[Array, ""]]:
    """What the terms of a batch are divided by: tokens for cross-entropies, facts for the KL."""
    mask = batch["decoder_mask"][..., 1:]
    tokens = mask.size if weights.count_padding else mask.sum()
    facts = batch["encoder_mask"].any(axis=-1).sum()
    return {
        name: jnp.maximum(jnp.asarray(n, jnp.int32), 1).astype(jnp.float32)
        for name, n in (("tokens", tokens), ("facts", facts))
    }


def losses(
    model: Larimar,
    memory,
    batch: dict[str, Array],
    keys: Key[Array, " B"] | None,
    weights: ObjectiveConfig,
    beta: Float[Array, ""],
    *,
    divide: dict[str, Float[Array, ""]] | None = None,
    over: Over = over_rows,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Eq. 1, negated so that it is minimised: B episodes of E facts, each with a memory of its own.

    Args:
      batch: encoder_tokens int32 [B,E,S], encoder_mask bool [B,E,S], decoder_tokens int32 [B,E,T]
        (`<BOS> text <EOS>`), decoder_mask bool [B,E,T].
      keys: one per episode, for the observation noise ξ and the addressing noise σ_W; None for
        neither.
      beta: the weight of the KL term at this step.
      divide: the `counts` of a larger batch that this one is a part of: the parts' losses then add
        up to its loss.
      over: how to map over episodes.

    Returns:
      The loss and its terms: reconstruction, autoencoding, kl and language, in nats; the
      cross-entropies per token, the KL per fact. A term whose weight is 0 is not computed.
    """
    divide = counts(batch, weights) if divide is None else divide
    encodings = model.encode(batch["encoder_tokens"], batch["encoder_mask"])
    reading = read_back(model, memory, encodings, keys, over)
    latents = {
        "reconstruction": reading.latent,
        "autoencoding": encodings,
        "language": jnp.zeros_like(encodings),
    }
    used = [name for name in latents if getattr(weights, name) != 0.0]
    # One decoder pass over all routes: the rows are independent, and one large GEMM beats three.
    # Routes lie beside each other within an episode, so that rows stay on their episode's device.
    rows = (encodings.shape[0], len(used), encodings.shape[1])
    stacked = jnp.stack([latents[name] for name in used], axis=1).reshape(math.prod(rows), -1)

    def tiled(array):
        wide = jnp.broadcast_to(array[:, None], (*rows, array.shape[-1]))
        return wide.reshape(math.prod(rows), -1)

    tokens, mask = tiled(batch["decoder_tokens"]), tiled(batch["decoder_mask"])
    shares = jnp.array([getattr(weights, name) for name in used], jnp.float32) / divide["tokens"]
    by_row = jnp.broadcast_to(shares[None, :, None], rows).reshape(-1)
    hidden, _ = model.hidden(tokens[:, :-1], model.condition(stacked))
    there = mask[:, 1:]
    total, entropies = weighted(
        model.decoder.to_logits,
        hidden,
        tokens[:, 1:],
        jnp.where(there, by_row[:, None], 0.0),
        whole=layers.rows_are_split(),
    )
    sums = jnp.where(there, entropies, 0.0).reshape(*rows, -1).sum(axis=(0, 2, 3))
    terms = {name: sums[i] / divide["tokens"] for i, name in enumerate(used)}
    present = batch["encoder_mask"].any(axis=-1)
    divergence = addressing_kl(reading.weights, reading.log_variance, weights.free_bits)
    terms["kl"] = jnp.where(present, divergence, 0.0).sum() / divide["facts"]
    return total + beta * terms["kl"], terms


def read_back(
    model: Larimar,
    memory,
    encodings: Float[Array, "B E C"],
    keys: Key[Array, " B"] | None,
    over: Over = over_rows,
):
    """Writes each episode into its own memory and reads every fact back by its own encoding (§3)."""
    # Whole before anything is solved: of a split M₀, XLA would make exchanges in the solver's loops, and
    # devices that come to them in another order than to others' wait for each other for ever.
    params = jax.tree.map(layers.whole, model.memory.params())
    with jax.named_scope("memory"):
        return _read_back(memory, params, encodings, keys, over)


def _read_back(memory, params, encodings, keys, over: Over):
    prepared = memory.prepare(params, brief=True)

    def one(prepared, episode, key=None):
        noise, weight = (None, None) if key is None else jax.random.split(key)
        state = memory.write(prepared, memory.empty(prepared), episode, episode, rng=noise)
        return memory.read(prepared, state, episode, rng=weight)

    return over(one)(prepared, encodings) if keys is None else over(one)(prepared, encodings, keys)


def untouched(
    model: Larimar, batch: dict[str, Array], divide: dict[str, Float[Array, ""]]
) -> Float[Array, ""]:
    """Nats per token of the texts to the base LM: no slot, no embedding, as if there were no memory."""
    tokens, mask = (batch[name].reshape(-1, batch[name].shape[-1]) for name in
                    ("decoder_tokens", "decoder_mask"))
    return token_losses(model, tokens, mask, None).sum() / divide["tokens"]


def token_losses(
    model: Larimar,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    condition: Condition | None,
) -> Float[Array, "B T-1"]:
    """−ln p(token t+1 | tokens ≤ t, condition) in nats, zero at padding, float32."""
    hidden, _ = model.hidden(tokens[:, :-1], condition)
    split = layers.rows_are_split()
    found = head_entropies(model.decoder.to_logits, hidden, tokens[:, 1:], whole=split)
    return jnp.where(mask[:, 1:], found, 0.0)


def addressing_kl(
    mean: Float[Array, "*facts K"], log_variance: Float[Array, "*facts K"], free_bits: float
) -> Float[Array, "*facts"]:
    """KL(q(W) ‖ N(0, I)) in nats: summed over the K slots, each at least `free_bits`."""
    element = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
    return jnp.maximum(element, free_bits).sum(axis=-1)


def beta_schedule(
    step: Int[Array, ""], total_steps: int, peak: float, cycles: int
) -> Float[Array, ""]:
    """β's cycles (§5): each is 0 for half, rises linearly over a quarter, then stays at `peak`.

    `cycles = 0` holds β at `peak` throughout.
    """
    if cycles == 0:
        return jnp.float32(peak)
    progress = step.astype(jnp.float32) * (cycles / total_steps)
    within = progress - jnp.floor(progress)
    return jnp.float32(peak) * jnp.clip((within - 0.5) * 4.0, 0.0, 1.0)
