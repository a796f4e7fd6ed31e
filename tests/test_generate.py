"""Scoring and cached decoding against plain, uncached loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf
from comparisons.generation import continue_ids
from flax import nnx
from tokenizers import decoders, models

from larimar_jax import decoding, generate, latent_layout, packing, scoring
from larimar_jax.config import AnswerCodeConfig
from larimar_jax.decoders import sampling
from larimar_jax.weights import Tokenizer

CODE = AnswerCodeConfig(positions=3, width=32, limit=20.0)
PROMPTS = ["Fact 1 is", "The capital of Japan is the city of", "new"]

both = pytest.mark.parametrize("conditioned", [True, False])


@pytest.fixture
def condition(tiny):
    latent = jax.random.normal(jax.random.key(0), (3, 16))
    # What memory reads where three answers are written: the last of another length than the rest.
    answers = latent_layout.pack_answers(CODE, [[5, 6, 7], [8], [9, 9]], 3)
    noise = 0.02 * jax.random.normal(jax.random.key(2), (3, 96))
    readout = latent_layout.encode_answers(CODE, jnp.asarray(answers)) + noise
    active = jnp.asarray([True, True, False])
    tokens = tiny.model.decoder.config.vocab_size
    evidence = latent_layout.decode_answers(CODE, readout, tokens, active)
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


def row(condition, number):
    return condition if condition is None else condition.rows(jnp.asarray([number], jnp.int32))


class _Numbers(Tokenizer):
    """A tokenizer for which a target is its tokens' numbers."""

    def following(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]


@both
def test_scores_equal_a_plain_loop_alone_and_together(tiny, condition, conditioned):
    """Of the likeliest tokens, of a mixture, and of any; accuracy is the share of likeliest ones."""
    condition = condition if conditioned else None
    names = [field.name for field in dataclasses.fields(Tokenizer)]
    tokenizer = _Numbers(*(getattr(tiny.decoder_tokenizer, name) for name in names))
    targets, losses = [], []
    for number, prompt in enumerate(PROMPTS):
        part, start = row(condition, number), generate.prompt_ids(tokenizer, prompt)
        answers, sums = ([], [], []), [0.0, 0.0, 0.0]
        for step in range(4):
            for column, answer in enumerate(answers):
                logits = logits_after(tiny, [*start, *answer], part, step)
                best = int(logits.argmax())
                token = (best, best if step in (0, 3) else (best + 1) % 300, 7 + step)[column]
                sums[column] -= float(jax.nn.log_softmax(logits)[token])
                answer.append(token)
        targets.append([" ".join(map(str, answer)) for answer in answers])
        losses.append([total / 4 for total in sums])
    judge = functools.partial(scoring.judge, tiny.model, tokenizer)
    scores = judge(PROMPTS, targets, condition)
    np.testing.assert_allclose(scores.loss, losses, rtol=2e-5)
    np.testing.assert_allclose(scores.accuracy[:, :2], [[1.0, 0.5]] * 3)
    np.testing.assert_array_equal(scores.accuracy, scores.hits.mean(axis=2))
    for number in range(3):
        alone = judge([PROMPTS[number]], [targets[number]], row(condition, number))
        np.testing.assert_allclose(scores.loss[number], alone.loss[0], rtol=2e-5)


@both
def test_greedy_decoding_equals_a_plain_loop(tiny, condition, conditioned):
    condition = condition if conditioned else None
    tokenizer = tiny.decoder_tokenizer
    texts = tiny.generate(PROMPTS, condition, max_tokens=6, stop="")
    for number, prompt in enumerate(PROMPTS):
        ids = [tokenizer.bos, *tokenizer.ids(prompt)]
        start = len(ids)
        for step in range(6):
            token = int(logits_after(tiny, ids, row(condition, number), step).argmax())
            if token == tokenizer.eos:
                break
            ids.append(token)
        assert texts[number] == tokenizer.decode(ids[start:])


