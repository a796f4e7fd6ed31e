"""One streaming memory over many devices: K past what one of them holds.

Each of p devices has K / p rows of G = Σ α WᵀW, of B and of M; none ever has all of G or of its factor.
(M₀ and what addresses, K x C each, are on all of them.) A forget is refused where it leaves A
indefinite; the closer look of `Streaming.possible` is not taken.
Solving is a blocked Cholesky factorisation, one block of columns a device: a block is factored, the
blocks below it are solved against it, and what they leave is taken from the rest. A device sends its
K/p x K/p block once per step, so that all together send K² numbers, once.

    place = sharded.Place(mesh, "slots")
    state = sharded.empty(memory, prepared, place)
    state = sharded.write(memory, prepared, state, keys, values, place=place)
    latent = sharded.read(memory, prepared, state, queries, place=place)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from larimar_jax.compensated import Sum, rank_update
from larimar_jax.linalg import cholesky, dot, solve_lower
from larimar_jax.memory.base import Prepared, Sign
from larimar_jax.memory.streaming import Streaming, StreamingState


class Place(NamedTuple):
    """An axis of a mesh that the slots are split over."""

    mesh: Mesh
    axis: str

    @property
    def ways(self) -> int:
        """Over how many devices."""
        return self.mesh.shape[self.axis]


def empty(memory: Streaming, prepared: Prepared, place: Place) -> StreamingState:
    """Nothing written; each device makes its own rows.

    Raises:
      ValueError: the devices do not divide the slots.
    """
    if memory.slots % place.ways:
        raise ValueError(
            f"{memory.slots} slots do not divide over the {place.ways} devices of the mesh's "
            f"{place.axis!r}; take a multiple of {place.ways}"
        )
    shapes = jax.eval_shape(memory.empty, prepared)
    specs = [_specs(place)[f.name] for f in dataclasses.fields(shapes)]
    where = [NamedSharding(place.mesh, spec) for spec in jax.tree.leaves(specs, is_leaf=_is_spec)]
    where = jax.tree.unflatten(jax.tree.structure(shapes), where)
    return jax.jit(memory.empty, out_shardings=where)(prepared)


def write(
    memory: Streaming,
    prepared: Prepared,
    state: StreamingState,
    keys: Float[Array, "N C"],
    values: Float[Array, "N C"],
    sign: Sign = 1,
    *,
    place: Place,
) -> StreamingState:
    """`Streaming.write`, with every K x K and K x C array in rows over the devices."""

    def local(state: dict[str, Any], reference, weights, values, signs):
        mine = _rows(weights.T, place).T
        errors = values - jax.lax.psum(dot(mine, reference), place.axis)
        signs = jnp.where(jnp.any(weights != 0, axis=1), signs, 0).astype(jnp.float32)
        # Rows of Wᵀ W: this device's slots by all slots.
        sums = (state["gram"], state["cross"])
        gram, cross = rank_update(sums, weights, errors, signs, rows=mine)
        energy = jnp.sum(signs * jnp.sum(jnp.square(errors), axis=1))[None, None]
        total = gram.total()
        shrink = memory.shrink_of(jax.lax.psum(jnp.trace(_own(total, place)), place.axis))
        ridge = memory.ridge + shrink
        factor = _factor(_plus_diagonal(total, ridge, place), place)
        change = _solve(factor, cross.total() - shrink * reference, place)
        bad = jnp.any(~jnp.isfinite(jnp.diagonal(_own(factor, place)))).astype(jnp.int32)
        sound = jax.lax.psum(bad, place.axis) == 0
        written = state | {
            "gram": gram,
            "cross": cross,
            "energy": state["energy"].plus(energy),
            "factor": factor,
            "solution": reference + change,
            "count": state["count"] + jnp.sum(signs).astype(jnp.int32),
        }
        number = jnp.sum(jnp.abs(signs)).astype(jnp.int32)
        kept = state | {"refused": state["refused"] + number}
        return jax.tree.map(lambda new, old: jnp.where(sound, new, old), written, kept)

    signs = jnp.broadcast_to(jnp.asarray(sign, jnp.int32), keys.shape[:1])
    weights, values = memory.address(prepared, keys), values.astype(jnp.float32)
    given = (_specs(place), P(place.axis), P(), P(), P())
    mapped = _mapped(local, place, given, _specs(place))
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return StreamingState(**mapped(fields, prepared.memory, weights, values, signs))


def read(
    memory: Streaming,
    prepared: Prepared,
    state: StreamingState,
    queries: Float[Array, "Q C"],
    *,
    place: Place,
) -> Float[Array, "Q C"]:
    """Z_read = W M."""

    def local(solution, weights):
        return jax.lax.psum(dot(_rows(weights.T, place).T, solution), place.axis)

    mapped = _mapped(local, place, (P(place.axis), P()), P())
    return mapped(state.solution, memory.address(prepared, queries))


def _specs(place: Place) -> dict[str, Any]:
    """By a state's field: what leads with K is in rows."""
    rows, whole = P(place.axis), P()
    return {
        "gram": Sum(rows, rows),
        "cross": Sum(rows, rows),
        "energy": Sum(whole, whole),
        "factor": rows,
        "solution": rows,
        "count": whole,
        "refused": whole,
    }


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)


