"""The memory contract, for every variant in the folder, and each variant against float64 NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import memory
from larimar_jax.memory import addressing
from larimar_jax.memory.direct import Direct
from larimar_jax.memory.newton_schulz import NewtonSchulz
from larimar_jax.memory.streaming import Streaming

K, C, N = 6, 9, 4  # one shape for the contract: each variant compiles once
VARIANTS = sorted(memory.variants().items())
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


@functools.cache
def built(name):
    """A variant with jitted functions, and its prior."""
    variant = memory.build(name, slots=K, latent=C)
    params = memory.MemoryParams(jnp.float32(matrix(0, K, C)), jnp.float32(-1.0))
    prior = variant.prepare(params)
    write = jax.jit(variant.write, static_argnames="sign")
    return variant, params, prior, write, jax.jit(variant.read), jax.jit(variant.matrix)


@pytest.fixture(params=[name for name, _ in VARIANTS])
def contract(request):
    return built(request.param)


def facts(seed, n=N):
    return jnp.float32(matrix(seed, n, C)), jnp.float32(matrix(seed + 1, n, C))


def same(contract, one, other, queries, tolerance=1e-4):
    """Whether two states are one memory, as far as their variant says."""
    variant, _, prior, _, read, matrix_of = contract
    if variant.SAME == "matrix":
        close(matrix_of(prior, one), matrix_of(prior, other), tolerance)
    if variant.SAME != "nothing":
        close(read(prior, one, queries).latent, read(prior, other, queries).latent, tolerance)


def test_variants_are_found_and_errors_name_them():
    known = {"direct": Direct, "newton_schulz": NewtonSchulz, "streaming": Streaming}
    assert known.items() <= memory.variants().items()
    with pytest.raises(memory.UnknownVariant, match="direct, .*newton_schulz, .*streaming"):
        memory.build("hopfeld", slots=K, latent=C)
    with pytest.raises(memory.UnknownVariant, match="no setting ridgee"):
        memory.build("streaming", slots=K, latent=C, ridgee=1.0)


def test_reading_has_the_contract_s_shapes(contract):
    variant, params, prior, write, read, matrix_of = contract
    keys, values = facts(1)
    state = write(prior, variant.empty(prior), keys, values)
    reading = read(prior, state, keys[:3])
    assert reading.latent.shape == (3, C)
    assert reading.weights.shape == reading.log_variance.shape == (3, K)
    assert jnp.all(reading.log_variance == params.log_variance)
    assert reading.confidence.shape == (3,)
    assert jnp.all((reading.confidence >= 0.0) & (reading.confidence <= 1.0))
    # Facts overwritten by later ones are partly gone.
    known = {"matrix": slice(None), "reads": slice(None), "nothing": slice(0, 0)}[variant.SAME]
    assert jnp.all((reading.confidence[known] > 0.9) == variant.STORES)
    assert matrix_of(prior, state).shape == (K, C)
    assert variant.generate(prior, state, 7, jax.random.key(0)).shape == (7, C)
    close(reading.latent, reading.weights @ matrix_of(prior, state), 1e-4)
    initial = variant.init(jax.random.key(0)).prior
    np.testing.assert_array_equal(initial, np.eye(K, C))


def test_nothing_written_reads_the_prior_memory(contract):
    variant, _, prior, write, read, matrix_of = contract
    keys, values = facts(2)
    nothing = variant.empty(prior)
    padding = write(prior, nothing, jnp.zeros_like(keys), jnp.zeros_like(values))
    for state in (nothing, padding):
        np.testing.assert_array_equal(matrix_of(prior, state), prior.memory)
        reading = read(prior, state, keys)
        close(reading.latent, reading.weights @ prior.memory, 1e-6)
        assert not np.any(np.asarray(reading.confidence) > 1e-6)


def test_one_by_one_is_at_once_in_any_order(contract):
    variant, _, prior, write, read, matrix_of = contract
    keys, values = facts(3)
    at_once = write(prior, variant.empty(prior), keys, values)
    for order in (range(N), reversed(range(N))):
        state = variant.empty(prior)
        for i in order:
            state = write(prior, state, keys[i : i + 1], values[i : i + 1])
        same(contract, state, at_once, keys, 1e-5)
        if order == range(N):  # Grouping alone matters to no variant.
            close(matrix_of(prior, state), matrix_of(prior, at_once), 1e-5)
    if variant.SAME == "nothing":
        apart = read(prior, state, keys).latent - read(prior, at_once, keys).latent
        assert jnp.linalg.norm(apart) > 1e-2


def test_forgetting_is_never_having_seen(contract):
    variant, _, prior, write, read, matrix_of = contract
    keys, values = facts(4)
    state = write(prior, variant.empty(prior), keys, values)
    state = write(prior, state, keys[1:2], values[1:2], sign=-1)
    rest = jnp.array([0, 2, 3])
    never = write(prior, variant.empty(prior), keys[rest], values[rest])
    same(contract, state, never, keys)
    if variant.SAME == "nothing":
        assert jnp.linalg.norm(matrix_of(prior, state) - matrix_of(prior, never)) > 1e-2
        return
    assert int(state.missing) == int(not variant.STORES)
    if not variant.STORES:
        return
    gone = write(prior, state, keys[1:2], values[1:2], sign=-1)
    assert int(gone.missing) == 1
    np.testing.assert_allclose(matrix_of(prior, gone), matrix_of(prior, state), atol=1e-6)
    emptied = write(prior, state, keys[rest], values[rest], sign=-1)
    same(contract, emptied, variant.empty(prior), keys)


def test_a_fact_written_twice_is_forgotten_twice(contract):
    variant, _, prior, write, *_ = contract
    keys, values = facts(5)
    twice = jnp.array([0, 0, 1])
    state = write(prior, variant.empty(prior), keys[twice], values[twice])
    state = write(prior, state, keys[:1], values[:1], sign=-1)
    once = write(prior, variant.empty(prior), keys[:2], values[:2])
    same(contract, state, once, keys)


def test_signs_may_be_traced_and_differ(contract):
    variant, _, prior, write, *_ = contract
    keys, values = facts(6)
    start = write(prior, variant.empty(prior), keys[:2], values[:2])
    signs = jnp.array([-1, 0, 1, 1], jnp.int32)
    mixed = jax.jit(variant.write)(prior, start, keys, values, signs)
    want = write(
        prior, variant.empty(prior), keys[jnp.array([1, 2, 3])], values[jnp.array([1, 2, 3])]
    )
    same(contract, mixed, want, keys)
    assert int(mixed.missing) == int(not variant.STORES)


def test_padding_changes_nothing(contract):
    variant, _, prior, write, read, matrix_of = contract
    keys, values = facts(7)
    padded = [jnp.concatenate([x[:2], jnp.zeros((2, C)), x[2:]]) for x in (keys, values)]
    plain = write(prior, variant.empty(prior), keys, values)
    state = write(prior, variant.empty(prior), *padded)
    close(matrix_of(prior, state), matrix_of(prior, plain), 1e-5)
    noisy = write(prior, variant.empty(prior), *padded, rng=jax.random.key(0))
    close(matrix_of(prior, noisy), matrix_of(prior, plain), 1e-4)


def test_vmap_is_a_loop(contract):
    variant, _, prior, *_ = contract
    episodes = jnp.stack([facts(seed)[0] for seed in (10, 20, 30)])

    def episode(z):
        return variant.read(prior, variant.write(prior, variant.empty(prior), z, z), z)

    together = jax.jit(jax.vmap(episode))(episodes)
    alone = jax.jit(episode)
    for i, z in enumerate(episodes):
        for got, want in zip(jax.tree.leaves(together), jax.tree.leaves(alone(z)), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-3, atol=1e-4)


def test_noise_is_sampled_only_with_a_key(contract):
    variant, _, prior, write, read, matrix_of = contract
    keys, values = facts(8)
    state = write(prior, variant.empty(prior), keys, values)
    quiet, loud = read(prior, state, keys), read(prior, state, keys, jax.random.key(1))
    np.testing.assert_array_equal(quiet.latent, read(prior, state, keys).latent)
    np.testing.assert_allclose(quiet.weights, loud.weights, rtol=1e-6)
    assert np.any(np.abs(quiet.latent - loud.latent) > 1e-2)
    again = write(prior, variant.empty(prior), keys, values, rng=jax.random.key(2))
    close(matrix_of(prior, again), matrix_of(prior, state), 1e-4)  # ξ has standard deviation 1e-6


def loss(variant, params, keys, values, queries):
    prior = variant.prepare(params)
    state = variant.write(prior, variant.empty(prior), keys, values)
    reading = variant.read(prior, state, queries)
    return (
        jnp.sum(jnp.sin(reading.latent))
        + jnp.sum(jnp.square(reading.weights))
        + jnp.sum(reading.confidence)
    )


def test_gradients_are_those_of_finite_differences(contract):
    variant, params, *_ = contract
    keys, values = facts(9)
    arguments = (params, keys, values, keys + 0.3)
    at = jax.jit(functools.partial(loss, variant))
    gradient = jax.grad(functools.partial(loss, variant), argnums=(0, 1, 2, 3))
    gradients = jax.jit(gradient)(*arguments)
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
    grad = jax.jit(jax.grad(functools.partial(loss, variant), argnums=(0, 1, 2)))
    assert all(
        bool(jnp.all(jnp.isfinite(leaf)))
        for leaf in jax.tree.leaves(grad(params, keys, keys, facts(12)[0]))
    )


def test_no_lapack_call_has_a_batch_on_cpu(contract):
    """Batched ones wait for each other on XLA's threads: two at once never end on two cores."""
    variant, params, *_ = contract
    episodes = jnp.stack([facts(seed)[0] for seed in (10, 20, 30)])
    gradient = jax.grad(functools.partial(loss, variant), argnums=(1, 3))
    batched = jax.jit(jax.vmap(gradient, in_axes=(None, 0, 0, 0)))
    program = batched.lower(params, episodes, episodes, episodes).as_text()
    call = r"(?:custom_call @(?:lapack|blas)_\w+|stablehlo\.cholesky|triangular_solve)"
    operands = re.findall(call + r".*?: \((.*?)\)", program)
    assert operands or isinstance(variant, NewtonSchulz)
    for shapes in operands:
        assert not re.search(r"tensor<\d+x\d+x\d+x", shapes), shapes


