"""Addressing: from encodings to weights over the slots of a fixed reference memory M_ref (§4).

Storage does not know how weights are made, and addressing does not know what is stored: every memory
takes every kind by name. M_ref is M₀ where the parameters name no other: trained, drawn at random
(`initial="normal"`), or the encodings of prompts that are known beforehand (`from_prompts`). The
variant `growing` makes its own as facts arrive.

A kind is a pair of functions in `KINDS`, where a new one is added.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from larimar_jax.linalg import dot, inverse_factor, pinv, whitener

Real = float | Float[Array, ""]


class Addressing(NamedTuple):
    """prepare: (M_ref [K, C], width) → what depends on M_ref alone, once per batch of episodes.
    weigh: (that, encodings [N, C], width) → weights [N, K]. width: what the number means to it.
    brief: as prepare, cheaper where few encodings follow; None where there is no such thing."""

    prepare: Callable[[Float[Array, "K C"], Real], Any]
    weigh: Callable[[Any, Float[Array, "N C"], Real], Float[Array, "N K"]]
    width: str
    brief: Callable[[Float[Array, "K C"], Real], Any] | None = None


class Projector(NamedTuple):
    """M_ref† without its K x C numbers: a tenth of the time where few encodings are projected.

    reference: M_ref. whiten: L⁻¹ for the Cholesky factor L of M_ref M_refᵀ [K, K], or of M_refᵀM_ref
    [C, C] where K > C. sound: whether that is good enough (see `projector`); where it is not, it is the
    identity and not used. inverse: M_ref† where it is not sound, else zeros.
    """

    reference: Float[Array, "K C"]
    whiten: Float[Array, "n n"]
    sound: Bool[Array, ""]
    inverse: Float[Array, "C K"]


# The correction of a first solution, relative to it, up to which a second one is exact to rounding:
# normal equations square the condition number, one step of refinement squares what that costs.
_CORRECTION = 1e-3


def projector(reference: Float[Array, "K C"]) -> Projector:
    """The `Projector` of M_ref. Where a trial shows that M_ref is too ill-conditioned for normal
    equations (κ above about 100, or a rank below its sizes), it falls back on the pseudo-inverse."""
    slots, latent = reference.shape
    gram = dot(reference, reference.T) if slots <= latent else dot(reference.T, reference)
    made = Projector(
        reference, inverse_factor(gram), jnp.ones((), bool), jnp.zeros((latent, slots), jnp.float32)
    )
    first, last = _refined(made, jax.random.normal(jax.random.key(0), (4, latent), jnp.float32))
    size, correction = (jnp.max(jnp.abs(a)) for a in (first, last - first))
    sound = jax.lax.stop_gradient(correction <= _CORRECTION * size)  # Not where either is NaN.
    inverse = jax.lax.cond(sound, lambda: made.inverse, lambda: pinv(reference))
    # Both ways are taken, and one is chosen: the other has to be finite, and so its derivatives.
    blank = jnp.eye(gram.shape[0], dtype=jnp.float32)
    whiten = jnp.where(sound, made.whiten, blank)
    return made._replace(whiten=whiten, sound=sound, inverse=inverse)


def _refined(by: Projector, encodings: Float[Array, "N C"]):
    """Weights by the normal equations, and after a step of refinement.

    With P for the inverse of M_ref M_refᵀ, a constant to differentiation, the second step is
    W + (Z − WM)MᵀP (or the like with P first): its derivative at the solution is that of Z M†, so that
    no solve has to be differentiated.
    """
    reference, wide = by.reference, by.reference.shape[0] <= by.reference.shape[1]

    def solve(rows: Float[Array, "N n"]) -> Float[Array, "N n"]:
        return dot(dot(rows, by.whiten.T), by.whiten)

    def project(rows: Float[Array, "N C"]) -> Float[Array, "N K"]:
        if wide:
            return solve(dot(rows, reference.T))
        return dot(solve(rows), reference.T)

    first = project(encodings)
    if wide:
        return first, first + project(encodings - dot(first, reference))
    # (MᵀM)⁻¹ is on the other side: what is refined is Z(MᵀM)⁻¹.
    inner = solve(encodings)
    left = encodings - dot(dot(inner, reference.T), reference)
    return first, dot(inner + solve(left), reference.T)


def project(encodings: Float[Array, "N C"], inverse: Float[Array, "C K"]) -> Float[Array, "N K"]:
    """W = Z M_ref†: the coordinates of each encoding in the slots of M_ref (Algorithm 1, §4)."""
    return dot(encodings.astype(jnp.float32), inverse)


def _project(by: Projector | Float[Array, "C K"], encodings: Float[Array, "N C"], width: Real):
    if not isinstance(by, Projector):
        return project(encodings, by)
    encodings = encodings.astype(jnp.float32)
    return jax.lax.cond(
        by.sound, lambda: _refined(by, encodings)[1], lambda: dot(encodings, by.inverse)
    )


def gaussian(
    encodings: Float[Array, "N C"], reference: Float[Array, "K C"], width: Real
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
    return jnp.where(_present(encodings), weights, 0.0)


def features(
    encodings: Float[Array, "N C"], reference: Float[Array, "K C"], width: Real
) -> Float[Array, "N K"]:
    """Random Fourier features (Rahimi & Recht 2007): w_k = √(2/K) cos(z·M_ref[k] / ℓ + φ_k).

    `width` is ℓ. For M_ref with N(0, 1) entries w·w' ≈ exp(−‖z − z'‖² / (2ℓ²)), so that the memory is
    a Gaussian process in K features. φ_k are spread evenly over the circle by the golden ratio, in
    place of random phases.
    """
    encodings, slots = encodings.astype(jnp.float32), reference.shape[0]
    phases = 2.0 * jnp.pi * jnp.mod(jnp.arange(slots, dtype=jnp.float32) * 0.6180339887, 1.0)
    angles = dot(encodings, reference.T) / width + phases
    return jnp.where(_present(encodings), jnp.sqrt(2.0 / slots) * jnp.cos(angles), 0.0)


def _present(encodings: Float[Array, "N C"]):
    """Which rows are no padding, [N, 1]."""
    return jnp.any(encodings != 0, axis=1, keepdims=True)


KINDS = {
    "pinv": Addressing(
        lambda reference, width: pinv(reference),
        _project,
        "nothing",
        lambda reference, width: projector(reference),
    ),
    "gaussian": Addressing(
        lambda reference, width: reference,
        lambda reference, encodings, width: gaussian(encodings, reference, width),
        "α of Eq. 7",
    ),
    "features": Addressing(
        lambda reference, width: reference,
        lambda reference, encodings, width: features(encodings, reference, width),
        "the length ℓ over which encodings differ",
    ),
    # W = Z (M_refᵀM_ref + ε)^(−½), turned into the slots: ‖w‖ is the Mahalanobis norm of z under the
    # rows of M_ref, so that directions in which all prompts differ count less.
    "whitened": Addressing(
        whitener,
        lambda matrix, encodings, width: project(encodings, matrix),
        "ε, as a share of M_ref's mean squared singular value",
    ),
    # The slots are the keys themselves: linear keys that are learned as M_ref is.
    "linear": Addressing(
        lambda reference, width: reference.T,
        lambda matrix, encodings, width: project(encodings, matrix),
        "nothing",
    ),
}


def from_prompts(
    encodings: Float[Array, "N C"], slots: int, memory: Float[Array, "K C"]
) -> Float[Array, "K C"]:
    """An M_ref of prompts that are known beforehand, one a slot (Table 3), in their order.

    Slots beyond the prompts keep the rows of `memory`; prompts beyond the slots are left out.

    Raises:
      ValueError: `memory` is not [slots, C].
    """
    if memory.shape != (slots, encodings.shape[1]):
        raise ValueError(
            f"the memory is {memory.shape}, and its reference is to have {slots} slots of "
            f"{encodings.shape[1]} dimensions. Is it that of another encoder?"
        )
    rows = jnp.asarray(encodings, jnp.float32)[:slots]
    return memory.astype(jnp.float32).at[: rows.shape[0]].set(rows)
