"""Scoring and cached decoding against plain, uncached loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf
from flax import nnx
from tokenizers import decoders, models

from larimar_jax import answer_code, decoding, generate, packing, sampling, scoring
from larimar_jax.config import AnswerCodeConfig
from larimar_jax.weights import Tokenizer

SPELLING = AnswerCodeConfig(positions=3, width=32, limit=20.0)
PROMPTS = ["Fact 1 is", "The capital of Japan is the city of", "new"]


@pytest.fixture
def condition(tiny):
    latent = jax.random.normal(jax.random.key(0), (3, 16))
    # What memory reads where three answers are written: the last of another length than the rest.
    answers = answer_code.pack(SPELLING, [[5, 6, 7], [8], [9, 9]], 3)
    noise = 0.02 * jax.random.normal(jax.random.key(2), (3, 96))
    readout = answer_code.spell(SPELLING, jnp.asarray(answers)) + noise
    active = jnp.asarray([True, True, False])
    evidence = answer_code.read(SPELLING, readout, tiny.model.decoder.config.vocab_size, active)
    return tiny.model.condition(latent, active, evidence)


@functools.partial(jax.jit, static_argnums=0)
def every_logit(graph, state, tokens, condition):
    model = nnx.merge(graph, state)
    return model.decoder.logits(model.hidden(tokens, condition)[0])


def logits_after(tiny, ids, condition, step):
    """Logits of the next token, one row, nothing cached; `step` tokens were generated before."""
    # Padded to one shape, so that the loop compiles once; causality hides the padding.
    tokens = jnp.asarray([ids + [0] * (32 - len(ids))], jnp.int32)
    logits = every_logit(tiny.graph, tiny.state, tokens, condition)[0, len(ids) - 1]
    if condition is not None and step < condition.evidence.logit_gain.shape[1]:
        evidence = condition.evidence
        logits = logits.at[evidence.tokens[0, step]].add(evidence.logit_gain[0, step])
    return logits


def rows_of(condition):
    if condition is None:
        return [None] * 3
    return [condition.rows(jnp.asarray([row], jnp.int32)) for row in range(3)]


@pytest.mark.parametrize("conditioned", [True, False])
def test_scores_equal_a_plain_loop(tiny, condition, conditioned):
    condition = condition if conditioned else None
    tokenizer = tiny.decoder_tokenizer
    candidates = [("new 1", "true"), ("Japan", "France city"), ("0", "1")]
    found = tiny.judge(PROMPTS, candidates, condition)
    for row, part in enumerate(rows_of(condition)):
        for column, target in enumerate(candidates[row]):
            ids = [tokenizer.bos, *tokenizer.ids(PROMPTS[row])]
            total, right, answer = 0.0, 0, tokenizer.ids(" " + target)
            for step, token in enumerate(answer):
                logits = logits_after(tiny, ids, part, step)
                total -= jax.nn.log_softmax(logits)[token]
                right += int(jnp.argmax(logits)) == token
                ids.append(token)
            np.testing.assert_allclose(found.loss[row, column], total / len(answer), rtol=2e-5)
            assert found.accuracy[row, column] == right / len(answer)
    np.testing.assert_array_equal(tiny.score(PROMPTS, candidates, condition), found.loss)


class _Numbers(Tokenizer):
    """For whom a target is its tokens' numbers."""

    def following(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]


@pytest.mark.parametrize("conditioned", [True, False])
def test_accuracy_is_the_share_of_tokens_that_are_likeliest(tiny, condition, conditioned):
    condition = condition if conditioned else None
    tokenizer, targets, want = tiny.decoder_tokenizer, [], []
    for prompt, part in zip(PROMPTS, rows_of(condition), strict=True):
        ids = [tokenizer.bos, *tokenizer.ids(prompt)]
        right, mixed = [], []
        for step in range(4):
            right.append(int(jnp.argmax(logits_after(tiny, [*ids, *right], part, step))))
        for step in range(4):
            best = int(jnp.argmax(logits_after(tiny, [*ids, *mixed], part, step)))
            mixed.append(best if step in (0, 3) else (best + 1) % tokenizer.vocab_size)
        targets.append([" ".join(map(str, row)) for row in (right, mixed)])
        want.append([1.0, 0.5])
    fields = {f.name: getattr(tokenizer, f.name) for f in dataclasses.fields(tokenizer)}
    found = scoring.judge(tiny.model, _Numbers(**fields), PROMPTS, targets, condition)
    np.testing.assert_allclose(found.accuracy, want)