@both
@pytest.mark.parametrize("batch", [1, 2, 128])
def test_a_prompt_says_the_same_in_any_batch_up_to_its_limit(tiny, condition, conditioned, batch):
    rows, limits = [0, 1, 2, 1, 0], [7, 2, 4, 9, 1]
    whole = condition.rows(jnp.asarray(rows)) if conditioned else None
    prompts = [PROMPTS[number] for number in rows]
    texts = tiny.generate(prompts, whole, max_tokens=limits, stop="", batch=batch)
    for number, limit, text in zip(rows, limits, texts, strict=True):
        part = row(condition, number) if conditioned else None
        assert text == tiny.generate([PROMPTS[number]], part, max_tokens=limit, stop="")[0]


def test_prompts_that_begin_alike_are_read_once(tiny, monkeypatch):
    sizes, hidden = [], packing._hidden

    def counting(graph, state, tokens, *arguments, **options):
        sizes.append(tokens.size)
        return hidden(graph, state, tokens, *arguments, **options)

    monkeypatch.setattr(packing, "_hidden", counting)
    alone = tiny.generate([PROMPTS[1]], max_tokens=3)
    assert tiny.generate([PROMPTS[1]] * 20, max_tokens=3) == alone * 20
    assert sizes[1] == sizes[0]


@pytest.mark.parametrize(
    ("part", "broken"), [("key", np.nan), ("value", np.inf), ("embedding", 3e38)]
)
def test_a_broken_row_leaves_the_others_as_they_are(tiny, condition, part, broken):
    """Prompts share rows of the decoder, and their beginnings; what is not finite is one's own."""
    hurt = condition.rows(jnp.asarray([0, 0, 1]))
    leaf = getattr(hurt.prefix, part)
    leaf = leaf.at[2].set(broken) if part == "embedding" else leaf.at[:, 2].set(broken)
    hurt = dataclasses.replace(hurt, prefix=dataclasses.replace(hurt.prefix, **{part: leaf}))
    draw = np.random.default_rng(0)
    for lengths in ((59, 41, 11), (5, 6, 7), (61, 62, 3)):
        rows = [[1, *draw.integers(2, 300, length - 1).tolist()] for length in lengths]
        tokens = continue_ids(tiny.model, rows, 6, hurt)
        for number in (0, 1):
            alone = continue_ids(tiny.model, [rows[number]], 6, row(condition, 0))
            np.testing.assert_array_equal(tokens[number], alone[0])


def test_what_a_prompt_draws_depends_on_its_key_and_not_on_its_company(tiny):
    def draw(rng, rows=slice(None), **options):
        options = dict(temperature=1.5, max_tokens=5, stop=()) | options
        return tiny.generate(PROMPTS[rows], rng=rng, **options)

    single, keys = jax.random.key(0), jax.random.split(jax.random.key(1), len(PROMPTS))
    limits = dict(max_tokens=[5, 2, 6])
    assert draw(single, **limits) == draw(single, **limits, batch=2) != draw(keys[0], **limits)
    texts, back = draw(keys), slice(None, None, -1)
    assert draw(keys[back], back)[back] == texts == draw(jax.random.key_data(keys))
    assert draw(keys[back]) != texts
    with pytest.raises(ValueError, match="2,. for 3 rows; pass a key for each"):
        draw(keys[:-1])


def test_a_stop_text_ends_a_continuation(tiny):
    whole = tiny.generate(PROMPTS, max_tokens=8, stop="")
    stop = whole[0].lstrip()[2]
    begin = whole[0].index(whole[0].lstrip()) + 1
    stopped = whole[0][: whole[0].index(stop, begin)]
    assert tiny.generate(PROMPTS, max_tokens=8, stop=stop)[0] == stopped


def test_a_stop_counts_only_after_a_text_and_after_what_is_to_be_whole(tiny):
    tokens = tiny.decoder_tokenizer.ids("\n \nFact\nnew\nis")
    reader, text = generate._Reader(tiny.decoder_tokenizer, "\n"), tiny.decoder_tokenizer.decode
    assert reader.read(tokens)[:2] == ("\n \nFact", 7)
    assert [reader.read(tokens[:n])[0] for n in range(4)] == [text(tokens[:n]) for n in range(4)]
    whole = next(n for n in range(len(tokens)) if text(tokens[:n]).endswith("new"))
    assert reader.read(tokens, whole)[0] == "\n \nFact\nnew"
    reader = generate._Reader(tiny.decoder_tokenizer, ("<PAD>", "new"))
    ended = reader.read([*tokens[:2], tiny.decoder_tokenizer.pad, *tokens])
    assert ended == (text(tokens[:2]), len(text(tokens[:2])), 2, True), "a special token's name"


