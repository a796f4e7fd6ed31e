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


@settings(deadline=None, max_examples=25)
@given(
    first=st.integers(0, 400),
    second=st.integers(0, 400),
    shift=st.integers(0, 400),
    interleaved=st.booleans(),
    partial=st.booleans(),
)
def test_a_score_depends_on_distance_alone(first, second, shift, interleaved, partial):
    rng = np.random.default_rng(0)
    query, key = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)

    def score(i, j):
        turns = [rotary.rotation(jnp.array([[p]]), 4 if partial else 8, 100.0) for p in (i, j)]
        turned = (
            rotary.rotate(a, t, interleaved=interleaved)
            for a, t in zip((query, key), turns, strict=True)
        )
        return float(jnp.sum(next(turned) * next(turned)))

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=2e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_position_zero_is_unrotated_and_others_keep_their_length(interleaved):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 2, 8)), jnp.float32)
    at = [
        rotary.rotate(x, rotary.rotation(jnp.array([[p]]), 8, 100.0), interleaved=interleaved)
        for p in (0, 3)
    ]
    assert (at[0] == x).all()
    assert abs(at[1] - x).max() > 0.1
    np.testing.assert_allclose(*(np.linalg.norm(a, axis=-1) for a in at), rtol=1e-6)


def test_partial_rotation_leaves_the_rest_of_a_head():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 2, 8)), jnp.float32)
    got = rotary.rotate(x, rotary.rotation(jnp.array([[3]]), 4, 100.0), interleaved=True)
    assert (got[..., 4:] == x[..., 4:]).all()
    assert abs(got[..., :4] - x[..., :4]).max() > 0.1


def test_linear_scaling_divides_positions():
    scaled = RopeScaling("linear", 4.0, 0, 0.0, 0.0, 1.0)
    far = rotary.rotation(jnp.array([[12]]), 8, 100.0, scaled)
    near = rotary.rotation(jnp.array([[3]]), 8, 100.0)
    np.testing.assert_allclose(far, near, rtol=1e-6)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN])
def test_fast_pairs_are_kept_and_slow_ones_divided(scaling):
    plain = rotary.frequencies(128, 500000.0)
    ratio = rotary.frequencies(128, 500000.0, scaling) / plain
    np.testing.assert_allclose(ratio[[0, -1]], [1.0, 1 / scaling.factor], rtol=1e-6)
    assert (np.diff(ratio) <= 1e-6).all()
    between = (ratio > 1.01 / scaling.factor) & (ratio < 0.99)
    assert 2 < between.sum() < 60


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN, LINEAR])
def test_what_is_written_is_read_back(scaling):
    said = rotary.to_huggingface(5e5, scaling)
    theta, found = rotary.from_huggingface(
        {"rope_parameters": said, "max_position_embeddings": 64}
    )
    assert (theta, found) == (5e5, scaling)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"type": "linear"}, "lacks its 'factor'"),
        ({"rope_type": "llama3", "factor": 8.0}, "lacks its 'low_freq_factor'"),
        ({"type": "linear", "factor": 0}, "cannot be computed"),
        ({"type": "linear", "factor": -2.0}, "cannot be computed"),
        ({"type": "linear", "factor": float("nan")}, "cannot be computed"),
        ({"type": "yarn", "factor": 2.0, "attention_factor": 0.0}, "cannot be computed"),
        ({"type": "yarn", "factor": 2.0, "beta_slow": 32.0}, "cannot be computed"),
        (
            {"type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4},
            "cannot be computed",
        ),
        ({"type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope_theta is 1.0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ],
)
def test_what_is_not_computed_is_said(said, message):
    with pytest.raises(ValueError, match=message):
        rotary.from_huggingface({"rope_scaling": said, "max_position_embeddings": 64})
