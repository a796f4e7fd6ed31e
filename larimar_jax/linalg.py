"""Least squares on one system: pseudo-inverses, solves, factors and their condition.

Everything here is float32 at the highest matmul precision, acts on one system (callers `vmap`), is
differentiable, and has static shapes: a rank is never read out to choose a shape.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Memory algebra never runs in TF32 or bfloat16, whatever the model's dtype: pseudo-inverses square
# or invert the rounding of their products.
dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _serial_on_cpu(function):
    """Make the `vmap` of a LAPACK call a loop of single calls on CPU; leave it as it is elsewhere.

    jaxlib 0.10 spreads a batched Cholesky, QR, SVD or triangular solve over XLA's thread pool and
    waits for it *on a thread of that pool*: as many of them at once as the machine has cores (two
    in one program, or one on each of several virtual devices) never end. A batch of one does not
    wait.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size, batched, *arguments):
        def loop(*arguments):
            def step(row):
                rows = iter(row)
                chosen = zip(batched, arguments, strict=True)
                return mapped(*(next(rows) if b else x for b, x in chosen))

            rows = tuple(x for b, x in zip(batched, arguments, strict=True) if b)
            return jax.lax.map(step, rows)

        def native(*arguments):
            return jax.vmap(function, in_axes=tuple(0 if b else None for b in batched))(*arguments)

        return jax.lax.platform_dependent(*arguments, cpu=loop, default=native), True

    return mapped


@jax.custom_batching.custom_vmap
def _all_in_batch(condition):
    return condition


@_all_in_batch.def_vmap
def _all_in_batch_rule(size, batched, conditions):
    return _all_in_batch(jnp.all(conditions, axis=0)), False


def all_in_batch(condition: Bool[Array, ""]) -> Bool[Array, ""]:
    """Return the condition; under `vmap`, whether it is true of all: the predicate of a `lax.cond`
    that skips work for a batch, where a predicate of each would compute both branches."""
    return _all_in_batch(jax.lax.stop_gradient(condition))


@_serial_on_cpu
def _thin_pinv(a, cutoff):
    q, r = jnp.linalg.qr(a)  # m enters here only
    u, s, vt = jnp.linalg.svd(r)
    is_nonzero = s > cutoff * s[0]  # >, not >=: a zero matrix has s[0] = 0 and no nonzero value
    inverse = jnp.where(is_nonzero, 1.0 / jnp.where(is_nonzero, s, 1.0), 0.0)
    return dot(dot(vt.T * inverse, u.T), q.T)


# The largest number of X A − I that counts as rounding: reached up to conditions of a few 1e3.
_GRAM_ERROR = 1e-3


def _gram_pinv(a, cutoff):
    """Return A† = (AᵀA)⁻¹Aᵀ of a tall matrix; as `_thin_pinv` where A has no full rank to rounding.

    A solve by AᵀA squares the condition number; each step X ← 2X − XAX after it squares the error.
    It is all products but for one small factorisation, where GPUs are slow at QR and SVD.
    """
    gram = dot(a.T, a)
    # A column of zeros is padding: its row of A† is zero.
    is_fact = jnp.diagonal(gram) > 0
    factor = _cholesky(gram + jnp.diag(jnp.where(is_fact, 0.0, 1.0)))
    x = _unwhiten(factor, _whiten(factor, a)).T
    for _ in range(2):
        x = 2.0 * x - dot(dot(x, a), x)
    error = jnp.abs(dot(x, a) - jnp.diag(jnp.where(is_fact, 1.0, 0.0)))
    # Each number, since a factorisation that failed is NaN, which XLA's maximum on CPU passes over.
    is_exact = all_in_batch(jnp.all(error < _GRAM_ERROR))
    return jax.lax.cond(is_exact, lambda: x, lambda: _thin_pinv(a, cutoff))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _tall_pinv(a, cutoff):
    """Return the pseudo-inverse of a tall matrix (m >= n), as is fast on the platform."""
    return jax.lax.platform_dependent(a, jnp.float32(cutoff), cuda=_gram_pinv, default=_thin_pinv)


@_tall_pinv.defjvp
def _tall_pinv_jvp(cutoff, primals, tangents):
    """Golub & Pereyra (1973), for perturbations that keep the rank.

    d(A†) = -A† dA A† + A† A†ᵀ dAᵀ (I - A A†) + (I - A† A) dAᵀ A†ᵀ A†

    The derivative of the SVD itself is not used: it divides by differences of singular values and
    is infinite for repeated facts and for padding. Products are ordered so that nothing m x m
    arises.
    """
    (a,), (da,) = primals, tangents
    p = _tall_pinv(a, cutoff)
    pda = dot(p, da)
    first = dot(pda, p)
    second = dot(dot(p, p.T), da.T - dot(dot(da.T, a), p))
    third = dot(pda.T, p)
    third = third - dot(dot(p, a), third)
    return p, second + third - first


