"""The Kanerva machine: a Gaussian posterior over memories, updated by Kalman's formulas.

M ~ N(M₀, I ⊗ I) before anything is written and z = wM + noise of variance a for each fact, so that after
any facts M ~ N(R, U ⊗ I) with the K x K covariance U shared by all columns:

    Σ = w U wᵀ + a,    g = U wᵀ / Σ,    R ← R + g (z − w R),    U ← U − g Σ gᵀ

one by one, or for a block of facts at once with Σ an N x N matrix. This is the released code's path
without direct writing; R is the M of `streaming` with λ = a and no query noise, and U = a A⁻¹. A fact is
forgotten by the same formulas with −a in place of a, their exact inverse.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from larimar_jax.linalg import dot, eigh, general_solve
from larimar_jax.memory.base import (
    Memory,
    Prepared,
    Reading,
    Real,
    Sign,
    observe,
    pytree,
    sample,
    share,
    static,
)

# A forget is refused where less than this share of a is left of a − w U wᵀ: its key was never written.
_LEFT = 1e-6


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

    observation: a, the variance of a value's noise, in units of the prior's. update: facts of a write
    "sequential", one after the other, or as one "block": the same to rounding, but that a block is
    made or refused as a whole.

    Covariances lose digits where `streaming` does not: forgetting subtracts numbers that agree to a
    share of a / ‖w‖², and what was written and forgotten thousands of times drifts. It is here to be
    compared with, and for its U.
    """

    observation: Real = dataclasses.field(default=0.1, kw_only=True)
    update: Literal["sequential", "block"] = static(default="sequential", kw_only=True)

    def empty(self, prepared: Prepared) -> KanervaState:
        """The prior: mean M₀, covariance I."""
        zero = jnp.zeros((), jnp.int32)
        return KanervaState(prepared.memory, jnp.eye(self.slots, dtype=jnp.float32), zero, zero)

    def write(
        self,
        prepared: Prepared,
        state: KanervaState,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> KanervaState:
        """Kalman's update for N facts, their noise variance a·sign."""
        keys, values = observe(keys, values, self.noise, rng)
        weights = self.address(prepared, keys)
        signs = jnp.broadcast_to(jnp.asarray(sign, jnp.int32), keys.shape[:1])
        signs = jnp.where(jnp.any(weights != 0, axis=1), signs, 0)
        facts = (weights, values, signs.astype(jnp.float32))
        if self.update == "block":
            return self._block(state, *facts)
        return jax.lax.scan(lambda s, fact: (self._one(s, *fact), None), state, facts)[0]

    def _one(self, state: KanervaState, w, z, alpha) -> KanervaState:
        spread = dot(state.covariance, w)
        total = dot(w, spread) + alpha * self.observation
        refused = (alpha < 0) & (-total <= _LEFT * self.observation)
        total = jnp.where((alpha == 0) | refused, 1.0, total)
        used = jnp.where(refused, 0.0, jnp.abs(alpha))
        gain = used * spread / total
        return KanervaState(
            state.mean + gain[:, None] * (z - dot(w, state.mean))[None, :],
            # Both factors alike, so that it stays symmetric.
            state.covariance - used / total * spread[:, None] * spread[None, :],
            state.count + jnp.where(refused, 0.0, alpha).astype(jnp.int32),
            state.refused + refused.astype(jnp.int32),
        )

    def _block(self, state: KanervaState, w, z, alpha) -> KanervaState:
        w = jnp.where(alpha[:, None] != 0, w, 0.0)
        spread = dot(w, state.covariance)
        noise = jnp.where(alpha == 0, 1.0, alpha * self.observation)
        total = dot(spread, w.T) + jnp.diag(noise)
        found = general_solve(total, jnp.concatenate([spread, z - dot(w, state.mean)], axis=1))
        k = self.slots
        covariance = state.covariance - dot(spread.T, found[:, :k])
        mean = state.mean + dot(spread.T, found[:, k:])
        # U stays positive where Σ has as many negative eigenvalues as there are forgets (Haynsworth).
        negative = jnp.sum(eigh(total)[0] < -_LEFT * self.observation)
        sound = jnp.all(jnp.isfinite(mean)) & (negative == jnp.sum(alpha < 0))
        symmetric = 0.5 * (covariance + covariance.T)
        count = state.count + jnp.sum(alpha).astype(jnp.int32)
        written = KanervaState(mean, symmetric, count, state.refused)
        gone = state.refused + jnp.sum(alpha < 0).astype(jnp.int32)
        kept = dataclasses.replace(state, refused=gone)
        return jax.tree.map(lambda new, old: jnp.where(sound, new, old), written, kept)

    def read(
        self,
        prepared: Prepared,
        state: KanervaState,
        queries: Float[Array, "Q C"],
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """Z_read = W R. Confidence: 1 − ‖w U‖² / ‖w‖²; U = I where nothing is written."""
        mean = self.address(prepared, queries)
        log_variance = self.log_variance(prepared, state, queries)
        latent = dot(sample(mean, log_variance, rng), state.mean)
        squared = jnp.sum(jnp.square(mean), axis=1)
        left = jnp.sum(jnp.square(dot(mean, state.covariance)), axis=1)
        return Reading(latent, mean, log_variance, share(squared - left, squared))

    def posterior_variance(
        self, prepared: Prepared, state: KanervaState, queries: Float[Array, "Q C"]
    ):
        """The posterior variance w U wᵀ + a of each number of a readout, [Q]."""
        w = self.address(prepared, queries)
        return jnp.sum(dot(w, state.covariance) * w, axis=1) + self.observation

    def matrix(self, prepared: Prepared, state: KanervaState) -> Float[Array, "K C"]:
        """The posterior mean R."""
        return state.mean
