"""The parts of a latent, and a prior memory that is widened for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import config, latent_layout
from larimar_jax.config import KeyFeaturesConfig
from larimar_jax.memory import variance
from larimar_jax.memory.streaming import Streaming

PARTS = latent_layout.LatentLayout(encoding=8, key_features=3, answer_code=32)


@pytest.mark.parametrize("kind", variance.SETTINGS)
def test_a_wider_memory_reads_encodings_back_as_themselves_and_spells_nothing(kind):
    """And σ_W is what it was before, where it does not go by M, which has more columns now."""
    small = Streaming(slots=11, latent=8, ridge=0.1, variance=kind, initial="normal")
    params = small.init(jax.random.key(0))
    large = dataclasses.replace(small, latent=PARTS.size)
    prepared = large.prepare(latent_layout.extend_prior(params, PARTS))
    queries = jax.random.normal(jax.random.key(1), (5, 11))
    asked = jnp.pad(queries, ((0, 0), (0, 32)))
    reading = large.read(prepared, large.empty(prepared), asked)
    np.testing.assert_allclose(reading.latent, asked, atol=1e-4)
    if kind in ("scalar", "slot", "query"):
        one = small.prepare(params)
        before = small.read(one, small.empty(one), queries[:, :8])
        np.testing.assert_allclose(reading.log_variance, before.log_variance, atol=1e-5)


def test_features_are_a_gaussian_kernel_of_encodings():
    told = KeyFeaturesConfig(count=20_000, scale=0.5, length=1.5)
    rows = jax.random.normal(jax.random.key(0), (6, 8)) / 3
    made = np.asarray(latent_layout.features(told, rows), np.float64)
    apart = np.linalg.norm(np.asarray(rows)[:, None] - np.asarray(rows)[None], axis=-1)
    np.testing.assert_allclose(made @ made.T, 0.25 * np.exp(-(apart**2) / 4.5), atol=0.01)
    assert latent_layout.features(None, rows).shape == (6, 0)
    assert not latent_layout.features(told, jnp.zeros((1, 8))).any()


def test_features_let_a_memory_tell_more_facts_apart_than_encodings_have_dimensions():
    """16 dimensions and 40 facts; of 20 slots become 40."""
    keys = jax.random.normal(jax.random.key(0), (40, 16)) / 4
    values = jax.random.normal(jax.random.key(1), (40, 32))
    errors = []
    for count in (0, 24):
        told = KeyFeaturesConfig(count, 0.5, 1.0) if count else None
        parts = latent_layout.LatentLayout(16, count, 32)
        params = latent_layout.extend_prior(Streaming(slots=20, latent=16).init(jax.random.key(0)), parts)
        slots = len(params.prior_memory)
        memory = Streaming(slots=slots, latent=parts.size, ridge=1e-5, query_noise=0.0)
        prepared = memory.prepare(params)
        own = jnp.concatenate([keys, latent_layout.features(told, keys)], axis=1)
        asked, told = jnp.pad(own, ((0, 0), (0, 32))), jnp.concatenate([own, values], axis=1)
        state = memory.write(prepared, memory.empty(prepared), asked, told)
        read = memory.read(prepared, state, asked).latent[:, -32:]
        errors.append(float(jnp.linalg.norm(read - values) / jnp.linalg.norm(values)))
    assert errors[0] > 0.5 and errors[1] < 0.1


def test_a_memory_without_features_keeps_its_slots():
    params = Streaming(slots=5, latent=8, variance="slot").init(jax.random.key(0))
    assert latent_layout.extend_prior(params, latent_layout.LatentLayout(8, 0, 32)).prior_memory.shape == (5, 40)


def test_slots_are_not_added_to_a_variance_of_slots():
    parts = latent_layout.LatentLayout(8, 4, 0)
    params = Streaming(slots=11, latent=8, variance="slot").init(jax.random.key(0))
    with pytest.raises(ValueError, match="editing.key_features.count to 3 at the most"):
        latent_layout.extend_prior(params, parts)


def test_features_that_make_no_sense_are_refused(tiny):
    values = config.to_dict(tiny.config)
    values["editing"]["key_features"] = dict(count=0, scale=0.0, length=1.0)
    with pytest.raises(config.ConfigError) as refused:
        config.parse(values)
    assert "editing.key_features.count: must be above 0, got 0" in str(refused.value)
    assert "editing.key_features.scale: must be above 0" in str(refused.value)
