"""Least squares on one system: pseudo-inverses, ridge solves, factors and their condition.

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
    """On CPU, makes the `vmap` of a LAPACK call a loop of single calls; elsewhere, leaves it be.

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
def _everywhere(holds):
    return holds


@_everywhere.def_vmap
def _everywhere_of_many(size, batched, holds):
    return _everywhere(jnp.all(holds, axis=0)), False


def all_in_batch(holds: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether it holds; under `vmap`, whether it holds for all: what a `lax.cond` that skips work for
    a batch can ask, where a condition of each would make it do both."""
    return _everywhere(jax.lax.stop_gradient(holds))


@_serial_on_cpu
def _thin_pinv(a, cutoff):
    q, r = jnp.linalg.qr(a)  # m enters here only
    u, s, vt = jnp.linalg.svd(r)
    keep = s > cutoff * s[0]  # >, not >=: a zero matrix has s[0] = 0 and must keep nothing
    inverse = jnp.where(keep, 1.0 / jnp.where(keep, s, 1.0), 0.0)
    return dot(dot(vt.T * inverse, u.T), q.T)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _tall_pinv(a, cutoff):
    """The pseudo-inverse of a tall matrix (m >= n): QR, then the SVD of the n x n factor."""
    return _thin_pinv(a, jnp.float32(cutoff))


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


def pinv(a: Float[Array, "m n"], cutoff: float | None = None) -> Float[Array, "n m"]:
    """The Moore-Penrose pseudo-inverse A† (§3), exact, at the cost of the thin side.

    Singular values up to `cutoff` times the largest count as zero (default: the float32 epsilon
    times the longer side), so zero rows, repeated rows and a zero matrix are all proper inputs. The
    derivative is that of a perturbation that keeps the rank.
    """
    m, n = a.shape
    if min(m, n) == 0:
        return jnp.zeros((n, m), jnp.float32)
    a = a.astype(jnp.float32)
    if cutoff is None:
        cutoff = float(jnp.finfo(jnp.float32).eps) * max(m, n)
    return _tall_pinv(a, cutoff) if m >= n else _tall_pinv(a.T, cutoff).T


@_serial_on_cpu
def _thin_factors(a):
    """(U [m, n], s [n], Vᵀ [n, n]) of a tall matrix."""
    q, r = jnp.linalg.qr(a)
    u, s, vt = jnp.linalg.svd(r)
    return dot(q, u), s, vt


def whitener(a: Float[Array, "K C"], floor: float | Float[Array, ""]) -> Float[Array, "C K"]:
    """V (S² + ε)^(−½) Uᵀ of a = U S Vᵀ, where ε is `floor` times the mean of S².

    Rows times it have the Mahalanobis norm under the rows of a, shrunk by ε; with ε = 0 it is a†.
    A constant to differentiation: it belongs to data, and the SVD's derivative is infinite where
    singular values meet.
    """
    a = jax.lax.stop_gradient(a.astype(jnp.float32))
    tall = a.shape[0] >= a.shape[1]
    u, s, vt = _thin_factors(a if tall else a.T)
    power = jnp.square(s)
    power = power + floor * jnp.mean(power)
    keep = power > jnp.finfo(jnp.float32).eps * max(a.shape) * power[0]
    scale = jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, power, 1.0)), 0.0)
    scaled = dot(u * scale, vt)
    return scaled.T if tall else scaled


@_serial_on_cpu
def _singular_values(a):
    return jnp.linalg.svd(jnp.linalg.qr(a, mode="r"), compute_uv=False)


def matrix_condition(a: Float[Array, "m n"]) -> Float[Array, ""]:
    """The 2-norm condition number of a matrix: its largest singular value over its smallest."""
    a = a.astype(jnp.float32)
    values = _singular_values(a if a.shape[0] >= a.shape[1] else a.T)
    return values[0] / values[-1]


def newton_schulz_pinv(
    a: Float[Array, "m n"], steps: int = 15, log_start: float = -5.0
) -> Float[Array, "n m"]:
    """The released code's approximation of A† (§3), by Newton–Schulz steps.

    X ← 2X − XAX from X₀ = min(e^log_start, 5e-4)·Aᵀ. It turns a singular value s into
    (1 − (1 − 5e-4·s²)^(2^steps)) / s: too small for small s, and divergent for s > 63.2. Kept to
    reproduce the released model; `pinv` is the exact one.
    """
    a = a.astype(jnp.float32)
    tall = a.shape[0] >= a.shape[1]
    start = jnp.minimum(jnp.exp(jnp.float32(log_start)), jnp.float32(5e-4)) * a.T

    def step(x, _):
        # X A is n x n, A X is m x m: the product over the shorter side first.
        xax = dot(dot(x, a), x) if tall else dot(x, dot(a, x))
        return 2.0 * x - xax, None

    return jax.lax.scan(step, start, None, length=steps)[0]


@_serial_on_cpu
def _cholesky(matrix):
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


@_serial_on_cpu
def _whiten(factor, rows):
    # Rows, that is from the right: on CPU that takes 0.6 of the time of solving from the left.
    return jax.lax.linalg.triangular_solve(
        factor, rows, left_side=False, lower=True, transpose_a=True
    )


@_serial_on_cpu
def _unwhiten(factor, rows):
    return jax.lax.linalg.triangular_solve(factor, rows, left_side=False, lower=True)


def cholesky(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """The lower factor L of A = L Lᵀ; NaN where A is not positive definite.

    It carries no derivative: `spd_solve` and `spd_quadratic` take A and its factor, and
    differentiate through A, which is cheaper than through a factorisation and the same.
    """
    return _cholesky(jax.lax.stop_gradient(matrix))


def factor_solve(factor: Float[Array, "K K"], right: Float[Array, "K C"]) -> Float[Array, "K C"]:
    """(L Lᵀ)⁻¹ right, without a derivative with respect to L."""
    factor = jax.lax.stop_gradient(factor)
    return _unwhiten(factor, _whiten(factor, right.T)).T


@_serial_on_cpu
def _eigh(matrix):
    return jnp.linalg.eigh(matrix)


def eigh(matrix: Float[Array, "K K"]) -> tuple[Float[Array, "K"], Float[Array, "K K"]]:
    """Eigenvalues, ascending, and eigenvectors, one a column, of a symmetric matrix; no derivative."""
    return tuple(_eigh(jax.lax.stop_gradient(matrix)))


def solve_lower(
    factor: Float[Array, "K K"], rows: Float[Array, "N K"], *, turned: bool = True
) -> Float[Array, "N K"]:
    """rows · L⁻ᵀ for a lower factor L, or rows · L⁻¹ where not `turned`; no derivative for L."""
    factor = jax.lax.stop_gradient(factor)
    return _whiten(factor, rows) if turned else _unwhiten(factor, rows)


def lower_inverse(factor: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """L⁻¹ of a lower factor, without a derivative: for many products with few rows each."""
    return _whiten(
        jax.lax.stop_gradient(factor), jnp.eye(factor.shape[0], dtype=jnp.float32)
    ).T


def inverse_factor(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """L⁻¹ of A = L Lᵀ, of which the lower half is read; NaN where A is not positive definite.

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
    """A⁻¹ right for a positive definite A and its Cholesky factor."""
    return _symmetric_solve(matrix, right, lambda b: factor_solve(factor, b))


def inverse_solve(
    matrix: Float[Array, "K K"], inverse: Float[Array, "K K"], right: Float[Array, "K C"]
) -> Float[Array, "K C"]:
    """A⁻¹ right for a positive definite A and its `inverse_factor`."""
    return _symmetric_solve(matrix, right, lambda b: dot(inverse.T, dot(inverse, b)))


def _symmetric_solve(matrix, right, solve):
    """`solve` of the right-hand side, differentiated through the matrix."""
    return jax.lax.custom_linear_solve(
        lambda x: dot(matrix, x), right, lambda _, b: solve(b), symmetric=True
    )


def product_solve(factor: Float[Array, "K K"], right: Float[Array, "K C"]) -> Float[Array, "K C"]:
    """(L Lᵀ)⁻¹ right for a lower factor L, differentiable in both: `spd_solve` where only L is kept."""
    return jax.lax.custom_linear_solve(
        lambda x: dot(factor, dot(factor.T, x)),
        right,
        lambda _, b: factor_solve(factor, b),
        symmetric=True,
    )


@_serial_on_cpu
def _general_solve(matrix, right):
    return jnp.linalg.solve(matrix, right)


def general_solve(matrix: Float[Array, "N N"], right: Float[Array, "N C"]) -> Float[Array, "N C"]:
    """matrix⁻¹ right for any square matrix that has an inverse."""
    fixed = jax.lax.stop_gradient(matrix)
    return jax.lax.custom_linear_solve(
        lambda x: dot(matrix, x),
        right,
        lambda _, b: _general_solve(fixed, b),
        lambda _, b: _general_solve(fixed.T, b),
    )


# What has to be left of a pivot's square, relative to it, for a row to be taken out of a factor.
_PIVOT = 1e-7


def factor_update(
    factor: Float[Array, "K K"], row: Float[Array, "K"], sign: Float[Array, ""]
) -> tuple[Float[Array, "K K"], Bool[Array, ""]]:
    """The factor of L Lᵀ + sign · wᵀw, and whether there is one; the old factor where there is none.

    A Givens rotation (sign 1) or a hyperbolic one (−1) of w with each column in turn, O(K²).
    """

    def column(state, given):
        w, sound = state
        old, index = given
        pivot, here = old[index], w[index]
        power = jnp.square(pivot) + sign * jnp.square(here)
        sound = sound & (power > _PIVOT * jnp.square(pivot))
        root = jnp.sqrt(jnp.where(sound, power, 1.0))
        cosine, tangent = root / pivot, here / pivot
        new = (old + sign * tangent * w) / cosine
        return (cosine * w - tangent * new, sound), new

    start = (row, jnp.ones((), bool))
    (_, sound), columns = jax.lax.scan(column, start, (factor.T, jnp.arange(factor.shape[0])))
    return jnp.where(sound, columns.T, factor), sound


@jax.custom_jvp
def spd_quadratic(
    matrix: Float[Array, "K K"], factor: Float[Array, "K K"], rows: Float[Array, "Q K"]
) -> Float[Array, "Q"]:
    """w A⁻¹ wᵀ of each row w, for a positive definite A and its Cholesky factor: one solve."""
    return jnp.sum(jnp.square(_whiten(factor, rows)), axis=1)


@spd_quadratic.defjvp
def _spd_quadratic_jvp(primals, tangents):
    matrix, factor, rows = primals
    d_matrix, _, d_rows = tangents
    solved = factor_solve(factor, rows.T).T
    change = 2.0 * d_rows - dot(solved, d_matrix)
    return spd_quadratic(matrix, factor, rows), jnp.sum(change * solved, axis=1)


def add_ridge(gram: Float[Array, "K K"], ridge: float | Float[Array, ""]) -> Float[Array, "K K"]:
    """gram + ridge·I."""
    return gram + ridge * jnp.eye(gram.shape[0], dtype=jnp.float32)


def ridge_solve(
    weights: Float[Array, "N K"],
    values: Float[Array, "N C"],
    ridge: float | Float[Array, ""],
    prior_memory: Float[Array, "K C"] | None = None,
) -> Float[Array, "K C"]:
    """argmin over M of ‖Z − W M‖² + ridge·‖M − M₀‖² (§4), by Cholesky; M₀ = 0 where not given.

    It solves for M − M₀ and not for M: directions that no fact has touched then keep M₀ to the last
    bit, where ridge·M₀/ridge would round it.
    """
    weights, values = weights.astype(jnp.float32), values.astype(jnp.float32)
    errors = values if prior_memory is None else values - dot(weights, prior_memory)
    matrix = add_ridge(dot(weights.T, weights), ridge)
    change = spd_solve(matrix, cholesky(matrix), dot(weights.T, errors))
    return change if prior_memory is None else prior_memory + change


def is_positive_definite(factor: Float[Array, "K K"]) -> Bool[Array, ""]:
    """Whether the Cholesky factorisation that gave `factor` went through."""
    return jnp.all(jnp.isfinite(jnp.diagonal(factor)))


def condition(factor: Float[Array, "K K"], steps: int = 12) -> Float[Array, ""]:
    """An estimate (from below) of the 2-norm condition number of A = L Lᵀ from its factor L.

    `steps` of power iteration on A and on A⁻¹, O(K²) each: usually within a factor of two, which is
    what a warning needs.
    """
    return _condition(factor, lambda v: factor_solve(factor, v[:, None])[:, 0], steps)


def condition_of_inverse(
    factor: Float[Array, "K K"], inverse: Float[Array, "K K"], steps: int = 12
) -> Float[Array, ""]:
    """`condition`, where L⁻¹ is at hand: a product takes a fifth of a triangular solve's time."""
    return _condition(factor, lambda v: dot(dot(inverse, v), inverse), steps)


def _condition(factor: Float[Array, "K K"], solve, steps: int) -> Float[Array, ""]:
    start = jnp.cos(jnp.arange(factor.shape[0], dtype=jnp.float32) + 1.0)

    def largest(apply):
        def step(vector, _):
            vector = apply(vector / jnp.linalg.norm(vector))
            return vector, jnp.linalg.norm(vector)

        return jax.lax.scan(step, start, None, length=steps)[1][-1]

    # v L and not Lᵀv: on CPU, a product with a transposed matrix takes eight times as long.
    return largest(lambda v: dot(factor, dot(v, factor))) * largest(solve)
