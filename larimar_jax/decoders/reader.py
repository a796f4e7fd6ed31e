"""A late route: the decoder speaks from the encoding of an answer by a change of its last hidden state.

    z = Σ_i f(e_i, i), of length 1
    h'_t = h_t + r(z, h_t, x_t, j),        p(x_{t+1}) = softmax(h'_t Wᵀ)

e_i is what the frozen encoder makes of the answer's i-th token in its context, and z the answer's
encoding, which a memory holds and reads (latent_layout.py). h_t is the frozen language model's last
hidden state, x_t the newest token, j how many tokens of the answer stand before, and W the frozen map to
logits. What attends to what stays the language model's own, whatever z is, so that its keys and values
of a prompt are computed once for all z; and z = 0 leaves it as it is, to the bit. The route is ours: the
paper's two (§2) act in every layer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import layers


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """Sizes of a reader."""

    width: int = 1536  # of its two hidden layers
    positions: int = 8  # tokens of an answer that it can change


class Reader(nnx.Module):
    """f, a multi-layer perceptron of the normalised e_i and of i, and r, one of the normalised z, h_t
    and embedding of x_t, and of j.

    Args:
      inputs: H, the encoder's width. latent: C. width: D, the decoder's.
    """

    def __init__(self, config: ReaderConfig, inputs: int, latent: int, width: int, rngs: nnx.Rngs):
        self.config = config

        def linear(inputs: int, outputs: int, scale: float = 1.0, **how: Any) -> nnx.Linear:
            draw = nnx.initializers.variance_scaling(scale, "fan_in", "normal")
            how = dict(use_bias=False, kernel_init=draw, rngs=rngs) | how
            return nnx.Linear(inputs, outputs, **how)

        # What goes into the memory is rounded as little as its algebra, on a GPU too.
        exact = dict(precision=jax.lax.Precision.HIGHEST)
        half = config.width // 2
        self.of_piece = linear(inputs, half, **exact)
        self.piece_place = nnx.Embed(
            config.positions, half, embedding_init=nnx.initializers.normal(0.5), rngs=rngs
        )
        # e_i's own way to z: the mean of e_i is a good beginning.
        mean = dict(kernel_init=lambda *_: jnp.eye(inputs)) if inputs == latent else {}
        self.piece = linear(inputs, latent, **exact, **mean)
        self.to_latent = linear(half, latent, 0.1, **exact)
        self.of_latent = linear(latent, config.width)
        self.of_hidden = linear(width, config.width)
        self.of_token = linear(width, config.width)
        draw = nnx.initializers.normal(0.1)
        self.place = nnx.Embed(config.positions, config.width, embedding_init=draw, rngs=rngs)
        self.middle = linear(config.width, config.width)
        self.output = linear(config.width, width, 0.1)
        self.past = linear(latent, width, 0.1)  # z's own way to the output
        self.size = linear(config.width, 1, 0.01)

    def encode(
        self, hidden: Float[Array, "*n S H"], own: Bool[Array, "*n S"]
    ) -> Float[Array, "*n C"]:
        """Return z of texts; `own` are their answers' tokens, and where there are none z is 0."""
        terms = self.terms(hidden, jnp.cumsum(own, axis=-1) - 1)
        return self.scale(jnp.where(own[..., None], terms, 0.0).sum(axis=-2))

    def terms(self, hidden: Float[Array, "*n H"], place: Int[Array, "*n"]) -> Float[Array, "*n C"]:
        """Return f of the tokens of answers, which are at these places, 0 and up."""
        pieces = _normalise(hidden.astype(jnp.float32))
        place = jnp.clip(place, 0, self.config.positions - 1)
        wide = jax.nn.gelu(self.of_piece(pieces) + layers.look_up(self.piece_place, place))
        return self.piece(pieces) + self.to_latent(wide)

    def scale(self, total: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        """Return z of the sums of answers' terms."""
        square = jnp.square(total).sum(axis=-1, keepdims=True)
        return total * jax.lax.rsqrt(jnp.maximum(square, 1e-24))

    def __call__(
        self,
        latent: Float[Array, "*n C"],
        hidden: Float[Array, "*n D"],
        token: Float[Array, "*n D"],
        depth: Int[Array, "*n"],
    ) -> Float[Array, "*n D"]:
        """Return h'; `token` is the embedding of x_t, `depth` is j."""
        z, h = _normalise(latent), _normalise(hidden.astype(jnp.float32))
        places = self.config.positions
        wide = self.of_latent(z) + self.of_hidden(h) + self.of_token(_normalise(token))
        wide = jax.nn.gelu(wide + layers.look_up(self.place, jnp.minimum(depth, places - 1)))
        wide = _normalise(wide + jax.nn.gelu(self.middle(_normalise(wide))))
        change = _normalise(self.output(wide) + self.past(z))
        change = change * jax.nn.softplus(self.size(wide))
        # Selected, not multiplied: the language model is left as it is to the bit.
        speaks = (depth < places) & (latent != 0).any(axis=-1)
        return jnp.where(speaks[..., None], hidden + change.astype(hidden.dtype), hidden)


def _normalise(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """Return x with mean 0 and variance 1."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
