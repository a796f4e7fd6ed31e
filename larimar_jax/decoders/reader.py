"""A late route: the decoder speaks from the encoding of an answer by a change of its last hidden state.

    h'_t = h_t + r(z, h_t, x_t, j),        p(x_{t+1}) = softmax(h'_t Wᵀ)

z is what a memory reads of an answer's encoding (latent_layout.py), h_t the frozen language model's last
hidden state, x_t the newest token, j how many tokens of the answer stand before, and W the frozen map to
logits. What attends to what stays the language model's own, whatever z is, so that its keys and values
of a prompt are computed once for all z; and z = 0 leaves it as it is, to the bit. The route is ours: the
paper's two (§2) act in every layer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from larimar_jax import layers


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """Sizes of a reader."""

    width: int = 1536  # of its two hidden layers
    positions: int = 8  # tokens of an answer that it can change


class Reader(nnx.Module):
    """r: a multi-layer perceptron of the normalised z, h_t and embedding of x_t, and of j.

    Args:
      latent: C. width: D, the decoder's.
    """

    def __init__(self, config: ReaderConfig, latent: int, width: int, rngs: nnx.Rngs):
        self.config = config

        def linear(inputs: int, outputs: int, scale: float = 1.0) -> nnx.Linear:
            draw = nnx.initializers.variance_scaling(scale, "fan_in", "normal")
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=draw, rngs=rngs)

        self.of_latent = linear(latent, config.width)
        self.of_hidden = linear(width, config.width)
        self.of_token = linear(width, config.width)
        draw = nnx.initializers.normal(0.1)
        self.place = nnx.Embed(config.positions, config.width, embedding_init=draw, rngs=rngs)
        self.middle = linear(config.width, config.width)
        self.output = linear(config.width, width, 0.1)
        self.past = linear(latent, width, 0.1)  # z's own way to the output
        self.size = linear(config.width, 1, 0.01)

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
