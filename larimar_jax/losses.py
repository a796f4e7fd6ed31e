"""Cross-entropy over a large vocabulary, whose gradient is computed along with it.

The logits of a batch are the largest array of a training step. Here they are computed for some
positions at a time, and turned into their gradient where they lie: they are written once, and neither
stored for the backward pass nor computed again there.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

# Of how many positions of a row the logits exist at a time, and of how many tokens at the least: fewer
# give thin matrix products, and the kernel's gradient is read and written once for each.
POSITIONS, TOKENS = 16, 512


class Head(NamedTuple):
    """The map from hidden states to logits.

    kernel: float32 [V, D] where `tied` (an embedding table), else [D, V]. bias: float32 [V] or None.
    dtype: of the matrix product's factors; it accumulates in float32.
    """

    kernel: Array
    bias: Array | None
    tied: bool
    dtype: DTypeLike


class _Layout(NamedTuple):
    """What is static: the form of the head, and how many positions are computed at a time."""

    tied: bool
    dtype: DTypeLike
    positions: int


def fill(head: Head, multiple: int) -> Head:
    """Return the head with tokens of probability 0 added, for products whose size is a multiple."""
    axis = 0 if head.tied else 1
    size = head.kernel.shape[axis]
    if not (more := -size % multiple):
        return head
    widths = [(0, more if i == axis else 0) for i in range(2)]
    bias = jnp.zeros(size) if head.bias is None else head.bias
    bias = jnp.pad(bias, (0, more), constant_values=-jnp.inf)
    return head._replace(kernel=jnp.pad(head.kernel, widths), bias=bias)


def logits(head: Head, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Return next-token logits, float32."""
    return _logits(head, head.kernel, head.bias, hidden)


def cross_entropy(
    head: Head, hidden: Float[Array, "R T D"], targets: Int[Array, "R T"], *, whole: bool = False
) -> Float[Array, "R T"]:
    """Return −ln p(target) in nats. Its gradient computes the logits again.

    Args:
      whole: all positions at a time.
    """
    layout = _layout(head, targets, whole)
    return _cross_entropy(layout, head.kernel, head.bias, hidden, targets)


def weighted_cross_entropy(
    head: Head,
    hidden: Float[Array, "R T D"],
    targets: Int[Array, "R T"],
    weights: Float[Array, "R T"],
    *,
    whole: bool = False,
) -> tuple[Float[Array, ""], Float[Array, "R T"]]:
    """Return Σ weights · entropies, and the entropies as constants; its gradient costs no second pass.

    Args:
      whole: all positions at a time. Where rows are split over devices, the kernel's gradient is then
        summed over them once.
    """
    layout = _layout(head, targets, whole)
    total, entropies = _weighted(layout, head.kernel, head.bias, hidden, targets, weights)
    return total, jax.lax.stop_gradient(entropies)


def _layout(head: Head, targets: Int[Array, "R T"], whole: bool) -> _Layout:
    rows, length = targets.shape
    positions = length if whole else min(length, max(POSITIONS, math.ceil(TOKENS / rows)))
    # As even as they can be: what is added to fill the last one is computed for nothing.
    positions = math.ceil(length / math.ceil(length / positions))
    return _Layout(head.tied, jnp.dtype(head.dtype), positions)


