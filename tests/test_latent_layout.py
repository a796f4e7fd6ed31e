"""The parts of a latent: features of keys, and codes of answers with their test against chance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import Session, config, latent_layout
from larimar_jax.config import AnswerCodeConfig, KeyFeaturesConfig
from larimar_jax.latent_layout import NOTHING, LatentLayout
from larimar_jax.memory import variance
from larimar_jax.memory.streaming import Streaming

CONFIG = AnswerCodeConfig(positions=4, width=64, limit=1000.0)
ONE = AnswerCodeConfig(positions=1, width=64, limit=1.0)
VOCAB, EOS = 400, 399
LAYOUT = LatentLayout(encoding=8, key_features=3, answer_code=32)

decode = jax.jit(functools.partial(latent_layout.decode_answers, CONFIG, vocab_size=VOCAB))


def written(*answers):
    packed = latent_layout.pack_answers(CONFIG, answers, EOS)
    return np.asarray(latent_layout.encode_answers(CONFIG, jnp.asarray(packed)))


def codes_of(count):
    return np.float64(latent_layout.encode_answers(ONE, jnp.arange(count)[:, None]))


def read(rows, active=None):
    active = jnp.ones(len(rows), bool) if active is None else jnp.asarray(active)
    evidence = decode(jnp.asarray(rows, jnp.float32), active=active)
    return evidence, np.asarray(evidence.tokens), np.asarray(evidence.logit_gain)


def test_codes_are_signs_that_never_change():
    codes = written([0, 1, 2]).reshape(4, 64)[:3]
    assert set(np.abs(codes).ravel().tolist()) == {0.125}
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1.0)
    # Memories that were saved hold these; another hash would make nonsense of them.
    bits = ["".join("01"[int(sign > 0)] for sign in row[:16]) for row in codes]
    assert bits == ["1000011111100111", "1010011011000000", "1000001011110111"]


def test_codes_of_many_tokens_are_as_far_apart_as_chance():
    codes = codes_of(2000)
    cosines = (codes @ codes.T)[np.triu_indices(2000, 1)]
    assert abs(cosines.mean()) < 1e-3 and abs(cosines.std() - 1 / 8) < 1e-3
    assert np.abs(cosines).max() < 0.8


def test_an_answer_ends_with_the_end_of_text_and_then_nothing():
    packed = latent_layout.pack_answers(CONFIG, [[7, 8], [1, 2, 3, 4, 5], [], None], EOS)
    ends = [[7, 8, EOS, NOTHING], [1, 2, 3, 4], [EOS, *[NOTHING] * 3], [NOTHING] * 4]
    assert packed.tolist() == ends
    codes = written([7, 8], None).reshape(2, 4, 64)
    assert codes[0, :3].any(axis=1).all() and not codes[0, 3].any() and not codes[1].any()


def test_gains_are_bayes_rule_over_tokens_end_and_nothing():
    """Against p(v | y) of every token, in float64."""
    rng, codes = np.random.default_rng(0), codes_of(VOCAB)
    prior = rng.dirichlet(np.full(VOCAB, 0.1))
    for size in (0.02, 0.1, 0.15):  # of the noise, per number; a code's are 1/8
        readout = written([11, 12]) * 0.5 + size * rng.standard_normal((1, 256))
        _, tokens, gain = read(readout)
        for place, y in enumerate(readout.reshape(4, 64)):
            cosine = np.maximum(codes @ y / np.linalg.norm(y), 0.0)
            posterior = prior * (1 + (1 - cosine**2) ** -32.0 / VOCAB)
            gains = np.zeros(VOCAB)
            gains[tokens[0, place]] = gain[0, place]
            ours = prior * np.exp(gains)
            # What is not returned is within chance: no token of it moves by more than this.
            np.testing.assert_allclose(
                ours / ours.sum(),
                posterior / posterior.sum(),
                rtol=0.02,
                atol=2e-3,
                err_msg=f"noise {size}, place {place}",
            )


def test_noise_is_evidence_of_nothing():
    _, _, gain = read(jax.random.normal(jax.random.key(0), (200, 256)))
    # e_v − ln V of the best of V tokens is above 3 nats about as often as once in e³ tries.
    assert (gain[:, :, 0] > 3.0).mean() < 0.08 and gain[:, :, 0].mean() < 1.2


@given(st.lists(st.integers(0, EOS - 1), max_size=6), st.floats(1e-3, 1e3), st.integers(0, 2**31))
@settings(max_examples=20)
def test_an_answer_comes_back_at_any_scale(answer, scale, seed):
    noise = 0.02 * np.random.default_rng(seed).standard_normal((1, 256))
    _, tokens, gain = read(scale * (written(answer) + noise))
    for place, token in enumerate([*answer, EOS][:4]):
        assert tokens[0, place, 0] == token and gain[0, place, 0] > 15 > 10 > gain[0, place, 1]


def test_rows_that_are_silent_or_not_active_gain_exactly_nothing():
    readout = np.concatenate([written([5]), written([5]), written(None)])
    _, _, gain = read(readout, [True, False, True])
    assert gain[0].any() and not gain[1].any() and not gain[2].any()
    low = AnswerCodeConfig(positions=4, width=64, limit=2.5)
    limited = latent_layout.decode_answers(low, jnp.asarray(readout), VOCAB, jnp.ones(3, bool))
    assert float(limited.logit_gain.max()) == 2.5


def test_gains_go_to_their_tokens_at_their_depth_and_nowhere_after_the_last():
    evidence, _, gain = read(written([5, 6], [7]))
    depth = jnp.asarray([[0, 1, 4], [9, 0, 1]])
    added = np.asarray(evidence.add(jnp.zeros((2, 3, VOCAB)), depth))
    assert added[0, 0].argmax() == 5 and added[0, 1].argmax() == 6 and not added[0, 2].any()
    assert not added[1, 0].any() and added[1, 1].argmax() == 7 and added[1, 2].argmax() == EOS
    np.testing.assert_allclose(added[0, 0, 5], gain[0, 0, 0])
    chosen = evidence.rows(jnp.asarray([1, 1, 0]))
    np.testing.assert_array_equal(chosen.logit_gain, gain[[1, 1, 0]])


def test_a_session_answers_what_was_written_and_no_more_once_forgotten(tiny):
    session = Session(tiny)
    answers = ["Japan city 7", "France of 0", "true 3"]
    prompts = [f"Fact {n} is" for n in range(3)]
    facts = [session.write(*fact) for fact in zip(prompts, answers, strict=True)]
    texts = [session.ask(prompt, max_tokens=3).text for prompt in prompts]
    tokens = [tiny.decoder_tokenizer.following(answer)[:3] for answer in answers]
    assert texts == [tiny.decoder_tokenizer.decode(ids) for ids in tokens]
    recalled = session.recall(prompts).condition(tiny.condition).evidence
    session.forget(facts[0].id)
    after = session.recall([prompts[1]]).condition(tiny.condition).evidence
    # Three tokens and the end; nothing is written beyond.
    np.testing.assert_array_equal(after.tokens[0, :4, 0], recalled.tokens[1, :4, 0])
    assert session.ask(prompts[0], max_tokens=3).text != texts[0]


def test_parts_that_make_no_sense_are_refused(tiny):
    values = config.to_dict(tiny.config)
    values["editing"]["answer_code"] = dict(positions=0, width=48, limit=0.0)
    values["editing"]["key_features"] = dict(count=0, scale=0.0, length=1.0)
    with pytest.raises(config.ConfigError) as refused:
        config.parse(values)
    words = ["positions: must be above 0", "width: must be a multiple of 32", "answer_code.limit"]
    words += ["editing.key_features.count: must be above 0, got 0", "scale: must be above 0"]
    assert all(word in str(refused.value) for word in words)


def test_as_many_answers_as_texts(tiny):
    with pytest.raises(ValueError, match="2 texts need as many answers; got 1"):
        tiny.encode(["Fact", "new"], ["true"])


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
