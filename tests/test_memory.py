"""The memory contract, for every variant in the folder."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra import C, K, N, close, facts, matrix
from jax.sharding import AxisType, PartitionSpec

from larimar_jax import memory, objective
from larimar_jax.memory.direct import Direct
from larimar_jax.memory.newton_schulz import NewtonSchulz
from larimar_jax.memory.pytrees import pytree
from larimar_jax.memory.streaming import Streaming


@functools.cache
def built(name):
    """Return a variant, its parameters and what it prepares of them."""
    name, _, memory_of_keys = name.partition(" by ")
    settings = dict(addressed_by=memory_of_keys) if memory_of_keys else {}
    variant = memory.build(name, slots=K, latent=C, **settings)
    params = memory.MemoryParams(jnp.float32(matrix(0, K, C)), jnp.float32(-1.0))
    return variant, params, variant.prepare(params)


@pytest.fixture(params=[*sorted(memory.variants()), "kanerva by current"])
def contract(request):
    return built(request.param)


def written(contract, keys, values, rng=None):
    variant, _, prepared = contract
    return variant.write(prepared, variant.empty(prepared), keys, values, rng)


def matrix_of(contract, state):
    variant, _, prepared = contract
    return variant.matrix(prepared, state)


def same(contract, a, b, queries, tolerance=1e-4):
    """Assert that two states are one memory, as far as their variant promises."""
    variant, _, prepared = contract
    if variant.SAME == "matrix":
        close(variant.matrix(prepared, a), variant.matrix(prepared, b), tolerance)
    if variant.SAME != "nothing":
        latents = [variant.read(prepared, state, queries).latent for state in (a, b)]
        close(*latents, tolerance)


def test_variants_are_found_and_errors_name_them():
    known = {"direct": Direct, "newton_schulz": NewtonSchulz, "streaming": Streaming}
    assert known.items() <= memory.variants().items()
    with pytest.raises(memory.UnknownVariant, match="direct, .*newton_schulz, .*streaming"):
        memory.build("hopfeld", slots=K, latent=C)
    with pytest.raises(memory.UnknownVariant, match="no setting ridgee"):
        memory.build("streaming", slots=K, latent=C, ridgee=1.0)


def test_reading_has_the_contract_s_shapes(contract):
    variant, params, prepared = contract
    keys, values = facts(1)
    state = written(contract, keys, values)
    reading = variant.read(prepared, state, keys[:3])
    assert reading.latent.shape == (3, C)
    assert reading.weights.shape == reading.log_variance.shape == (3, K)
    assert jnp.all(reading.log_variance == params.log_variance)
    assert reading.confidence.shape == (3,)
    assert jnp.all((reading.confidence >= 0.0) & (reading.confidence <= 1.0))
    # Facts overwritten by later ones are partly gone.
    if variant.SAME != "nothing":
        assert jnp.all((reading.confidence > 0.9) == variant.STORES)
    assert variant.matrix(prepared, state).shape == (K, C)
    assert variant.generate(prepared, state, 7, jax.random.key(0)).shape == (7, C)
    close(reading.latent, reading.weights @ variant.matrix(prepared, state), 1e-4)
    initial = variant.init(jax.random.key(0)).prior_memory
    np.testing.assert_array_equal(initial, np.eye(K, C))


def test_nothing_written_reads_the_prior_memory(contract):
    variant, _, prepared = contract
    keys, values = facts(2)
    padding = written(contract, jnp.zeros_like(keys), jnp.zeros_like(values))
    for state in (variant.empty(prepared), padding):
        np.testing.assert_array_equal(variant.matrix(prepared, state), prepared.prior_memory)
        reading = variant.read(prepared, state, keys)
        close(reading.latent, reading.weights @ prepared.prior_memory, 1e-6)
        assert not np.any(np.asarray(reading.confidence) > 1e-6)


def test_one_by_one_is_at_once_in_any_order(contract):
    variant, _, prepared = contract
    keys, values = facts(3)
    at_once = written(contract, keys, values)
    for order in (range(N), range(N)[::-1]):
        state = variant.empty(prepared)
        for i in order:
            state = variant.write(prepared, state, keys[i : i + 1], values[i : i + 1])
        same(contract, state, at_once, keys, 1e-5)
        if order == range(N):  # Grouping alone matters to no variant.
            close(matrix_of(contract, state), matrix_of(contract, at_once), 1e-5)
    if variant.SAME == "nothing":
        reads = [variant.read(prepared, s, keys).latent for s in (state, at_once)]
        assert jnp.linalg.norm(reads[0] - reads[1]) > 1e-2


def test_forgetting_is_never_having_seen(contract):
    variant, _, prepared = contract
    keys, values = facts(4)
    state = written(contract, keys, values)
    state = variant.forget(prepared, state, keys[1:2], values[1:2])
    rest = jnp.array([0, 2, 3])
    never = written(contract, keys[rest], values[rest])
    same(contract, state, never, keys)
    if variant.SAME == "nothing":
        apart = matrix_of(contract, state) - matrix_of(contract, never)
        assert jnp.linalg.norm(apart) > 1e-2
        return
    assert int(state.refused) == int(not variant.FORGETS)
    if not variant.STORES:
        return
    again = variant.forget(prepared, state, keys[1:2], values[1:2])
    assert int(again.refused) == 1
    np.testing.assert_allclose(matrix_of(contract, again), matrix_of(contract, state), atol=1e-6)
    emptied = variant.forget(prepared, state, keys[rest], values[rest])
    same(contract, emptied, variant.empty(prepared), keys)


def test_a_fact_written_twice_is_forgotten_twice(contract):
    variant, _, prepared = contract
    keys, values = facts(5)
    twice = jnp.array([0, 0, 1])
    state = written(contract, keys[twice], values[twice])
    state = variant.forget(prepared, state, keys[:1], values[:1])
    same(contract, state, written(contract, keys[:2], values[:2]), keys)


def test_signs_may_be_traced_and_differ(contract):
    variant, _, prepared = contract
    keys, values = facts(6)
    start = written(contract, keys[:2], values[:2])
    mixed = variant.update(prepared, start, keys, values, jnp.array([-1, 0, 1, 1], jnp.int32))
    same(contract, mixed, written(contract, keys[1:], values[1:]), keys)
    assert int(mixed.refused) == int(not variant.FORGETS)


def test_padding_changes_nothing(contract):
    keys, values = facts(7)
    padded = [jnp.concatenate([x[:2], jnp.zeros((2, C)), x[2:]]) for x in (keys, values)]
    plain = matrix_of(contract, written(contract, keys, values))
    close(matrix_of(contract, written(contract, *padded)), plain, 1e-5)
    noisy = written(contract, *padded, rng=jax.random.key(0))
    close(matrix_of(contract, noisy), plain, 1e-4)


def test_vmap_is_a_loop(contract):
    variant, _, prepared = contract
    episodes = jnp.stack([facts(seed)[0] for seed in (10, 20, 30)])

    def episode(z):
        return variant.read(prepared, variant.write(prepared, variant.empty(prepared), z, z), z)

    together = jax.jit(jax.vmap(episode))(episodes)
    alone = jax.jit(episode)
    for i, z in enumerate(episodes):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone(z)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4)


def test_noise_is_sampled_only_with_a_key(contract):
    variant, _, prepared = contract
    keys, values = facts(8)
    state = written(contract, keys, values)
    quiet, again = (variant.read(prepared, state, keys) for _ in range(2))
    loud = variant.read(prepared, state, keys, jax.random.key(1))
    np.testing.assert_array_equal(quiet.latent, again.latent)
    np.testing.assert_allclose(quiet.weights, loud.weights, rtol=1e-6)
    assert np.any(np.abs(quiet.latent - loud.latent) > 1e-2)
    noisy = written(contract, keys, values, rng=jax.random.key(2))
    close(matrix_of(contract, noisy), matrix_of(contract, state), 1e-4)  # ξ has deviation 1e-6


def loss(variant, params, keys, values, queries):
    prepared = variant.prepare(params)
    state = variant.write(prepared, variant.empty(prepared), keys, values)
    reading = variant.read(prepared, state, queries)
    return (
        jnp.sum(jnp.sin(reading.latent))
        + jnp.sum(jnp.square(reading.weights))
        + jnp.sum(reading.confidence)
    )


gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4)))


def assert_slope(function, argument, gradient, seed, step=5e-3):
    """Assert that a gradient is the central difference along a random direction."""
    rng = np.random.default_rng(seed)
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), argument)

    def value(size):
        moved = jax.tree.map(lambda x, d: jnp.float32(x + size * d), argument, direction)
        return float(function(moved))

    slope = (value(step) - value(-step)) / (2 * step)
    products = jax.tree.map(lambda g, d: float(np.sum(g * d)), gradient, direction)
    ours = sum(jax.tree.leaves(products))
    assert abs(ours - slope) <= 2e-2 * max(1.0, abs(slope)), (seed, ours, slope)


def test_gradients_are_those_of_finite_differences(contract):
    variant, params, _ = contract
    keys, values = facts(9)
    arguments = (params, keys, values, keys + 0.3)
    at = jax.jit(functools.partial(loss, variant))
    for part, slopes in enumerate(gradient(variant, *arguments)):
        before, after = arguments[:part], arguments[part + 1 :]
        function = lambda x, before=before, after=after: at(*before, x, *after)  # noqa: E731
        assert_slope(function, arguments[part], slopes, part)


def test_gradients_reach_every_part_of_the_variance(contract):
    variant, params, _ = contract
    (keys, queries), rng = facts(14), np.random.default_rng(0)
    shapes = dict(log_variance=(K,), variance_by_query=(C, K), variance_by_memory=(K, C, K))
    parts = {n: jnp.float32(rng.normal(0, 0.05, shape)) for n, shape in shapes.items()}

    # One program for both: differences need the value alone.
    @jax.jit
    @jax.value_and_grad
    def sampled_loss(parts):
        prepared = variant.prepare(dataclasses.replace(params, **parts))
        state = variant.write(prepared, variant.empty(prepared), keys, keys)
        reading = variant.read(prepared, state, queries, jax.random.key(7))
        kl = objective.addressing_kl(jnp.zeros_like(reading.weights), reading.log_variance, 0.0)
        return jnp.sum(jnp.sin(reading.latent)) + jnp.sum(kl)

    _, slopes = sampled_loss(parts)
    for name, slope in slopes.items():
        # Where a memory has free slots their rows are zero, and so are the slopes of B there.
        is_full = variant.SAME == "matrix" or name != "variance_by_memory"
        assert jnp.all(slope != 0.0) if is_full else jnp.any(slope != 0.0)
        function = lambda x, name=name: sampled_loss(parts | {name: x})[0]  # noqa: E731
        assert_slope(function, parts[name], slope, 5, 1e-3)


def test_gradients_are_finite_for_repeats_and_padding(contract):
    variant, params, _ = contract
    keys, _ = facts(11)
    keys = keys.at[1].set(keys[0]).at[3].set(0.0)
    slopes = gradient(variant, params, keys, keys, facts(12)[0])[:3]
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slopes))


def test_episodes_train_on_eight_devices_as_on_one(contract):
    variant, params, _ = contract
    each = jax.vmap(functools.partial(loss, variant), in_axes=(None, 0, 0, 0))
    mesh, rows = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")
    # As the objective splits episodes.
    specs = dict(in_specs=(PartitionSpec(), rows, rows, rows), out_specs=rows, check_vma=False)
    z = jnp.stack([facts(seed)[0] for seed in range(15, 23)])
    alone, split = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a)), argnums=(0, 1)))(params, z, z, z + 0.3)
        for f in (each, jax.shard_map(each, mesh=mesh, **specs))
    )
    jax.tree.map(lambda a, b: close(a, b, 1e-4), split, alone)


def test_no_lapack_call_has_a_batch_on_cpu(contract):
    """Batched ones wait for each other on XLA's threads: two at once never end on two cores."""
    variant, params, _ = contract
    episodes = jnp.stack([facts(seed)[0] for seed in (10, 20, 30)])
    batched = jax.jit(jax.vmap(gradient, in_axes=(None, None, 0, 0, 0)))
    program = batched.lower(variant, params, episodes, episodes, episodes).as_text()
    call = r"(?:custom_call @(?:lapack|blas)_\w+|stablehlo\.cholesky|triangular_solve)"
    operands = re.findall(call + r".*?: \((.*?)\)", program)
    assert operands or isinstance(variant, NewtonSchulz)
    for shapes in operands:
        assert not re.search(r"tensor<\d+x\d+x\d+x", shapes), shapes


