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
from larimar_jax.memory.base import Memory, Prepared, Reading, Real, Sign, pytree, sample
from larimar_jax.memory.streaming import Streaming, StreamingState


@pytree
class GrowingState:
    """inner: the streaming memory's state in these slots. basis: orthonormal rows, zero where a slot is
    free. grown: slots in use. crowded: facts whose own direction found no slot any more."""

    inner: StreamingState
    basis: Float[Array, "K C"]
    grown: Int[Array, ""]
    crowded: Int[Array, ""]

    @property
    def count(self) -> Int[Array, ""]:
        """Facts in."""
        return self.inner.count

    @property
    def refused(self) -> Int[Array, ""]:
        """Forgets refused."""
        return self.inner.refused


@pytree
class Growing(Memory):
    """`streaming`, addressed by the span of what was written.

    A slot reads what M₀ reads of its direction, until facts say otherwise: M₀ and M_ref, with
    `addressing`, are asked for nothing else. ridge: as there, in units of a key's own squared norm.
    query_noise: as there. novelty: the share of a key's
    norm outside the span from which it gets a slot. Forgetting gives no slot back.
    """

    SAME = "reads"

    ridge: Real = dataclasses.field(default=0.1, kw_only=True)
    query_noise: Real = dataclasses.field(default=0.5, kw_only=True)
    novelty: Real = dataclasses.field(default=1e-3, kw_only=True)

    def empty(self, prepared: Prepared) -> GrowingState:
        """No slots yet."""
        zero = jnp.zeros((), jnp.int32)
        basis = jnp.zeros((self.slots, self.latent), jnp.float32)
        return GrowingState(self._inner().empty(self._prior(prepared, basis)), basis, zero, zero)

    def write(
        self,
        prepared: Prepared,
        state: GrowingState,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> GrowingState:
        """Grows slots for the keys that come, then writes as `streaming`."""
        signs = jnp.broadcast_to(jnp.asarray(sign, jnp.int32), keys.shape[:1])
        if isinstance(sign, int) and sign >= 0:
            strange, asked = jnp.zeros((), jnp.int32), sign
        else:
            # While every key found its slots, a key outside their span was never written.
            outside = keys - dot(dot(keys, state.basis.T), state.basis)
            there = jnp.sum(jnp.square(keys), axis=1)
            new = jnp.sum(jnp.square(outside), axis=1) > jnp.square(self.novelty) * there
            never = (signs < 0) & new & (state.crowded == 0)
            strange, asked = jnp.sum(never).astype(jnp.int32), jnp.where(never, 0, signs)
            keys = jnp.where(never[:, None], 0.0, keys)
        basis, grown, crowded = self._grow(state, jnp.where(signs[:, None] > 0, keys, 0.0))
        inner = self._inner().write(
            self._prior(prepared, basis), state.inner, keys, values, asked, rng
        )
        inner = dataclasses.replace(inner, refused=inner.refused + strange)
        return GrowingState(inner, basis, grown, crowded)

    def read(
        self,
        prepared: Prepared,
        state: GrowingState,
        queries: Float[Array, "Q C"],
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """As `streaming` in the slots so far, and what lies outside of them as a slot would read that
        nothing was written to; where there are no slots yet, the weights are those of M_ref."""
        inner, mine = self._inner(), self._prior(prepared, state.basis)
        found = inner.read(mine, state.inner, queries, rng)
        outside = queries - dot(inner.address(mine, queries), state.basis)
        kept = self.ridge / (self.ridge + inner.shrink(state.inner.gram.total()))
        log_variance = self.log_variance(prepared, state, queries)
        bare = self.address(prepared, queries)
        some = state.grown > 0
        latent = found.latent + kept * dot(self.address(prepared, outside), prepared.memory)
        return Reading(
            jnp.where(some, latent, dot(sample(bare, log_variance, rng), prepared.memory)),
            jnp.where(some, found.weights, bare),
            log_variance,
            found.confidence,
        )

    def matrix(self, prepared: Prepared, state: GrowingState) -> Float[Array, "K C"]:
        """The posterior memory M, a row a slot; M₀ where there is none yet."""
        return jnp.where(state.grown > 0, state.inner.solution, prepared.memory)

    def _inner(self) -> Streaming:
        return Streaming(
            self.slots,
            self.latent,
            noise=self.noise,
            ridge=self.ridge,
            query_noise=self.query_noise,
            addressing="linear",
        )

    def _prior(self, prepared: Prepared, basis: Float[Array, "K C"]) -> Prepared:
        # Orthonormal rows are their own pseudo-inverse, turned.
        memory = dot(self.address(prepared, basis), prepared.memory)
        return dataclasses.replace(prepared, memory=memory, reference=basis, address=basis.T)

    def _grow(self, state: GrowingState, keys: Float[Array, "N C"]):
        def one(carried, key):
            basis, grown, crowded = carried
            left = key - dot(dot(basis, key), basis)
            left = left - dot(dot(basis, left), basis)
            squared = jnp.sum(jnp.square(left))
            new = squared > jnp.square(self.novelty) * jnp.sum(jnp.square(key))
            fits = new & (grown < self.slots)
            row = jnp.where(fits, left * jax.lax.rsqrt(jnp.where(new, squared, 1.0)), 0.0)
            # Where it does not fit nothing is added, to whichever row.
            basis = basis.at[jnp.minimum(grown, self.slots - 1)].add(row)
            counts = (grown + fits.astype(jnp.int32), crowded + (new & ~fits).astype(jnp.int32))
            return (basis, *counts), None

        start = (state.basis, state.grown, state.crowded)
        return jax.lax.scan(one, start, keys.astype(jnp.float32))[0]
