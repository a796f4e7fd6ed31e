"""Freezing, the learning rate, and which parameters decay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from larimar_jax.config import TrainConfig
from larimar_jax.train import optimizer

TRAIN = TrainConfig(steps=100, learning_rate=0.1, warmup_steps=10, weight_decay=0.5)
KERNEL, SCALE = "decoder/layers/up/kernel", "decoder/layers/attention_norm/scale"
SHAPES = {KERNEL: (2, 3, 4), SCALE: (2, 3), "memory/prior_memory": (4, 4)}
PARAMETERS = {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def test_freezing_splits_by_path_and_takes_no_optimizer_state():
    trained, frozen = optimizer.partition(PARAMETERS, ["^decoder/.*kernel$"])
    assert list(frozen) == [KERNEL] and list(trained) == [SCALE, "memory/prior_memory"]
    state = optimizer.make(TRAIN).init(trained)
    assert not any(leaf.shape == (2, 3, 4) for leaf in jax.tree.leaves(state))


def test_patterns_that_freeze_nothing_or_everything_are_errors():
    with pytest.raises(optimizer.FreezeError, match="'encoder', 'heads'") as error:
        optimizer.partition(PARAMETERS, ["encoder", "decoder", "heads"])
    assert "memory/prior_memory" in str(error.value)
    with pytest.raises(optimizer.FreezeError, match="every parameter"):
        optimizer.partition(PARAMETERS, ["."])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_learning_rate_warms_up_and_decays(decay):
    rate = optimizer.learning_rate(dataclasses.replace(TRAIN, decay=decay))
    values = [float(rate(jnp.int32(step))) for step in (0, 4, 9, 10, 55, 100, 1000)]
    np.testing.assert_allclose(values, [0.01, 0.05, 0.1, 0.1, 0.05, 0.0, 0.0], atol=1e-7)


def test_the_learning_rate_without_warm_up_or_decay():
    constant = dataclasses.replace(TRAIN, decay="constant", warmup_steps=0)
    rate = optimizer.learning_rate(constant)
    assert float(rate(jnp.int32(0))) == float(rate(jnp.int32(99))) == np.float32(0.1)
    with pytest.raises(ValueError, match="warmup_steps"):
        optimizer.learning_rate(dataclasses.replace(TRAIN, warmup_steps=101))


def test_only_matrices_of_the_towers_and_projections_decay():
    assert [name for name in PARAMETERS if optimizer.is_decayed(name)] == [KERNEL]
    assert all(map(optimizer.is_decayed, ("to_embedding/kernel", "encoder/word/embedding")))
    assert not optimizer.is_decayed("encoder/norm/bias")
    transform = optimizer.make(TRAIN)
    gradients = jax.tree.map(jnp.zeros_like, PARAMETERS)
    updates, _ = transform.update(gradients, transform.init(PARAMETERS), PARAMETERS)
    # −rate · decay · parameter at the first step, where there is no gradient at all.
    np.testing.assert_allclose(updates[KERNEL], -0.01 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["memory/prior_memory"], 0.0)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    names = [KERNEL, SCALE, "decoder/head/kernel", "decoder/word/embedding"]
    keys = jax.random.split(jax.random.key(0), 2 * len(names))
    shapes = [(2, 6, 4), (2, 6), (6, 4), (6, 4)]
    parameters, gradients = (
        {
            name: jax.random.normal(key, shape)
            for name, key, shape in zip(names, part, shapes, strict=True)
        }
        for part in (keys[: len(names)], keys[len(names) :])
    )
    train = dataclasses.replace(TRAIN, clip_norm=0.0, optimizer="muon")
    with jax.numpy_dtype_promotion("standard"):
        adam = optax.adam(0.01, nesterov=True)
        expected, _ = adam.update(gradients, adam.init(parameters), parameters)
    muon = optimizer.make(train)
    updates, _ = muon.update(gradients, muon.init(parameters), parameters)
    for layer, decayed in zip(updates[KERNEL], parameters[KERNEL], strict=True):
        step = (layer + 0.01 * 0.5 * decayed) / (0.2 * 6**0.5 * 0.01)
        # 0.2 · √(the longer side) times what Newton–Schulz brings near to orthogonal.
        np.testing.assert_allclose(np.linalg.svd(step, compute_uv=False), 1.0, atol=0.35)
    for name in names[1:]:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)
