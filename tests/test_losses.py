"""Cross-entropy and its own gradients, against autodiff of the plain form and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import losses
from larimar_jax.train import flops


def _problem(tied, bias, *, rows=5, length=37, width=12, vocabulary=83, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (vocabulary, width) if tied else (width, vocabulary)
    head = losses.Head(
        jax.random.normal(keys[0], shape),
        jax.random.normal(keys[1], (vocabulary,)) if bias else None,
        tied,
        dtype,
    )
    hidden = jax.random.normal(keys[2], (rows, length, width)).astype(dtype)
    targets = jax.random.randint(keys[3], (rows, length), 0, vocabulary)
    weights = jax.random.uniform(keys[4], (rows, length)).at[:, -3:].set(0.0)
    return head, hidden, targets, weights


def _plain(head, hidden, targets):
    logits = losses.logits(head, hidden)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


@pytest.fixture
def small_parts(monkeypatch):
    # 37 positions as 8 + 8 + 8 + 8 + 5.
    monkeypatch.setattr(losses, "POSITIONS", 8)
    monkeypatch.setattr(losses, "TOKENS", 1)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tied, bias", [(True, False), (False, False), (False, True)])
def test_values_and_gradients_are_the_plain_ones(tied, bias, whole):
    head, hidden, targets, weights = _problem(tied, bias)

    def ours(kernel, bias, hidden, weights):
        mine = head._replace(kernel=kernel, bias=bias)
        total, each = losses.weighted_cross_entropy(mine, hidden, targets, weights, whole=whole)
        return 3.0 * total, each

    def plain(kernel, bias, hidden, weights):
        each = _plain(head._replace(kernel=kernel, bias=bias), hidden, targets)
        return 3.0 * jnp.sum(each * weights), each

    arguments = (head.kernel, head.bias, hidden, weights)
    where = (0, 1, 2, 3) if bias else (0, 2, 3)
    found, expected = (
        jax.jit(jax.value_and_grad(f, where, has_aux=True))(*arguments) for f in (ours, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


@pytest.mark.usefixtures("small_parts")
def test_each_entropy_can_be_differentiated():
    head, hidden, targets, weights = _problem(True, False)

    def of(each):
        return lambda kernel, hidden: jnp.sum(
            jnp.sin(each(head._replace(kernel=kernel), hidden, targets))
        )

    def beside(head, hidden, targets):
        total, each = losses.weighted_cross_entropy(head, hidden, targets, weights)
        return each + total

    def plain_beside(head, hidden, targets):
        each = _plain(head, hidden, targets)
        return each + jnp.sum(each * weights)

    for ours, plain in ((losses.cross_entropy, _plain), (beside, plain_beside)):
        found, expected = (jax.grad(of(f), (0, 1))(head.kernel, hidden) for f in (ours, plain))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_against_numpy():
    head, hidden, targets, _ = _problem(False, True)
    kernel, bias, states = (np.asarray(a, np.float64) for a in (head.kernel, head.bias, hidden))
    logits = states @ kernel + bias
    chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    expected = np.log(np.exp(logits).sum(-1)) - chosen
    found = losses.cross_entropy(head, hidden, targets)
    # Of logits of up to 20, with a rounding error of 1e-6 each.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_logits_far_from_zero_are_finite():
    head, hidden, targets, weights = _problem(True, False)
    head = head._replace(kernel=head.kernel * 1e4)
    (total, _), slope = jax.value_and_grad(
        lambda hidden: losses.weighted_cross_entropy(head, hidden, targets, weights), has_aux=True
    )(hidden)
    assert jnp.isfinite(total) and jnp.isfinite(slope).all()


def test_half_precision_accumulates_in_float32():
    head, hidden, targets, weights = _problem(True, False, dtype=jnp.bfloat16)
    (kernel, back) = jax.grad(
        lambda kernel, hidden: losses.weighted_cross_entropy(
            head._replace(kernel=kernel), hidden, targets, weights
        )[0],
        (0, 1),
    )(head.kernel, hidden)
    assert kernel.dtype == jnp.float32 and back.dtype == jnp.bfloat16
    exact = head._replace(dtype=jnp.float32)
    expected = jax.grad(
        lambda kernel: jnp.sum(_plain(exact._replace(kernel=kernel), hidden, targets) * weights)
    )(head.kernel)
    assert jnp.linalg.norm(kernel - expected) < 0.02 * jnp.linalg.norm(expected)


def test_slopes_of_many_tokens_do_not_vanish_in_float16():
    head, hidden, targets, _ = _problem(True, False, dtype=jnp.float16)
    weights = jnp.full(targets.shape, 1e-6)  # Of a million tokens.

    def loss(kernel, dtype):
        mine = head._replace(kernel=kernel, dtype=dtype)
        return losses.weighted_cross_entropy(mine, hidden, targets, weights)[0]

    found, want = (jax.grad(loss)(head.kernel, dtype) for dtype in (jnp.float16, jnp.float32))
    assert jnp.linalg.norm(found - want) < 0.01 * jnp.linalg.norm(want)


def test_a_frozen_head_costs_no_gradient():
    head, hidden, targets, weights = _problem(True, False)

    def loss(kernel, hidden):
        mine = head._replace(kernel=kernel)
        return losses.weighted_cross_entropy(mine, hidden, targets, weights, whole=True)[0]

    one = 2 * targets.size * head.kernel.size
    assert flops.count(jax.grad(loss, (0, 1)), head.kernel, hidden) == 3 * one
    assert flops.count(jax.grad(loss, 1), head.kernel, hidden) == 2 * one
    assert flops.count(loss, head.kernel, hidden) == one