def pinv(a: Float[Array, "m n"]) -> Float[Array, "n m"]:
    """Return the Moore-Penrose pseudo-inverse A† (§3), exact, at the cost of the thin side.

    Singular values up to the largest times the float32 epsilon times the longer side count as zero, so
    zero rows, repeated rows and a zero matrix are all proper inputs. The derivative is that of a
    perturbation that keeps the rank.
    """
    m, n = a.shape
    if min(m, n) == 0:
        return jnp.zeros((n, m), jnp.float32)
    a = a.astype(jnp.float32)
    cutoff = float(jnp.finfo(jnp.float32).eps) * max(m, n)
    return _tall_pinv(a, cutoff) if m >= n else _tall_pinv(a.T, cutoff).T


@_serial_on_cpu
def _thin_factors(a):
    """Return (U [m, n], s [n], Vᵀ [n, n]) of a tall matrix."""
    q, r = jnp.linalg.qr(a)
    u, s, vt = jnp.linalg.svd(r)
    return dot(q, u), s, vt


def whitener(a: Float[Array, "K C"], floor: float | Float[Array, ""]) -> Float[Array, "C K"]:
    """Return V (S² + ε)^(−½) Uᵀ of a = U S Vᵀ, where ε is `floor` times the mean of S².

    Rows times it have the Mahalanobis norm under the rows of a, shrunk by ε; with ε = 0 it is a†.
    A constant to differentiation: it belongs to data, and the SVD's derivative is infinite where
    singular values meet.
    """
    a = jax.lax.stop_gradient(a.astype(jnp.float32))
    is_tall = a.shape[0] >= a.shape[1]
    u, s, vt = _thin_factors(a if is_tall else a.T)
    power = jnp.square(s)
    power = power + floor * jnp.mean(power)
    is_nonzero = power > jnp.finfo(jnp.float32).eps * max(a.shape) * power[0]
    scale = jnp.where(is_nonzero, jax.lax.rsqrt(jnp.where(is_nonzero, power, 1.0)), 0.0)
    scaled = dot(u * scale, vt)
    return scaled.T if is_tall else scaled


@_serial_on_cpu
def matrix_condition(a: Float[Array, "m n"]) -> Float[Array, ""]:
    """Return the 2-norm condition number of a matrix."""
    tall = (a if a.shape[0] >= a.shape[1] else a.T).astype(jnp.float32)
    values = jnp.linalg.svd(jnp.linalg.qr(tall, mode="r"), compute_uv=False)
    return values[0] / values[-1]


@_serial_on_cpu
def _whiten(factor, rows):
    # Rows, that is from the right: on CPU that takes 0.6 of the time of solving from the left.
    return jax.lax.linalg.triangular_solve(
        factor, rows, left_side=False, lower=True, transpose_a=True
    )


@_serial_on_cpu
def _unwhiten(factor, rows):
    return jax.lax.linalg.triangular_solve(factor, rows, left_side=False, lower=True)


_cholesky = _serial_on_cpu(functools.partial(jax.lax.linalg.cholesky, symmetrize_input=False))


