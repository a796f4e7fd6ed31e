"""Streaming: facts are written and forgotten one by one or in batches, in any order (Eqs. 2–6, §4).

The memory minimises Σ_j ‖Z_j − W_j M‖² + λ‖M − M₀‖² over exactly the facts that are in,
W = X M_ref† or Gaussian keys. Its sufficient statistics are sums over facts, so α = ±1 adds and
takes away:

    A = λI + Σ α WᵀW,      B = Σ α Wᵀ(Z − W M₀),      M = M₀ + A⁻¹ B

which is the same M as B' = λM₀ + Σ α WᵀZ, M = A⁻¹B'. Solving for M − M₀ keeps M₀ to the last bit
where nothing has been written. With λ → 0 this is Eq. 4's M (the pseudo-inverse solution nearest to
M₀).

Why not Eq. 4's recursion on M, nor Sherman–Morrison on A⁻¹: their errors feed back and diverge for
small λ after some thousand updates. Sums do not; M and the Cholesky factor here are only a cache of
them.

Precision. In float32 M differs from its float64 value, and from itself under another order or
grouping of the same facts, by at most about 1e-7·κ of its norm, κ = 1 + ‖Σ WᵀW‖₂ / λ: 1e-5 for
κ ≤ 100 and 1e-4 for κ ≤ 1000 (for up to K facts, ‖Σ WᵀW‖₂ is a few times a fact's ‖w‖²), after
thousands of updates as after one. The difference lies where nothing was written, so what is read at
written keys stays within 1e-6 far below these ridges. `condition` estimates κ.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from larimar_jax.linalg import (
    Sum,
    add_ridge,
    cholesky,
    condition,
    dot,
    is_positive_definite,
    rank_update,
    spd_quadratic,
    spd_solve,
    zero_sum,
)
from larimar_jax.memory.contract import (
    Memory,
    Prior,
    Reading,
    Real,
    Sign,
    observe,
    pytree,
    sample,
    share,
)


@pytree
class StreamingState:
    """Sufficient statistics of one memory (λ not included), and the solution they imply.

    gram: Σ α WᵀW [K, K]. cross: Σ α Wᵀ(Z − W M₀) [K, C]. factor: Cholesky of gram + λI. solution:
    M.
    count: facts in. missing: forgets refused.
    """

    gram: Sum
    cross: Sum
    factor: Float[Array, "K K"]
    solution: Float[Array, "K C"]
    count: Int[Array, ""]
    missing: Int[Array, ""]


@pytree
class Streaming(Memory):
    """Recursive least squares with a ridge towards M₀, in the information form.

    ridge: λ, in units of a squared norm of addressing weights ‖w‖².

    Forgetting what was never written is refused and counted in `missing` when it would leave A
    indefinite, which for a key outside the span of the written ones is the case as soon as
    λ < ‖w‖². A key inside that span can not be told from a written one: statistics keep no list.
    """

    ridge: Real = dataclasses.field(default=1e-2, kw_only=True)

    def empty(self, prior: Prior) -> StreamingState:
        """Nothing written: A = λI, M = M₀."""
        zero = jnp.zeros((), jnp.int32)
        diagonal = jnp.sqrt(jnp.asarray(self.ridge, jnp.float32))
        return StreamingState(
            gram=zero_sum(self.slots, self.slots),
            cross=zero_sum(self.slots, self.latent),
            factor=diagonal * jnp.eye(self.slots, dtype=jnp.float32),
            solution=prior.memory,
            count=zero,
            missing=zero,
        )

    def write(
        self,
        prior: Prior,
        state: StreamingState,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> StreamingState:
        """Eqs. 3–4 for N facts and one factorisation: `accumulate`, then `solve`."""
        updated = self.solve(prior, self.accumulate(prior, state, keys, values, sign, rng))
        sound = is_positive_definite(updated.factor)
        forgets = jnp.sum(jnp.broadcast_to(jnp.asarray(sign, jnp.int32) < 0, keys.shape[:1]))
        refused = dataclasses.replace(state, missing=state.missing + forgets.astype(jnp.int32))
        return jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, refused)

    def accumulate(
        self,
        prior: Prior,
        state: StreamingState,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> StreamingState:
        """Eq. 3 alone: adds the facts to the statistics and leaves `factor` and `solution` stale,
        so that a long stream (a `lax.scan` over batches) pays for one factorisation at its end."""
        keys, values = observe(keys, values, self.noise, rng)
        weights = self.address(prior, keys)
        signs = jnp.broadcast_to(jnp.asarray(sign, jnp.int32), keys.shape[:1])
        signs = jnp.where(jnp.any(weights != 0, axis=1), signs, 0)
        gram, cross = rank_update(
            (state.gram, state.cross),
            weights,
            values - dot(weights, prior.memory),
            signs.astype(jnp.float32),
        )
        count = state.count + jnp.sum(signs).astype(jnp.int32)
        return dataclasses.replace(state, gram=gram, cross=cross, count=count)

    def solve(self, prior: Prior, state: StreamingState) -> StreamingState:
        """M and the factor of A from the statistics; NaN where A is not positive definite."""
        matrix = add_ridge(state.gram.total(), self.ridge)
        factor = cholesky(matrix)
        solution = prior.memory + spd_solve(matrix, factor, state.cross.total())
        return dataclasses.replace(state, factor=factor, solution=solution)

    def read(
        self,
        prior: Prior,
        state: StreamingState,
        queries: Float[Array, "Q C"],
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """Z_read = W M with W addressed by M_ref. Confidence: w G A⁻¹ wᵀ / ‖w‖², G = A − λI."""
        mean = self.address(prior, queries)
        log_variance = self.log_variance(prior, state, queries)
        latent = dot(sample(mean, log_variance, rng), state.solution)
        squared = jnp.sum(jnp.square(mean), axis=1)
        # G A⁻¹ = I − λA⁻¹: what the ridge leaves of the weights is what no fact has claimed.
        matrix = add_ridge(state.gram.total(), self.ridge)
        unclaimed = self.ridge * spd_quadratic(matrix, state.factor, mean)
        return Reading(
            latent,
            mean,
            log_variance,
            share(squared - unclaimed, squared),
        )

    def matrix(self, prior: Prior, state: StreamingState) -> Float[Array, "K C"]:
        """The posterior memory M."""
        return state.solution

    def condition(self, state: StreamingState) -> Float[Array, ""]:
        """An estimate of κ(A); float32 keeps about 7 − log₁₀ κ digits of M."""
        return condition(state.factor)
