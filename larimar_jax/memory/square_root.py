"""Square-root streaming: the memory of `streaming` by its Cholesky factor, never computed anew.

A = λI + Σ α WᵀW is kept as L with A = L Lᵀ. A fact in turns L by a Givens rotation for each column, a
fact out by a hyperbolic one: O(K²), and with half of the digits that forming A needs. M is not kept;
reading solves for it: wM = wM₀ + w A⁻¹ B, O(K² + KC) a query.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from larimar_jax.linalg import dot, factor_update, product_solve
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
)


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
        """Nothing written: A = λI, M = M₀."""
        zero = jnp.zeros((), jnp.int32)
        diagonal = jnp.sqrt(jnp.asarray(self.ridge, jnp.float32))
        return SquareRootState(
            diagonal * jnp.eye(self.slots, dtype=jnp.float32),
            jnp.zeros((self.slots, self.latent), jnp.float32),
            zero,
            zero,
        )

    def write(
        self,
        prepared: Prepared,
        state: SquareRootState,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> SquareRootState:
        """A rotation of L for each fact."""
        keys, values = observe(keys, values, self.noise, rng)
        weights = self.address(prepared, keys)
        signs = jnp.broadcast_to(jnp.asarray(sign, jnp.int32), keys.shape[:1])
        signs = jnp.where(jnp.any(weights != 0, axis=1), signs, 0).astype(jnp.float32)

        def one(state: SquareRootState, fact):
            w, error, alpha = fact
            factor, sound = factor_update(state.factor, w, alpha)
            used = jnp.where(sound, alpha, 0.0)
            return SquareRootState(
                factor,
                state.cross + used * w[:, None] * error[None, :],
                state.count + used.astype(jnp.int32),
                state.refused + (~sound).astype(jnp.int32),
            ), None

        facts = (weights, values - dot(weights, prepared.memory), signs)
        return jax.lax.scan(one, state, facts)[0]

    def read(
        self,
        prepared: Prepared,
        state: SquareRootState,
        queries: Float[Array, "Q C"],
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """Z_read = W M. Confidence as in `streaming`: 1 − ‖λ w A⁻¹‖² / ‖w‖²."""
        mean = self.address(prepared, queries)
        log_variance = self.log_variance(prepared, state, queries)
        weights = sample(mean, log_variance, rng)
        solved = product_solve(state.factor, weights.T).T
        left = self.ridge * (solved if rng is None else product_solve(state.factor, mean.T).T)
        squared = jnp.sum(jnp.square(mean), axis=1)
        return Reading(
            dot(weights, prepared.memory) + dot(solved, state.cross),
            mean,
            log_variance,
            share(squared - jnp.sum(jnp.square(left), axis=1), squared),
        )

    def matrix(self, prepared: Prepared, state: SquareRootState) -> Float[Array, "K C"]:
        """The posterior memory M."""
        return prepared.memory + product_solve(state.factor, state.cross)
