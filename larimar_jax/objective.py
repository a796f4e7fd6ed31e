"""The training objective (Eq. 1), one named term each."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.config import ObjectiveConfig
from larimar_jax.model import Condition, Larimar


def losses(
    model: Larimar,
    memory,
    batch: dict[str, Array],
    rng: jax.Array | None,
    weights: ObjectiveConfig,
    beta: Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Eq. 1, negated so that it is minimised: B episodes of E facts, each with a memory of its own.

    Args:
      batch: encoder_tokens int32 [B,E,S], encoder_mask bool [B,E,S], decoder_tokens int32 [B,E,T]
        (`<BOS> text <EOS>`), decoder_mask bool [B,E,T].
      rng: for the observation noise ξ and the addressing noise σ_W; None for neither.
      beta: the weight of the KL term at this step.

    Returns:
      The loss and its terms: reconstruction, autoencoding, kl and language, in nats; the
      cross-entropies per token, the KL per fact. A term whose weight is 0 is not computed.
    """
    encodings = model.encode(batch["encoder_tokens"], batch["encoder_mask"])
    reading = read_back(model, memory, encodings, rng)
    facts = encodings.shape[0] * encodings.shape[1]
    latents = {
        "reconstruction": reading.latent,
        "autoencoding": encodings,
        "language": jnp.zeros_like(encodings),
    }
    used = [name for name in latents if getattr(weights, name) != 0.0]
    # One decoder pass over all routes: the rows are independent, and one large GEMM beats three.
    stacked = jnp.concatenate([latents[name].reshape(facts, -1) for name in used])
    tokens = batch["decoder_tokens"].reshape(facts, -1)
    mask = batch["decoder_mask"].reshape(facts, -1)
    repeat = (len(used), 1)
    entropies = token_losses(
        model, jnp.tile(tokens, repeat), jnp.tile(mask, repeat), model.condition(stacked)
    ).reshape(len(used), -1)
    counted = jnp.ones_like(mask[:, 1:]) if weights.count_padding else mask[:, 1:]
    tokens_counted = jnp.maximum(counted.sum(), 1).astype(jnp.float32)
    terms = {name: total.sum() / tokens_counted for name, total in zip(used, entropies, strict=True)}
    present = batch["encoder_mask"].any(axis=-1)
    divergence = addressing_kl(reading.weights, reading.log_variance, weights.free_bits)
    terms["kl"] = jnp.where(present, divergence, 0.0).sum() / jnp.maximum(present.sum(), 1).astype(
        jnp.float32
    )
    loss = beta * terms["kl"] + sum(getattr(weights, name) * terms[name] for name in used)
    return loss, terms


def read_back(model: Larimar, memory, encodings: Float[Array, "B E C"], rng: jax.Array | None):
    """Writes each episode into its own memory and reads every fact back by its own encoding (§3)."""
    prior = memory.prepare(model.memory.params())

    def one(episode, key):
        noise, weight = (None, None) if key is None else jax.random.split(key)
        state = memory.write(prior, memory.empty(prior), episode, episode, rng=noise)
        return memory.read(prior, state, episode, rng=weight)

    if rng is None:
        return jax.vmap(lambda episode: one(episode, None))(encodings)
    return jax.vmap(one)(encodings, jax.random.split(rng, encodings.shape[0]))


def token_losses(
    model: Larimar,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    condition: Condition | None,
) -> Float[Array, "B T-1"]:
    """−ln p(token t+1 | tokens ≤ t, condition) in nats, zero at padding, float32."""
    hidden, _ = model.hidden(tokens[:, :-1], condition)
    logits = model.decoder.logits(hidden)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    entropy = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(mask[:, 1:], entropy, 0.0)


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
