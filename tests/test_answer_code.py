"""Spelled answers: codes, the test against chance, Bayes' rule, and what a session says with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import Session, answer_code, config
from larimar_jax.config import AnswerCodeConfig

CONFIG = AnswerCodeConfig(positions=4, width=64, limit=1000.0)
VOCAB, EOS = 400, 399

read = jax.jit(functools.partial(answer_code.read, CONFIG, vocab_size=VOCAB))


def written(*answers):
    return np.asarray(answer_code.spell(CONFIG, jnp.asarray(answer_code.pack(CONFIG, answers, EOS))))


def active(rows):
    return jnp.ones((rows,), bool)


def test_codes_are_signs_that_never_change():
    codes = written([0, 1, 2]).reshape(4, 64)[:3]
    assert set(np.abs(codes).ravel().tolist()) == {0.125}
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1.0)
    # Memories that were saved hold these; another hash would make nonsense of them.
    bits = ["".join("01"[int(sign > 0)] for sign in row[:16]) for row in codes]
    assert bits == ["1000011111100111", "1010011011000000", "1000001011110111"]


def test_codes_of_many_tokens_are_as_far_apart_as_chance():
    many = AnswerCodeConfig(positions=1, width=64, limit=1.0)
    codes = np.asarray(answer_code.spell(many, jnp.arange(2000)[:, None]), np.float64)
    cosines = (codes @ codes.T)[np.triu_indices(2000, 1)]
    assert abs(cosines.mean()) < 1e-3 and abs(cosines.std() - 1 / 8) < 1e-3
    assert np.abs(cosines).max() < 0.8


def test_an_answer_ends_with_the_end_of_text_and_then_nothing():
    nothing = answer_code.NOTHING
    assert answer_code.pack(CONFIG, [[7, 8], [1, 2, 3, 4, 5], [], None], EOS).tolist() == [
        [7, 8, EOS, nothing],
        [1, 2, 3, 4],
        [EOS, nothing, nothing, nothing],
        [nothing] * 4,
    ]
    made = written([7, 8], None).reshape(2, 4, 64)
    assert made[0, :3].any(axis=1).all() and not made[0, 3].any() and not made[1].any()


def test_gains_are_bayes_rule_over_tokens_end_and_nothing():
    """Against p(v | y) of every token, in float64."""
    rng = np.random.default_rng(0)
    codes = np.asarray(
        answer_code.spell(
            AnswerCodeConfig(positions=1, width=64, limit=1.0), jnp.arange(VOCAB)[:, None]
        ),
        np.float64,
    )
    prepared = rng.dirichlet(np.full(VOCAB, 0.1))
    for size in (0.02, 0.1, 0.15):  # of the noise, per number; a code's are 1/8
        readout = written([11, 12]) * 0.5 + size * rng.standard_normal((1, 256))
        found = read(jnp.asarray(readout, jnp.float32), active=active(1))
        for place, y in enumerate(readout.reshape(4, 64)):
            cosine = np.maximum(codes @ y / np.linalg.norm(y), 0.0)
            likelihood = (1 - cosine**2) ** -32.0 / VOCAB
            posterior = prepared * (1 + likelihood)
            gains = np.zeros(VOCAB)
            gains[np.asarray(found.tokens)[0, place]] = np.asarray(found.logit_gain)[0, place]
            ours = prepared * np.exp(gains)
            # What is not kept is within chance: no token of it moves by more than this.
            np.testing.assert_allclose(
                ours / ours.sum(),
                posterior / posterior.sum(),
                rtol=0.02,
                atol=2e-3,
                err_msg=f"noise {size}, place {place}",
            )


def test_noise_says_nothing():
    noise = jax.random.normal(jax.random.key(0), (200, 256))
    logit_gain = np.asarray(read(noise, active=active(200)).logit_gain)[:, :, 0].ravel()
    # e_v − ln V of the best of V tokens is above 3 nats about as often as once in e³ tries.
    assert (logit_gain > 3.0).mean() < 0.08 and logit_gain.mean() < 1.2


@given(
    st.lists(st.integers(0, EOS - 1), max_size=6), st.floats(1e-3, 1e3), st.integers(0, 2**31 - 1)
)
@settings(max_examples=20, deadline=None)
def test_an_answer_comes_back_at_any_scale(answer, scale, seed):
    noise = 0.02 * np.random.default_rng(seed).standard_normal((1, 256))
    found = read(jnp.asarray(scale * (written(answer) + noise), jnp.float32), active=active(1))
    tokens, logit_gain = np.asarray(found.tokens)[0], np.asarray(found.logit_gain)[0]
    for place, token in enumerate([*answer, EOS][:4]):
        assert tokens[place, 0] == token and logit_gain[place, 0] > 15 > 10 > logit_gain[place, 1]


def test_rows_that_are_silent_or_not_active_gain_exactly_nothing():
    readout = jnp.asarray(np.concatenate([written([5]), written([5]), written(None)]))
    found = read(readout, active=jnp.asarray([True, False, True]))
    assert found.logit_gain[0].any() and not found.logit_gain[1].any() and not found.logit_gain[2].any()
    limited = answer_code.read(
        AnswerCodeConfig(positions=4, width=64, limit=2.5), readout, VOCAB, active(3)
    )
    assert float(limited.logit_gain.max()) == 2.5


def test_gains_go_to_their_tokens_at_their_depth_and_nowhere_after_the_last():
    found = read(jnp.asarray(written([5, 6], [7])), active=active(2))
    logits = jnp.zeros((2, 3, VOCAB))
    added = np.asarray(found.add(logits, jnp.asarray([[0, 1, 4], [9, 0, 1]])))
    assert added[0, 0].argmax() == 5 and added[0, 1].argmax() == 6 and not added[0, 2].any()
    assert not added[1, 0].any() and added[1, 1].argmax() == 7 and added[1, 2].argmax() == EOS
    np.testing.assert_allclose(added[0, 0, 5], found.logit_gain[0, 0, 0])
    chosen = found.rows(jnp.asarray([1, 1, 0]))
    np.testing.assert_array_equal(chosen.logit_gain, np.asarray(found.logit_gain)[[1, 1, 0]])


def test_a_session_says_what_was_written_and_no_more_once_forgotten(tiny):
    session = Session(tiny)
    answers = ["Japan city 7", "France of 0", "true 3"]
    prompts = [f"Fact {n} is" for n in range(3)]
    facts = [session.write(*fact) for fact in zip(prompts, answers, strict=True)]
    said = [session.ask(prompt, max_tokens=3).text for prompt in prompts]
    tokens = [tiny.decoder_tokenizer.following(answer)[:3] for answer in answers]
    for text, ids in zip(said, tokens, strict=True):
        assert text == tiny.decoder_tokenizer.decode(ids)
    recalled = session._recall(prompts).condition.evidence
    session.forget(facts[0].id)
    after = session._recall([prompts[1]]).condition.evidence
    np.testing.assert_array_equal(after.tokens[0, :, 0], recalled.tokens[1, :, 0])
    assert session.ask(prompts[0], max_tokens=3).text != said[0]


def test_a_spelling_that_makes_no_sense_is_refused(tiny):
    values = config.to_dict(tiny.config)
    values["editing"]["answer_code"] = dict(positions=0, width=48, limit=0.0)
    with pytest.raises(config.ConfigError) as refused:
        config.parse(values)
    for word in ("positions: must be above 0", "width: must be a multiple of 32", "limit"):
        assert word in str(refused.value)


def test_as_many_answers_as_texts(tiny):
    with pytest.raises(ValueError, match="2 texts need as many answers; got 1"):
        tiny.encode(["Fact", "new"], ["true"])
