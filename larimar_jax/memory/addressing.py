"""Addressing: from encodings to weights over the slots of a fixed reference memory M_ref (§4)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from larimar_jax.linalg import dot


def project(encodings: Float[Array, "N C"], inverse: Float[Array, "C K"]) -> Float[Array, "N K"]:
    """W = Z M_ref†: the coordinates of each encoding in the slots of M_ref (Algorithm 1, §4)."""
    return dot(encodings.astype(jnp.float32), inverse)


def gaussian(
    encodings: Float[Array, "N C"],
    reference: Float[Array, "K C"],
    width: float | Float[Array, ""],
) -> Float[Array, "N K"]:
    """Eqs. 7–8: w_k ∝ exp(−‖z − M_ref[k]‖² / (2 α s²)), s = min_k ‖z − M_ref[k]‖, Σ_k w_k = 1.

    `width` is α; towards 0 the weights become the one-hot nearest neighbour, which is also their
    value at α = 0 and for an encoding that is itself a slot (s = 0). An encoding of zeros is
    padding and gets zero weights.
    """
    encodings = encodings.astype(jnp.float32)
    # Differences and not ‖z‖² + ‖m‖² − 2zm: α near 1e-3 magnifies the rounding of small distances.
    # XLA fuses the reduction, so N x K x C is not held.
    squared = jnp.sum(jnp.square(encodings[:, None, :] - reference[None, :, :]), axis=-1)
    nearest = jnp.min(squared, axis=1, keepdims=True)
    # The shift by s² changes no weight and makes the largest exponent 0.
    beyond = squared - nearest
    scale = 2.0 * width * nearest
    # Where 2αs² vanishes only the nearest slots keep an exponent; the quotient is not even formed,
    # because its derivative would be infinite.
    vanishes = scale <= 1e-12 * jnp.max(squared, axis=1, keepdims=True)
    exponent = -beyond / jnp.where(vanishes, 1.0, scale)
    weights = jax.nn.softmax(
        jnp.where(vanishes, jnp.where(beyond > 0, -jnp.inf, 0.0), exponent), axis=1
    )
    return jnp.where(jnp.any(encodings != 0, axis=1, keepdims=True), weights, 0.0)
