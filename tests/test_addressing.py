"""Kinds of addressing, each against float64, and under every memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra import check, matrix, seeds
from hypothesis import given
from hypothesis import strategies as st

from larimar_jax import memory
from larimar_jax.memory import addressing
from larimar_jax.memory.addressing import Gaussian, Linear, PseudoInverse, RandomFeatures, Whitened

K, C, N = 12, 8, 5
KINDS = [PseudoInverse(), Gaussian(0.5), RandomFeatures(0.5), Whitened(0.5), Linear()]
KINDS.append(addressing.BenIsraelCohen(steps=9))


def weights(kind, reference, encodings):
    prepared = kind.prepare(jnp.float32(reference))
    return np.float64(kind.weigh(prepared, jnp.float32(encodings)))


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return rng.standard_normal((K, C)), rng.standard_normal((N, C))


def test_features_are_a_gaussian_kernel_for_many_of_them():
    rng = np.random.default_rng(1)
    reference, z = rng.standard_normal((4096, C)), 0.5 * rng.standard_normal((N, C))
    w = weights(RandomFeatures(1.3), reference, z)
    apart = np.square(z[:, None] - z[None]).sum(-1)
    np.testing.assert_allclose(w @ w.T, np.exp(-apart / (2 * 1.3**2)), atol=0.06)


@pytest.mark.parametrize("shape", [(K, C), (C, K)])
def test_whitened_weights_have_the_mahalanobis_norm(shape):
    rng = np.random.default_rng(2)
    reference, z = rng.standard_normal(shape), rng.standard_normal((N, shape[1]))
    u, s, vt = np.linalg.svd(reference, full_matrices=False)
    floor = 0.1 * np.mean(s**2)
    w, inside = weights(Whitened(0.1), reference, z), z @ vt.T
    np.testing.assert_allclose(w, (inside / np.sqrt(s**2 + floor)) @ u.T, atol=1e-4)
    np.testing.assert_allclose(np.square(w).sum(1), (inside**2 / (s**2 + floor)).sum(1), rtol=1e-4)
    # Without a floor it is the pseudo-inverse.
    w = weights(Whitened(0.0), reference, z)
    np.testing.assert_allclose(w, z @ np.linalg.pinv(reference), atol=1e-4)


def test_linear_keys_are_products_with_the_slots(rows):
    reference, z = rows
    np.testing.assert_allclose(weights(Linear(), reference, z), z @ reference.T, rtol=1e-4)


weigh_gaussian = jax.jit(lambda z, reference, width: Gaussian(width).weigh(reference, z))
slope_gaussian = jax.jit(jax.grad(lambda *a: jnp.sum(weigh_gaussian(*a)[:, 0]), argnums=(0, 1, 2)))


@check
@given(st.sampled_from([1e-3, 0.1, 1.0, 10.0]), seeds)
def test_gaussian_weights_are_equations_7_and_8(width, seed):
    z, reference = matrix(seed, 4, 6), matrix(seed + 1, 5, 6)
    squared = ((z[:, None] - reference[None]) ** 2).sum(-1)
    nearest = squared.min(1, keepdims=True)
    want = np.exp(-(squared - nearest) / (2 * width * nearest))
    # A slot itself, and padding.
    z = jnp.float32(np.concatenate([z, reference[2:3], np.zeros((1, 6))]))
    reference = jnp.float32(reference)
    w = weigh_gaussian(z, reference, jnp.float32(width))
    np.testing.assert_allclose(w[:4], want / want.sum(1, keepdims=True), atol=2e-3)
    np.testing.assert_allclose(w[4], np.eye(5)[2], atol=1e-6)
    assert not np.any(w[5])
    one_hot = weigh_gaussian(z, reference, jnp.float32(0.0))
    np.testing.assert_array_equal(one_hot[:4], np.eye(5)[squared.argmin(1)])
    for slope in slope_gaussian(z, reference, jnp.float32(width)):
        assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_every_kind_leaves_padding_out_and_serves_a_memory(kind, rows):
    reference, z = rows
    z[2] = 0.0
    w = weights(kind, reference, z)
    assert w.shape == (N, K) and not w[2].any() and np.isfinite(w).all()
    assert np.abs(np.delete(w, 2, 0)).sum(1).all()
    options = dict(slots=K, latent=C, ridge=1e-3, query_noise=0.0)
    variant = memory.build("streaming", addressing=kind, **options)
    params = memory.MemoryParams(jnp.zeros((K, C)), jnp.zeros(()), jnp.float32(reference))
    prepared = variant.prepare(params)
    ours = np.float64(variant.address(prepared, jnp.float32(z)))
    np.testing.assert_allclose(ours, w, rtol=1e-5)
    values = jnp.float32(np.random.default_rng(3).standard_normal((N, C)))
    state = variant.write(prepared, variant.empty(prepared), jnp.float32(z), values)
    want = ours.T @ np.linalg.solve(ours @ ours.T + 1e-3 * np.eye(N), np.float64(values))
    np.testing.assert_allclose(ours @ np.float64(state.solution), ours @ want, atol=1e-4)

    # Every real number is a leaf: ridges and widths are swept in one `vmap`.
    def latent(variant):
        prepared = variant.prepare(params)
        state = variant.write(prepared, variant.empty(prepared), jnp.float32(z), values)
        return variant.read(prepared, state, jnp.float32(z)).latent

    doubled = jax.tree.map(lambda x: 2 * x, variant)
    swept = jax.tree.map(lambda *x: jnp.float32(x), variant, doubled)
    for together, alone in zip(jax.vmap(latent)(swept), (variant, doubled), strict=True):
        np.testing.assert_allclose(together, latent(alone), atol=1e-4)

    def read(reference):
        prepared = variant.prepare(dataclasses.replace(params, reference_memory=reference))
        state = variant.write(prepared, variant.empty(prepared), jnp.float32(z), values)
        return jnp.sum(variant.read(prepared, state, jnp.float32(z)).latent)

    assert jnp.isfinite(jax.grad(read)(params.reference_memory)).all()
    # A config holds it, by its name and numbers; its numbers are leaves, unless they are static.
    assert addressing.build(addressing.to_config(kind)) == kind
    reals = [f.name for f in dataclasses.fields(kind) if not f.metadata.get("static")]
    assert jax.tree.leaves(kind) == [getattr(kind, name) for name in reals]


def test_a_config_names_a_kind_alone_or_with_its_numbers():
    assert addressing.build("gaussian") == Gaussian()
    assert addressing.build({"kind": "random_features", "length": 2.0}) == RandomFeatures(2.0)
    with pytest.raises(addressing.UnknownAddressing, match="'pinv'; known: pseudo_inverse, gau"):
        memory.build("streaming", slots=K, latent=C, addressing="pinv")
    with pytest.raises(addressing.UnknownAddressing, match="no setting length; it has width"):
        addressing.build({"kind": "gaussian", "length": 1.0})


def test_a_reference_of_prompts_keeps_the_rest_of_the_slots(rows):
    reference, z = rows
    slots = addressing.from_prompts(jnp.float32(z), K, jnp.float32(reference))
    np.testing.assert_array_equal(slots[:N], np.float32(z))
    np.testing.assert_array_equal(slots[N:], np.float32(reference)[N:])
    many = addressing.from_prompts(jnp.ones((K + 3, C)), K, jnp.float32(reference))
    np.testing.assert_array_equal(many, 1.0)
    with pytest.raises(ValueError, match="11 slots of 8"):
        addressing.from_prompts(jnp.float32(z), K - 1, jnp.float32(reference))


@pytest.mark.parametrize("shape", [(K, C), (C, K), (C, C)])
@pytest.mark.parametrize("worst", [2.0, 50.0, 1e4, 1e9])
def test_a_projector_is_the_pseudo_inverse_however_ill_conditioned(shape, worst):
    rng, kind = np.random.default_rng(4), PseudoInverse()
    u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    reference = (u * np.geomspace(1.0, 1.0 / worst, len(vt))) @ vt
    z = rng.standard_normal((N, shape[1]))
    want = z @ np.linalg.pinv(reference, rcond=1e-6)
    prepared = jax.jit(kind.prepare_few)(jnp.float32(reference))
    assert bool(prepared.is_accurate) == (worst < 1e3)
    error = np.linalg.norm(kind.weigh(prepared, jnp.float32(z)) - want)
    assert error <= 3e-7 * min(worst, 1e6) * np.linalg.norm(want) + 1e-5
    if worst < 1e3:
        arguments = (jnp.float32(reference), jnp.float32(z))
        ours, plain = (
            jax.grad(lambda m, z, f=f: jnp.sum(jnp.sin(kind.weigh(f(m), z))), (0, 1))(*arguments)
            for f in (kind.prepare_few, kind.prepare)
        )
        for a, b in zip(ours, plain, strict=True):
            assert float(jnp.linalg.norm(a - b)) <= 1e-4 * worst * float(jnp.linalg.norm(b))


@pytest.mark.parametrize("shape", [(K, C), (C, K)])
def test_over_a_noisy_memory_weights_are_ridge_regression(shape):
    """In a batch in which one memory has no full rank, and falls back."""
    rng = np.random.default_rng(5)
    memories, z = rng.standard_normal((3, *shape)), rng.standard_normal((3, N, shape[1]))
    memories[1, 2:] = 0.0
    arrays = jnp.float32(memories), jnp.float32(z)
    weigh = jax.jit(jax.vmap(PseudoInverse().weigh_over, in_axes=(0, 0, None)))
    for a in (1e-12, 0.1):
        for m, rows, w in zip(memories, z, weigh(*arrays, jnp.float32(a)), strict=True):
            exact = m.T @ np.linalg.inv(m @ m.T + a * np.eye(len(m)))
            # Eq. 4's pseudo-inverse is the limit.
            exact = exact if a > 1e-9 else np.linalg.pinv(m)
            np.testing.assert_allclose(w, rows @ exact, atol=1e-4)
        slopes = jax.grad(lambda m, z, a=a: jnp.sum(weigh(m, z, jnp.float32(a))), (0, 1))(*arrays)
        assert all(jnp.isfinite(slope).all() for slope in slopes)
