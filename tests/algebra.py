"""What the tests of the memory's algebra share: well-conditioned numbers, and how close is close."""

import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

K, C, N = 6, 9, 4  # one shape for the contract: each variant compiles once
seeds = st.integers(0, 2**31 - 1)
check = settings(deadline=None, max_examples=8)


def close(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want) + 1e-12, (got, want)


def matrix(seed, rows, columns, rank=None, low=2.0, high=6.0):
    """Float64, singular values between `low` and `high`: well inside what Newton–Schulz inverts."""
    rng = np.random.default_rng(seed)
    rank = min(rows, columns) if rank is None else rank
    u = np.linalg.qr(rng.standard_normal((rows, rank)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, rank)))[0]
    return (u * rng.uniform(low, high, rank)) @ v.T


def facts(seed, n=N):
    return jnp.float32(matrix(seed, n, C)), jnp.float32(matrix(seed + 1, n, C))
