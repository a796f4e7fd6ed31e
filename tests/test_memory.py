"""The memory contract, for every variant in the folder."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra import C, K, N, close, facts, matrix

from larimar_jax import memory
from larimar_jax.memory.direct import Direct
from larimar_jax.memory.newton_schulz import NewtonSchulz
from larimar_jax.memory.streaming import Streaming

VARIANTS = sorted(memory.variants().items())


@functools.cache
def built(name):
    """A variant, its parameters, its prior, and its functions."""
    variant = memory.build(name, slots=K, latent=C)
    params = memory.MemoryParams(jnp.float32(matrix(0, K, C)), jnp.float32(-1.0))
    prepared = variant.prepare(params)
    return variant, params, prepared, variant.write, variant.read, variant.matrix


@pytest.fixture(params=[name for name, _ in VARIANTS])
def contract(request):
    return built(request.param)


def same(contract, one, other, queries, tolerance=1e-4):
    """Whether two states are one memory, as far as their variant says."""
    variant, _, prepared, _, read, matrix_of = contract
    if variant.SAME == "matrix":
        close(matrix_of(prepared, one), matrix_of(prepared, other), tolerance)
    if variant.SAME != "nothing":
        close(read(prepared, one, queries).latent, read(prepared, other, queries).latent, tolerance)


def test_variants_are_found_and_errors_name_them():
    known = {"direct": Direct, "newton_schulz": NewtonSchulz, "streaming": Streaming}
    assert known.items() <= memory.variants().items()
    with pytest.raises(memory.UnknownVariant, match="direct, .*newton_schulz, .*streaming"):
        memory.build("hopfeld", slots=K, latent=C)
    with pytest.raises(memory.UnknownVariant, match="no setting ridgee"):
        memory.build("streaming", slots=K, latent=C, ridgee=1.0)


def test_reading_has_the_contract_s_shapes(contract):
    variant, params, prepared, write, read, matrix_of = contract
    keys, values = facts(1)
    state = write(prepared, variant.empty(prepared), keys, values)
    reading = read(prepared, state, keys[:3])
    assert reading.latent.shape == (3, C)
    assert reading.weights.shape == reading.log_variance.shape == (3, K)
    assert jnp.all(reading.log_variance == params.log_variance)
    assert reading.confidence.shape == (3,)
    assert jnp.all((reading.confidence >= 0.0) & (reading.confidence <= 1.0))
    # Facts overwritten by later ones are partly gone.
    known = {"matrix": slice(None), "reads": slice(None), "nothing": slice(0, 0)}[variant.SAME]
    assert jnp.all((reading.confidence[known] > 0.9) == variant.STORES)
    assert matrix_of(prepared, state).shape == (K, C)
    assert variant.generate(prepared, state, 7, jax.random.key(0)).shape == (7, C)
    close(reading.latent, reading.weights @ matrix_of(prepared, state), 1e-4)
    initial = variant.init(jax.random.key(0)).prior_memory
    np.testing.assert_array_equal(initial, np.eye(K, C))


def test_nothing_written_reads_the_prior_memory(contract):
    variant, _, prepared, write, read, matrix_of = contract
    keys, values = facts(2)
    nothing = variant.empty(prepared)
    padding = write(prepared, nothing, jnp.zeros_like(keys), jnp.zeros_like(values))
    for state in (nothing, padding):
        np.testing.assert_array_equal(matrix_of(prepared, state), prepared.memory)
        reading = read(prepared, state, keys)
        close(reading.latent, reading.weights @ prepared.memory, 1e-6)
        assert not np.any(np.asarray(reading.confidence) > 1e-6)


def test_one_by_one_is_at_once_in_any_order(contract):
    variant, _, prepared, write, read, matrix_of = contract
    keys, values = facts(3)
    at_once = write(prepared, variant.empty(prepared), keys, values)
    for order in (range(N), reversed(range(N))):
        state = variant.empty(prepared)
        for i in order:
            state = write(prepared, state, keys[i : i + 1], values[i : i + 1])
        same(contract, state, at_once, keys, 1e-5)
        if order == range(N):  # Grouping alone matters to no variant.
            close(matrix_of(prepared, state), matrix_of(prepared, at_once), 1e-5)
    if variant.SAME == "nothing":
        apart = read(prepared, state, keys).latent - read(prepared, at_once, keys).latent
        assert jnp.linalg.norm(apart) > 1e-2


def test_forgetting_is_never_having_seen(contract):
    variant, _, prepared, write, read, matrix_of = contract
    keys, values = facts(4)
    state = write(prepared, variant.empty(prepared), keys, values)
    state = write(prepared, state, keys[1:2], values[1:2], sign=-1)
    rest = jnp.array([0, 2, 3])
    never = write(prepared, variant.empty(prepared), keys[rest], values[rest])
    same(contract, state, never, keys)
    if variant.SAME == "nothing":
        assert jnp.linalg.norm(matrix_of(prepared, state) - matrix_of(prepared, never)) > 1e-2
        return
    assert int(state.refused) == int(not variant.STORES)
    if not variant.STORES:
        return
    gone = write(prepared, state, keys[1:2], values[1:2], sign=-1)
    assert int(gone.refused) == 1
    np.testing.assert_allclose(matrix_of(prepared, gone), matrix_of(prepared, state), atol=1e-6)
    emptied = write(prepared, state, keys[rest], values[rest], sign=-1)
    same(contract, emptied, variant.empty(prepared), keys)


def test_a_fact_written_twice_is_forgotten_twice(contract):
    variant, _, prepared, write, *_ = contract
    keys, values = facts(5)
    twice = jnp.array([0, 0, 1])
    state = write(prepared, variant.empty(prepared), keys[twice], values[twice])
    state = write(prepared, state, keys[:1], values[:1], sign=-1)
    once = write(prepared, variant.empty(prepared), keys[:2], values[:2])
    same(contract, state, once, keys)


def test_signs_may_be_traced_and_differ(contract):
    variant, _, prepared, write, *_ = contract
    keys, values = facts(6)
    start = write(prepared, variant.empty(prepared), keys[:2], values[:2])
    signs = jnp.array([-1, 0, 1, 1], jnp.int32)
    mixed = variant.write(prepared, start, keys, values, signs)
    want = write(
        prepared, variant.empty(prepared), keys[jnp.array([1, 2, 3])], values[jnp.array([1, 2, 3])]
    )
    same(contract, mixed, want, keys)
    assert int(mixed.refused) == int(not variant.STORES)


def test_padding_changes_nothing(contract):
    variant, _, prepared, write, read, matrix_of = contract
    keys, values = facts(7)
    padded = [jnp.concatenate([x[:2], jnp.zeros((2, C)), x[2:]]) for x in (keys, values)]
    plain = write(prepared, variant.empty(prepared), keys, values)
    state = write(prepared, variant.empty(prepared), *padded)
    close(matrix_of(prepared, state), matrix_of(prepared, plain), 1e-5)
    noisy = write(prepared, variant.empty(prepared), *padded, rng=jax.random.key(0))
    close(matrix_of(prepared, noisy), matrix_of(prepared, plain), 1e-4)


def test_vmap_is_a_loop(contract):
    variant, _, prepared, *_ = contract
    episodes = jnp.stack([facts(seed)[0] for seed in (10, 20, 30)])

    def episode(z):
        return variant.read(prepared, variant.write(prepared, variant.empty(prepared), z, z), z)

    together = jax.jit(jax.vmap(episode))(episodes)
    alone = jax.jit(episode)
    for i, z in enumerate(episodes):
        for got, want in zip(jax.tree.leaves(together), jax.tree.leaves(alone(z)), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-3, atol=1e-4)


def test_noise_is_sampled_only_with_a_key(contract):
    variant, _, prepared, write, read, matrix_of = contract
    keys, values = facts(8)
    state = write(prepared, variant.empty(prepared), keys, values)
    quiet, loud = read(prepared, state, keys), read(prepared, state, keys, jax.random.key(1))
    np.testing.assert_array_equal(quiet.latent, read(prepared, state, keys).latent)
    np.testing.assert_allclose(quiet.weights, loud.weights, rtol=1e-6)
    assert np.any(np.abs(quiet.latent - loud.latent) > 1e-2)
    again = write(prepared, variant.empty(prepared), keys, values, rng=jax.random.key(2))
    close(matrix_of(prepared, again), matrix_of(prepared, state), 1e-4)  # ξ has standard deviation 1e-6


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


def test_gradients_are_those_of_finite_differences(contract):
    variant, params, *_ = contract
    keys, values = facts(9)
    arguments = (params, keys, values, keys + 0.3)
    at = jax.jit(functools.partial(loss, variant))
    gradients = gradient(variant, *arguments)
    for part in range(4):
        rng = np.random.default_rng(part)
        leaves, tree = jax.tree.flatten(arguments[part])
        direction = [rng.standard_normal(x.shape) for x in leaves]

        def value(step, part=part, leaves=leaves, tree=tree, direction=direction):
            moved = [jnp.float32(x + step * d) for x, d in zip(leaves, direction, strict=True)]
            return float(at(*arguments[:part], tree.unflatten(moved), *arguments[part + 1 :]))

        slope = (value(5e-3) - value(-5e-3)) / 1e-2
        found = zip(jax.tree.leaves(gradients[part]), direction, strict=True)
        got = sum(float(np.sum(g * d)) for g, d in found)
        assert abs(got - slope) <= 2e-2 * max(1.0, abs(slope)), (part, got, slope)


def test_gradients_are_finite_for_repeats_and_padding(contract):
    variant, params, *_ = contract
    keys, _ = facts(11)
    keys = keys.at[1].set(keys[0]).at[3].set(0.0)
    found = gradient(variant, params, keys, keys, facts(12)[0])[:3]
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found))


def test_no_lapack_call_has_a_batch_on_cpu(contract):
    """Batched ones wait for each other on XLA's threads: two at once never end on two cores."""
    variant, params, *_ = contract
    episodes = jnp.stack([facts(seed)[0] for seed in (10, 20, 30)])
    batched = jax.jit(jax.vmap(gradient, in_axes=(None, None, 0, 0, 0)))
    program = batched.lower(variant, params, episodes, episodes, episodes).as_text()
    call = r"(?:custom_call @(?:lapack|blas)_\w+|stablehlo\.cholesky|triangular_solve)"
    operands = re.findall(call + r".*?: \((.*?)\)", program)
    assert operands or isinstance(variant, NewtonSchulz)
    for shapes in operands:
        assert not re.search(r"tensor<\d+x\d+x\d+x", shapes), shapes


def test_a_variant_s_functions_are_compiled_once_for_all_reals_and_know_a_python_sign():
    signs = []

    @memory.contract.pytree
    class Told(Streaming):
        def write(self, prepared, state, keys, values, sign=1, rng=None):
            signs.append(sign)
            return super().write(prepared, state, keys, values, sign, rng)

    keys, values = facts(13)
    for ridge in (1e-2, 1e-1):
        variant = Told(K, C, ridge=ridge)
        prepared = variant.prepare(variant.init(jax.random.key(0)))
        state = variant.write(prepared, variant.empty(prepared), keys, values)
        state = variant.write(prepared, state, keys[:1], values[:1], sign=-1)
        variant.write(prepared, state, keys[:1], values[:1], jnp.int32(1))
    assert signs[:2] == [1, -1] and isinstance(signs[2], jax.core.Tracer) and len(signs) == 3


def test_a_prior_of_another_size_is_refused(contract):
    variant, *_ = contract
    with pytest.raises(ValueError, match=r"shape \(3, 9\).*expects \(6, 9\)"):
        variant.prepare(memory.MemoryParams(jnp.zeros((3, C)), jnp.zeros(())))
