"""One streaming memory over many devices: K past what one of them holds.

Each of p devices has K / p rows of G = Σ α WᵀW, of B and of M; none ever has all of G or of its factor.
(M₀ and what addresses, K x C each, are on all of them.) A forget is refused where it leaves A
indefinite; the closer look of `Streaming.is_consistent` is not taken.
Solving is a blocked Cholesky factorisation, one block of columns a device: a block is factored, the
blocks below it are solved against it, and what they leave is subtracted from the rest. A device sends
its K/p x K/p block once per step, so that all together send K² numbers, once.

    place = sharded.Place(mesh, "slots")
    state = sharded.empty(memory, prepared, place)
    state = sharded.update(memory, prepared, state, keys, values, 1, place=place)
    latent = sharded.read(memory, prepared, state, queries, place=place)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from larimar_jax.linalg import cholesky, dot, solve_lower
from larimar_jax.memory.base import Prepared, Signs
from larimar_jax.memory.compensated import rank_update
from larimar_jax.memory.pytrees import Latents
from larimar_jax.memory.streaming import Streaming, StreamingState


class Place(NamedTuple):
    """An axis of a mesh that the slots are split over."""

    mesh: Mesh
    axis: str

    @property
    def ways(self) -> int:
        """The number of devices along the axis."""
        return self.mesh.shape[self.axis]


def empty(memory: Streaming, prepared: Prepared, place: Place) -> StreamingState:
    """Return the state with nothing written; each device creates its own rows.

    Raises:
      ValueError: the devices do not divide the slots.
    """
    if memory.slots % place.ways:
        raise ValueError(
            f"{memory.slots} slots do not divide over the {place.ways} devices of the mesh's "
            f"{place.axis!r}; take a multiple of {place.ways}"
        )
    layout = _layout(memory, prepared, place)
    shardings = jax.tree.map(functools.partial(NamedSharding, place.mesh), layout)
    return jax.jit(memory.empty, out_shardings=shardings)(prepared)


def update(
    memory: Streaming,
    prepared: Prepared,
    state: StreamingState,
    keys: Latents,
    values: Latents,
    signs: Signs,
    *,
    place: Place,
) -> StreamingState:
    """Do as `Streaming.update`, with every K x K and K x C array in rows over the devices."""

    # The fields of a state in a dict: a device's rows have not the shapes that a state's fields have.
    def local(state: dict[str, Any], prior, weights, values, signs) -> dict[str, Any]:
        own_weights = _rows(weights.T, place).T
        errors = values - jax.lax.psum(dot(own_weights, prior), place.axis)
        # Rows of Wᵀ W: this device's slots by all slots.
        sums = (state["gram"], state["cross"])
        gram, cross = rank_update(sums, weights, errors, signs, rows=own_weights)
        energy = jnp.sum(signs * jnp.sum(jnp.square(errors), axis=1))[None, None]
        total = gram.total()
        trace = jax.lax.psum(jnp.trace(_diagonal_block(total, place)), place.axis)
        shrink = memory.shrink_of_trace(trace)
        factor = _factor(_add_ridge(total, memory.ridge + shrink, place), place)
        change = _solve(factor, cross.total() - shrink * prior, place)
        is_finite = jnp.isfinite(jnp.diagonal(_diagonal_block(factor, place))).all()
        is_sound = jax.lax.pmin(is_finite.astype(jnp.int32), place.axis) > 0
        written = state | {
            "gram": gram,
            "cross": cross,
            "energy": state["energy"].plus(energy),
            "factor": factor,
            "solution": prior + change,
            "count": state["count"] + jnp.sum(signs).astype(jnp.int32),
        }
        number = jnp.sum(jnp.abs(signs)).astype(jnp.int32)
        refused = state | {"refused": state["refused"] + number}
        return jax.tree.map(lambda a, b: jnp.where(is_sound, a, b), written, refused)

    layout = vars(_layout(memory, prepared, place))
    facts = memory.address_facts(prepared, keys, values, signs)
    mapped = _mapped(local, place, (layout, P(place.axis), P(), P(), P()), layout)
    return StreamingState(**mapped(vars(state), prepared.prior_memory, *facts))


def read(
    memory: Streaming, prepared: Prepared, state: StreamingState, queries: Latents, *, place: Place
) -> Latents:
    """Read Z_read = W M."""

    def local(solution, weights):
        return jax.lax.psum(dot(_rows(weights.T, place).T, solution), place.axis)

    mapped = _mapped(local, place, (P(place.axis), P()), P())
    return mapped(state.solution, memory.address(prepared, queries))


def _layout(memory: Streaming, prepared: Prepared, place: Place) -> StreamingState:
    """Return a state of partition specs: arrays that lead with K are in rows."""

    def spec(leaf):
        return P(place.axis) if leaf.shape[:1] == (memory.slots,) else P()

    return jax.tree.map(spec, jax.eval_shape(memory.empty, prepared))


def _mapped(local, place: Place, inputs: Any, outputs: Any):
    # JAX cannot prove what is the same on all devices: a refused write chooses by a sum over them.
    return jax.shard_map(
        local, mesh=place.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )


def _rows(whole: Float[Array, "K n"], place: Place) -> Float[Array, "k n"]:
    """Return this device's rows of a replicated array."""
    size = whole.shape[0] // place.ways
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(place.axis) * size, size)


