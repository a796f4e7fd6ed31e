"""The Kanerva machine: a Gaussian posterior over memories, updated by Kalman's formulas.

M ~ N(M₀, I ⊗ I) before anything is written and z = wM + noise of variance a for each fact, so that after
any facts M ~ N(R, U ⊗ I) with the K x K covariance U shared by all columns:

    Σ = w U wᵀ + a,    g = U wᵀ / Σ,    R ← R + g (z − w R),    U ← U − g Σ gᵀ

one by one. With keys from a fixed M_ref, R is the M of `streaming` with λ = a and no query noise, and
U = a A⁻¹. A fact is then forgotten by the same formulas with −a in place of a, their exact inverse.

Keys from the current memory are Eq. 4's other form, W_i = Z_i M_{i−1}†, of a memory that is noisy
(`Addressing.weigh_over`; the pseudo-inverse itself is its limit for a → 0):

    w_i = z_i R_{i−1}ᵀ (R_{i−1} R_{i−1}ᵀ + aI)⁻¹

and a query is addressed by the memory as it stands then, W̄ = Z R† (Algorithm 1). This is the released
code's path without direct writing, with a = σ² / (1 + 10⁻⁶) for its `observation_noise_std` σ: 10⁻¹²
for the 10⁻⁶ of its config. Its prior covariance, and so its U, is 1 + 10⁻⁶ times the one here; its
reads take 15 Newton–Schulz steps for R† (`BenIsraelCohen`), its keys are solved for as here.

Such keys depend on the order of facts, and no fact can be forgotten: R_{i−1} is gone, and later keys
were computed from a memory with the fact in. Taking out z R†, the key that the last memory gives,
leaves another memory than that of the other facts, even in float64. So every forget is refused.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from larimar_jax.linalg import dot
from larimar_jax.memory.base import Memory, Prepared, Signs, mask_signs
from larimar_jax.memory.pytrees import Latents, Real, Weights, pytree, static

# A forget is refused where less than this share of a is left of a − w U wᵀ: its key was never written.
_LEFT = 1e-6
# What rounding leaves of w U wᵀ for a key that is fully known, relative to ‖w‖². Σ is no less where a
# fact is written, and as much is left where it is forgotten: a gain is no quotient of two roundings.
_ROUNDING = 5e-7


@pytree
class KanervaState:
    """mean: R. covariance: U, symmetric. count: facts in. refused: forgets refused."""

    mean: Float[Array, "K C"]
    covariance: Float[Array, "K K"]
    count: Int[Array, ""]
    refused: Int[Array, ""]


@pytree
class Kanerva(Memory):
    """The posterior over M, mean and covariance.

    observation: a, the variance of a value's noise, in units of the prior's. addressed_by: what keys
    and queries are addressed by, the "reference" memory M_ref, or the "current" one: each key by the
    memory before its fact, each query by the memory that is read. Then every forget is refused.

    Covariances lose digits where `streaming` does not: forgetting subtracts numbers that agree to a
    share of a / ‖w‖², and what was written and forgotten thousands of times drifts. It is here to be
    compared with, and for its U.
    """

    observation: Real = dataclasses.field(default=0.1, kw_only=True)
    addressed_by: Literal["reference", "current"] = static(default="reference", kw_only=True)

    @property
    def SAME(self) -> Literal["matrix", "nothing"]:
        return "matrix" if self.FORGETS else "nothing"

    @property
    def FORGETS(self) -> bool:
        return self.addressed_by == "reference"

    def empty(self, prepared: Prepared) -> KanervaState:
        """Return the prior: mean M₀, covariance I."""
        zero, identity = jnp.zeros((), jnp.int32), jnp.eye(self.slots, dtype=jnp.float32)
        return KanervaState(prepared.prior_memory, identity, zero, zero)

    def update(
        self, prepared: Prepared, state: KanervaState, keys: Latents, values: Latents, signs: Signs
    ) -> KanervaState:
        """Apply Kalman's update to N facts, their noise variance a·sign."""
        if self.addressed_by == "reference":
            rows, values, signs = self.address_facts(prepared, keys, values, signs)
        else:
            rows, values = keys.astype(jnp.float32), values.astype(jnp.float32)
            signs = mask_signs(rows, signs)
            refused = state.refused + jnp.sum(signs < 0).astype(jnp.int32)
            state, signs = dataclasses.replace(state, refused=refused), jnp.maximum(signs, 0.0)

        def step(state: KanervaState, fact):
            row, z, alpha = fact
            if self.addressed_by == "current":
                row = self.addressing.weigh_over(state.mean, row[None], self.observation)[0]
            return self._one(state, row, z, alpha), None

        return jax.lax.scan(step, state, (rows, values, signs))[0]

    def for_edits(self) -> "Kanerva":
        """Return the memory that addresses by M_ref, by which queries find keys of other values."""
        return dataclasses.replace(self, addressed_by="reference")

    def _one(self, state: KanervaState, w, z, alpha) -> KanervaState:
        spread = dot(state.covariance, w)
        total = dot(w, spread) + alpha * self.observation
        least = _ROUNDING * dot(w, w)
        total = jnp.where(alpha > 0, jnp.maximum(total, least), total)
        is_refused = (alpha < 0) & (-total <= jnp.maximum(_LEFT * self.observation, least))
        total = jnp.where((alpha == 0) | is_refused, 1.0, total)
        used = jnp.where(is_refused, 0.0, jnp.abs(alpha))
        gain = used * spread / total
        return KanervaState(
            state.mean + gain[:, None] * (z - dot(w, state.mean))[None, :],
            # Both factors alike, so that it stays symmetric.
            state.covariance - used / total * spread[:, None] * spread[None, :],
            state.count + jnp.where(is_refused, 0.0, alpha).astype(jnp.int32),
            state.refused + is_refused.astype(jnp.int32),
        )

    def query_weights(self, prepared: Prepared, state: KanervaState, queries: Latents) -> Weights:
        """Return W̄ by M_ref, or by R (see `addressed_by`)."""
        if self.addressed_by == "reference":
            return self.address(prepared, queries)
        by = self._address(state.mean, few_encodings=True)
        return self.addressing.weigh(by, queries.astype(jnp.float32))

    def matrix(self, prepared: Prepared, state: KanervaState) -> Float[Array, "K C"]:
        return state.mean

    def residual(self, prepared: Prepared, state: KanervaState, weights: Weights) -> Weights:
        """Return w U; U = I where nothing is written."""
        return dot(weights, state.covariance)
