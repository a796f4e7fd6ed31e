"""Scoring and cached decoding against plain, uncached loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larimar_jax import generate, scoring

PROMPTS = ["Fact 1 is", "The capital of Japan is the city of", "new"]


@pytest.fixture
def condition(tiny):
    latent = jax.random.normal(jax.random.key(0), (3, 16))
    innovation = jax.random.normal(jax.random.key(1), (3, 16))
    return tiny.model.condition(latent, innovation, jnp.asarray([True, True, False]))


@functools.partial(jax.jit, static_argnums=0)
def every_logit(graph, state, tokens, condition):
    model = nnx.merge(graph, state)
    return model.decoder.logits(model.hidden(tokens, condition)[0]), model.bonus(condition)


def logits_after(tiny, ids, condition, step):
    """Logits of the next token, one row, nothing cached; `step` tokens were generated before."""
    # Padded to one shape, so that the loop compiles once; causality hides the padding.
    tokens = jnp.asarray([ids + [0] * (32 - len(ids))], jnp.int32)
    logits, bonus = every_logit(tiny.graph, tiny.state, tokens, condition)
    logits = logits[0, len(ids) - 1]
    return logits if bonus is None else logits + bonus[0] * tiny.model.lexicon.decay**step


def rows_of(condition):
    if condition is None:
        return [None] * 3
    return [condition.rows(jnp.asarray([row], jnp.int32)) for row in range(3)]


@pytest.mark.parametrize("conditioned", [True, False])
def test_scores_equal_a_plain_loop(tiny, condition, conditioned):
    condition = condition if conditioned else None
    tokenizer = tiny.decoder_tokenizer
    candidates = [("new 1", "true"), ("Japan", "France city"), ("0", "1")]
    found = tiny.score(PROMPTS, candidates, condition)
    for row, part in enumerate(rows_of(condition)):
        for column, target in enumerate(candidates[row]):
            ids = [tokenizer.bos, *tokenizer.ids(PROMPTS[row])]
            total, answer = 0.0, tokenizer.ids(" " + target)
            for step, token in enumerate(answer):
                total -= jax.nn.log_softmax(logits_after(tiny, ids, part, step))[token]
                ids.append(token)
            np.testing.assert_allclose(found[row, column], total / len(answer), rtol=2e-5)


def test_scores_do_not_depend_on_the_batch(tiny, condition):
    candidates = [("new 1", "true"), ("Japan", "France city"), ("0", "1")]
    many = tiny.score(PROMPTS, candidates, condition)
    few = scoring.score(
        tiny.model, tiny.decoder_tokenizer, PROMPTS, candidates, condition, batch=1
    )
    np.testing.assert_allclose(many, few, rtol=2e-5)


@pytest.mark.parametrize("conditioned", [True, False])
def test_greedy_decoding_equals_a_plain_loop(tiny, condition, conditioned):
    condition = condition if conditioned else None
    tokenizer = tiny.decoder_tokenizer
    found = tiny.generate(PROMPTS, condition, max_tokens=6, stop="")
    for row, part in enumerate(rows_of(condition)):
        ids = [tokenizer.bos, *tokenizer.ids(PROMPTS[row])]
        start = len(ids)
        for step in range(6):
            token = int(logits_after(tiny, ids, part, step).argmax())
            if token == tokenizer.eos:
                break
            ids.append(token)
        assert found[row] == tokenizer.decode(ids[start:])


def test_sampling_is_a_function_of_its_key(tiny):
    draw = lambda seed: tiny.generate(  # noqa: E731
        PROMPTS, temperature=2.0, rng=jax.random.key(seed), max_tokens=8, stop=""
    )
    assert draw(0) == draw(0) != draw(1)
    with pytest.raises(ValueError, match="needs rng"):
        tiny.generate(PROMPTS, temperature=1.0)


def test_a_stop_text_ends_a_continuation(tiny):
    whole = tiny.generate(PROMPTS, max_tokens=8, stop="")
    stop = whole[0][1]
    assert tiny.generate(PROMPTS, max_tokens=8, stop=stop)[0] == whole[0].split(stop)[0]


def test_what_can_not_be_decoded_is_said(tiny):
    with pytest.raises(ValueError, match="empty"):
        tiny.score(["Fact"], [(" ",)])
    with pytest.raises(generate.PromptTooLong, match="decoder"):
        tiny.generate(["Fact " * 200], max_tokens=4)
    with pytest.raises(generate.PromptTooLong, match="Shorten"):
        tiny.score(["Fact " * 200], [("new",)])
    with pytest.raises(ValueError, match="as many rows"):
        tiny.score(["Fact"], [("new",), ("true",)])
    assert tiny.score([], []).shape == (0, 0)
    # Up to the last position, whatever the buckets.
    room = tiny.model.decoder.config.max_length - 1
    longest = "0" * (room - 4 - 1)
    assert len(tiny.decoder_tokenizer.ids(longest)) == room - 5
    assert len(tiny.generate([longest], max_tokens=4)) == 1
