"""Cross-entropy over a large vocabulary, whose gradient is computed along with it.

The logits of a batch are the largest array of a training step. Here they are made for some positions
at a time, and turned into their gradient where they lie: they are written once, and neither kept for
the backward pass nor computed again there.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from larimar_jax import products

# Of a row, how many positions' logits are there at a time, and of how many tokens at the least: fewer
# make thin matrix products, and the kernel's gradient is read and written once for each.
POSITIONS, TOKENS = 16, 512


class Head(NamedTuple):
    """What makes logits of hidden states.

    kernel: float32 [V, D] where `tied` (an embedding table), else [D, V]. bias: float32 [V] or None.
    dtype: of the matrix product's factors; it accumulates in float32.
    """

    kernel: Array
    bias: Array | None
    tied: bool
    dtype: DTypeLike


class _How(NamedTuple):
    tied: bool
    dtype: DTypeLike
    positions: int


def logits(head: Head, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Next-token logits, float32."""
    return _logits(head.tied, head.dtype, head.kernel, head.bias, hidden)


def entropies(
    head: Head,
    hidden: Float[Array, "R T D"],
    targets: Int[Array, "R T"],
    *,
    whole: bool = False,
) -> Float[Array, "R T"]:
    """−ln p(target) in nats. Its gradient computes the logits again: see `weighted`.

    Args:
      whole: all positions at a time.
    """
    how = _how(head, targets, whole)
    return _entropies_of(how, head.kernel, head.bias, hidden, targets)


def weighted(
    head: Head,
    hidden: Float[Array, "R T D"],
    targets: Int[Array, "R T"],
    weights: Float[Array, "R T"],
    *,
    whole: bool = False,
) -> tuple[Float[Array, ""], Float[Array, "R T"]]:
    """Σ weights · entropies, and the entropies; the gradient of the sum costs no second pass.

    Args:
      whole: all positions at a time. Where rows are split over devices, the kernel's gradient is then
        summed over them once.
    """
    how = _how(head, targets, whole)
    return _weighted(how, head.kernel, head.bias, hidden, targets, weights)


