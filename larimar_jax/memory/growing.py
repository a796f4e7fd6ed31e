"""Streaming with an M_ref that grows as facts arrive: no prompt has to be known beforehand.

The slots are an orthonormal basis of the keys so far. A key that lies outside their span, by more than
`novelty` of its norm, adds its own direction as the next slot (Gram–Schmidt, twice); its weights are
its coordinates. A new slot is orthogonal to every earlier key, but for `novelty` of its norm, so that
earlier weights stay what they were: statistics stay sums, and a fact is forgotten by computing its
weights again. With room for all keys, the memory is ridge regression on the encodings themselves.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from larimar_jax.linalg import dot
from larimar_jax.memory import variance
from larimar_jax.memory.addressing import Linear
from larimar_jax.memory.base import Memory, Prepared, Reading, Signs
from larimar_jax.memory.pytrees import Latents, Real, pytree
from larimar_jax.memory.streaming import Streaming, StreamingState


@pytree
class GrowingState:
    """inner: the streaming memory's state in these slots. basis: orthonormal rows, zero where a slot is
    free. used: slots in use. overflow: facts whose own direction found no free slot."""

    inner: StreamingState
    basis: Float[Array, "K C"]
    used: Int[Array, ""]
    overflow: Int[Array, ""]

    @property
    def count(self) -> Int[Array, ""]:
        """The number of facts in."""
        return self.inner.count

    @property
    def refused(self) -> Int[Array, ""]:
        """The number of forgets refused."""
        return self.inner.refused


@pytree
class Growing(Memory):
    """`streaming`, addressed by the span of what was written.

    Until a fact is about it, a slot reads what M₀ reads of its direction: M₀ and M_ref, with
    `addressing`, are used for nothing else. ridge: as in streaming.py, in units of a key's own squared
    norm. query_noise: as there. novelty: the share of a key's norm outside the span from which it gets
    a slot. Forgetting frees no slot.
    """

    SAME = "reads"

    ridge: Real = dataclasses.field(default=0.1, kw_only=True)
    query_noise: Real = dataclasses.field(default=0.5, kw_only=True)
    novelty: Real = dataclasses.field(default=1e-3, kw_only=True)

    def empty(self, prepared: Prepared) -> GrowingState:
        """Return the state without slots."""
        zero = jnp.zeros((), jnp.int32)
        basis = jnp.zeros((self.slots, self.latent), jnp.float32)
        return GrowingState(self._inner().empty(self._prepared(prepared, basis)), basis, zero, zero)

    def update(
        self, prepared: Prepared, state: GrowingState, keys: Latents, values: Latents, signs: Signs
    ) -> GrowingState:
        """Add slots for the keys that are written, then update as `streaming`."""
        each = jnp.broadcast_to(jnp.asarray(signs, jnp.int32), keys.shape[:1])
        number = jnp.zeros((), jnp.int32)
        if not (isinstance(signs, int) and signs >= 0):
            # While every key found its slots, a key outside their span was never written.
            outside = keys - dot(dot(keys, state.basis.T), state.basis)
            squared = jnp.sum(jnp.square(keys), axis=1)
            is_new = jnp.sum(jnp.square(outside), axis=1) > jnp.square(self.novelty) * squared
            is_refused = (each < 0) & is_new & (state.overflow == 0)
            number = jnp.sum(is_refused).astype(jnp.int32)
            signs = jnp.where(is_refused, 0, each)
            keys = jnp.where(is_refused[:, None], 0.0, keys)
        basis, used, overflow = self._grow(state, jnp.where(each[:, None] > 0, keys, 0.0))
        prepared = self._prepared(prepared, basis)
        inner = self._inner().update(prepared, state.inner, keys, values, signs)
        inner = dataclasses.replace(inner, refused=inner.refused + number)
        return GrowingState(inner, basis, used, overflow)

    def read(
        self,
        prepared: Prepared,
        state: GrowingState,
        queries: Latents,
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """Read as `streaming` in the slots so far, and what lies outside of them as from a slot that
        nothing was written to; where there are no slots yet, the weights are those of M_ref."""
        inner, own = self._inner(), self._prepared(prepared, state.basis)
        reading = inner.read(own, state.inner, queries, rng)
        outside = queries - dot(inner.address(own, queries), state.basis)
        prior_share = self.ridge / inner.total_ridge(state.inner)
        log_variance = self.log_variance(prepared, state, queries)
        weights = self.address(prepared, queries)
        has_slots = state.used > 0
        beyond = dot(self.address(prepared, outside), prepared.prior_memory)
        latent = reading.latent + prior_share * beyond
        prior_latent = dot(variance.sample(weights, log_variance, rng), prepared.prior_memory)
        return Reading(
            jnp.where(has_slots, latent, prior_latent),
            jnp.where(has_slots, reading.weights, weights),
            log_variance,
            reading.confidence,
        )

    def matrix(self, prepared: Prepared, state: GrowingState) -> Float[Array, "K C"]:
        """Return the posterior memory M, a row a slot; M₀ where there is none yet."""
        return jnp.where(state.used > 0, state.inner.solution, prepared.prior_memory)

    def _inner(self) -> Streaming:
        numbers = dict(noise=self.noise, ridge=self.ridge, query_noise=self.query_noise)
        return Streaming(self.slots, self.latent, addressing=Linear(), **numbers)

    def _prepared(self, prepared: Prepared, basis: Float[Array, "K C"]) -> Prepared:
        # Orthonormal rows are their own pseudo-inverse, transposed.
        memory = dot(self.address(prepared, basis), prepared.prior_memory)
        return dataclasses.replace(
            prepared, prior_memory=memory, reference_memory=basis, address=basis.T
        )

    def _grow(self, state: GrowingState, keys: Latents):
        def step(carried, key):
            basis, used, overflow = carried
            left = key - dot(dot(basis, key), basis)
            left = left - dot(dot(basis, left), basis)
            squared = jnp.sum(jnp.square(left))
            is_new = squared > jnp.square(self.novelty) * jnp.sum(jnp.square(key))
            fits = is_new & (used < self.slots)
            row = jnp.where(fits, left * jax.lax.rsqrt(jnp.where(is_new, squared, 1.0)), 0.0)
            # Where it does not fit nothing is added, to whichever row.
            basis = basis.at[jnp.minimum(used, self.slots - 1)].add(row)
            overflow = overflow + (is_new & ~fits).astype(jnp.int32)
            return (basis, used + fits.astype(jnp.int32), overflow), None

        start = (state.basis, state.used, state.overflow)
        return jax.lax.scan(step, start, keys.astype(jnp.float32))[0]