def test_a_prior_of_another_size_is_refused(contract):
    variant, *_ = contract
    with pytest.raises(ValueError, match=r"shape \(3, 9\).*expects \(6, 9\)"):
        variant.prepare(memory.MemoryParams(jnp.zeros((3, C)), jnp.zeros(())))


# Algorithm 1 -----------------------------------------------------------------------------------

@functools.partial(jax.jit, static_argnums=0)
def write_and_read(variant, m0, keys, values, queries):
    prior = variant.prepare(memory.MemoryParams(m0, jnp.zeros(())))
    state = variant.write(prior, variant.empty(prior), keys, values)
    return variant.matrix(prior, state), variant.read(prior, state, queries)


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
    rng = np.random.default_rng(seed)
    m0 = matrix(seed, slots, 8)
    # Keys inside M₀'s row space keep W₀ as well conditioned as they are.
    basis = np.linalg.qr(m0.T)[0]
    keys = matrix(seed + 1, n, basis.shape[1], key_rank) @ basis.T
    values = keys if paired else matrix(seed + 2, n, 8, value_rank)
    queries = rng.standard_normal((5, 8))
    m, weights, latent = algorithm_1(m0, keys, values, queries, address == "posterior")
    got_m, reading = write_and_read(
        Direct(slots, 8, query=address), *map(jnp.float32, (m0, keys, values, queries))
    )
    # float32 leaves its epsilon times the condition numbers passed through.
    tolerance = 1e-5 if n < slots else 1e-4
    close(got_m, m, tolerance)
    close(reading.latent, latent, tolerance * 3)
    close(reading.weights, weights, tolerance * 3)


