"""The parts of a latent, and a prior memory that is extended for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import config, latent_layout
from larimar_jax.config import KeyFeaturesConfig
from larimar_jax.latent_layout import LatentLayout
from larimar_jax.memory import variance
from larimar_jax.memory.streaming import Streaming

LAYOUT = LatentLayout(encoding=8, key_features=3, answer_code=32)


@pytest.mark.parametrize("kind", variance.SETTINGS)
def test_an_extended_memory_reads_encodings_back_as_themselves_and_no_answer(kind):
    """And σ_W is what it was before, where it does not depend on M, which has more columns now."""
    small = Streaming(slots=11, latent=8, ridge=0.1, variance=kind, initial="normal")
    params = small.init(jax.random.key(0))
    large = dataclasses.replace(small, latent=LAYOUT.size)
    prepared = large.prepare(latent_layout.extend_prior(params, LAYOUT))
    encodings = jax.random.normal(jax.random.key(1), (5, 11))
    queries = jnp.pad(encodings, ((0, 0), (0, 32)))
    reading = large.read(prepared, large.empty(prepared), queries)
    np.testing.assert_allclose(reading.latent, queries, atol=1e-4)
    if kind in ("scalar", "slot", "query"):
        before = small.prepare(params)
        want = small.read(before, small.empty(before), encodings[:, :8]).log_variance
        np.testing.assert_allclose(reading.log_variance, want, atol=1e-5)


def test_features_are_a_gaussian_kernel_of_encodings():
    features = KeyFeaturesConfig(count=20_000, scale=0.5, length=1.5)
    rows = jax.random.normal(jax.random.key(0), (6, 8)) / 3
    phi = np.float64(latent_layout.features(features, rows))
    apart = np.linalg.norm(np.asarray(rows)[:, None] - np.asarray(rows)[None], axis=-1)
    np.testing.assert_allclose(phi @ phi.T, 0.25 * np.exp(-(apart**2) / 4.5), atol=0.01)
    assert latent_layout.features(None, rows).shape == (6, 0)
    assert not latent_layout.features(features, jnp.zeros((1, 8))).any()


def test_features_let_a_memory_tell_more_facts_apart_than_encodings_have_dimensions():
    """16 dimensions and 40 facts; of 20 slots become 40."""
    keys = jax.random.normal(jax.random.key(0), (40, 16)) / 4
    values = jax.random.normal(jax.random.key(1), (40, 32))
    errors = []
    for count in (0, 24):
        features = KeyFeaturesConfig(count, 0.5, 1.0) if count else None
        sizes = LatentLayout(16, count, 32)
        small = Streaming(slots=20, latent=16)
        params = latent_layout.extend_prior(small.init(jax.random.key(0)), sizes)
        slots = len(params.prior_memory)
        memory = Streaming(slots=slots, latent=sizes.size, ridge=1e-5, query_noise=0.0)
        prepared = memory.prepare(params)
        own = jnp.concatenate([keys, latent_layout.features(features, keys)], axis=1)
        queries, latents = jnp.pad(own, ((0, 0), (0, 32))), jnp.concatenate([own, values], axis=1)
        state = memory.write(prepared, memory.empty(prepared), queries, latents)
        readout = memory.read(prepared, state, queries).latent[:, -32:]
        errors.append(float(jnp.linalg.norm(readout - values) / jnp.linalg.norm(values)))
    assert errors[0] > 0.5 and errors[1] < 0.1


def test_slots_are_added_for_features_alone_and_not_to_a_variance_of_slots():
    params = Streaming(slots=5, latent=8, variance="slot").init(jax.random.key(0))
    extended = latent_layout.extend_prior(params, LatentLayout(8, 0, 32))
    assert extended.prior_memory.shape == (5, 40)
    params = Streaming(slots=11, latent=8, variance="slot").init(jax.random.key(0))
    with pytest.raises(ValueError, match="editing.key_features.count to 3 at the most"):
        latent_layout.extend_prior(params, LatentLayout(8, 4, 0))


def test_features_that_make_no_sense_are_refused(tiny):
    values = config.to_dict(tiny.config)
    values["editing"]["key_features"] = dict(count=0, scale=0.0, length=1.0)
    with pytest.raises(config.ConfigError) as refused:
        config.parse(values)
    assert "editing.key_features.count: must be above 0, got 0" in str(refused.value)
    assert "editing.key_features.scale: must be above 0" in str(refused.value)
