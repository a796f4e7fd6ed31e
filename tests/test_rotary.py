"""Rotary positions: invariants, and scalings against their formulas' limits."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import rotary
from larimar_jax.rotary import RopeScaling

LLAMA3 = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0, 1.0)
YARN = RopeScaling("yarn", 4.0, 4096, 1.0, 32.0, 1.1386)
LINEAR = RopeScaling("linear", 2.0, 64, 0.0, 0.0, 1.0)


def rotated(x, position, size=8, interleaved=False):
    turn = rotary.rotation(jnp.array([[position]]), size, 100.0)
    return rotary.rotate(x, turn, interleaved=interleaved)


@settings(max_examples=25)
@given(st.tuples(*[st.integers(0, 400)] * 3), st.booleans(), st.sampled_from([4, 8]))
def test_a_score_depends_on_distance_alone(places, interleaved, size):
    query, key = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)), jnp.float32)
    first, second, shift = places

    def score(i, j):
        return float(
            jnp.sum(rotated(query, i, size, interleaved) * rotated(key, j, size, interleaved))
        )

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=2e-4)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_position_zero_is_unrotated_lengths_stay_and_so_does_the_rest_of_a_head(interleaved, size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 2, 8)), jnp.float32)
    near, far = (rotated(x, p, size, interleaved) for p in (0, 3))
    assert (near == x).all() and abs(far[..., :size] - x[..., :size]).max() > 0.1
    assert (far[..., size:] == x[..., size:]).all()
    np.testing.assert_allclose(*(np.linalg.norm(a, axis=-1) for a in (near, far)), rtol=1e-6)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN])
def test_fast_pairs_stay_and_slow_ones_are_divided(scaling):
    plain = rotary.frequencies(128, 500000.0)
    ratio = rotary.frequencies(128, 500000.0, scaling) / plain
    np.testing.assert_allclose(ratio[[0, -1]], [1.0, 1 / scaling.factor], rtol=1e-6)
    assert (np.diff(ratio) <= 1e-6).all()
    between = (ratio > 1.01 / scaling.factor) & (ratio < 0.99)
    assert 2 < between.sum() < 60


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN, LINEAR])
def test_a_written_scaling_is_read_back(scaling):
    written = rotary.to_huggingface(5e5, scaling)
    config = {"rope_parameters": written, "max_position_embeddings": 64}
    assert rotary.from_huggingface(config) == (5e5, scaling)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "linear"}, "lacks its 'factor'"),
        ({"rope_type": "llama3", "factor": 8.0}, "lacks its 'low_freq_factor'"),
        ({"rope_type": "linear", "factor": 0}, "cannot be computed"),
        ({"rope_type": "linear", "factor": float("nan")}, "cannot be computed"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}, "cannot be computed"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 32.0}, "cannot be computed"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4},
            "cannot be computed",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope_theta is 1.0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ],
)
def test_scalings_that_are_not_computed_are_errors(parameters, message):
    with pytest.raises(ValueError, match=message):
        whole = {"rope_theta": 1e4, "rope_type": "default"} | parameters
        rotary.from_huggingface({"rope_parameters": whole, "max_position_embeddings": 64})
