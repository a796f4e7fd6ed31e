"""Streaming: facts are written and forgotten one by one or in batches, in any order (Eqs. 2–6, §4).

The memory minimises Σ_j ‖Z_j − W_j M‖² + λ‖M − M₀‖² + μ‖M‖² over exactly the facts that are in. Its
sufficient statistics are sums over facts, so α = ±1 adds and takes away:

    A = (λ + μ)I + Σ α WᵀW,      B = Σ α Wᵀ(Z − W M₀),      M = M₀ + A⁻¹ (B − μM₀)

Solving for M − M₀ keeps M₀ to the last bit while nothing has been written. With μ = 0 and λ → 0 this
is Eq. 4's M (the pseudo-inverse solution nearest to M₀).

μ is chosen by the memory itself, for queries that are not quite the keys: where a query's weights are a
key's plus noise of covariance σ²I, the expected error of N reads is Σ ‖Z − WM‖² + Nσ²‖M‖², least with
μ = Nσ². Noise of a share ρ of the keys' own size has σ² = ρ² mean‖W‖² / K, so that

    μ = ρ² tr(Σ α WᵀW) / K

follows from the statistics. Without it (ρ = 0) the error of such reads peaks where N ≈ K (§3). The
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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from larimar_jax.compensated import Sum, rank_update, zero_sum
from larimar_jax.linalg import (
    add_ridge,
    cholesky,
    condition,
    dot,
    factor_solve,
    is_positive_definite,
    spd_solve,
)
from larimar_jax.memory.base import (
    Memory,
    Prepared,
    Reading,
    Real,
    Sign,
    compiled,
    observe,
    pytree,
    sample,
    share,
)

# See `Streaming._slack`.
_SLACK = 1e-3


def level(trace: Float[Array, ""], slots: int) -> Float[Array, ""]:
    """tr(Σ α WᵀW) / K to the nearest power of two, 0 where nothing is in; a constant to
    differentiation."""
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


@pytree
class Streaming(Memory):
    """Recursive least squares with a ridge towards M₀, in the information form.

    ridge: λ, in units of a squared norm of addressing weights ‖w‖². query_noise: ρ, how far queries are
    expected to lie from keys, relative to them; 0 is for keys that come back as they were written.

    A forget is refused, and counted in `refused`, where the statistics show that its fact cannot have
    been in (`possible`): a key outside the span of the written ones, or a written key with another
    value that no other fact explains. Where other facts span its key, a fact that was never written
    can not be told from a written one: statistics keep no list. A batch is refused as a whole.
    """

    ridge: Real = dataclasses.field(default=1e-2, kw_only=True)
    query_noise: Real = dataclasses.field(default=0.5, kw_only=True)

    def empty(self, prepared: Prepared) -> StreamingState:
        """Nothing written: A = λI, M = M₀."""
        zero = jnp.zeros((), jnp.int32)
        diagonal = jnp.sqrt(jnp.asarray(self.ridge, jnp.float32))
        return StreamingState(
            gram=zero_sum(self.slots, self.slots),
            cross=zero_sum(self.slots, self.latent),
            energy=zero_sum(1, 1),
            factor=diagonal * jnp.eye(self.slots, dtype=jnp.float32),
            solution=prepared.memory,
            count=zero,
            refused=zero,
        )

    def write(
        self,
        prepared: Prepared,
        state: StreamingState,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> StreamingState:
        """Eqs. 3–4 for N facts and one factorisation: `accumulate`, then `solve`."""
        facts = self._facts(prepared, keys, values, sign, rng)
        updated = self.solve(prepared, _added(state, *facts))
        if isinstance(sign, int) and sign >= 0:
            sound = is_positive_definite(updated.factor)
        else:
            sound = self.possible(prepared, state, updated, *facts)
        number = jnp.sum(jnp.abs(facts[2])).astype(jnp.int32)
        refused = dataclasses.replace(state, refused=state.refused + number)
        return jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, refused)

    @compiled
    def accumulate(
        self,
        prepared: Prepared,
        state: StreamingState,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> StreamingState:
        """Eq. 3 alone: adds the facts to the statistics and leaves `factor` and `solution` stale,
        so that a long stream (a `lax.scan` over batches) pays for one factorisation at its end."""
        return _added(state, *self._facts(prepared, keys, values, sign, rng))

    def _facts(self, prepared: Prepared, keys, values, sign: Sign, rng: PRNGKeyArray | None):
        """w [N, K], z − wM₀ [N, C] and α [N] of facts, α = 0 for padding."""
        keys, values = observe(keys, values, self.noise, rng)
        weights = self.address(prepared, keys)
        signs = jnp.broadcast_to(jnp.asarray(sign, jnp.float32), keys.shape[:1])
        signs = jnp.where(jnp.any(weights != 0, axis=1), signs, 0.0)
        return weights, values - dot(weights, prepared.memory), signs

    def possible(
        self,
        prepared: Prepared,
        before: StreamingState,
        after: StreamingState,
        weights: Float[Array, "N K"],
        errors: Float[Array, "N C"],
        signs: Float[Array, "N"],
    ) -> Bool[Array, ""]:
        """Whether facts can have the statistics of `after`: `before` with these rows, and solved.

        A sum over facts has no negative direction: A is positive definite, J ≥ 0 (`objective`), and
        so is u G uᵀ, for each forgotten row along u = wA⁻¹, which leans to where little is in.
        """
        ridge = self.ridge + self.shrink(after.gram.total())
        slack = self._slack(after)
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
        """What rounding may do to a number that is not negative, relative to what it is a difference of:
        A⁻¹ enlarges that of G by up to ‖G‖ / (λ + μ), here with the largest row's sum for ‖G‖."""
        gram = state.gram.total()
        size = jnp.max(jnp.sum(jnp.abs(gram), axis=1)) / (self.ridge + self.shrink(gram))
        return _SLACK + 4.0 * jnp.finfo(jnp.float32).eps * size

    def unexplained(self, prepared: Prepared, state: StreamingState) -> Float[Array, ""]:
        """Σ α ‖Z − WM‖² = E − 2⟨Δ, B⟩ + ⟨Δ, GΔ⟩ with Δ = M − M₀; to rounding at least 0."""
        change = state.solution - prepared.memory
        cross, gram = state.cross.total(), state.gram.total()
        found = state.energy.total()[0, 0] - 2.0 * jnp.sum(change * cross)
        return found + jnp.sum(change * dot(gram, change))

    def objective(self, prepared: Prepared, state: StreamingState) -> Float[Array, ""]:
        """J = Σ α ‖Z − WM‖² + λ‖M − M₀‖² + μ‖M‖² at its minimum; to rounding at least 0.

        Of M as it is, and not as E − ⟨B, A⁻¹B⟩: there terms cancel to what rounding left of them.
        """
        shrink = self.shrink(state.gram.total())
        moved = jnp.sum(jnp.square(state.solution - prepared.memory))
        whole = jnp.sum(jnp.square(state.solution))
        return self.unexplained(prepared, state) + self.ridge * moved + shrink * whole

    def shrink(self, gram: Float[Array, "K K"]) -> Float[Array, ""]:
        """μ of Σ α WᵀW; a constant to differentiation."""
        return self.shrink_of(jnp.trace(gram))

    def shrink_of(self, trace: Float[Array, ""]) -> Float[Array, ""]:
        """μ of the trace of Σ α WᵀW."""
        return jnp.square(self.query_noise) * level(trace, self.slots)

    def solve(self, prepared: Prepared, state: StreamingState) -> StreamingState:
        """M and the factor of A from the statistics; NaN where A is not positive definite."""
        gram = state.gram.total()
        shrink = self.shrink(gram)
        matrix = add_ridge(gram, self.ridge + shrink)
        factor = cholesky(matrix)
        change = spd_solve(matrix, factor, state.cross.total() - shrink * prepared.memory)
        return dataclasses.replace(state, factor=factor, solution=prepared.memory + change)

    @compiled
    def combine(
        self, prepared: Prepared, state: StreamingState, other: StreamingState, sign: int = 1
    ) -> StreamingState:
        """The memory of the facts of both (sign +1), or of those of `state` without those of `other`
        (−1): statistics are sums. Both have to be of this prior.

        Where facts cannot have the statistics of a difference (A is indefinite, or J negative),
        `other` held what `state` does not: the result is `state`, and `refused` counts the facts of
        `other`.
        """
        alpha = jnp.float32(sign)

        def total(one: Sum, another: Sum) -> Sum:
            return one.plus(alpha * another.high).plus(alpha * another.low)

        sums = {n: total(getattr(state, n), getattr(other, n)) for n in ("gram", "cross", "energy")}
        count = state.count + jnp.int32(sign) * other.count
        solved = self.solve(prepared, dataclasses.replace(state, **sums, count=count))
        least = -self._slack(solved) * state.energy.total()[0, 0]
        sound = is_positive_definite(solved.factor) & (self.objective(prepared, solved) >= least)
        refused = dataclasses.replace(state, refused=state.refused + other.count)
        return jax.tree.map(lambda new, old: jnp.where(sound, new, old), solved, refused)

    def read(
        self,
        prepared: Prepared,
        state: StreamingState,
        queries: Float[Array, "Q C"],
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """Z_read = W M with W addressed by M_ref. Confidence: 1 − ‖w − w G A⁻¹‖² / ‖w‖², G = Σ α WᵀW."""
        mean = self.address(prepared, queries)
        log_variance = self.log_variance(prepared, state, queries)
        latent = dot(sample(mean, log_variance, rng), state.solution)
        squared = jnp.sum(jnp.square(mean), axis=1)
        # w − w G A⁻¹ = (λ + μ) w A⁻¹ is what no fact has claimed of the weights.
        gram = state.gram.total()
        ridge = self.ridge + self.shrink(gram)
        left = ridge * spd_solve(add_ridge(gram, ridge), state.factor, mean.T)
        unclaimed = jnp.sum(jnp.square(left), axis=0)
        return Reading(
            latent,
            mean,
            log_variance,
            share(squared - unclaimed, squared),
        )

    def matrix(self, prepared: Prepared, state: StreamingState) -> Float[Array, "K C"]:
        """The posterior memory M."""
        return state.solution

    def condition(self, state: StreamingState) -> Float[Array, ""]:
        """An estimate of κ(A); float32 keeps about 7 − log₁₀ κ digits of M."""
        return condition(state.factor)


def _added(state: StreamingState, weights, errors, signs) -> StreamingState:
    """The sums with N rows more; `factor` and `solution` stay."""
    gram, cross = rank_update((state.gram, state.cross), weights, errors, signs)
    energy = state.energy.plus(jnp.sum(signs * jnp.sum(jnp.square(errors), axis=1))[None, None])
    count = state.count + jnp.sum(signs).astype(jnp.int32)
    return dataclasses.replace(state, gram=gram, cross=cross, energy=energy, count=count)
