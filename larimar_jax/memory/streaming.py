"""Streaming: facts are written and forgotten one by one or in batches, in any order (Eqs. 2–6, §4).

The memory minimises Σ_j ‖Z_j − W_j M‖² + λ‖M − M₀‖² + μ‖M‖² over exactly the facts that are in. Its
sufficient statistics are sums over facts, so α = ±1 adds and takes away:

    A = (λ + μ)I + Σ α WᵀW,      B = Σ α Wᵀ(Z − W M₀),      M = M₀ + A⁻¹ (B − μM₀)

Solving for M − M₀ keeps M₀ to the last bit while nothing has been written. With μ = 0 and λ → 0 this
is Eq. 4's M (the pseudo-inverse solution nearest to M₀).

μ follows from the statistics, for queries that are not quite the keys: where a query's weights are a
key's plus noise of covariance σ²I, the expected error of N reads is Σ ‖Z − WM‖² + Nσ²‖M‖², least with
μ = Nσ². Noise of a share ρ of the keys' own size has σ² = ρ² mean‖W‖² / K, so that

    μ = ρ² tr(Σ α WᵀW) / K

is known without the facts. Without it (ρ = 0) the error of such reads peaks where N ≈ K (§3). The
trace is taken to the nearest power of two: the minimum is flat, and μ then stays from one fact to the
next, so that facts can be streamed (rls.py).

Why not Eq. 4's recursion on M, nor Sherman–Morrison on A⁻¹: their errors feed back and diverge for
small λ after some thousand updates. Sums do not; M and the Cholesky factor here are only a cache of
them.

Precision. In float32 M differs from its float64 value, and from itself under another order or
grouping of the same facts, by at most about 1e-7·κ of its norm, κ = 1 + ‖Σ WᵀW‖₂ / (λ + μ): 1e-5 for
κ ≤ 100 and 1e-4 for κ ≤ 1000 (for up to K facts, ‖Σ WᵀW‖₂ is a few times a fact's ‖w‖²), after
thousands of updates as after one. The difference lies where nothing was written, so what is read at
written keys stays within 1e-6 far below these ridges. `condition` estimates κ.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.linalg import (
    add_ridge,
    cholesky,
    condition,
    dot,
    factor_solve,
    is_positive_definite,
    spd_solve,
)
from larimar_jax.memory.base import Memory, Prepared, Signs
from larimar_jax.memory.compensated import Sum, rank_update, zero_sum
from larimar_jax.memory.pytrees import Latents, Real, Weights, pytree

# See `Streaming._slack`.
_SLACK = 1e-3


def power_of_two_scale(trace: Float[Array, ""], slots: int) -> Float[Array, ""]:
    """Return tr(Σ α WᵀW) / K rounded to a power of two, 0 for an empty memory; without a derivative."""
    size = jax.lax.stop_gradient(trace) / slots
    power = jnp.exp2(jnp.round(jnp.log2(jnp.maximum(size, jnp.finfo(jnp.float32).tiny))))
    return jnp.where(size > 0, power, 0.0)


@pytree
class StreamingState:
    """Sufficient statistics of one memory (λ and μ not included), and the solution they imply.

    gram: Σ α WᵀW [K, K]. cross: Σ α Wᵀ(Z − W M₀) [K, C]. energy: Σ α ‖Z − W M₀‖² [1, 1]. factor:
    Cholesky of A. solution: M. count: facts in. refused: facts refused.
    """

    gram: Sum
    cross: Sum
    energy: Sum
    factor: Float[Array, "K K"]
    solution: Float[Array, "K C"]
    count: Int[Array, ""]
    refused: Int[Array, ""]

    def add(self, weights: Weights, errors: Latents, signs: Float[Array, "N"]) -> "StreamingState":
        """Add N rows to the sums (Eq. 3); `factor` and `solution` stay."""
        gram, cross = rank_update((self.gram, self.cross), weights, errors, signs)
        energy = self.energy.plus(jnp.sum(signs * jnp.sum(jnp.square(errors), axis=1))[None, None])
        count = self.count + jnp.sum(signs).astype(jnp.int32)
        return dataclasses.replace(self, gram=gram, cross=cross, energy=energy, count=count)

    def unless_refused(
        self, is_sound: Bool[Array, ""], before: "StreamingState", number: Int[Array, ""]
    ) -> "StreamingState":
        """Return this state where it is sound, else the one before with `number` more refused."""
        refused = dataclasses.replace(before, refused=before.refused + number)
        return jax.tree.map(lambda a, b: jnp.where(is_sound, a, b), self, refused)


@pytree
class Streaming(Memory):
    """Recursive least squares with a ridge towards M₀, in the information form.

    ridge: λ, in units of a squared norm of addressing weights ‖w‖². query_noise: ρ, the expected
    distance of queries to keys, relative to keys; 0 is for keys that come back as they were written.

    A forget is refused, and counted in `refused`, where the statistics show that its fact cannot have
    been in (`is_consistent`): a key outside the span of the written ones, or a written key with
    another value that no other fact explains. Where other facts span its key, a fact that was never
    written can not be told from a written one: statistics keep no list. A batch is refused as a whole,
    and so is a write that float32 cannot solve for.
    """

    ridge: Real = dataclasses.field(default=1e-2, kw_only=True)
    query_noise: Real = dataclasses.field(default=0.5, kw_only=True)

    def empty(self, prepared: Prepared) -> StreamingState:
        """Return the state with nothing written: A = λI, M = M₀."""
        zero = jnp.zeros((), jnp.int32)
        diagonal = jnp.sqrt(jnp.asarray(self.ridge, jnp.float32))
        return StreamingState(
            gram=zero_sum(self.slots, self.slots),
            cross=zero_sum(self.slots, self.latent),
            energy=zero_sum(1, 1),
            factor=diagonal * jnp.eye(self.slots, dtype=jnp.float32),
            solution=prepared.prior_memory,
            count=zero,
            refused=zero,
        )

    def update(
        self,
        prepared: Prepared,
        state: StreamingState,
        keys: Latents,
        values: Latents,
        signs: Signs,
    ) -> StreamingState:
        """Apply Eqs. 3–4 to N facts with one factorisation."""
        facts = self.facts(prepared, keys, values, signs)
        updated = self.solve(prepared, state.add(*facts))
        if isinstance(signs, int) and signs >= 0:
            is_sound = is_positive_definite(updated.factor)
        else:
            is_sound = self.is_consistent(prepared, state, updated, *facts)
        number = jnp.sum(jnp.abs(facts[2])).astype(jnp.int32)
        return updated.unless_refused(is_sound, state, number)

    @jax.jit
    def accumulate(
        self,
        prepared: Prepared,
        state: StreamingState,
        keys: Latents,
        values: Latents,
        signs: Float[Array, "N"] | Int[Array, "N"],
    ) -> StreamingState:
        """Add facts to the statistics (Eq. 3) and leave `factor` and `solution` stale, so that a long
        stream (a `lax.scan` over batches) pays for one factorisation at its end (`solve`)."""
        return state.add(*self.facts(prepared, keys, values, signs))

    def facts(
        self, prepared: Prepared, keys: Latents, values: Latents, signs: Signs
    ) -> tuple[Weights, Latents, Float[Array, "N"]]:
        """Return w [N, K], z − wM₀ [N, C] and α [N] of facts, α = 0 for padding."""
        weights, values, signs = self.address_facts(prepared, keys, values, signs)
        return weights, values - dot(weights, prepared.prior_memory), signs

    def solve(self, prepared: Prepared, state: StreamingState) -> StreamingState:
        """Solve for M and the factor of A; NaN where A is not positive definite."""
        gram = state.gram.total()
        shrink = self.shrink(gram)
        matrix = add_ridge(gram, self.ridge + shrink)
        factor = cholesky(matrix)
        change = spd_solve(matrix, factor, state.cross.total() - shrink * prepared.prior_memory)
        return dataclasses.replace(state, factor=factor, solution=prepared.prior_memory + change)

    def is_consistent(
        self,
        prepared: Prepared,
        before: StreamingState,
        after: StreamingState,
        weights: Weights,
        errors: Latents,
        signs: Float[Array, "N"],
    ) -> Bool[Array, ""]:
        """Return whether facts can have the statistics of `after`: `before` with these rows, solved.

        A sum over facts has no negative direction: A is positive definite, J ≥ 0 (`objective`), and
        so is u G uᵀ, for each forgotten row along u = wA⁻¹, which leans to where little is in.
        """
        ridge = self.total_ridge(after)
        # What is left where nearly all is forgotten is the rounding of what was in.
        slack = jnp.maximum(self._slack(before), self._slack(after))
        written = jnp.maximum(signs, 0.0) * jnp.sum(jnp.square(errors), axis=1)
        energy = before.energy.total()[0, 0] + jnp.sum(written)
        rows = factor_solve(after.factor, weights.T)
        held = jnp.sum(weights.T * rows, axis=0) - ridge * jnp.sum(jnp.square(rows), axis=0)
        least = -slack * jnp.sum(jnp.square(weights), axis=1) / ridge
        return is_positive_definite(after.factor) & (
            jnp.all(signs >= 0)
            | (
                (self.objective(prepared, after) >= -slack * energy)
                & jnp.all((signs >= 0) | (held >= least))
            )
        )

    def _slack(self, state: StreamingState) -> Float[Array, ""]:
        """Bound the rounding of a non-negative number, relative to what it is a difference of: A⁻¹
        enlarges that of G by up to ‖G‖ / (λ + μ), here with the largest row's sum for ‖G‖."""
        rows = jnp.sum(jnp.abs(state.gram.total()), axis=1)
        size = jnp.max(rows) / self.total_ridge(state)
        return _SLACK + 4.0 * jnp.finfo(jnp.float32).eps * size

    def unexplained(self, prepared: Prepared, state: StreamingState) -> Float[Array, ""]:
        """Return Σ α ‖Z − WM‖² = E − 2⟨Δ, B⟩ + ⟨Δ, GΔ⟩ with Δ = M − M₀; at least 0 to rounding."""
        change = state.solution - prepared.prior_memory
        cross, gram = state.cross.total(), state.gram.total()
        linear = state.energy.total()[0, 0] - 2.0 * jnp.sum(change * cross)
        return linear + jnp.sum(change * dot(gram, change))

    def objective(self, prepared: Prepared, state: StreamingState) -> Float[Array, ""]:
        """Return J = Σ α ‖Z − WM‖² + λ‖M − M₀‖² + μ‖M‖² at its minimum; at least 0 to rounding.

        Of M as it is, and not as E − ⟨B, A⁻¹B⟩: there terms cancel to what rounding left of them.
        """
        shrink = self.shrink(state.gram.total())
        moved = jnp.sum(jnp.square(state.solution - prepared.prior_memory))
        whole = jnp.sum(jnp.square(state.solution))
        return self.unexplained(prepared, state) + self.ridge * moved + shrink * whole

    def shrink(self, gram: Float[Array, "K K"]) -> Float[Array, ""]:
        """Return μ of Σ α WᵀW, without a derivative."""
        return self.shrink_of_trace(jnp.trace(gram))

    def shrink_of_trace(self, trace: Float[Array, ""]) -> Float[Array, ""]:
        """Return μ of the trace of Σ α WᵀW."""
        return jnp.square(self.query_noise) * power_of_two_scale(trace, self.slots)

    def total_ridge(self, state: StreamingState) -> Float[Array, ""]:
        """Return λ + μ."""
        return self.ridge + self.shrink(state.gram.total())

    @jax.jit
    def combine(
        self,
        prepared: Prepared,
        state: StreamingState,
        operand: StreamingState,
        sign: int | Int[Array, ""] = 1,
    ) -> StreamingState:
        """Return the memory of the facts of both states (sign +1), or of those of `state` without those
        of `operand` (−1): statistics are sums. Both have to be of the same prior memory.

        Where facts cannot have the statistics of a difference (A is indefinite, or J negative),
        `operand` held what `state` does not: the result is `state`, and `refused` counts the facts of
        `operand`.
        """
        alpha = jnp.asarray(sign, jnp.float32)

        def total(a: Sum, b: Sum) -> Sum:
            return a.plus(alpha * b.high).plus(alpha * b.low)

        names = ("gram", "cross", "energy")
        sums = {name: total(getattr(state, name), getattr(operand, name)) for name in names}
        count = state.count + jnp.asarray(sign, jnp.int32) * operand.count
        solved = self.solve(prepared, dataclasses.replace(state, **sums, count=count))
        least = -self._slack(solved) * state.energy.total()[0, 0]
        is_sound = is_positive_definite(solved.factor) & (self.objective(prepared, solved) >= least)
        return solved.unless_refused(is_sound, state, operand.count)

    def matrix(self, prepared: Prepared, state: StreamingState) -> Float[Array, "K C"]:
        return state.solution

    def residual(self, prepared: Prepared, state: StreamingState, weights: Weights) -> Weights:
        """Return w − w G A⁻¹ = (λ + μ) w A⁻¹, G = Σ α WᵀW."""
        ridge = self.total_ridge(state)
        matrix = add_ridge(state.gram.total(), ridge)
        return ridge * spd_solve(matrix, state.factor, weights.T).T

    def condition(self, state: StreamingState) -> Float[Array, ""]:
        """Estimate κ(A); float32 keeps about 7 − log₁₀ κ digits of M."""
        return condition(state.factor)