def _mapped(local: Callable, place: Place, given: Any, made: Any) -> Callable:
    # What is the same on all devices is not proven to be: a refused write chooses by a sum over them.
    return jax.shard_map(local, mesh=place.mesh, in_specs=given, out_specs=made, check_vma=False)


def _rows(whole: Float[Array, "K n"], place: Place) -> Float[Array, "k n"]:
    """This device's rows of what all have."""
    size = whole.shape[0] // place.ways
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(place.axis) * size, size)


def _own(rows: Float[Array, "k K"], place: Place) -> Float[Array, "k k"]:
    """The block on the diagonal of this device's rows."""
    size = rows.shape[0]
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(place.axis) * size, size, axis=1)


def _plus_diagonal(rows: Float[Array, "k K"], ridge, place: Place) -> Float[Array, "k K"]:
    size, index = rows.shape[0], jax.lax.axis_index(place.axis)
    own = jnp.arange(size)[:, None] + index * size == jnp.arange(rows.shape[1])[None, :]
    return rows + jnp.where(own, ridge, 0.0)


def _factor(rows: Float[Array, "k K"], place: Place) -> Float[Array, "k K"]:
    """This device's rows of the Cholesky factor; NaN where the matrix is not positive definite."""
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
            every = jax.lax.all_gather(block, place.axis, tiled=True)
            rows = rows - dot(block, every.T)
    return factor


def _solve(factor: Float[Array, "k K"], right: Float[Array, "k C"], place: Place):
    """This device's rows of (L Lᵀ)⁻¹ right."""
    size, index, ways = factor.shape[0], jax.lax.axis_index(place.axis), place.ways

    def corner(step):
        mine = jnp.where(index == step, factor[:, step * size : (step + 1) * size], 0.0)
        return jax.lax.psum(mine, place.axis)

    for step in range(ways):
        block = factor[:, step * size : (step + 1) * size]
        here = jax.lax.psum(jnp.where(index == step, right, 0.0), place.axis)
        solved = solve_lower(corner(step), here.T, turned=True).T
        later = right - jnp.where(index > step, dot(block, solved), 0.0)
        right = jnp.where(index == step, solved, later)
    for step in reversed(range(ways)):
        block = factor[:, step * size : (step + 1) * size]
        above = jax.lax.psum(jnp.where(index > step, dot(block.T, right), 0.0), place.axis)
        here = jax.lax.psum(jnp.where(index == step, right, 0.0), place.axis)
        solved = solve_lower(corner(step), (here - above).T, turned=False).T
        right = jnp.where(index == step, solved, right)
    return right
