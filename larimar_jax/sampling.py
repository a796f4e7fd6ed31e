"""Drawing the next token: greedy, temperature, top-k, top-p."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

LEAST_TEMPERATURE = 1e-6


class Draw(NamedTuple):
    """The numbers of a `Sampling`, as data of a compiled loop: other values compile nothing."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    rng: Key[Array, "*rows"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    temperature: 0 takes the likeliest. top_k: draws among so many of the likeliest only; 0 is all.
    top_p: draws among the fewest of the likeliest that have this much probability together.
    rng: one key, of which row i draws with `fold_in(rng, i)`; or a key for every row, with which it
    draws the same in whatever place and company.

    Raises:
      ValueError: a number out of its range, one that draws nothing, or drawing without `rng`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    rng: jax.Array | None = None

    def __post_init__(self):
        # Logits are divided by it: by less they overflow, and what is drawn is NaN.
        drawn = LEAST_TEMPERATURE <= self.temperature < math.inf
        if not (self.temperature == 0 or drawn) or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: the first"
                f" two are at least 0, the temperature 0 or finite and at least {LEAST_TEMPERATURE},"
                " top_p is above 0 and at most 1"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p choose among draws; set a temperature above 0")
        if self.temperature > 0 and self.rng is None:
            raise ValueError("Sampling (temperature > 0) needs rng; pass jax.random.key(seed).")

    def traced(self, rows: int, padded: int) -> Draw:
        """What `pick` takes as data, for so many rows and those that pad them.

        Raises:
          ValueError: keys, but not one a row.
        """
        rng = jax.random.key(0) if self.rng is None else _keys(self.rng)
        if rng.ndim:
            rng = one_each(rng, rows, padded)
        return Draw(
            jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p), rng
        )

    def each(self, rows: int) -> "Sampling":
        """The same draws of so many rows, with a key for every one.

        Raises:
          ValueError: keys, but not one a row.
        """
        if self.rng is None:
            return self
        rng = _keys(self.rng)
        return dataclasses.replace(self, rng=one_each(rng, rows, rows) if rng.ndim else _rows(rng, rows))

    def of(self, chosen: Sequence[int]) -> "Sampling":
        """The draws of chosen rows of those with a key each."""
        if self.rng is None:
            return self
        return dataclasses.replace(self, rng=self.rng[np.asarray(chosen)])

    def static(self) -> dict[str, bool]:
        """What `pick` is compiled for: greedy decoding sorts and draws nothing."""
        return dict(sampled=self.temperature > 0, truncated=self.top_k > 0 or self.top_p < 1)


def _keys(rng: jax.Array) -> Key[Array, "*rows"]:
    """Keys, whether they are typed or raw."""
    return rng if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(rng)


def _rows(key: Key[Array, ""], rows: int) -> Key[Array, " rows"]:
    """What rows draw with that are given one key."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def one_each(keys: Key[Array, "*n"], rows: int, padded: int) -> Key[Array, " padded"]:
    """A key a row, with more for the rows that pad them.

    Raises:
      ValueError: not one a row.
    """
    if keys.shape != (rows,):
        raise ValueError(
            f"rng has shape {keys.shape} for {rows} rows; pass a key for each of them"
            f" (jax.random.split(key, {rows}))"
        )
    return keys[np.arange(padded) % rows] if rows else jax.random.split(jax.random.key(0), padded)


def pick(
    logits: Float[Array, "B V"],
    step: Int[Array, ""],
    draw: Draw,
    *,
    sampled: bool,
    truncated: bool,
) -> Int[Array, "B"]:
    """One token per row; what a row draws does not depend on the rows beside it."""
    if not sampled:
        return likeliest(logits)
    logits = logits / draw.temperature
    if truncated:
        logits = truncate(logits, draw.top_k, draw.top_p)
    keys = draw.rng
    if not keys.ndim:
        keys = _rows(keys, logits.shape[0])
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def likeliest(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """The first of the largest, as argmax; on CPU two plain reductions are four times as fast."""
    size = logits.shape[-1]
    best = logits == jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(best, jnp.arange(size, dtype=jnp.int32), size), axis=-1)
    return jnp.minimum(first, size - 1)  # with NaN none equals the largest


def truncate(
    logits: Float[Array, "*rows V"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "*rows V"]:
    """−∞ on all but the top_k likeliest (0: all), and of these all but the fewest with top_p.

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
    kept = (likelier < top_p) & (rank < count)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    above, equal = logits > least, logits == least
    room = jnp.sum(kept, axis=-1, keepdims=True) - jnp.sum(above, axis=-1, keepdims=True)
    first = equal & (jnp.cumsum(equal, axis=-1) <= room)
    return jnp.where(above | first, logits, -jnp.inf)
