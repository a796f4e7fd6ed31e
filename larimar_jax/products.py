"""Products of activations with a tower's kernels, whose factors training may round.

A CPU with bfloat16 instructions multiplies bfloat16 factors, adding up in float32, about twice as fast
as float32 ones; norms, activations and sums lose by bfloat16 there. So activations, parameters and
gradients stay in the dtype that the model computes in, and only what is multiplied is rounded.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_FACTORS: contextvars.ContextVar[DTypeLike | None] = contextvars.ContextVar("factors", default=None)


@contextlib.contextmanager
def factors(dtype: DTypeLike | None) -> Iterator[None]:
    """While it is open, factors of what is traced are rounded to this dtype; None leaves them be."""
    token = _FACTORS.set(None if dtype is None else jnp.dtype(dtype))
    try:
        yield
    finally:
        _FACTORS.reset(token)


def factor_dtype(dtype: DTypeLike) -> DTypeLike:
    """What the factors of a product of this dtype are rounded to."""
    chosen = _FACTORS.get()
    return jnp.dtype(dtype) if chosen is None else chosen


def product(x: Float[Array, "*rows I"], kernel: Float[Array, "I O"]) -> Float[Array, "*rows O"]:
    """x W in the dtype of x; its gradients are products of rounded factors too."""
    return _product(factor_dtype(x.dtype), x, kernel)


def dot_general(x, kernel, dimension_numbers, **options):
    """`product`, as flax's linear maps ask for it.

    Raises:
      ValueError: what is asked for is not the last axis of x times the first of the kernel,
        in the default precision.
    """
    asked = {name: value for name, value in options.items() if value is not None}
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())) or kernel.ndim != 2 or asked:
        raise ValueError(f"a product over {dimension_numbers} with {asked} is not that of a linear map")
    return product(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(low: DTypeLike, x: Array, kernel: Array) -> Array:
    return _dot(x.astype(low), kernel.astype(low), ((x.ndim - 1,), (0,)), x.dtype)


def _forward(low: DTypeLike, x, kernel):
    # Rounded once: what is kept for the way back is half as large.
    rounded = x.value.astype(low)
    last = ((rounded.ndim - 1,), (0,))
    found = _dot(rounded, kernel.value.astype(low), last, x.value.dtype)
    return found, (rounded if kernel.perturbed else None, kernel.value, x.perturbed)


def _backward(low: DTypeLike, kept, slope):
    if isinstance(slope, jax.custom_derivatives.SymbolicZero):
        return None, None
    x, kernel, wanted = kept
    rounded = slope.astype(low)
    of_x = of_kernel = None
    if wanted:
        of_x = _dot(rounded, kernel.astype(low), ((rounded.ndim - 1,), (1,)), slope.dtype)
    if x is not None:
        # In this order: the transposed product is several times slower where one factor is narrow.
        rows = tuple(range(x.ndim - 1))
        of_kernel = _dot(x, rounded, (rows, rows), kernel.dtype)
    return of_x, of_kernel


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _dot(left: Array, right: Array, contract, dtype: DTypeLike) -> Array:
    return jax.lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=dtype)
