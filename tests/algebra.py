"""What the tests of the memory's algebra share: well-conditioned numbers, and how close is close."""

import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from larimar_jax import memory

K, C, N = 6, 9, 4  # one shape for the contract: each variant compiles once
seeds = st.integers(0, 2**31 - 1)
check = settings(max_examples=8)


def distance(actual, expected):
    """Return the relative distance of two arrays, in float64."""
    actual, expected = np.float64(actual), np.float64(expected)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / (np.linalg.norm(expected) + 1e-300)


def close(actual, expected, tolerance):
    actual, expected = np.float64(actual), np.float64(expected)
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected)
    assert error <= tolerance * np.linalg.norm(expected) + 1e-12, (actual, expected)


def matrix(seed, rows, columns, rank=None, low=2.0, high=6.0):
    """Float64, singular values between `low` and `high`: well inside what Newton–Schulz inverts."""
    rng = np.random.default_rng(seed)
    rank = min(rows, columns) if rank is None else rank
    u = np.linalg.qr(rng.standard_normal((rows, rank)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, rank)))[0]
    return (u * rng.uniform(low, high, rank)) @ v.T


def facts(seed, n=N):
    return jnp.float32(matrix(seed, n, C)), jnp.float32(matrix(seed + 1, n, C))


def unit(seed, rows, columns):
    """Rows of length 1, float64 numbers that float32 holds."""
    normal = np.random.default_rng(seed).standard_normal((rows, columns))
    return np.float64(np.float32(normal / np.linalg.norm(normal, axis=1, keepdims=True)))


def prepare(variant, m0, **params):
    params = memory.MemoryParams(jnp.float32(m0), jnp.zeros(()), **params)
    return variant.prepare(params)


def ridge_solution(m0, weights, values, ridge, shrink=0.0):
    """§4 in float64: the least Σ‖Z − WM‖² + λ‖M − M₀‖² + μ‖M‖²."""
    gram = weights.T @ weights + (ridge + shrink) * np.eye(len(m0))
    return np.linalg.solve(gram, weights.T @ values + ridge * np.asarray(m0, np.float64))
