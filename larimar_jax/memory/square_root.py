"""Square-root streaming: the memory of `streaming` by its Cholesky factor, never computed anew.

A = λI + Σ α WᵀW is kept as L with A = L Lᵀ. A fact in turns L by a Givens rotation for each column, a
fact out by a hyperbolic one: O(K²), and with half of the digits that forming A needs. M is not kept;
reading solves for it: wM = wM₀ + w A⁻¹ B, O(K² + KC) a query.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from larimar_jax.linalg import dot, factor_update, product_solve
from larimar_jax.memory.base import Memory, Prepared, Signs
from larimar_jax.memory.pytrees import Latents, Real, Weights, pytree


@pytree
class SquareRootState:
    """factor: L, lower. cross: B = Σ α Wᵀ(Z − W M₀). count: facts in. refused: forgets refused."""

    factor: Float[Array, "K K"]
    cross: Float[Array, "K C"]
    count: Int[Array, ""]
    refused: Int[Array, ""]


@pytree
class SquareRoot(Memory):
    """Recursive least squares with a ridge towards M₀, in the square-root form.

    ridge: λ, as in `streaming`; there is no query noise here, whose μ would change A as a whole.

    A forget that would leave A indefinite is refused and counted, and so far exact. Rounding is not
    undone: unlike the sums of `streaming`, a factor that was turned back and forth thousands of times
    drifts.
    """

    ridge: Real = dataclasses.field(default=0.1, kw_only=True)

    def empty(self, prepared: Prepared) -> SquareRootState:
        """Return the state with nothing written: A = λI, M = M₀."""
        zero = jnp.zeros((), jnp.int32)
        diagonal = jnp.sqrt(jnp.asarray(self.ridge, jnp.float32))
        return SquareRootState(
            diagonal * jnp.eye(self.slots, dtype=jnp.float32),
            jnp.zeros((self.slots, self.latent), jnp.float32),
            zero,
            zero,
        )

    def update(
        self,
        prepared: Prepared,
        state: SquareRootState,
        keys: Latents,
        values: Latents,
        signs: Signs,
    ) -> SquareRootState:
        weights, values, signs = self.address_facts(prepared, keys, values, signs)

        def rotate(state: SquareRootState, fact):
            w, error, alpha = fact
            factor, is_sound = factor_update(state.factor, w, alpha)
            used = jnp.where(is_sound, alpha, 0.0)
            return SquareRootState(
                factor,
                state.cross + used * w[:, None] * error[None, :],
                state.count + used.astype(jnp.int32),
                state.refused + (~is_sound).astype(jnp.int32),
            ), None

        facts = (weights, values - dot(weights, prepared.prior_memory), signs)
        return jax.lax.scan(rotate, state, facts)[0]

    def recall(self, prepared: Prepared, state: SquareRootState, weights: Weights) -> Latents:
        """Return wM₀ + w A⁻¹ B."""
        solved = product_solve(state.factor, weights.T).T
        return dot(weights, prepared.prior_memory) + dot(solved, state.cross)

    def residual(self, prepared: Prepared, state: SquareRootState, weights: Weights) -> Weights:
        """Return λ w A⁻¹."""
        return self.ridge * product_solve(state.factor, weights.T).T

    def matrix(self, prepared: Prepared, state: SquareRootState) -> Float[Array, "K C"]:
        return prepared.prior_memory + product_solve(state.factor, state.cross)