@check
@given(seeds)
def test_direct_projects_on_what_is_written(seed):
    """§3: read∘write is the orthogonal projection on the span of the encodings, and M₀ cancels."""
    z, queries = matrix(seed, 3, 8), np.random.default_rng(seed).standard_normal((5, 8))
    want = queries @ np.linalg.pinv(z) @ z
    for other in (1, 2):
        m0 = np.random.default_rng(seed + other).standard_normal((6, 8)) + 3 * np.eye(6, 8)
        _, reading = write_and_read(Direct(6, 8), *map(jnp.float32, (m0, z, z, queries)))
        close(reading.latent, want, 1e-4)


@pytest.mark.parametrize("n", [3, 10])
def test_direct_never_inverts_a_k_by_c_matrix(n):
    """Per episode only thin factorisations, of at most n or K rows and columns, even under vmap."""
    slots, latent = 8, 12
    variant = Direct(slots, latent)
    prior = variant.prepare(variant.init(jax.random.key(0)))

    def episode(z):
        return variant.read(prior, variant.write(prior, variant.empty(prior), z, z), z).latent

    sizes = factored(jax.make_jaxpr(jax.vmap(episode))(jnp.ones((2, n, latent))).jaxpr)
    assert sizes["qr"] and sizes["svd"]
    widest = min(n, slots)
    assert all(min(shape[-2:]) <= widest for shape in sizes["qr"])
    assert all(max(shape[-2:]) <= widest for shape in sizes["svd"])
    if n < slots:
        assert all(sorted(shape[-2:]) != [slots, latent] for shape in sizes["qr"])