def test_a_loop_ends_at_a_stop_after_a_text(tiny, monkeypatch):
    """The tokens that are drawn, one a step: a line's end, a word, a line's end, …"""
    (end,), (word,) = (tiny.decoder_tokenizer.ids(text)[:1] for text in ("\n", "Fact"))
    drawn = jnp.asarray([end, word, end, word, end, word], jnp.int32)
    monkeypatch.setattr(
        decoding, "_next_token", lambda model, hidden, last, step, rows: drawn[step] + 0 * last
    )
    for part in ("_begin", "_decode"):
        monkeypatch.setattr(decoding, part, decoding.__dict__[part].__wrapped__)
    lengths = []
    for after in (0, 3):
        options = generate.Options(max_tokens=6, stop_after=after)
        reader = generate._Reader(tiny.decoder_tokenizer, "\n")
        _, start = generate._start(tiny.model, reader, [[1, 2]], None, options)
        decoding_ = start([0])
        decoding_.advance(5)
        lengths.append(len(decoding_.tokens[0]))
    assert lengths == [3, 5]


def test_a_prompt_without_room_may_lose_its_beginning(tiny):
    words = "Fact 1 is new " * 60
    (whole,) = tiny.generate([words], max_tokens=4, stop="", cut=True)
    tokens = tiny.decoder_tokenizer.ids(words.rstrip())
    end = [[tiny.decoder_tokenizer.bos, *tokens[-(127 - 4 - 1) :]]]
    ids = continue_ids(tiny.model, end, 4)[0]
    assert len(tokens) > 127 and whole == tiny.decoder_tokenizer.decode(ids)
    with pytest.raises(generate.PromptTooLong):
        tiny.generate([words], max_tokens=4, stop="")


@pytest.mark.parametrize("every", [1, 3, 50])
@pytest.mark.parametrize("stop", ["", "a", ("ef", "n"), "drawn"])
def test_streamed_pieces_join_to_the_whole(tiny, condition, every, stop):
    options = dict(max_tokens=14, stop=stop)
    if stop == "drawn":
        options |= dict(temperature=1.5, top_k=20, rng=jax.random.key(3), stop="")
    whole = tiny.generate(PROMPTS, condition, **options)
    pieces = list(tiny.stream(PROMPTS, condition, every=every, **options))
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == whole
    *_, last = generate.pieces(tiny.model, tiny.decoder_tokenizer, PROMPTS, condition, **options)
    assert {piece.ending for piece in last} <= {"stop", "length"}
    assert all(len(piece.tokens) == 14 for piece in last if piece.ending == "length")
    if every == 1 and stop == "":
        assert len(pieces) > 3


