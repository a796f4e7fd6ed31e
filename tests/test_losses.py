"""Cross-entropy and its own gradients, against autodiff of the plain form and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import losses
from larimar_jax.train.flops import count_flops


def problem(tied, bias, *, rows=5, length=37, width=12, vocabulary=83, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    kernel = jax.random.normal(keys[0], (vocabulary, width) if tied else (width, vocabulary))
    bias = jax.random.normal(keys[1], (vocabulary,)) if bias else None
    hidden = jax.random.normal(keys[2], (rows, length, width)).astype(dtype)
    targets = jax.random.randint(keys[3], (rows, length), 0, vocabulary)
    weights = jax.random.uniform(keys[4], (rows, length)).at[:, -3:].set(0.0)
    return losses.Head(kernel, bias, tied, dtype), hidden, targets, weights


def plain(head, hidden, targets):
    logits = losses.logits(head, hidden)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def total(head, *arrays, **how):
    return losses.weighted_cross_entropy(head, *arrays, **how)[0]


@pytest.fixture
def small_parts(monkeypatch):
    # 37 positions as 8 + 8 + 8 + 8 + 5.
    monkeypatch.setattr(losses, "POSITIONS", 8)
    monkeypatch.setattr(losses, "TOKENS", 1)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tied, bias", [(True, False), (False, False), (False, True)])
def test_values_and_gradients_are_the_plain_ones(tied, bias, whole):
    head, hidden, targets, weights = problem(tied, bias)

    def fused(kernel, bias, hidden, weights):
        own = head._replace(kernel=kernel, bias=bias)
        loss, each = losses.weighted_cross_entropy(own, hidden, targets, weights, whole=whole)
        return 3.0 * loss + each.sum(), each  # which is a constant

    def unfused(kernel, bias, hidden, weights):
        each = plain(head._replace(kernel=kernel, bias=bias), hidden, targets)
        return 3.0 * jnp.sum(each * weights) + jax.lax.stop_gradient(each.sum()), each

    arguments = (head.kernel, head.bias, hidden, weights)
    where = (0, 1, 2, 3) if bias else (0, 2, 3)
    slopes = (jax.jit(jax.value_and_grad(f, where, has_aux=True)) for f in (fused, unfused))
    actual, want = (function(*arguments) for function in slopes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, want)


@pytest.mark.usefixtures("small_parts")
def test_each_entropy_can_be_differentiated():
    head, hidden, targets, _ = problem(True, False)

    def gradients(entropies):
        def loss(kernel, hidden):
            return jnp.sum(jnp.sin(entropies(head._replace(kernel=kernel), hidden, targets)))

        return jax.grad(loss, (0, 1))(head.kernel, hidden)

    for a, b in zip(gradients(losses.cross_entropy), gradients(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_values_are_those_of_numpy_and_logits_far_from_zero_stay_finite():
    head, hidden, targets, weights = problem(False, True)
    kernel, bias, states = (np.asarray(a, np.float64) for a in (head.kernel, head.bias, hidden))
    logits = states @ kernel + bias
    target = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    want = np.log(np.exp(logits).sum(-1)) - target
    # Of logits of up to 20, with a rounding error of 1e-6 each.
    actual = losses.cross_entropy(head, hidden, targets)
    np.testing.assert_allclose(actual, want, rtol=1e-6, atol=1e-5)
    far = head._replace(kernel=head.kernel * 1e4)
    loss, slope = jax.value_and_grad(lambda h: total(far, h, targets, weights))(hidden)
    assert jnp.isfinite(loss) and jnp.isfinite(slope).all()


def alone(head, hidden, targets, weights):
    return jnp.sum(weights * losses.cross_entropy(head, hidden, targets))


@pytest.mark.parametrize(
    "loss, dtype, weight, tolerance",
    # In float16 the slopes of a million tokens must not vanish.
    [*((loss, "bfloat16", 1.0, 0.02) for loss in (total, alone)), (total, "float16", 1e-6, 0.01)],
)
def test_half_precision_accumulates_in_float32(loss, dtype, weight, tolerance):
    head, hidden, targets, weights = problem(True, False, dtype=dtype)

    def gradients(dtype):
        def of(kernel, hidden):
            changed = head._replace(kernel=kernel, dtype=dtype)
            return loss(changed, hidden, targets, weight * weights)

        return jax.grad(of, (0, 1))(head.kernel, hidden)

    (exact, _), (kernel, back) = gradients("float32"), gradients(dtype)
    assert kernel.dtype == jnp.float32 and back.dtype == dtype
    assert jnp.linalg.norm(kernel - exact) < tolerance * jnp.linalg.norm(exact)


def test_a_frozen_head_costs_no_gradient():
    head, hidden, targets, weights = problem(True, False)

    def loss(kernel, hidden):
        return total(head._replace(kernel=kernel), hidden, targets, weights, whole=True)

    product = 2 * targets.size * head.kernel.size
    assert count_flops(jax.grad(loss, (0, 1)), head.kernel, hidden) == 3 * product
    assert count_flops(jax.grad(loss, 1), head.kernel, hidden) == 2 * product
    assert count_flops(loss, head.kernel, hidden) == product


@pytest.mark.parametrize("tied, bias", [(True, False), (False, True)])
def test_tokens_that_fill_up_a_vocabulary_change_nothing(tied, bias):
    head, *arrays = problem(tied, bias)

    def loss(kernel, multiple):
        return total(losses.fill(head._replace(kernel=kernel), multiple), *arrays)

    plain, filled = (jax.value_and_grad(loss)(head.kernel, multiple) for multiple in (1, 32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, filled)
    logits = losses.logits(losses.fill(head, 32), arrays[0])
    assert logits.shape[-1] == 96 and not np.exp(logits[..., 83:]).any()
