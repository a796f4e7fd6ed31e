"""σ_W in its five parametrisations: the formula, sampling, and models that learn it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from larimar_jax import config, memory, model
from larimar_jax.memory import variance
from larimar_jax.train import sharding

K, C, N, Q = 5, 7, 3, 4
# One of each way to read: by the posterior, by M_ref, from a list, in slots that grow.
KINDS = ["direct", "streaming", "nearest", "growing"]
BY_QUERY, BY_MEMORY = ("query", "both"), ("memory", "both")
each_setting = pytest.mark.parametrize("setting", variance.SETTINGS)


def facts(seed, n=N):
    return jnp.float32(np.random.default_rng(seed).standard_normal((n, C)))


def drawn(variant, setting):
    """A variant with that setting, and parameters none of which is 0 or 1."""
    built = memory.build(variant, slots=K, latent=C, variance=setting, initial="normal")
    leaves, tree = jax.tree.flatten(built.init(jax.random.key(0)))
    draw = np.random.default_rng(1)
    leaves = [jnp.float32(draw.normal(0, 0.4, leaf.shape)) for leaf in leaves]
    # Newton–Schulz wants singular values well above 0.
    leaves[0] = leaves[0] + 3 * jnp.eye(K, C)
    return built, tree.unflatten(leaves)


def written(built, params, seed=2):
    prepared, keys = built.prepare(params), facts(seed)
    return prepared, built.write(prepared, built.empty(prepared), keys, keys)


def formula(setting, params, queries, m):
    """§3 in float64; vec(M) by rows, as torch's reshape has it."""
    total = np.zeros((len(queries), K)) + np.float64(params.log_variance)
    if setting in BY_QUERY:
        total += np.float64(queries) @ np.float64(params.variance_by_query)
    if setting in BY_MEMORY:
        total += np.float64(m).ravel() @ np.float64(params.variance_by_memory).reshape(K * C, K)
    return total


EVERY = {*itertools.product(KINDS, variance.SETTINGS), *((v, "both") for v in memory.variants())}


@pytest.mark.parametrize(("variant", "setting"), sorted(EVERY))
def test_a_reading_s_log_variance_is_the_formula(variant, setting):
    built, params = drawn(variant, setting)
    prepared, state = written(built, params)
    queries = facts(3, Q)
    for at in (state, built.empty(prepared)):
        want = formula(setting, params, queries, built.matrix(prepared, at))
        reading = built.read(prepared, at, queries)
        assert reading.log_variance.shape == (Q, K)
        np.testing.assert_allclose(reading.log_variance, want, rtol=1e-5, atol=1e-5)
    # Each setting depends on query or memory where it is named for it, and on nothing else.
    here = built.read(prepared, state, queries).log_variance
    elsewhere = built.read(prepared, state, facts(4, Q)).log_variance
    rewritten = built.read(*written(built, params, seed=5), queries).log_variance
    assert bool(jnp.allclose(here, elsewhere, atol=1e-3)) is (setting not in BY_QUERY)
    changes = setting in BY_MEMORY and built.STORES
    assert bool(jnp.allclose(here, rewritten, atol=1e-3)) is not changes


@each_setting
def test_at_the_start_it_is_what_the_config_sets(setting):
    options = dict(slots=K, latent=C, variance=setting, initial_log_variance=-2.5)
    built = memory.build("direct", **options)
    params = built.init(jax.random.key(0))
    assert params.log_variance.shape == (() if setting == "scalar" else (K,))
    assert (params.variance_by_query is not None) is (setting in BY_QUERY)
    assert (params.variance_by_memory is not None) is (setting in BY_MEMORY)
    prepared, state = written(built, params)
    np.testing.assert_array_equal(built.read(prepared, state, facts(3)).log_variance, -2.5)


@pytest.mark.parametrize("setting", ["query", "memory", "both"])
def test_zero_maps_leave_one_number_per_slot(setting):
    built, params = drawn("direct", "slot")
    linear = memory.build("direct", slots=K, latent=C, variance=setting)
    _, by_query, by_memory = variance.init(setting, K, C, 0.0)
    zero = dict(variance_by_query=by_query, variance_by_memory=by_memory)
    rng, queries = jax.random.key(3), facts(4, Q)
    prepared, state = written(built, params)
    # Op by op: as two programs they might add in another order.
    with jax.disable_jit():
        want = built.read(prepared, state, queries, rng)
        also = linear.prepare(dataclasses.replace(params, **zero))
        ours = linear.read(also, state, queries, rng)
    jax.tree.map(np.testing.assert_array_equal, ours, want)


@pytest.mark.parametrize("setting", ["scalar", "both"])
@pytest.mark.parametrize("variant", KINDS)
def test_samples_have_the_variance_that_the_reading_names(variant, setting):
    built, params = drawn(variant, setting)
    prepared, state = written(built, params)
    queries, keys = facts(3, Q), jax.random.split(jax.random.key(0), 4000)
    quiet = built.read(prepared, state, queries)
    latents = jax.vmap(lambda key: built.read(prepared, state, queries, key).latent)(keys)
    # Z = W M with independent W: Var z_c = Σ_k σ²_k M²_kc.
    want = jnp.exp(quiet.log_variance) @ jnp.square(built.matrix(prepared, state))
    np.testing.assert_allclose(latents.var(axis=0), want, rtol=0.15)
    deviation = jnp.sqrt(want / len(keys))
    assert jnp.all(jnp.abs(latents.mean(axis=0) - quiet.latent) < 5 * deviation)


@each_setting
def test_a_model_learns_it_under_the_rules_that_there_are(setting, cpu_devices):
    values = tiny_config()
    values["memory"]["variance"] = setting
    parsed = config.parse(values)
    skeleton = model.AbstractModel(model.abstract(parsed))
    slots, latent = values["memory"]["slots"], values["model"]["latent"]
    want = {"memory/log_variance": () if setting == "scalar" else (slots,)}
    if setting in BY_QUERY:
        want["memory/variance_by_query"] = (latent, slots)
    if setting in BY_MEMORY:
        want["memory/variance_by_memory"] = (slots, latent, slots)
    shapes = {n: leaf.shape for n, leaf in skeleton.parameters.items() if "variance" in n}
    assert shapes == want
    mesh = sharding.make_mesh((2, 2, 2), cpu_devices)
    assert sharding.parameter_shardings(parsed, skeleton, mesh).keys() == skeleton.parameters.keys()