def _how(head: Head, targets: Int[Array, "R T"], whole: bool) -> _How:
    rows, length = targets.shape
    positions = length if whole else min(length, max(POSITIONS, math.ceil(TOKENS / rows)))
    # As even as they can be: what is added to fill the last one is computed for nothing.
    positions = math.ceil(length / math.ceil(length / positions))
    return _How(head.tied, products.factor_dtype(head.dtype), positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _entropies_of(how: _How, kernel, bias, hidden, targets):
    def some(_, part):
        hidden, targets = part
        found = _logits(how.tied, how.dtype, kernel, bias, hidden)
        return None, _entropies(found, targets)[0]

    parts = (_cut(how, hidden), _cut(how, targets))
    return _join(jax.lax.scan(some, None, parts)[1], targets.shape)


def _entropies_forward(how: _How, *primals):
    values, trained = _seen(primals)
    return _entropies_of(how, *values), (values, trained)


def _entropies_backward(how: _How, kept, cotangent):
    return (*_slopes(how, *kept, cotangent)[1], None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(how: _How, kernel, bias, hidden, targets, weights):
    found = _entropies_of(how, kernel, bias, hidden, targets)
    return jnp.sum(found * weights), found


def _weighted_forward(how: _How, *primals):
    values, trained = _seen(primals[:-1])
    weights = primals[-1].value
    found, slopes = _slopes(how, values, trained, weights)
    return (jnp.sum(found * weights), found), (values, trained, slopes, found)


def _weighted_backward(how: _How, kept, cotangents):
    values, trained, slopes, found = kept
    of_sum, of_each = cotangents
    zero = jax.custom_derivatives.SymbolicZero
    if isinstance(of_sum, zero):
        of_sum = jnp.zeros((), jnp.float32)
    slopes = jax.tree.map(lambda slope: slope * of_sum.astype(slope.dtype), slopes)
    if not isinstance(of_each, zero):
        slopes = jax.tree.map(jnp.add, slopes, _slopes(how, values, trained, of_each)[1])
    return (*slopes, None, found * of_sum)


_entropies_of.defvjp(_entropies_forward, _entropies_backward, symbolic_zeros=True)
_weighted.defvjp(_weighted_forward, _weighted_backward, symbolic_zeros=True)


def _seen(primals):
    """The values of kernel, bias, hidden and targets, and whether the first two are differentiated."""
    values = tuple(None if a is None else a.value for a in primals)
    return values, tuple(a is not None and a.perturbed for a in primals[:2])


def _slopes(how: _How, values, trained: tuple[bool, bool], weights):
    """The entropies [R, T], and the gradients of Σ weights · entropies for kernel, bias and hidden.

    A frozen kernel or bias gets None: its gradient is as large as it, and nobody asks for it.
    """
    kernel, bias, hidden, targets = values
    across = 1 - _contract(how.tied)
    # A weight is one over all tokens: float16 would lose most of such slopes.
    size = jnp.max(jnp.abs(weights))
    weights = weights / jnp.where(size > 0, size, 1.0)

    def some(sums, part):
        hidden, targets, weights = part
        found = _logits(how.tied, how.dtype, kernel, bias, hidden)
        each, powers, scale = _entropies(found, targets)
        one = jax.nn.one_hot(targets, found.shape[-1], dtype=bool)
        # softmax − 1 at the target, of each token by its weight.
        slope = powers * (weights * scale)[:, None] - jnp.where(one, weights[:, None], 0.0)
        low = slope.astype(how.dtype)
        back = _product(low, kernel.astype(how.dtype), contract=(1, across))
        of_kernel, of_bias = sums
        if trained[0]:
            pair = (low, hidden.astype(how.dtype))
            of_kernel = of_kernel + _product(*(pair if how.tied else pair[::-1]), contract=(0, 0))
        if trained[1]:
            of_bias = of_bias + slope.sum(axis=0)
        return (of_kernel, of_bias), (each, (size * back).astype(hidden.dtype))

    start = tuple(
        jnp.zeros(array.shape, jnp.float32) if wanted else None
        for array, wanted in zip((kernel, bias), trained, strict=True)
    )
    parts = tuple(_cut(how, array) for array in (hidden, targets, weights))
    sums, (each, back) = jax.lax.scan(some, start, parts)
    sums = jax.tree.map(lambda total: size * total, sums)
    return _join(each, targets.shape), (*sums, _join(back, hidden.shape))


def _contract(tied: bool) -> int:
    """The kernel's axis of width D."""
    return 1 if tied else 0


def _product(left: Array, right: Array, *, contract: tuple[int, int]) -> Array:
    # By axes, so that no transposed copy of a kernel or of logits is asked for.
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _logits(tied: bool, dtype: DTypeLike, kernel, bias, hidden) -> Array:
    factors = (hidden.astype(dtype), kernel.astype(dtype))
    found = _product(*factors, contract=(hidden.ndim - 1, _contract(tied)))
    return found if bias is None else found + bias.astype(jnp.float32)


def _entropies(found: Float[Array, "N V"], targets: Int[Array, " N"]):
    """−ln p(target) [N], e^(logits − their maximum) [N, V], and one over their sums [N]."""
    most = jnp.max(found, axis=-1)
    powers = jnp.exp(found - most[:, None])
    total = jnp.sum(powers, axis=-1)
    chosen = jnp.take_along_axis(found, targets[:, None], axis=-1)[:, 0]
    return most + jnp.log(total) - chosen, powers, 1.0 / total


def _cut(how: _How, array: Array) -> Array:
    """[R, T, …] as [parts, R · positions, …], padded with zeros; rows stay where they are."""
    fill = -array.shape[1] % how.positions
    array = jnp.pad(array, ((0, 0), (0, fill), *((0, 0) for _ in array.shape[2:])))
    array = array.reshape(array.shape[0], -1, how.positions, *array.shape[2:]).swapaxes(0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def _join(parts: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_cut`, to an array of this shape."""
    array = parts.reshape(parts.shape[0], shape[0], -1, *shape[2:]).swapaxes(0, 1)
    return array.reshape(shape[0], -1, *shape[2:])[:, : shape[1]]
