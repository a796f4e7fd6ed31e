"""Where encoder, memory and decoder meet: conditioning, and Eq. 1 term by term."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import config, objective


def tokens_of(tiny, texts, length):
    return [
        jnp.asarray(part) for part in tiny.encoder_tokenizer.encode(texts, length, truncate=True)
    ]


def batch_of(tiny, episodes=2, facts=3, length=16):
    texts = [f"Fact {n} is new {n}" for n in range(episodes * facts)]
    tokens, mask = tokens_of(tiny, texts, length)
    shape = (episodes, facts, length)
    return dict(
        encoder_tokens=tokens.reshape(shape),
        encoder_mask=mask.reshape(shape),
        decoder_tokens=tokens.reshape(shape),
        decoder_mask=mask.reshape(shape),
    )


def losses(tiny, batch, rng=None, beta=0.0, **weights):
    """`objective.loss` compiled, as a step has it; weights that differ from the config's."""
    told = dataclasses.replace(tiny.config.objective, **weights)
    memory = config.make_memory(tiny.config)

    @jax.jit
    def run(batch, rng, beta):
        return objective.loss(tiny.model, memory, batch, rng, told, beta)

    return run(batch, rng, jnp.float32(beta))


def test_a_row_without_tokens_encodes_to_zero_and_others_do_not_notice(tiny):
    tokens, mask = tokens_of(tiny, ["Fact 1 is new", "Fact 2 is"], 16)
    padded = jnp.concatenate([tokens, jnp.zeros_like(tokens[:1])])
    latent = tiny.model.encode(padded, jnp.concatenate([mask, jnp.zeros_like(mask[:1])]))
    assert not latent[2].any()
    np.testing.assert_allclose(latent[:2], tiny.model.encode(tokens, mask), rtol=1e-5, atol=1e-6)


def test_base_zero_and_memory_are_three_things_and_inactive_is_base(tiny):
    tokens, _ = tokens_of(tiny, ["Fact 1 is new"] * 2, 12)
    latent = jnp.ones((2, 16))
    run = lambda condition: tiny.model.hidden(tokens, condition)[0]  # noqa: E731
    base, zero = run(None), run(tiny.model.condition(jnp.zeros((2, 16))))
    half = run(tiny.model.condition(latent, active=jnp.asarray([True, False])))
    assert jnp.abs(base - zero).max() > 1e-3
    assert jnp.abs(half[0] - zero[0]).max() > 1e-3
    np.testing.assert_allclose(half[1], base[1], rtol=1e-5, atol=1e-6)


def test_equation_1_is_the_weighted_sum_of_its_terms(tiny):
    rng = jax.random.split(jax.random.key(3), 2)
    loss, terms = losses(tiny, batch_of(tiny), rng, 0.25)
    total = terms["reconstruction"] + terms["autoencoding"] + terms["language"] + 0.25 * terms["kl"]
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    assert set(terms) == {"reconstruction", "autoencoding", "language", "kl"}


def test_language_is_z_0_and_autoencoding_bypasses_the_memory(tiny):
    batch = batch_of(tiny)
    _, terms = losses(tiny, batch)
    tokens = batch["decoder_tokens"].reshape(-1, 16)
    mask = batch["decoder_mask"].reshape(-1, 16)
    encodings = tiny.model.encode(batch["encoder_tokens"], batch["encoder_mask"]).reshape(-1, 16)
    for name, latent in (("language", jnp.zeros_like(encodings)), ("autoencoding", encodings)):
        logits = tiny.model.decoder.logits(
            tiny.model.hidden(tokens[:, :-1], tiny.model.condition(latent))[0]
        )
        logged = np.asarray(jax.nn.log_softmax(logits), np.float64)
        picked = np.take_along_axis(logged, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        kept = np.asarray(mask)[:, 1:]
        np.testing.assert_allclose(terms[name], -picked[kept].mean(), rtol=1e-5)
    # Without noise a fact read by its own encoding is itself (§3).
    np.testing.assert_allclose(terms["reconstruction"], terms["autoencoding"], rtol=1e-4)


def test_padding_changes_no_term_but_where_it_is_counted(tiny):
    short, long = batch_of(tiny, length=16), batch_of(tiny, length=24)
    plain = losses(tiny, long)[1]
    for name, value in losses(tiny, short)[1].items():
        np.testing.assert_allclose(plain[name], value, rtol=1e-4)
    assert losses(tiny, long, count_padding=True)[1]["language"] < plain["language"]


def test_a_term_of_weight_0_is_not_computed(tiny):
    _, terms = losses(tiny, batch_of(tiny), language=0.0, autoencoding=0.0)
    assert set(terms) == {"reconstruction", "kl"}


def test_kl_against_the_textbook(tiny):
    mean = np.random.default_rng(0).normal(size=(3, 5))
    log_variance = np.random.default_rng(1).normal(size=(3, 5))
    expected = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)
    args = jnp.asarray(mean, jnp.float32), jnp.asarray(log_variance, jnp.float32)
    np.testing.assert_allclose(objective.addressing_kl(*args, 0.0), expected.sum(-1), rtol=1e-5)
    floored = np.maximum(expected, 0.4).sum(-1)
    np.testing.assert_allclose(objective.addressing_kl(*args, 0.4), floored, rtol=1e-5)


def test_beta_cycles():
    value = lambda step: float(objective.beta_schedule(jnp.int32(step), 100, 0.5, 5))  # noqa: E731
    # Cycles of 20: 0 for ten steps, a rise over five, then the peak.
    assert [value(step) for step in (0, 9, 10, 15, 19, 20, 29)] == pytest.approx(
        [0, 0, 0, 0.5, 0.5, 0, 0], abs=1e-6
    )
    assert value(13) == pytest.approx(0.3, abs=1e-6)
    assert float(objective.beta_schedule(jnp.int32(3), 100, 0.5, 0)) == 0.5
