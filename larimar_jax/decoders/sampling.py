"""Tokens out of logits: the likeliest, or one that is drawn. The numbers of sampling are data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Draw(NamedTuple):
    """How tokens are drawn, as data of the compiled loop.

    truncation: top_k and top_p, or None where neither leaves anything out. keys: one for each row.
    """

    temperature: Float[Array, ""]
    truncation: tuple[Int[Array, ""], Float[Array, ""]] | None
    keys: Key[Array, "B"]


def pick(logits: Float[Array, "B V"], step: Int[Array, "B"], draw: Draw | None) -> Int[Array, "B"]:
    """Return a row's next token after `step` others; what it draws does not depend on other rows."""
    if draw is None:
        return likeliest(logits)
    logits = logits / draw.temperature
    if draw.truncation is not None:
        logits = truncate(logits, *draw.truncation)
    keys = jax.vmap(jax.random.fold_in)(draw.keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def likeliest(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """Return the first of the largest, as argmax; on CPU two plain reductions are four times as fast."""
    size = logits.shape[-1]
    best = logits == jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(best, jnp.arange(size, dtype=jnp.int32), size), axis=-1)
    return jnp.minimum(first, size - 1)  # with NaN none equals the largest


def truncate(
    logits: Float[Array, "*rows V"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "*rows V"]:
    """Return −∞ on all but the top_k likeliest (0: all), and of these all but the fewest with top_p.

    Of equally likely ones the first come first.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    size = logits.shape[-1]
    count = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    rank = jnp.arange(size)
    ordered = jnp.where(rank < count, ordered, -jnp.inf)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    # A token stays where those likelier than it do not reach top_p yet; the first always does.
    likelier = jnp.concatenate([jnp.zeros_like(before[..., :1]), before[..., :-1]], axis=-1)
    stays = (likelier < top_p) & (rank < count)
    least = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    above, equal = logits > least, logits == least
    room = jnp.sum(stays, axis=-1, keepdims=True) - jnp.sum(above, axis=-1, keepdims=True)
    first = equal & (jnp.cumsum(equal, axis=-1) <= room)
    return jnp.where(above | first, logits, -jnp.inf)