def test_scores_do_not_depend_on_the_batch(tiny, condition):
    candidates = [("new 1", "true"), ("Japan", "France city"), ("0", "1")]
    many = tiny.score(PROMPTS, candidates, condition)
    for row, part in enumerate(rows_of(condition)):
        alone = tiny.score([PROMPTS[row]], [candidates[row]], part)
        np.testing.assert_allclose(many[row], alone[0], rtol=2e-5)


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


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 128])
def test_a_prompt_says_the_same_in_any_batch_and_as_much_as_it_may(tiny, condition, conditioned, batch):
    rows, most = [0, 1, 2, 1, 0], [7, 2, 4, 9, 1]
    parts = rows_of(condition if conditioned else None)
    given = condition.rows(jnp.asarray(rows)) if conditioned else None
    prompts = [PROMPTS[row] for row in rows]
    said = tiny.generate(prompts, given, max_tokens=most, stop="", batch=batch)
    for row, tokens, text in zip(rows, most, said, strict=True):
        assert text == tiny.generate([PROMPTS[row]], parts[row], max_tokens=tokens, stop="")[0]


def test_draws_do_not_depend_on_the_batch(tiny):
    options = dict(temperature=1.5, rng=jax.random.key(4), max_tokens=[5, 2, 6], stop="")
    said = tiny.generate(PROMPTS, **options)
    assert tiny.generate(PROMPTS, batch=2, **options) == said


def test_what_prompts_begin_with_is_read_once(tiny, monkeypatch):
    read, prefill = [], decoding._prefill

    def counting(graph, state, tokens, tree, condition):
        read.append(tokens.size)
        return prefill(graph, state, tokens, tree, condition)

    monkeypatch.setattr(decoding, "_prefill", counting)
    alone = tiny.generate([PROMPTS[1]], max_tokens=3)
    said = tiny.generate([PROMPTS[1]] * 20, max_tokens=3)
    assert said == alone * 20 and read[1] == read[0]


@pytest.mark.parametrize("part", ["key", "value", "embedding"])
@pytest.mark.parametrize("broken", [np.nan, np.inf, 3e38])
def test_a_broken_row_leaves_the_others_as_they_are(tiny, condition, part, broken):
    """Prompts share rows of the decoder, and their beginnings; what is not finite is one's own."""
    hurt = condition.rows(jnp.asarray([0, 0, 1]))
    leaf = getattr(hurt.prefix, part)
    leaf = leaf.at[2].set(broken) if part == "embedding" else leaf.at[:, 2].set(broken)
    hurt = dataclasses.replace(hurt, prefix=dataclasses.replace(hurt.prefix, **{part: leaf}))
    draw = np.random.default_rng(0)
    for lengths in ((59, 41, 11), (5, 6, 7), (61, 62, 3)):
        rows = [[1, *draw.integers(2, 300, length - 1).tolist()] for length in lengths]
        said = generate.continue_ids(tiny.model, rows, 6, hurt)
        for row in (0, 1):
            alone = generate.continue_ids(
                tiny.model, rows[row : row + 1], 6, condition.rows(jnp.asarray([0]))
            )
            np.testing.assert_array_equal(said[row], alone[0])


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
    with pytest.raises(decoding.PromptTooLong, match="decoder"):
        tiny.generate(["Fact " * 200], max_tokens=4)
    with pytest.raises(decoding.PromptTooLong, match="Shorten"):
        tiny.score(["Fact " * 200], [("new",)])
    with pytest.raises(ValueError, match="as many rows"):
        tiny.score(["Fact"], [("new",), ("true",)])
    assert tiny.score([], []).shape == (0, 0)
    # Up to the last position, whatever the buckets.
    room = tiny.model.decoder.config.max_length - 1
    longest = "0" * (room - 4 - 1)
    assert len(tiny.decoder_tokenizer.ids(longest)) == room - 5
    assert len(tiny.generate([longest], max_tokens=4)) == 1


@pytest.mark.parametrize("every", [1, 3, 50])
@pytest.mark.parametrize("stop", ["", "a", ("ef", "n")])
def test_streamed_pieces_join_to_the_whole(tiny, condition, every, stop):
    options = dict(max_tokens=14, stop=stop)
    whole = tiny.generate(PROMPTS, condition, **options)
    pieces = list(tiny.stream(PROMPTS, condition, every=every, **options))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == whole
    if every == 1 and stop == "":
        assert len(pieces) > 3


def test_drawn_pieces_join_to_what_is_drawn_at_once(tiny, condition):
    options = dict(max_tokens=9, temperature=1.5, top_k=20, rng=jax.random.key(3), stop="")
    pieces = tiny.stream(PROMPTS, condition, every=2, **options)
    whole = tiny.generate(PROMPTS, condition, **options)
    assert ["".join(row) for row in zip(*pieces, strict=True)] == whole


def test_an_unfinished_character_is_held_back(tiny):
    """Pieces never hold U+FFFD that a later token turns into a character."""
    tokenizer = tiny.decoder_tokenizer
    reader = generate._Reader(tokenizer, "")
    ids = tokenizer.ids("né 東京")
    for length in range(1, len(ids)):
        text, sure = reader.text(ids[:length])
        assert "né 東京".startswith(text[:sure])