def cholesky(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """Return the lower factor L of A = L Lᵀ; NaN where A is not positive definite.

    It carries no derivative: `spd_solve` takes A and its factor, and differentiates through A, which
    is cheaper than through a factorisation and the same.
    """
    return _cholesky(jax.lax.stop_gradient(matrix))


def factor_solve(factor: Float[Array, "K K"], right: Float[Array, "K C"]) -> Float[Array, "K C"]:
    """Return (L Lᵀ)⁻¹ right, without a derivative with respect to L."""
    factor = jax.lax.stop_gradient(factor)
    return _unwhiten(factor, _whiten(factor, right.T)).T


def solve_lower(
    factor: Float[Array, "K K"], rows: Float[Array, "N K"], *, transposed: bool = True
) -> Float[Array, "N K"]:
    """Return rows · L⁻ᵀ, or rows · L⁻¹ where not `transposed`; no derivative for L."""
    factor = jax.lax.stop_gradient(factor)
    return _whiten(factor, rows) if transposed else _unwhiten(factor, rows)


def lower_inverse(factor: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """Return L⁻¹ of a lower factor, without a derivative: for many products with few rows each."""
    return solve_lower(factor, jnp.eye(factor.shape[0], dtype=jnp.float32)).T


def inverse_factor(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """Return L⁻¹ of A = L Lᵀ, of which the lower half is read; NaN where A is not positive definite.

    By halves, so that nearly all of it are products; with it every solve is two more: faster than
    triangular solves with few rows, and under `vmap`. Without a derivative, as `cholesky`.
    """
    return _inverse_factor(jax.lax.stop_gradient(matrix))


@jax.custom_batching.custom_vmap
def _inverse_factor(matrix):
    return _by_halves(matrix, _LEAF)


@_inverse_factor.def_vmap
def _inverse_factors(size, batched, matrices):
    # LAPACK takes one at a time: small ones are done side by side without it.
    leaf = 1 if matrices.shape[-1] <= _SMALL else _LEAF
    return jax.vmap(functools.partial(_by_halves, leaf=leaf))(matrices), True


# Sizes up to which LAPACK is faster than products of halves, and many without LAPACK than one by one.
_LEAF, _SMALL = 128, 16


def _by_halves(matrix, leaf):
    size = matrix.shape[0]
    if size == 1:
        return 1.0 / jnp.sqrt(matrix)
    if size <= leaf:
        return lower_inverse(_cholesky(matrix))
    half = size // 2
    first = _by_halves(matrix[:half, :half], leaf)
    below = dot(matrix[half:, :half], first.T)
    last = _by_halves(matrix[half:, half:] - dot(below, below.T), leaf)
    corner = jnp.zeros((half, size - half), jnp.float32)
    return jnp.block([[first, corner], [-dot(last, dot(below, first)), last]])


def spd_solve(
    matrix: Float[Array, "K K"], factor: Float[Array, "K K"], right: Float[Array, "K C"]
) -> Float[Array, "K C"]:
    """Return A⁻¹ right for a positive definite A and its Cholesky factor, differentiable in A."""
    return _symmetric_solve(lambda x: dot(matrix, x), right, lambda b: factor_solve(factor, b))


def inverse_solve(
    matrix: Float[Array, "K K"], inverse: Float[Array, "K K"], right: Float[Array, "K C"]
) -> Float[Array, "K C"]:
    """Return A⁻¹ right for a positive definite A and its `inverse_factor`, differentiable in A."""
    return _symmetric_solve(
        lambda x: dot(matrix, x), right, lambda b: dot(inverse.T, dot(inverse, b))
    )


def product_solve(factor: Float[Array, "K K"], right: Float[Array, "K C"]) -> Float[Array, "K C"]:
    """Return (L Lᵀ)⁻¹ right for a lower factor L, differentiable in both: where only L is known."""
    return _symmetric_solve(
        lambda x: dot(factor, dot(factor.T, x)), right, lambda b: factor_solve(factor, b)
    )


def _symmetric_solve(multiply, right, solve):
    """Return `solve` of the right-hand side, differentiated through `multiply`."""
    return jax.lax.custom_linear_solve(multiply, right, lambda _, b: solve(b), symmetric=True)


# What has to be left of a pivot's square, relative to it, for a row to be taken out of a factor.
_PIVOT = 1e-7


def factor_update(
    factor: Float[Array, "K K"], row: Float[Array, "K"], sign: Float[Array, ""]
) -> tuple[Float[Array, "K K"], Bool[Array, ""]]:
    """Return the factor of L Lᵀ + sign · wᵀw, and whether it exists; the same factor where it does not:
    a Givens rotation (sign 1) or a hyperbolic one (−1) of w with each column in turn, O(K²)."""

    def rotate(carry, columns):
        w, is_sound = carry
        column, index = columns
        pivot, entry = column[index], w[index]
        power = jnp.square(pivot) + sign * jnp.square(entry)
        is_sound = is_sound & (power > _PIVOT * jnp.square(pivot))
        root = jnp.sqrt(jnp.where(is_sound, power, 1.0))
        cosine, tangent = root / pivot, entry / pivot
        rotated = (column + sign * tangent * w) / cosine
        return (cosine * w - tangent * rotated, is_sound), rotated

    start = (row, jnp.ones((), bool))
    (_, is_sound), columns = jax.lax.scan(rotate, start, (factor.T, jnp.arange(factor.shape[0])))
    return jnp.where(is_sound, columns.T, factor), is_sound


def add_ridge(gram: Float[Array, "K K"], ridge: float | Float[Array, ""]) -> Float[Array, "K K"]:
    """Return gram + ridge·I."""
    return gram + ridge * jnp.eye(gram.shape[0], dtype=jnp.float32)


def is_positive_definite(factor: Float[Array, "K K"]) -> Bool[Array, ""]:
    """Return whether the Cholesky factorisation that returned `factor` went through."""
    return jnp.all(jnp.isfinite(jnp.diagonal(factor)))


def condition(factor: Float[Array, "K K"], steps: int = 12) -> Float[Array, ""]:
    """Estimate (from below) the 2-norm condition number of A = L Lᵀ from its factor L: `steps` of power
    iteration on A and A⁻¹, O(K²) each, usually within a factor of two, as a warning needs."""
    start = jnp.cos(jnp.arange(factor.shape[0], dtype=jnp.float32) + 1.0)

    def largest(apply):
        def step(vector, _):
            vector = apply(vector / jnp.linalg.norm(vector))
            return vector, jnp.linalg.norm(vector)

        return jax.lax.scan(step, start, None, length=steps)[1][-1]

    # v L and not Lᵀv: on CPU, a product with a transposed matrix takes eight times as long.
    largest_of_inverse = largest(lambda v: factor_solve(factor, v[:, None])[:, 0])
    return largest(lambda v: dot(factor, dot(v, factor))) * largest_of_inverse