def _cross_entropy(layout: _Layout, kernel, bias, hidden, targets):
    @jax.checkpoint
    def part(arrays):
        hidden, targets = arrays
        return _softmax(_logits(layout, kernel, bias, hidden), targets)[0]

    arrays = (_cut(layout, hidden), _cut(layout, targets))
    return _join(jax.lax.map(part, arrays), targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(layout: _Layout, kernel, bias, hidden, targets, weights):
    entropies = _cross_entropy(layout, kernel, bias, hidden, targets)
    return jnp.sum(entropies * weights), entropies


def _weighted_forward(layout: _Layout, *primals):
    *values, weights = (None if array is None else array.value for array in primals)
    # A frozen kernel's gradient is as large as the kernel, and nothing reads it.
    trained = tuple(array is not None and array.perturbed for array in primals[:2])
    entropies, slopes = _gradients(layout, values, trained, weights)
    return (jnp.sum(entropies * weights), entropies), (slopes, entropies)


def _weighted_backward(layout: _Layout, residuals, cotangents):
    slopes, entropies = residuals
    of_sum, _ = cotangents
    slopes = jax.tree.map(lambda slope: slope * of_sum.astype(slope.dtype), slopes)
    return (*slopes, None, entropies * of_sum)


_weighted.defvjp(_weighted_forward, _weighted_backward, symbolic_zeros=True)


def _gradients(layout: _Layout, values, trained: tuple[bool, bool], weights):
    """Return the entropies [R, T], and gradients of Σ weights · entropies for kernel, bias and hidden.

    A frozen kernel or bias gets None.
    """
    kernel, bias, hidden, targets = values
    # A weight is divided by all tokens: float16 would lose most of such slopes.
    size = jnp.max(jnp.abs(weights))
    weights = weights / jnp.where(size > 0, size, 1.0)

    def part(sums, arrays):
        hidden, targets, weights = arrays
        entropies, powers, scale = _softmax(_logits(layout, kernel, bias, hidden), targets)
        target = jax.nn.one_hot(targets, powers.shape[-1], dtype=bool)
        # softmax − 1 at the target, of each token by its weight.
        slope = powers * (weights * scale)[:, None] - jnp.where(target, weights[:, None], 0.0)
        low = slope.astype(layout.dtype)
        width = 1 if layout.tied else 0
        of_hidden = _product(low, kernel.astype(layout.dtype), contract=(1, 1 - width))
        of_kernel, of_bias = sums
        if trained[0]:
            pair = (low, hidden.astype(layout.dtype))
            pair = pair if layout.tied else pair[::-1]
            of_kernel = of_kernel + _product(*pair, contract=(0, 0))
        if trained[1]:
            of_bias = of_bias + slope.sum(axis=0)
        return (of_kernel, of_bias), (entropies, (size * of_hidden).astype(hidden.dtype))

    start = tuple(
        jnp.zeros(array.shape, jnp.float32) if wanted else None
        for array, wanted in zip((kernel, bias), trained, strict=True)
    )
    arrays = tuple(_cut(layout, array) for array in (hidden, targets, weights))
    sums, (entropies, of_hidden) = jax.lax.scan(part, start, arrays)
    sums = jax.tree.map(lambda total: size * total, sums)
    return _join(entropies, targets.shape), (*sums, _join(of_hidden, hidden.shape))


def _product(left: Array, right: Array, *, contract: tuple[int, int]) -> Array:
    # By axes, so that no transposed copy of a kernel or of logits is asked for.
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _logits(layout: Head | _Layout, kernel, bias, hidden) -> Array:
    factors = (hidden.astype(layout.dtype), kernel.astype(layout.dtype))
    logits = _product(*factors, contract=(hidden.ndim - 1, 1 if layout.tied else 0))
    return logits if bias is None else logits + bias.astype(jnp.float32)


def _softmax(logits: Float[Array, "N V"], targets: Int[Array, " N"]):
    """Return −ln p(target) [N], e^(logits − their maximum) [N, V], and 1 / Σ of these [N]."""
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    powers = jnp.exp(logits - peak[:, None])
    total = jnp.sum(powers, axis=-1)
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return peak + jnp.log(total) - target, powers, 1.0 / total


def _cut(layout: _Layout, array: Array) -> Array:
    """Return [R, T, …] as [parts, R · positions, …], padded with zeros; rows stay where they are."""
    fill = -array.shape[1] % layout.positions
    array = jnp.pad(array, ((0, 0), (0, fill), *((0, 0) for _ in array.shape[2:])))
    array = array.reshape(array.shape[0], -1, layout.positions, *array.shape[2:]).swapaxes(0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def _join(parts: Array, shape: tuple[int, ...]) -> Array:
    """Return the inverse of `_cut`, as an array of this shape."""
    array = parts.reshape(parts.shape[0], shape[0], -1, *shape[2:]).swapaxes(0, 1)
    return array.reshape(shape[0], -1, *shape[2:])[:, : shape[1]]
