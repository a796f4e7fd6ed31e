"""Kinds of addressing, each against float64, and under every memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import memory
from larimar_jax.memory import addressing

K, C, N = 12, 8, 5


def weights(kind, reference, encodings, width):
    prepared = addressing.KINDS[kind].prepare(jnp.float32(reference), width)
    return np.float64(addressing.KINDS[kind].weigh(prepared, jnp.float32(encodings), width))


@pytest.fixture
def given():
    rng = np.random.default_rng(0)
    return rng.standard_normal((K, C)), rng.standard_normal((N, C))


def test_features_are_a_gaussian_kernel_for_many_of_them():
    rng = np.random.default_rng(1)
    reference, z = rng.standard_normal((4096, C)), 0.5 * rng.standard_normal((N, C))
    w = weights("features", reference, z, 1.3)
    apart = np.square(z[:, None] - z[None]).sum(-1)
    np.testing.assert_allclose(w @ w.T, np.exp(-apart / (2 * 1.3**2)), atol=0.06)


@pytest.mark.parametrize("shape", [(K, C), (C, K)])
def test_whitened_weights_have_the_mahalanobis_norm(shape):
    rng = np.random.default_rng(2)
    reference, z = rng.standard_normal(shape), rng.standard_normal((N, shape[1]))
    u, s, vt = np.linalg.svd(reference, full_matrices=False)
    floor = 0.1 * np.mean(s**2)
    w = weights("whitened", reference, z, 0.1)
    np.testing.assert_allclose(w, (z @ vt.T / np.sqrt(s**2 + floor)) @ u.T, atol=1e-4)
    inside = z @ vt.T
    np.testing.assert_allclose(np.square(w).sum(1), (inside**2 / (s**2 + floor)).sum(1), rtol=1e-4)
    # Without a floor it is the pseudo-inverse.
    np.testing.assert_allclose(
        weights("whitened", reference, z, 0.0), z @ np.linalg.pinv(reference), atol=1e-4
    )


def test_linear_keys_are_products_with_the_slots(given):
    reference, z = given
    np.testing.assert_allclose(weights("linear", reference, z, 0.0), z @ reference.T, rtol=1e-4)


@pytest.mark.parametrize("kind", addressing.KINDS)
def test_every_kind_leaves_padding_out_and_serves_a_memory(kind, given):
    reference, z = given
    z[2] = 0.0
    w = weights(kind, reference, z, 0.5)
    assert w.shape == (N, K) and not w[2].any() and np.isfinite(w).all()
    assert np.abs(np.delete(w, 2, 0)).sum(1).all()
    variant = memory.build(
        "streaming", slots=K, latent=C, addressing=kind, width=0.5, ridge=1e-3, query_noise=0.0
    )
    params = memory.MemoryParams(jnp.zeros((K, C)), jnp.zeros(()), reference_memory=jnp.float32(reference))
    prepared = variant.prepare(params)
    found = np.float64(variant.address(prepared, jnp.float32(z)))
    np.testing.assert_allclose(found, w, rtol=1e-5)
    values = jnp.float32(np.random.default_rng(3).standard_normal((N, C)))
    state = variant.write(prepared, variant.empty(prepared), jnp.float32(z), values)
    want = found.T @ np.linalg.solve(found @ found.T + 1e-3 * np.eye(N), np.float64(values))
    np.testing.assert_allclose(found @ np.float64(state.solution), found @ want, atol=1e-4)

    def read(reference):
        prepared = variant.prepare(params.__class__(params.prior_memory, params.log_variance, reference))
        state = variant.write(prepared, variant.empty(prepared), jnp.float32(z), values)
        return jnp.sum(variant.read(prepared, state, jnp.float32(z)).latent)

    assert jnp.isfinite(jax.grad(read)(params.reference_memory)).all()


def test_a_reference_of_prompts_keeps_the_other_slots(given):
    reference, z = given
    found = addressing.from_prompts(jnp.float32(z), K, jnp.float32(reference))
    np.testing.assert_array_equal(found[:N], np.float32(z))
    np.testing.assert_array_equal(found[N:], np.float32(reference)[N:])
    many = addressing.from_prompts(jnp.ones((K + 3, C)), K, jnp.float32(reference))
    np.testing.assert_array_equal(many, 1.0)
    with pytest.raises(ValueError, match="11 slots of 8"):
        addressing.from_prompts(jnp.float32(z), K - 1, jnp.float32(reference))


@pytest.mark.parametrize("shape", [(K, C), (C, K), (C, C)])
@pytest.mark.parametrize("worst", [2.0, 50.0, 1e4, 1e9])
def test_a_projector_is_the_pseudo_inverse_however_ill_conditioned(shape, worst):
    rng = np.random.default_rng(4)
    u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    reference = (u * np.geomspace(1.0, 1.0 / worst, len(vt))) @ vt
    z = rng.standard_normal((N, shape[1]))
    want = z @ np.linalg.pinv(reference, rcond=1e-6)
    made = jax.jit(addressing.projector)(jnp.float32(reference))
    assert bool(made.sound) == (worst < 1e3)
    weigh = addressing.KINDS["pinv"].weigh
    found = weigh(made, jnp.float32(z), 0.0)
    assert np.linalg.norm(found - want) <= 3e-7 * min(worst, 1e6) * np.linalg.norm(want) + 1e-5
    if worst < 1e3:

        def of(prepare):
            return lambda reference, z: jnp.sum(jnp.sin(weigh(prepare(reference), z, 0.0)))

        arguments = (jnp.float32(reference), jnp.float32(z))
        ours, plain = (
            jax.grad(of(f), (0, 1))(*arguments)
            for f in (addressing.projector, lambda m: addressing.KINDS["pinv"].prepare(m, 0.0))
        )
        for a, b in zip(ours, plain, strict=True):
            assert float(jnp.linalg.norm(a - b)) <= 1e-4 * worst * float(jnp.linalg.norm(b))