def factored(jaxpr, found=None):
    """Operand shapes of all factorisations in a jaxpr, inner ones included."""
    found = {"qr": [], "svd": []} if found is None else found
    for equation in jaxpr.eqns:
        name = {"geqrf": "qr", "householder_product": None}.get(
            equation.primitive.name, equation.primitive.name
        )
        if name in found:
            found[name].append(equation.invars[0].aval.shape)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                factored(inner, found)
    return found


def test_newton_schulz_is_direct_within_its_range():
    m0, z, queries = matrix(1, K, C), matrix(2, N, C), matrix(3, 5, C)
    arguments = [jnp.float32(x) for x in (m0, z, z, queries)]
    exact = write_and_read(Direct(K, C), *arguments)[1].latent
    close(write_and_read(NewtonSchulz(K, C), *arguments)[1].latent, exact, 1e-3)
    # A small latent falls out of the range of 15 steps (§3), and the exact memory does not mind.
    arguments[1:3] = [0.02 * x for x in arguments[1:3]]
    small = write_and_read(NewtonSchulz(K, C), *arguments)[1].latent
    assert np.linalg.norm(small - exact) > 0.2 * np.linalg.norm(exact)
    close(write_and_read(Direct(K, C), *arguments)[1].latent, exact, 1e-4)


# Streaming -------------------------------------------------------------------------------------


def ridge(m0, weights, values, strength):
    """§4 in float64: Σ‖Z − WM‖² + λ‖M − M₀‖²."""
    gram = weights.T @ weights + strength * np.eye(m0.shape[0])
    return np.linalg.solve(gram, weights.T @ values + strength * m0)


STREAM = (8, 6)


@functools.cache
def streaming_write():
    return jax.jit(lambda variant, prior, state, *facts: variant.write(prior, state, *facts))


def stream(seed, strength, n=12):
    """A memory, its prior, n facts and their float64 weights; λ relative to ‖Σ WᵀW‖₂."""
    m0, keys, values = matrix(seed, *STREAM), matrix(seed + 1, n, 6), matrix(seed + 2, n, 6)
    weights = keys @ np.linalg.pinv(m0)
    strength = strength * np.linalg.norm(weights, 2) ** 2
    variant = Streaming(*STREAM, ridge=jnp.float32(strength), query_noise=0.0)
    prior = variant.prepare(memory.MemoryParams(jnp.float32(m0), jnp.zeros(())))
    return variant, prior, m0, keys, values, weights, float(np.float32(strength))


