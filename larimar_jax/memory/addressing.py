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
    # The shift by s² changes no weight and makes the largest exponent 0; the floor only acts where
    # 2αs² vanishes, and there leaves 0 for the nearest slots and −∞ for the others.
    scale = jnp.maximum(2.0 * width * nearest, jnp.float32(1e-30))
    weights = jax.nn.softmax(-(squared - nearest) / scale, axis=1)
    return jnp.where(jnp.any(encodings != 0, axis=1, keepdims=True), weights, 0.0)