@pytest.mark.parametrize("drawn", [False, True])
def test_rows_that_join_and_leave_are_continued_as_by_themselves(tiny, condition, drawn):
    """Three begin at different times and with different room; the others' shapes change by it."""
    limits, begin, texts = [14, 40, 9], [2, 0, 5], ["", "", ""]
    how = (
        dict(temperature=1.5, top_k=9, rng=jax.random.split(jax.random.key(0), 1)) if drawn else {}
    )
    options = [dict(how, stop="a", max_tokens=limits[n], stop_after=n) for n in range(3)]
    own = [condition.rows(jnp.asarray([n])) for n in range(3)]
    # Fewer places of evidence: what lacks is no evidence.
    short = latent_layout.TokenEvidence(*(a[:, :2] for a in own[0].evidence.__dict__.values()))
    own[0] = dataclasses.replace(own[0], evidence=short)
    running, rows = None, []
    for time in range(60):
        parts = [(running, [n for n, row in enumerate(rows) if row is not None])] if rows else []
        rows = [row for row in rows if row is not None]
        for n in range(3):
            if begin[n] == time:
                args = (tiny.model, tiny.decoder_tokenizer, [PROMPTS[n]], own[n])
                parts.append((generate.Continuations(*args, **options[n]), [0]))
                rows.append(n)
        if not rows:
            break
        running = generate.Continuations.join(parts, 4 if time % 2 else len(rows))
        running.advance(1 + time % 3)
        for at, piece in enumerate(running.gained()):
            texts[rows[at]] += piece.text
            rows[at] = rows[at] if piece.ending is None else None
    whole = [tiny.generate([PROMPTS[n]], own[n], **options[n])[0] for n in range(3)]
    assert texts == whole and len({*texts}) == 3


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A SentencePiece-like tokenizer: words, and a token for each byte."""
    names = ["<s>", "</s>", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = hf.Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return Tokenizer(backend, 0, 1, 1)


@pytest.mark.parametrize("stop", ["", "\n", ("\nx", "é\n")])
@pytest.mark.parametrize(
    "content",
    [
        "é東".encode()[:-1],
        "é\n東".encode()[:-2],
        b"\xff\xc3\xa9\xffx",
        "a😀\nx".encode() + b"\xf0\x9f",
        "né 東京",  # by the tokenizer of the tiny model, which merges bytes
    ],
)
def test_bytes_of_no_character_are_held_back_alone(tiny, byte_tokenizer, content, stop):
    stops = (stop,) if isinstance(stop, str) else stop
    if isinstance(content, str):
        tokenizer, expected = tiny.decoder_tokenizer, content
        ids = tokenizer.ids(content)
    else:
        tokenizer, ids = byte_tokenizer, [2, *(3 + byte for byte in content)]
        expected = "a" + content.decode("utf-8", "replace")
    reader = generate._Reader(tokenizer, stop)
    whole = reader.read(ids)[0]
    ends = [at for text in stops if text and (at := expected.find(text, 1)) > 0]
    assert whole == expected[: min(ends, default=None)]
    before = ""
    for length in range(1, len(ids) + 1):
        text, settled, *_ = reader.read(ids[:length])
        assert text[:settled].startswith(before)
        before = text[:settled]
    assert whole.startswith(before)


def test_another_length_or_number_of_rows_seldom_compiles(tiny):
    words = "Fact 1 is the capital of Japan".split()
    parts = [getattr(decoding, name) for name in ("_empty", "_place", "_begin", "_decode")]
    parts = [packing._hidden, *parts]
    sizes = []
    for rows in (5, 6):
        for length in (5, 6, 7):
            prompts = [" ".join([*words[n:], *words[:n]][:length]) for n in range(rows)]
            tiny.generate(prompts, max_tokens=9 + length, stop="")
            sizes.append([part._cache_size() for part in parts])
    more = np.subtract(sizes[-1], sizes[0])
    # They fill one, two or three rows of the decoder, which reads a power of two at a time.
    assert (more <= [2, 0, 4, 0, 0]).all(), sizes


def test_a_prompt_that_may_say_no_more_keeps_no_loop_going(tiny, monkeypatch):
    whole = tiny.generate(PROMPTS[:1], max_tokens=100, stop="")[0]
    steps, decode = [], decoding._decode

    def counting(*arguments, **options):
        results = decode(*arguments, **options)
        steps.append(int(results[2]))
        return results

    monkeypatch.setattr(decoding, "_decode", counting)
    stop = tiny.decoder_tokenizer.decode(tiny.decoder_tokenizer.ids(whole)[1:2])
    tiny.generate(PROMPTS[:2], max_tokens=[100, 2], stop=stop)
    assert sum(steps) == 1


def test_top_k_and_top_p_leave_the_likeliest_of_equals_the_first():
    logits = np.log(np.asarray([[0.5, 0.05, 0.3, 0.15], [0.25, 0.25, 0.4, 0.1]], np.float32))

    def left(top_k, top_p, logits=logits):
        cut = sampling.truncate(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p))
        return [set(np.flatnonzero(np.isfinite(tokens))) for tokens in np.asarray(cut)]

    assert left(0, 1.0) == left(9, 1.0) == [{0, 1, 2, 3}] * 2
    assert left(1, 1.0) == left(0, 1e-6) == [{0}, {2}]
    assert left(0, 0.6) == left(2, 0.9) == [{0, 2}, {0, 2}]
    assert left(0, 0.5)[0] == {0}
    assert left(3, 1.0, np.zeros((1, 8), np.float32)) == [{0, 1, 2}]


@pytest.mark.parametrize("one_key", [True, False])
def test_draws_follow_the_distribution_and_every_step_draws_anew(one_key):
    rng = jax.random.key(0) if one_key else jax.random.split(jax.random.key(0), 4000)
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]] * 4000))
    draw = generate.sampling(1.0, 0, 1.0, rng, 4000)
    draw = draw._replace(keys=draw.keys[:4000])
    first, second = (np.asarray(sampling.pick(logits, jnp.full(4000, n), draw)) for n in (0, 1))
    share = np.bincount(first, minlength=3) / 4000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=0.03)  # 3.8 standard errors
    assert abs(np.mean(first == second) - 0.38) < 0.03  # 0.5² + 0.3² + 0.2² by chance


def test_the_likeliest_is_argmax():
    logits = np.random.default_rng(0).integers(0, 4, (50, 9)).astype(np.float32)
    logits[1:3, 4] = np.inf, -np.inf
    np.testing.assert_array_equal(sampling.likeliest(jnp.asarray(logits)), logits.argmax(-1))
    assert 0 <= int(sampling.likeliest(jnp.full((1, 9), jnp.nan))[0]) < 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1.0), "at least 0"),
        (dict(temperature=float("nan")), "0 or finite"),
        (dict(temperature=float("inf")), "0 or finite"),
        (dict(temperature=1e-7), "at least 1e-06"),
        (dict(temperature=1.0), "needs rng"),
        (dict(temperature=1.0, top_p=0.0), "top_p"),
        (dict(top_k=5), "set a temperature"),
        (dict(top_p=0.5), "set a temperature"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_tokens=[3, 4]), "2 numbers for 3 prompts"),
        (dict(max_tokens=[3, 0, 4]), "at least 1"),
        (dict(batch=0), "batch"),
        (dict(condition=2), "2 rows for 3 prompts"),
    ],
)
def test_options_that_make_no_sense(tiny, options, message):
    if "condition" in options:
        options = dict(condition=tiny.model.condition(jnp.zeros((options["condition"], 16))))
        with pytest.raises(ValueError, match=message):
            tiny.score(PROMPTS, [("new",)] * 3, **options)
    with pytest.raises(ValueError, match=message):
        tiny.generate(PROMPTS, **options)
    with pytest.raises(ValueError, match="every"):
        list(tiny.stream(PROMPTS, every=0))


def test_a_text_that_can_not_be_decoded_is_named(tiny, monkeypatch):
    with pytest.raises(ValueError, match="empty"):
        tiny.score(["Fact"], [(" ",)])
    with pytest.raises(generate.PromptTooLong, match="decoder"):
        tiny.generate(["Fact " * 200], max_tokens=4)
    with pytest.raises(generate.PromptTooLong, match="Shorten"):
        tiny.score(["Fact " * 200], [("new",)])
    with pytest.raises(ValueError, match="as many rows"):
        tiny.score(["Fact"], [("new",), ("true",)])
    with pytest.raises(TypeError, match="list of texts"):
        tiny.generate("Fact")
    assert tiny.score([], []).shape == (0, 0) and tiny.generate([]) == []
    # Up to the last position, whatever the buckets.
    room = tiny.model.decoder.config.max_length - 1
    longest = "0" * (room - 4 - 1)
    assert len(tiny.decoder_tokenizer.ids(longest)) == room - 5
    assert len(tiny.generate([longest], max_tokens=4)) == 1
    monkeypatch.setattr(type(tiny.decoder_tokenizer), "following", lambda *_: [])
    with pytest.raises(ValueError, match="Target 0 of prompt 'Fact', 'new', has no tokens"):
        tiny.score(["Fact"], [("new",)])


def test_a_bare_decoder_speaks_as_the_base_model(tiny):
    texts = generate.generate(tiny.model.decoder, tiny.decoder_tokenizer, ["Fact is"], max_tokens=6)
    assert texts == tiny.generate(["Fact is"], max_tokens=6)
