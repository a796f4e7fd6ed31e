"""A ridge by what the data say: marginal likelihood and generalised cross-validation (§3).

Both are functions of the sufficient statistics alone: G = Σ WᵀW = U S Uᵀ, B = Σ Wᵀ E, Σ‖E‖² and N, for
the errors E = Z − W M₀ that the memory has to explain. They ask how well facts predict *other facts*,
which for an episodic memory is not the question: a memory of unrelated facts predicts nothing, and both
answer with a ridge that blurs what is written. `Streaming` therefore chooses for noisy queries instead
(its μ); these are for values that do depend on keys, and for comparison.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from larimar_jax.linalg import dot, eigh
from larimar_jax.memory.contract import Prior, compiled
from larimar_jax.memory.streaming import Streaming, StreamingState

# Of E, what its rounding may leave where everything can be explained.
_ROUNDING = 1e-5


class Evidence(NamedTuple):
    """Of R ridges. likelihood: the log marginal likelihood per number that was written, with the noise's
    variance at its own best. validation: mean squared leave-one-out error by the generalised formula."""

    likelihood: Float[Array, "R"]
    validation: Float[Array, "R"]


@compiled
def evidence(
    memory: Streaming, prior: Prior, state: StreamingState, ridges: Float[Array, "R"]
) -> Evidence:
    """What each ridge towards M₀ is worth. One eigendecomposition of K x K for all of them.

    Under M − M₀ ~ N(0, s²/λ) and Z = WM + N(0, s²), each of C columns of E is N(0, s²(I + WWᵀ/λ)).
    """
    values, vectors = eigh(state.gram.total())
    power = jnp.sum(jnp.square(dot(vectors.T, state.cross.total())), axis=1)
    # Directions of the written keys; in the others G and B are what rounding left.
    inside = values > memory.slots * jnp.finfo(jnp.float32).eps * values[-1]
    values, power = (jnp.where(inside, x, empty) for x, empty in ((values, 1.0), (power, 0.0)))
    energy, columns = state.energy.total()[0, 0], memory.latent
    facts = jnp.maximum(state.count, 1).astype(jnp.float32)
    numbers = facts * columns
    # What no ridge explains, of errors and of degrees of freedom: nothing, for as many facts as
    # directions. The sums below are of positive terms, for E − Σ power / (s + λ) would cancel.
    outside = energy - jnp.sum(power / values)
    outside = jnp.where(outside > _ROUNDING * energy, outside, 0.0)
    others = jnp.maximum(facts - jnp.sum(inside).astype(jnp.float32), 0.0)
    left = jnp.where(inside, ridges[:, None] / (values + ridges[:, None]), 0.0)
    tiny = jnp.finfo(jnp.float32).tiny
    misfit = jnp.maximum(outside + jnp.sum(power * left / values, axis=1), tiny)
    volume = columns * jnp.sum(jnp.where(inside, jnp.log1p(values / ridges[:, None]), 0.0), axis=1)
    likelihood = -0.5 * (jnp.log(misfit / numbers) + volume / numbers)
    residual = outside + jnp.sum(power * jnp.square(left) / values, axis=1)
    free = (others + jnp.sum(left, axis=1)) / facts
    return Evidence(likelihood, residual / numbers / jnp.square(jnp.maximum(free, tiny)))


def best_ridge(
    memory: Streaming,
    prior: Prior,
    state: StreamingState,
    *,
    by: str = "likelihood",
    low: float = 1e-6,
    high: float = 1e6,
    steps: int = 121,
) -> Float[Array, ""]:
    """The best of `steps` ridges from `low` to `high` times mean‖W‖², evenly by their logarithm.

    Args:
      by: "likelihood" or "validation".
    Raises:
      ValueError: another `by`.
    """
    if by not in Evidence._fields:
        raise ValueError(f"by is {by!r}; write 'likelihood' or 'validation'")
    scale = jnp.trace(state.gram.total()) / jnp.maximum(state.count, 1).astype(jnp.float32)
    ridges = jnp.geomspace(low, high, steps) * jnp.where(scale > 0, scale, 1.0)
    found = evidence(memory, prior, state, ridges)
    score = found.likelihood if by == "likelihood" else -found.validation
    return ridges[jnp.argmax(score)]
