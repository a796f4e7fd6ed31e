"""Addressing: from encodings to weights over the slots of a fixed reference memory M_ref (§4).

Storage does not know how weights are computed, and addressing does not know what is stored: every
memory takes every kind. M_ref is M₀ where the parameters have no other: trained, drawn at random
(`initial="normal"`), or the encodings of prompts that are known beforehand (`from_prompts`). The
variant `growing` builds its own as facts arrive.

A kind is a class of this file; its name in configs is the class name in snake case, alone or with
its numbers: `addressing="gaussian"`, `addressing=dict(kind="gaussian", width=1e-2)`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from larimar_jax.linalg import (
    add_ridge,
    all_in_batch,
    dot,
    inverse_factor,
    pinv,
    whitener,
)
from larimar_jax.memory.pytrees import Latents, Real, Weights, pytree, static


class UnknownAddressing(ValueError):
    """A kind of addressing that does not exist, or numbers that the kind does not have."""


@pytree
class Addressing:
    """How encodings become weights; its fields are real numbers, leaves that a sweep maps over."""

    def prepare(self, reference: Float[Array, "K C"]) -> Any:
        """Compute what depends on M_ref alone, once per batch of episodes; M_ref itself by default."""
        return reference

    def prepare_few(self, reference: Float[Array, "K C"]) -> Any:
        """Do as `prepare`, cheaper where few encodings follow."""
        return self.prepare(reference)

    def weigh(self, prepared: Any, encodings: Latents) -> Weights:
        """Return the weights of encodings, given what `prepare` returned: Z times that, by default.
        Padding has weights 0."""
        return dot(encodings, prepared)

    def weigh_over(
        self, memory: Float[Array, "K C"], encodings: Latents, variance: Real
    ) -> Weights:
        """Return the weights of few encodings over another memory than M_ref, where every number of an
        encoding has noise of this variance; only inverses regard it."""
        return self.weigh(self.prepare_few(memory), encodings)


class Projector(NamedTuple):
    """M_refᵀ(M_ref M_refᵀ + εI)⁻¹, M_ref† for ε = 0, without its K x C numbers: a tenth of the time
    where few encodings are projected.

    reference: M_ref. ridge: ε. whiten: L⁻¹ for the Cholesky factor L of M_ref M_refᵀ + εI [K, K], or of
    M_refᵀM_ref + εI [C, C] where K > C. is_accurate: whether the normal equations are good enough (see
    `projector`); where they are not, whiten is the identity and not used. inverse: the numbers where
    they are not, else zeros.
    """

    reference: Float[Array, "K C"]
    ridge: Real
    whiten: Float[Array, "n n"]
    is_accurate: Bool[Array, ""]
    inverse: Float[Array, "C K"]


@pytree
class PseudoInverse(Addressing):
    """W = Z M_ref†: the coordinates of each encoding in the slots of M_ref (Algorithm 1, §4)."""

    def prepare(self, reference: Float[Array, "K C"]) -> Float[Array, "C K"]:
        return pinv(reference)

    def prepare_few(self, reference: Float[Array, "K C"]) -> Projector:
        """Return M_ref† as a `Projector`."""
        return projector(reference)

    def weigh(self, prepared: Projector | Float[Array, "C K"], encodings: Latents) -> Weights:
        if not isinstance(prepared, Projector):
            return dot(encodings, prepared)
        return jax.lax.cond(
            prepared.is_accurate,
            lambda: _refined(prepared, encodings)[1],
            lambda: dot(encodings, prepared.inverse),
        )

    def weigh_over(
        self, memory: Float[Array, "K C"], encodings: Latents, variance: Real
    ) -> Weights:
        """Return Z Mᵀ(M Mᵀ + aI)⁻¹, a = `variance`: the mean of w where z is wM and noise of variance
        a, for w ~ N(0, I); it is Z M† for a → 0."""
        return self.weigh(projector(memory, variance), encodings)


def newton_schulz_pinv(
    a: Float[Array, "m n"], steps: int = 15, log_start: float = -5.0
) -> Float[Array, "n m"]:
    """Return the released code's approximation of A† (§3), by Newton–Schulz steps.

    X ← 2X − XAX from X₀ = min(e^log_start, 5e-4)·Aᵀ. It turns a singular value s into
    (1 − (1 − 5e-4·s²)^(2^steps)) / s: too small for small s, and divergent for s > 63.2. For
    reproducing the released model; `pinv` is the exact one.
    """
    a = a.astype(jnp.float32)
    is_tall = a.shape[0] >= a.shape[1]
    start = jnp.minimum(jnp.exp(jnp.float32(log_start)), jnp.float32(5e-4)) * a.T

    def step(x, _):
        # X A is n x n, A X is m x m: the product over the shorter side first.
        xax = dot(dot(x, a), x) if is_tall else dot(x, dot(a, x))
        return 2.0 * x - xax, None

    return jax.lax.scan(step, start, None, length=steps)[0]


@pytree
class BenIsraelCohen(PseudoInverse):
    """W = Z X for the released code's X ≈ M_ref† (§3, `newton_schulz_pinv`), by Newton–Schulz
    steps in their number and with their start; where an encoding has noise, as `PseudoInverse`."""

    steps: int = static(default=15)
    log_start: float = static(default=-5.0)

    def prepare(self, reference: Float[Array, "K C"]) -> Float[Array, "C K"]:
        return newton_schulz_pinv(reference, self.steps, self.log_start)

    prepare_few = prepare


@pytree
class Gaussian(Addressing):
    """Eqs. 7–8: w_k ∝ exp(−‖z − M_ref[k]‖² / (2 α s²)), s = min_k ‖z − M_ref[k]‖, Σ_k w_k = 1.

    width: α; towards 0 the weights become the one-hot nearest neighbour, which is also their value
    at α = 0 and for an encoding that is itself a slot (s = 0). An encoding of zeros is padding and
    gets zero weights.
    """

    width: Real = 1e-3

    def weigh(self, prepared: Float[Array, "K C"], encodings: Latents) -> Weights:
        # Differences and not ‖z‖² + ‖m‖² − 2zm: α near 1e-3 magnifies the rounding of small distances.
        # XLA fuses the reduction, so N x K x C is not held.
        squared = jnp.sum(jnp.square(encodings[:, None, :] - prepared[None, :, :]), axis=-1)
        nearest = jnp.min(squared, axis=1, keepdims=True)
        # The shift by s² changes no weight and makes the largest exponent 0.
        beyond = squared - nearest
        scale = 2.0 * self.width * nearest
        # Where 2αs² vanishes only the nearest slots keep an exponent; the quotient is not even
        # formed, because its derivative would be infinite.
        vanishes = scale <= 1e-12 * jnp.max(squared, axis=1, keepdims=True)
        exponent = -beyond / jnp.where(vanishes, 1.0, scale)
        limit = jnp.where(beyond > 0, -jnp.inf, 0.0)
        weights = jax.nn.softmax(jnp.where(vanishes, limit, exponent), axis=1)
        return jnp.where(_is_present(encodings), weights, 0.0)


@pytree
class RandomFeatures(Addressing):
    """Random Fourier features (Rahimi & Recht 2007): w_k = √(2/K) cos(z·M_ref[k] / ℓ + φ_k).

    length: ℓ, over which encodings differ. For M_ref with N(0, 1) entries w·w' ≈
    exp(−‖z − z'‖² / (2ℓ²)), so that the memory is a Gaussian process in K features. φ_k are spread
    evenly over the circle by the golden ratio, in place of random phases.
    """

    length: Real = 1.0

    def weigh(self, prepared: Float[Array, "K C"], encodings: Latents) -> Weights:
        slots = prepared.shape[0]
        phases = 2.0 * jnp.pi * jnp.mod(jnp.arange(slots, dtype=jnp.float32) * 0.6180339887, 1.0)
        angles = dot(encodings, prepared.T) / self.length + phases
        return jnp.where(_is_present(encodings), jnp.sqrt(2.0 / slots) * jnp.cos(angles), 0.0)


@pytree
class Whitened(Addressing):
    """W = Z (M_refᵀM_ref + ε)^(−½), turned into the slots.

    ‖w‖ is the Mahalanobis norm of z under the rows of M_ref, so that directions in which all prompts
    differ count less. epsilon: ε, as a share of M_ref's mean squared singular value.
    """

    epsilon: Real = 1e-3

    def prepare(self, reference: Float[Array, "K C"]) -> Float[Array, "C K"]:
        """Return the map from encodings to weights."""
        return whitener(reference, self.epsilon)


@pytree
class Linear(Addressing):
    """W = Z M_refᵀ: the slots are the keys themselves, linear keys that are learned as M_ref is."""

    def prepare(self, reference: Float[Array, "K C"]) -> Float[Array, "C K"]:
        return reference.T


KINDS: dict[str, type[Addressing]] = {
    re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower(): kind
    for kind in (PseudoInverse, Gaussian, RandomFeatures, Whitened, Linear, BenIsraelCohen)
}


def build(value: str | Mapping[str, Any] | Addressing) -> Addressing:
    """Return the addressing of a config: a kind's name, or a mapping of `kind` and its numbers.

    Raises:
      UnknownAddressing: naming the known kinds, or the numbers that the kind has.
    """
    if isinstance(value, Addressing):
        return value
    settings = {"kind": value} if isinstance(value, str) else dict(value)
    name = settings.pop("kind", None)
    if name not in KINDS:
        raise UnknownAddressing(
            f"there is no addressing {name!r}; known: {', '.join(KINDS)}. Write a name, or "
            'dict(kind="gaussian", width=1e-3).'
        )
    fields = [field.name for field in dataclasses.fields(KINDS[name])]
    if unknown := sorted(set(settings) - set(fields)):
        raise UnknownAddressing(
            f"the addressing {name!r} has no setting {', '.join(unknown)}; it has "
            f"{', '.join(fields) or 'none'}."
        )
    return KINDS[name](**settings)


def to_config(addressing: Addressing) -> dict[str, Any]:
    """Return the mapping that `build` turns into the same addressing."""
    [name] = [name for name, kind in KINDS.items() if type(addressing) is kind]
    return {"kind": name, **vars(addressing)}


def _is_present(encodings: Latents) -> Bool[Array, "N 1"]:
    """Return which rows are no padding."""
    return jnp.any(encodings != 0, axis=1, keepdims=True)


# The correction of a first solution, relative to it, up to which a second one is exact to rounding:
# normal equations square the condition number, one step of refinement squares what that costs.
_CORRECTION = 1e-3


def projector(reference: Float[Array, "K C"], ridge: Real | None = None) -> Projector:
    """Return the `Projector` of M_ref, which falls back on a pseudo-inverse where a trial shows that
    M_ref is too ill-conditioned for normal equations (κ above about 100, or a deficient rank)."""
    slots, latent = reference.shape
    gram = dot(reference, reference.T) if slots <= latent else dot(reference.T, reference)
    if ridge is not None:
        gram = add_ridge(gram, ridge)
    trial = Projector(
        reference,
        0.0 if ridge is None else ridge,
        inverse_factor(gram),
        jnp.ones((), bool),
        jnp.zeros_like(reference.T),
    )
    first, second = _refined(trial, jax.random.normal(jax.random.key(0), (4, latent), jnp.float32))
    size, correction = (jnp.max(jnp.abs(a)) for a in (first, second - first))
    # False where either is NaN. Of several M_ref, such as those of seeds side by side, all have to be
    # accurate: a predicate of each would compute both ways for all, and their SVDs at every step.
    is_accurate = all_in_batch(correction <= _CORRECTION * size)

    def exact():
        if ridge is None:
            return pinv(reference)
        # [M, √ε I]† = [M, √ε I]ᵀ(M Mᵀ + εI)⁻¹.
        root = jnp.sqrt(ridge) * jnp.eye(slots, dtype=jnp.float32)
        return pinv(jnp.concatenate([reference, root], axis=1))[:latent]

    inverse = jax.lax.cond(is_accurate, lambda: trial.inverse, exact)
    # What is not used has to be finite where both branches are computed, and its derivatives.
    identity = jnp.eye(gram.shape[0], dtype=jnp.float32)
    whiten = jnp.where(is_accurate, trial.whiten, identity)
    return trial._replace(whiten=whiten, is_accurate=is_accurate, inverse=inverse)


def _refined(by: Projector, encodings: Latents):
    """Return weights by the normal equations, and after a step of refinement.

    With P for the inverse of M_ref M_refᵀ + εI, a constant to differentiation, the second step is
    W + ((Z − WM)Mᵀ − εW)P (or the like with P first): its derivative at the solution is that of the
    solution, so that no solve has to be differentiated.
    """
    reference, is_wide = by.reference, by.reference.shape[0] <= by.reference.shape[1]

    def solve(rows: Float[Array, "N n"]) -> Float[Array, "N n"]:
        return dot(dot(rows, by.whiten.T), by.whiten)

    if is_wide:
        first = solve(dot(encodings, reference.T))
        left = dot(encodings - dot(first, reference), reference.T) - by.ridge * first
        return first, first + solve(left)
    # (MᵀM + εI)⁻¹ is on the other side: what is refined is Z(MᵀM + εI)⁻¹.
    inner = solve(encodings)
    first = dot(inner, reference.T)
    left = encodings - dot(first, reference) - by.ridge * inner
    return first, dot(inner + solve(left), reference.T)


def from_prompts(
    encodings: Latents, slots: int, memory: Float[Array, "K C"]
) -> Float[Array, "K C"]:
    """Return an M_ref of prompts that are known beforehand, one a slot (Table 3), in their order.

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