@check
@given(st.floats(1e-2, 10.0), st.integers(0, 11), seeds)
def test_streaming_is_ridge_least_squares_in_any_order(strength, split, seed):
    variant, prior, m0, keys, values, weights, strength = stream(seed, strength)
    write = functools.partial(streaming_write(), variant, prior)
    k, v = jnp.float32(keys), jnp.float32(values)
    plus = jnp.int32(1)
    at_once = write(variant.empty(prior), k, v, plus)
    close(at_once.solution, ridge(m0, weights, values, strength), 1e-5)
    order = np.random.default_rng(seed).permutation(12)
    state = variant.empty(prior)
    for i in order:
        state = write(state, k[i : i + 1], v[i : i + 1], plus)
    close(state.solution, at_once.solution, 1e-5)
    # Any one of them is forgotten: M never saw it.
    state = write(state, k[split : split + 1], v[split : split + 1], -plus)
    rest = np.delete(np.arange(12), split)
    close(state.solution, ridge(m0, weights[rest], values[rest], strength), 1e-4)
    assert int(state.count) == 11 and int(state.missing) == 0


@check
@given(seeds)
def test_streaming_forgets_at_a_small_ridge(seed):
    variant, prior, m0, keys, values, weights, strength = stream(seed, 1e-3)
    write = functools.partial(streaming_write(), variant, prior)
    k, v = jnp.float32(keys), jnp.float32(values)
    state = write(variant.empty(prior), k, v, jnp.int32(1))
    state = write(state, k[3:4], v[3:4], jnp.int32(-1))
    rest = np.delete(np.arange(12), 3)
    close(state.solution, ridge(m0, weights[rest], values[rest], strength), 1e-4)


def test_streaming_tends_to_the_pseudo_inverse():
    """§4: as λ → 0 the memory is the least-squares solution nearest to M₀."""
    variant, prior, m0, keys, values, weights, _ = stream(3, 1e-5, n=4)
    k, v = jnp.float32(keys), jnp.float32(values)
    state = streaming_write()(variant, prior, variant.empty(prior), k, v, jnp.int32(1))
    want = m0 + np.linalg.pinv(weights) @ (values - weights @ m0)
    close(weights @ np.asarray(state.solution, np.float64), weights @ want, 1e-3)
    close(state.solution, want, 1e-2)


def test_streaming_sweeps_ridges_in_one_vmap():
    variant, prior, m0, keys, values, weights, _ = stream(4, 1.0)
    k, v = jnp.float32(keys), jnp.float32(values)

    def solution(strength):
        swept = Streaming(*STREAM, ridge=strength, query_noise=0.0)
        return swept.write(prior, swept.empty(prior), k, v).solution

    strengths = np.float32([0.3, 1.0, 10.0])
    for got, strength in zip(jax.jit(jax.vmap(solution))(strengths), strengths, strict=True):
        close(got, ridge(m0, weights, values, float(strength)), 1e-5)


def test_streaming_accumulates_a_long_stream_before_it_solves():
    variant, prior, m0, keys, values, weights, strength = stream(5, 0.1)
    batches = (jnp.float32(keys).reshape(4, 3, 6), jnp.float32(values).reshape(4, 3, 6))

    def step(state, batch):
        return variant.accumulate(prior, state, *batch), None

    @jax.jit
    def run(state):
        return variant.solve(prior, jax.lax.scan(step, state, batches)[0])

    state = run(variant.empty(prior))
    close(state.solution, ridge(m0, weights, values, strength), 1e-5)
    true = np.linalg.cond(weights.T @ weights + strength * np.eye(8))
    assert 0.3 * true < float(variant.condition(state)) < 1.01 * true