def test_a_target_without_tokens_is_named(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny.decoder_tokenizer), "following", lambda *_: [])
    with pytest.raises(ValueError, match="Target 0 of prompt 'Fact', 'new', has no tokens"):
        tiny.score(["Fact"], [("new",)])


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A SentencePiece-like tokenizer: words, and a token for each byte."""
    names = ["<s>", "</s>", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = hf.Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, 0, 1, 1)


@pytest.mark.parametrize("stop", ["", "\n", ("\nx", "é\n")])
@pytest.mark.parametrize(
    "said",
    ["é東".encode()[:-1], "é\n東".encode()[:-2], b"\xff\xc3\xa9\xffx", "a😀\nx".encode() + b"\xf0\x9f"],
)
def test_bytes_that_are_no_character_leave_the_others(byte_tokenizer, said, stop):
    reader = generate._Reader(byte_tokenizer, stop)
    ids = [2, *(3 + byte for byte in said)]
    whole = reader.text(ids)[0]
    expected = "a" + said.decode("utf-8", "replace")
    stops = [expected.find(s) for s in ((stop,) if isinstance(stop, str) else stop) if s in expected]
    assert whole == (expected[: min(stops)] if stop and stops else expected)
    given = ""
    for length in range(1, len(ids) + 1):
        text, sure = reader.text(ids[:length])
        assert text[:sure].startswith(given)
        given = text[:sure]
    assert whole.startswith(given)


def test_a_new_length_or_number_of_rows_seldom_compiles(tiny):
    words = "Fact 1 is the capital of Japan".split()
    parts = (decoding._prefill, decoding._empty, decoding._place, decoding._begin, decoding._decode)
    sizes = []
    for rows in (5, 6):
        for length in (5, 6, 7):
            prompts = [" ".join([*words[row:], *words[:row]][:length]) for row in range(rows)]
            tiny.generate(prompts, max_tokens=9 + length, stop="")
            sizes.append([part._cache_size() for part in parts])
    more = np.subtract(sizes[-1], sizes[0])
    # They fill one, two or three rows of the decoder, which reads a power of two at a time.
    assert (more <= [2, 0, 4, 0, 0]).all(), sizes


def test_a_prompt_that_may_say_no_more_keeps_no_loop_going(tiny, monkeypatch):
    whole = tiny.generate(PROMPTS[:1], max_tokens=100, stop="")[0]
    stop, steps, decode = whole[0], [], decoding._decode

    def counting(*arguments, **options):
        found = decode(*arguments, **options)
        steps.append(int(found[2]))
        return found

    monkeypatch.setattr(decoding, "_decode", counting)
    tiny.generate([PROMPTS[0], PROMPTS[1]], max_tokens=[100, 2], stop=stop)
    assert sum(steps) == 1


def test_top_k_and_top_p_against_a_plain_reading():
    logits = np.log(np.asarray([[0.5, 0.05, 0.3, 0.15], [0.25, 0.25, 0.4, 0.1]], np.float32))

    def kept(top_k, top_p):
        found = sampling.truncate(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p))
        return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(found)]

    assert kept(0, 1.0) == [{0, 1, 2, 3}] * 2
    assert kept(1, 1.0) == [{0}, {2}]
    assert kept(9, 1.0) == [{0, 1, 2, 3}] * 2
    assert kept(0, 0.6) == [{0, 2}, {0, 2}]  # of equals, the first
    assert kept(0, 0.5)[0] == {0}
    assert kept(2, 0.9) == [{0, 2}, {0, 2}]
    even = sampling.truncate(jnp.zeros((1, 8)), jnp.int32(3), jnp.float32(1.0))
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(even)), [0, 1, 2])
    assert kept(0, 1e-6) == [{0}, {2}]


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]] * 4000))
    chosen = sampling.Sampling(temperature=1.0, rng=jax.random.key(0))
    tokens = sampling.pick(logits, jnp.int32(0), chosen.traced(4000, 4000), **chosen.static())
    share = np.bincount(np.asarray(tokens), minlength=3) / 4000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=0.03)  # 3.8 standard errors


@pytest.mark.parametrize("rows", [None, 64])
def test_every_step_draws_anew(rows):
    key = jax.random.key(0)
    chosen = sampling.Sampling(1.0, rng=key if rows is None else jax.random.split(key, rows))
    draw, logits = chosen.traced(64, 64), jnp.zeros((64, 50))
    first, second = (sampling.pick(logits, jnp.int32(n), draw, **chosen.static()) for n in (0, 1))
    assert np.mean(np.asarray(first) == np.asarray(second)) < 0.2  # 1 in 50 by chance


def test_a_prompt_with_a_key_of_its_own_draws_the_same_in_any_company(tiny):
    keys = jax.random.split(jax.random.key(1), len(PROMPTS))
    options = dict(temperature=1.0, max_tokens=4, stop=())
    said = tiny.generate(PROMPTS, rng=keys, **options)
    turned = tiny.generate(PROMPTS[::-1], rng=keys[::-1], **options)
    assert turned[::-1] == said
    raw = jax.random.key_data(keys)
    assert tiny.generate(PROMPTS, rng=raw, **options) == said
    assert tiny.generate(PROMPTS, rng=keys[::-1], **options) != said
    with pytest.raises(ValueError, match="2,. for 3 rows; pass a key for each"):
        tiny.generate(PROMPTS, rng=keys[:-1], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1.0), "at least 0"),
        (dict(temperature=float("nan")), "0 or finite"),
        (dict(temperature=float("inf")), "0 or finite"),
        (dict(temperature=1e-7), "at least 1e-06"),
        (dict(temperature=1.0, top_p=0.0), "top_p"),
        (dict(top_k=5), "set a temperature"),
        (dict(top_p=0.5), "set a temperature"),
        (dict(max_tokens=0), "max_tokens"),
    ],
)
def test_options_that_make_no_sense(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate(PROMPTS, **options)
    with pytest.raises(ValueError, match="every"):
        list(tiny.stream(PROMPTS, every=0))
    with pytest.raises(ValueError, match="batch"):
        tiny.generate(PROMPTS, batch=0)
    with pytest.raises(ValueError, match="2 numbers for 3 prompts"):
        tiny.generate(PROMPTS, max_tokens=[3, 4])
    with pytest.raises(ValueError, match="at least 1"):
        tiny.generate(PROMPTS, max_tokens=[3, 0, 4])
    with pytest.raises(ValueError, match="2 rows for 3 prompts"):
        tiny.generate(PROMPTS, tiny.model.condition(jnp.zeros((2, 16))))
    with pytest.raises(ValueError, match="2 rows for 3 prompts"):
        tiny.score(PROMPTS, [("new",)] * 3, tiny.model.condition(jnp.zeros((2, 16))))


def test_many_candidates_share_their_prompt(tiny, condition):
    """30 candidates that branch at different depths, in one row, equal each by itself."""
    tokenizer = tiny.decoder_tokenizer
    words = ["new", "true", "Japan", "France city", "new 1", "new 12", "0 0 1"]
    texts = [f"{a} {b}" for a in words for b in words[:4]] + ["new", "new 1"]
    together = tiny.score([PROMPTS[0]], [texts], condition.rows(jnp.asarray([0])))
    apart = [tiny.score([PROMPTS[0]], [(t,)], condition.rows(jnp.asarray([0])))[0, 0] for t in texts]
    np.testing.assert_allclose(together[0], apart, rtol=2e-5)
    trie, prompt = packing.Trie(), generate.prompt_ids(tokenizer, PROMPTS[0])
    packing.text(trie, prompt, [tokenizer.following(text) for text in texts], 0)
    alone_tokens = sum(len(tokenizer.ids(" " + text)) for text in texts)
    assert len(trie.token) - len(prompt) < alone_tokens / 2  # shared beginnings are computed once


def test_token_ids_go_on_without_a_stop(tiny):
    ids = [generate.prompt_ids(tiny.decoder_tokenizer, prompt) for prompt in PROMPTS]
    found = generate.continue_ids(tiny.model, ids, 8)
    assert found.shape == (3, 8)
    texts = tiny.generate(PROMPTS, max_tokens=8, stop="")
    for row, text in zip(found, texts, strict=True):
        assert tiny.decoder_tokenizer.decode(row).startswith(text)
    with pytest.raises(ValueError, match="no tokens"):
        generate.continue_ids(tiny.model, [[]], 4)
    for odd in (-1, tiny.model.decoder.config.vocab_size):
        with pytest.raises(ValueError, match="prompt 1 has token ids from"):
            generate.continue_ids(tiny.model, [[1], [1, odd]], 4)


def test_the_likeliest_is_argmax():
    logits = np.random.default_rng(0).integers(0, 4, (50, 9)).astype(np.float32)
    logits[1:3, 4] = np.inf, -np.inf
    np.testing.assert_array_equal(sampling.likeliest(jnp.asarray(logits)), logits.argmax(-1))
    broken = jnp.full((1, 9), jnp.nan)
    assert 0 <= int(sampling.likeliest(broken)[0]) < 9


def test_a_bare_decoder_speaks_as_the_base_model(tiny):
    said = generate.generate(tiny.model.decoder, tiny.decoder_tokenizer, ["Fact is"], max_tokens=6)
    assert said == tiny.generate(["Fact is"], max_tokens=6)
