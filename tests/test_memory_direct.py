"""Algorithm 1 beside §3 in float64, exactly and by Newton–Schulz."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra import C, K, N, check, close, matrix, prepare, seeds
from hypothesis import given
from hypothesis import strategies as st

from larimar_jax.memory.direct import Direct
from larimar_jax.memory.newton_schulz import NewtonSchulz


@functools.partial(jax.jit, static_argnums=0)
def write_and_read(variant, m0, keys, values, queries):
    prepared = prepare(variant, m0)
    state = variant.write(prepared, variant.empty(prepared), keys, values)
    return variant.matrix(prepared, state), variant.read(prepared, state, queries)


def algorithm_1(m0, keys, values, queries, posterior=True):
    """§3 in float64, straight from the page; the cutoff only separates exact zeros."""
    pinv = functools.partial(np.linalg.pinv, rcond=1e-5)
    m = pinv(keys @ pinv(m0)) @ values
    weights = queries @ pinv(m) if posterior else queries @ pinv(m0)
    return m, weights, weights @ m


@pytest.mark.parametrize("address", ["posterior", "prior"])
@check
@given(
    # (K, N, rank of the keys, rank of the values): N < K, N = K, N > K; repeated and missing facts.
    st.sampled_from([(6, 3, 3, 3), (6, 3, 2, 3), (6, 3, 3, 2), (6, 6, 6, 6), (6, 8, 6, 8)]),
    st.booleans(),
    seeds,
)
def test_direct_is_algorithm_1(address, sizes, paired, seed):
    slots, n, key_rank, value_rank = sizes
    m0 = matrix(seed, slots, 8)
    # Keys inside M₀'s row space leave W₀ as well conditioned as they are.
    basis = np.linalg.qr(m0.T)[0]
    keys = matrix(seed + 1, n, basis.shape[1], key_rank) @ basis.T
    values = keys if paired else matrix(seed + 2, n, 8, value_rank)
    queries = np.random.default_rng(seed).standard_normal((5, 8))
    m, weights, latent = algorithm_1(m0, keys, values, queries, address == "posterior")
    arguments = map(jnp.float32, (m0, keys, values, queries))
    ours, reading = write_and_read(Direct(slots, 8, query=address), *arguments)
    # float32 leaves its epsilon times the condition numbers passed through.
    tolerance = 1e-5 if n < slots else 1e-4
    close(ours, m, tolerance)
    close(reading.latent, latent, tolerance * 3)
    close(reading.weights, weights, tolerance * 3)


@check
@given(seeds)
def test_direct_projects_on_what_is_written(seed):
    """§3: read∘write is the orthogonal projection on the span of the encodings, and M₀ cancels."""
    z, queries = matrix(seed, 3, 8), np.random.default_rng(seed).standard_normal((5, 8))
    want = queries @ np.linalg.pinv(z) @ z
    for more in (1, 2):
        m0 = np.random.default_rng(seed + more).standard_normal((6, 8)) + 3 * np.eye(6, 8)
        _, reading = write_and_read(Direct(6, 8), *map(jnp.float32, (m0, z, z, queries)))
        close(reading.latent, want, 1e-4)


@pytest.mark.parametrize("n", [3, 10])
def test_direct_never_inverts_a_k_by_c_matrix(n):
    """Per episode only thin factorisations, of at most n or K rows and columns, even under vmap."""
    slots, latent = 8, 12
    variant = Direct(slots, latent)
    prepared = variant.prepare(variant.init(jax.random.key(0)))

    def episode(z):
        state = variant.write(prepared, variant.empty(prepared), z, z)
        return variant.read(prepared, state, z).latent

    program = jax.jit(jax.vmap(episode)).lower(jnp.ones((2, n, latent))).as_text()
    call = r"custom_call @lapack_s(geqrf|gesdd)\w*\(.*: \(tensor<(\d+)x(\d+)xf32>"
    sizes = {(name, int(a), int(b)) for name, a, b in re.findall(call, program)}
    assert {name for name, *_ in sizes} == {"geqrf", "gesdd"}
    for name, *shape in sizes:
        assert (min(shape) if name == "geqrf" else max(shape)) <= min(n, slots)
        assert n > slots or sorted(shape) != [slots, latent]


def test_newton_schulz_is_direct_within_its_range():
    m0, z, queries = (jnp.float32(matrix(*sizes)) for sizes in ((1, K, C), (2, N, C), (3, 5, C)))
    exact = write_and_read(Direct(K, C), m0, z, z, queries)[1].latent
    close(write_and_read(NewtonSchulz(K, C), m0, z, z, queries)[1].latent, exact, 1e-3)
    # A small latent falls out of the range of 15 steps (§3), and the exact memory does not mind.
    z = 0.02 * z
    small = write_and_read(NewtonSchulz(K, C), m0, z, z, queries)[1].latent
    assert np.linalg.norm(small - exact) > 0.2 * np.linalg.norm(exact)
    close(write_and_read(Direct(K, C), m0, z, z, queries)[1].latent, exact, 1e-4)