def test_streaming_does_not_drift():
    """Two thousand writes and forgets later the memory is that of the eight facts left (§4)."""
    variant, prior, m0, keys, values, weights, strength = stream(6, 1e-2, n=16)
    k, v = jnp.float32(keys), jnp.float32(values)
    rng = np.random.default_rng(0)
    alive, changes = set(range(8)), [(i, 1) for i in range(8)]
    for _ in range(1000):
        out = int(rng.choice(sorted(alive)))
        new = int(rng.choice(sorted(set(range(16)) - alive)))
        alive = alive - {out} | {new}
        changes += [(out, -1), (new, 1)]

    def step(state, change):
        fact, sign = change
        return variant.accumulate(prior, state, k[fact][None], v[fact][None], sign), None

    changes = jnp.int32(np.array(changes))
    run = jax.jit(lambda state: jax.lax.scan(step, state, (changes[:, 0], changes[:, 1]))[0])
    state = variant.solve(prior, run(variant.empty(prior)))
    left = sorted(alive)
    close(state.solution, ridge(m0, weights[left], values[left], strength), 1e-4)
    assert int(state.count) == 8


def test_streaming_addresses_by_a_reference_of_its_own():
    reference = jnp.float32(matrix(8, K, C))
    variant = Streaming(K, C)
    params = memory.MemoryParams(jnp.float32(matrix(7, K, C)), jnp.zeros(()), reference)
    keys, _ = facts(13)
    prior = variant.prepare(params)
    weights = jax.jit(variant.read)(prior, variant.empty(prior), keys).weights
    close(weights, np.asarray(keys, np.float64) @ np.linalg.pinv(np.float64(reference)), 1e-4)


# Gaussian keys ---------------------------------------------------------------------------------


gaussian = jax.jit(addressing.gaussian)
gaussian_gradient = jax.jit(
    jax.grad(lambda *a: jnp.sum(addressing.gaussian(*a)[:, 0]), argnums=(0, 1, 2))
)


@check
@given(st.sampled_from([1e-3, 0.1, 1.0, 10.0]), seeds)
def test_gaussian_addressing(width, seed):
    z, reference = matrix(seed, 4, 6), matrix(seed + 1, 5, 6)
    z = np.concatenate([z, reference[2:3], np.zeros((1, 6))])
    z32, reference32 = jnp.float32(z), jnp.float32(reference)
    got = gaussian(z32, reference32, jnp.float32(width))
    squared = ((z[:4, None] - reference[None]) ** 2).sum(-1)
    nearest = squared.min(1, keepdims=True)
    want = np.exp(-(squared - nearest) / (2 * width * nearest))
    want /= want.sum(1, keepdims=True)
    np.testing.assert_allclose(got[:4], want, atol=2e-3)
    np.testing.assert_allclose(got[4], np.eye(5)[2], atol=1e-6)  # itself a slot
    assert not np.any(got[5])  # padding
    one_hot = gaussian(z32, reference32, jnp.float32(0.0))
    np.testing.assert_array_equal(one_hot[:4], np.eye(5)[squared.argmin(1)])
    for gradient in gaussian_gradient(z32, reference32, jnp.float32(width)):
        assert np.all(np.isfinite(gradient))


def test_streaming_with_gaussian_keys_needs_no_pseudo_inverse():
    variant = Streaming(
        K, C, addressing="gaussian", width=jnp.float32(0.1), query_noise=0.0
    )
    params = memory.MemoryParams(jnp.float32(matrix(7, K, C)), jnp.zeros(()))
    prior = variant.prepare(params)
    assert prior.address.shape == (K, C)
    keys, values = facts(14)
    state = streaming_write()(variant, prior, variant.empty(prior), keys, values, jnp.int32(1))
    weights = addressing.gaussian(keys, prior.reference, 0.1)
    m0, w, z = (np.asarray(x, np.float64) for x in (prior.memory, weights, values))
    close(state.solution, ridge(m0, w, z, 1e-2), 1e-5)
