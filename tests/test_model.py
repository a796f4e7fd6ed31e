"""Where encoder, memory and decoder meet: conditioning, and Eq. 1 term by term."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import config, objective


def tokens_of(tiny, texts, length):
    batch = tiny.encoder_tokenizer.encode(texts, length, truncate=True)
    return jnp.asarray(batch.ids), jnp.asarray(batch.mask)


def batch_of(tiny, episodes=2, facts=3, length=16):
    texts = [f"Fact {n} is new {n}" for n in range(episodes * facts)]
    tokens, mask = (a.reshape(episodes, facts, length) for a in tokens_of(tiny, texts, length))
    return {
        f"{tower}_{name}": array
        for tower in ("encoder", "decoder")
        for name, array in (("tokens", tokens), ("mask", mask))
    }


def loss_and_terms(tiny, batch, rng=None, beta=0.0, **weights):
    """`objective.loss` compiled, as a step has it; weights that differ from the config's."""
    weights = dataclasses.replace(tiny.config.objective, **weights)
    memory = config.make_memory(tiny.config)

    @jax.jit
    def run(batch, rng, beta):
        return objective.loss(tiny.model, memory, batch, rng, weights, beta)

    return run(batch, rng, jnp.float32(beta))


def test_a_row_without_tokens_encodes_to_zero_and_other_rows_do_not_notice(tiny):
    tokens, mask = tokens_of(tiny, ["Fact 1 is new", "Fact 2 is"], 16)
    padded = jnp.concatenate([tokens, jnp.zeros_like(tokens[:1])])
    latent = tiny.model.encode(padded, jnp.concatenate([mask, jnp.zeros_like(mask[:1])]))
    assert not latent[2].any()
    np.testing.assert_allclose(latent[:2], tiny.model.encode(tokens, mask), rtol=1e-5, atol=1e-6)


def test_what_goes_into_the_memory_is_projected_in_full_float32(tiny):
    """A GPU rounds factors of other products to TF32."""
    encode = jax.jit(lambda *tokens: tiny.model.encode(*tokens))
    text = encode.lower(*tokens_of(tiny, ["Fact 1 is new"], 16)).as_text()
    assert text.count("precision = [HIGHEST, HIGHEST]") == 1


@pytest.mark.parametrize("way", ["slots", "embedding"])
def test_a_model_of_one_way_holds_zeros_in_the_other(tiny, way):
    larimar = copy.copy(tiny.model)
    larimar.conditioning = way
    latent = jnp.ones((1, larimar.to_slots.in_features))
    both, single = (model.condition(latent).prefix for model in (tiny.model, larimar))
    other = {"slots": both.key, "embedding": both.embedding}
    parts = {"slots": single.key, "embedding": single.embedding}
    for name, part in parts.items():
        assert (part == other[name]).all() if name == way else not part.any()


def test_equation_1_is_the_weighted_sum_of_its_terms(tiny):
    rng = jax.random.split(jax.random.key(3), 2)
    loss, terms = loss_and_terms(tiny, batch_of(tiny), rng, 0.25)
    assert set(terms) == {"reconstruction", "autoencoding", "language", "kl"}
    total = sum(terms.values()) - 0.75 * terms["kl"]
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    terms = loss_and_terms(tiny, batch_of(tiny), language=0.0, autoencoding=0.0)[1]
    assert set(terms) == {"reconstruction", "kl"}  # A term of weight 0 is not computed.


def test_language_is_z_0_and_autoencoding_bypasses_the_memory(tiny):
    batch, model = batch_of(tiny), tiny.model
    terms = loss_and_terms(tiny, batch)[1]
    tokens, mask = (batch[f"decoder_{n}"].reshape(-1, 16) for n in ("tokens", "mask"))
    encodings = model.encode(batch["encoder_tokens"], batch["encoder_mask"]).reshape(-1, 16)
    for name, latent in (("language", jnp.zeros_like(encodings)), ("autoencoding", encodings)):
        hidden, _ = model.hidden(tokens[:, :-1], model.condition(latent))
        log_p = np.asarray(jax.nn.log_softmax(model.decoder.logits(hidden)), np.float64)
        log_p = np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        np.testing.assert_allclose(terms[name], -log_p[np.asarray(mask)[:, 1:]].mean(), rtol=1e-5)
    # Without noise a fact read by its own encoding is itself (§3).
    np.testing.assert_allclose(terms["reconstruction"], terms["autoencoding"], rtol=1e-4)


def test_padding_changes_no_term_but_where_it_is_counted(tiny):
    short, long = batch_of(tiny, length=16), batch_of(tiny, length=24)
    plain = loss_and_terms(tiny, long)[1]
    for name, value in loss_and_terms(tiny, short)[1].items():
        np.testing.assert_allclose(plain[name], value, rtol=1e-4)
    assert loss_and_terms(tiny, long, count_padding=True)[1]["language"] < plain["language"]


def test_kl_against_the_textbook():
    mean, log_variance = np.random.default_rng(0).normal(size=(2, 3, 5))
    element = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)
    arguments = jnp.asarray(mean, jnp.float32), jnp.asarray(log_variance, jnp.float32)
    for free_bits in (0.0, 0.4):
        want = np.maximum(element, free_bits).sum(-1)
        actual = objective.addressing_kl(*arguments, free_bits)
        np.testing.assert_allclose(actual, want, rtol=1e-5)


@pytest.mark.parametrize(
    "step, cycles, beta",
    # Cycles of 20: 0 for ten steps, a rise over five, then the peak.
    [*((n, 5, 0.0) for n in (0, 9, 10, 20, 29)), (13, 5, 0.3), (15, 5, 0.5), (3, 0, 0.5)]
    + [(19, 5, 0.5)],
)
def test_beta_cycles(step, cycles, beta):
    actual = objective.beta_schedule(jnp.int32(step), 100, 0.5, cycles)
    assert float(actual) == pytest.approx(beta, abs=1e-6)