def test_a_variant_is_compiled_once_for_all_reals_and_branches_on_a_python_sign():
    signs_seen = []

    @pytree
    class Recording(Streaming):
        def update(self, prepared, state, keys, values, signs):
            signs_seen.append(signs)
            return super().update(prepared, state, keys, values, signs)

    keys, values = facts(13)
    for ridge in (1e-2, 1e-1):
        variant = Recording(K, C, ridge=ridge)
        prepared = variant.prepare(variant.init(jax.random.key(0)))
        state = variant.write(prepared, variant.empty(prepared), keys, values)
        state = variant.forget(prepared, state, keys[:1], values[:1])
        variant.update(prepared, state, keys[:1], values[:1], jnp.int32([1]))
    assert signs_seen[:2] == [1, -1] and isinstance(signs_seen[2], jax.core.Tracer)
    assert len(signs_seen) == 3


@pytest.mark.parametrize(
    "name, shape",
    [
        ("prior_memory", (3, C)),
        ("reference_memory", (3, C)),
        ("log_variance", (1,)),
        ("variance_by_query", (1, K)),
        ("variance_by_memory", (K, C, 1)),
    ],
)
def test_a_parameter_of_another_size_is_refused(contract, name, shape):
    params = memory.MemoryParams(jnp.eye(K, C), jnp.zeros(()))
    object.__setattr__(params, name, jnp.zeros(shape))  # The constructor would refuse it in tests.
    with pytest.raises(ValueError, match=rf"{name} has shape {re.escape(str(shape))}.*expects"):
        contract[0].prepare(params)