def _diagonal_block(rows: Float[Array, "k K"], place: Place) -> Float[Array, "k k"]:
    """Return the block on the diagonal of this device's rows."""
    size = rows.shape[0]
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(place.axis) * size, size, axis=1)


def _add_ridge(rows: Float[Array, "k K"], ridge, place: Place) -> Float[Array, "k K"]:
    size, index = rows.shape[0], jax.lax.axis_index(place.axis)
    return rows + ridge * jnp.eye(size, rows.shape[1], k=index * size, dtype=jnp.float32)


def _factor(rows: Float[Array, "k K"], place: Place) -> Float[Array, "k K"]:
    """Return this device's rows of the Cholesky factor; NaN where there is none."""
    size, index = rows.shape[0], jax.lax.axis_index(place.axis)
    factor = jnp.zeros_like(rows)
    for step in range(place.ways):
        columns = slice(step * size, (step + 1) * size)
        block = rows[:, columns]
        corner = cholesky(jax.lax.psum(jnp.where(index == step, block, 0.0), place.axis))
        below = solve_lower(corner, block)
        block = jnp.where(index == step, corner, jnp.where(index > step, below, 0.0))
        factor = factor.at[:, columns].set(block)
        if step + 1 < place.ways:
            gathered = jax.lax.all_gather(block, place.axis, tiled=True)
            rows = rows - dot(block, gathered.T)
    return factor


def _solve(factor: Float[Array, "k K"], right: Float[Array, "k C"], place: Place):
    """Return this device's rows of (L Lᵀ)⁻¹ right."""
    size, index = factor.shape[0], jax.lax.axis_index(place.axis)

    def broadcast(step, rows):
        """Give all devices the rows that device `step` has."""
        return jax.lax.psum(jnp.where(index == step, rows, 0.0), place.axis)

    blocks = [factor[:, step * size : (step + 1) * size] for step in range(place.ways)]
    for step, block in enumerate(blocks):
        solved = solve_lower(broadcast(step, block), broadcast(step, right).T).T
        later = right - jnp.where(index > step, dot(block, solved), 0.0)
        right = jnp.where(index == step, solved, later)
    for step, block in reversed(list(enumerate(blocks))):
        above = jax.lax.psum(jnp.where(index > step, dot(block.T, right), 0.0), place.axis)
        rest = broadcast(step, right) - above
        solved = solve_lower(broadcast(step, block), rest.T, transposed=False).T
        right = jnp.where(index == step, solved, right)
    return right
