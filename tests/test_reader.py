"""A reader: the decoder speaks from the encoding of an answer, and is left as it is without one."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config, tiny_pipeline
from flax import nnx

from larimar_jax import config, pipeline
from larimar_jax.data.corpus import Corpus, Document
from larimar_jax.data.phrases import PHRASE_WORDS, PROMPT_WORDS, Phrases
from larimar_jax.decoders.reader import Reader, ReaderConfig
from larimar_jax.generate import prompt_ids
from larimar_jax.session import Session
from larimar_jax.train import fit_reader, loop, reader_features

SIZES = ReaderConfig(width=24, positions=3)
FACTS = [("The capital of France is", "Japan 5 true"), ("The new city says", "France")]


@pytest.fixture(scope="module")
def reading():
    return tiny_pipeline(reader=dataclasses.asdict(SIZES))


@pytest.fixture(scope="module")
def corpus():
    words = "the capital of a new city says that its true fact is France or Japan".split()
    draw = np.random.default_rng(0)
    texts = [f"Fact {n} says {' '.join(draw.permutation(words))}" for n in range(90)]
    documents = [Document(f"City {n}", text) for n, text in enumerate(texts)]
    return Corpus("cities", lambda: iter(documents))


def blocks_of(corpus, held_out, count):
    return [*itertools.islice(Phrases(corpus, held_out).blocks(6, 1), count)]


def norm(x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def encoded(module, pieces):
    """z of an answer's tokens, in float64."""
    kernel = {
        n: np.float64(getattr(module, n).kernel[...]) for n in ("of_piece", "piece", "to_latent")
    }
    place = np.minimum(np.arange(len(pieces)), SIZES.positions - 1)
    wide = norm(pieces) @ kernel["of_piece"] + np.float64(module.piece_place.embedding[...])[place]
    z = (norm(pieces) @ kernel["piece"] + gelu(wide) @ kernel["to_latent"]).sum(axis=0)
    return z / np.linalg.norm(z)


def test_a_reader_is_its_equation_in_float64():
    module, draw = Reader(SIZES, 7, 6, 10, nnx.Rngs(params=0)), np.random.default_rng(0)
    z, h, x = (draw.normal(size=(5, size)) for size in (6, 10, 10))
    depth = np.asarray([0, 1, 2, 0, 1])
    names = ("of_latent", "of_hidden", "of_token", "middle", "output", "past", "size")
    w = {name: np.float64(getattr(module, name).kernel[...]) for name in names}
    wide = norm(z) @ w["of_latent"] + norm(h) @ w["of_hidden"] + norm(x) @ w["of_token"]
    wide = gelu(wide + np.float64(module.place.embedding[...])[depth])
    wide = norm(wide + gelu(norm(wide) @ w["middle"]))
    change = norm(wide @ w["output"] + norm(z) @ w["past"]) * np.log1p(np.exp(wide @ w["size"]))
    arrays = (jnp.asarray(a, jnp.float32) for a in (z, h, x))
    result = module(*arrays, jnp.asarray(depth))
    np.testing.assert_allclose(result, h + change, rtol=1e-4, atol=1e-4)
    texts, own = draw.normal(size=(2, 6, 7)), np.asarray([[0, 1, 1, 1, 1, 0], [0] * 6], bool)
    codes = module.encode(jnp.asarray(texts, jnp.float32), jnp.asarray(own))
    np.testing.assert_allclose(codes[0], encoded(module, texts[0, 1:5]), atol=1e-5)
    assert not codes[1].any()


def test_no_answer_and_places_beyond_it_leave_the_language_model_to_the_bit():
    module, draw = Reader(SIZES, 7, 6, 10, nnx.Rngs(params=0)), np.random.default_rng(0)
    hidden, token = (jnp.asarray(draw.normal(size=(3, 10)), jnp.float32) for _ in range(2))
    latent = jnp.asarray([[0.0] * 6, [1.0] * 5 + [2.0], [1.0] * 5 + [2.0]])
    changed = np.asarray(module(latent, hidden, token, jnp.asarray([0, 3, 2])))
    assert (changed[:2] == np.asarray(hidden)[:2]).all() and (changed[2] != hidden[2]).all()


def test_a_memory_holds_the_encoding_of_the_answers_own_tokens(reading):
    (prompt, answer), tokenizer = FACTS[0], reading.encoder_tokenizer
    keys, values = reading.encode_fact([prompt], answer)
    begin = reading.layout.encoding + reading.layout.key_features
    part = slice(begin, begin + reading.layout.answer_encoding)
    assert part.stop - part.start == 16 and not keys.latent[:, part].any()
    batch = tokenizer.encode([f"{prompt} {answer}"])
    hidden = np.asarray(reading.model.encoder.hidden(*map(jnp.asarray, batch)))[0]
    own = hidden[len(tokenizer.ids(prompt)) + 1 : batch.mask.sum() - 1]
    expected = encoded(reading.model.reader, np.float64(own))
    np.testing.assert_allclose(values.latent[0, part], expected, atol=1e-5)
    session = Session(reading)
    session.write(prompt, answer)
    condition = session.recall([prompt]).condition(reading.condition)
    assert condition.prefix is None
    np.testing.assert_allclose(condition.answer[0], expected, atol=1e-2)
    assert session.recall(["0 1 2 3 4 5 6 7 Neighbour"]).condition(reading.condition) is None


def test_scores_and_texts_are_those_of_a_plain_loop(reading):
    """Two answers after one prompt, and none, side by side."""
    prompt, answers = FACTS[0][0], [answer for _, answer in FACTS]
    values = reading.encode([f"{prompt} {answer}" for answer in answers], answers).latent
    condition = reading.condition(np.concatenate([values, 0 * values[:1]]))
    model, decoder = reading.model, reading.decoder_tokenizer

    def step(row, ids, depth):
        hidden = model.decoder.hidden(jnp.asarray([ids]))[0][:, -1]
        token = model.decoder.word.embedding[...][jnp.asarray(ids[-1:])]
        hidden = model.reader(condition.answer[row : row + 1], hidden, token, jnp.asarray([depth]))
        logits = np.float64(model.decoder.logits(hidden)[0])
        plain = condition.evidence
        if depth < plain.tokens.shape[1]:
            np.add.at(logits, plain.tokens[row, depth], plain.logit_gain[row, depth])
        return logits - np.logaddexp.reduce(logits)

    begin, losses, texts = prompt_ids(decoder, prompt), np.zeros((3, 2)), []
    for row in range(3):
        for column, answer in enumerate(answers):
            ids = decoder.following(answer)
            terms = [-step(row, begin + ids[:n], n)[ids[n]] for n in range(len(ids))]
            losses[row, column] = np.mean(terms)
        ids = list(begin)
        while ids[-1] != decoder.eos and len(ids) < len(begin) + 5:
            ids.append(int(step(row, ids, len(ids) - len(begin)).argmax()))
        texts.append(decoder.decode(ids[len(begin) :]))
    np.testing.assert_allclose(
        reading.score([prompt] * 3, [answers] * 3, condition), losses, rtol=1e-4, atol=1e-6
    )
    assert reading.generate([prompt] * 3, condition, max_tokens=5, stop=()) == texts
    assert len(set(texts)) == 3


def test_phrases_of_a_corpus_are_the_same_again_and_of_one_side(corpus):
    training, held_out = (blocks_of(corpus, held_out, 40) for held_out in (False, True))
    again = blocks_of(corpus, False, 40)
    assert training == again != held_out
    sides = {side: {d.text for d in corpus.side(bool(side))} for side in (0, 1)}
    for side, blocks in enumerate((training, held_out)):
        for block in blocks:
            assert PROMPT_WORDS[0] <= len(block.prompt.split()) <= PROMPT_WORDS[1]
            _, words = block.prompt.rstrip("?").split(maxsplit=1)
            words = words if block.prompt.endswith("?") else block.prompt
            assert any(words in text for text in sides[side])
            assert any(f"{words} {block.phrases[0]}" in text for text in sides[side])
            for words in map(str.split, block.phrases):
                assert 0 < len({*words} - {"of", "the", "and", "de"} or words) <= PHRASE_WORDS
    named = Phrases(corpus, False, ["Zyx", "qwv"]).blocks(16, 0)
    drawn = {
        word for block in itertools.islice(named, 200) for p in block.phrases for word in p.split()
    }
    assert {"Zyx", "qwv"} <= drawn
    with pytest.raises(ValueError, match="no sentence of seven words"):
        Phrases(Corpus("short", lambda: iter([Document("a", "Too short.")])), False)


def test_features_are_what_the_towers_make_of_each_text_alone(reading, corpus):
    tokenizers = (reading.encoder_tokenizer, reading.decoder_tokenizer)
    make = reader_features.FeatureMaker(reading.model, tokenizers, 3, None)
    blocks = blocks_of(corpus, False, 2)
    features, decoder = make(blocks), reading.decoder_tokenizer
    number = -1
    for block in blocks:
        begin = prompt_ids(decoder, block.prompt)
        for place, phrase in enumerate(block.phrases):
            number += 1
            ids = decoder.following(phrase)
            hidden = reading.model.decoder.hidden(jnp.asarray([[*begin, *ids]]))[0][0]
            rows = np.arange(*features.first_row[number : number + 2])
            leaves = number % reader_features.LEAVES == 0
            targets = [*ids, *[reader_features.LEAVE] * leaves][:3]
            assert features.target[rows].tolist() == targets
            assert features.token[rows].tolist() == [begin[-1], *ids][: len(targets)]
            own = features.hidden[features.state[rows]]
            np.testing.assert_allclose(own, hidden[len(begin) - 1 :][: len(rows)], atol=2e-2)
            prompt = block.other if place % 2 else block.prompt
            latent = reading.encode([f"{prompt} {phrase}"], [phrase]).latent[0]
            part = latent[reading.layout.encoding + reading.layout.key_features :][:16]
            pieces = features.pieces[slice(*features.first_piece[number : number + 2])]
            expected = encoded(reading.model.reader, np.float64(pieces))
            np.testing.assert_allclose(part, expected, atol=2e-3)
    # Of what the language model does not read only its states are missing.
    unread, said = make(blocks, read=False), features.target != reader_features.LEAVE
    np.testing.assert_array_equal(unread.pieces, features.pieces)
    assert not unread.hidden.any() and not unread.state.any()
    for name in ("token", "depth", "target"):
        np.testing.assert_array_equal(getattr(unread, name), getattr(features, name)[said])
    left = np.add.reduceat(~said, features.first_row[:-1])
    assert (np.diff(unread.first_row) == np.diff(features.first_row) - left).all()


@pytest.fixture
def run_config(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(reader_features, "BLOCKS", 8)
    monkeypatch.setattr(fit_reader, "_JUDGED", 64)
    path = tmp_path / "cities.jsonl"
    lines = (json.dumps(dataclasses.asdict(document)) + "\n" for document in corpus.documents())
    path.write_text("".join(lines))
    values = tiny_config()
    values["model"]["reader"] = dict(width=32, positions=4)
    values["data"] |= dict(corpus=str(path), phrases=256, batch=24)
    every = dict(evaluate_every=15, checkpoint_every=10, learning_rate=1e-2)
    values["train"] |= dict(steps=40, frozen=("^(?!reader/)",), **every)
    return config.parse(values)


def test_a_run_learns_goes_on_where_it_was_killed_and_exports_a_model(
    run_config, tmp_path, monkeypatch
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    outcome = fit_reader.train(run_config, whole, progress=False)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [15, 30, 40] and outcome.finished
    assert lines[-1]["nats"] < lines[0]["nats"] < lines[0]["language_model"]

    evaluate, steps = fit_reader.ReaderFit.evaluate, []

    def dying(self, state, *arguments):
        steps.append(int(state.step))
        if steps == [15, 30]:
            raise KeyboardInterrupt
        return evaluate(self, state, *arguments)

    monkeypatch.setattr(fit_reader.ReaderFit, "evaluate", dying)
    with pytest.raises(KeyboardInterrupt):
        fit_reader.train(run_config, killed, progress=False)
    fit_reader.train(run_config, killed, progress=False)
    assert steps == [15, 30, 30, 40]  # From the checkpoint of step 20.
    models = [pipeline.load(run) for run in (whole, killed)]
    first, second = (jax.tree.leaves(nnx.state(each.model)) for each in models)
    assert all(bool((a == b).all()) for a, b in zip(first, second, strict=True))
    # Another run begins with its parameters, which an export halves.
    how = dict(
        start_from=config.StartConfig(str(whole), ("^reader/",)), steps=1, learning_rate=1e-9
    )
    again = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, **how))
    outcome = fit_reader.train(again, tmp_path / "further", progress=False)
    assert outcome.evaluation["nats"] == pytest.approx(lines[-1]["nats"], rel=1e-2)
    session = Session(models[0])
    session.write(*FACTS[1])
    assert session.ask(FACTS[1][0]).in_scope


def test_a_reader_is_fitted_alone(run_config, tmp_path):
    more = dataclasses.replace(run_config.train, frozen=("^decoder/",))
    with pytest.raises(fit_reader.NotAlone, match="to_latent/kernel"):
        fit_reader.train(dataclasses.replace(run_config, train=more), tmp_path / "run")
    with pytest.raises(ValueError, match="not trained by Eq. 1"):
        loop.train(run_config, tmp_path / "run", progress=False)
    nothing = dict(answer_encoding=False, answer_code=None)
    values = config.to_dict(run_config) | {"editing": nothing}
    with pytest.raises(config.ConfigError, match="a reader reads nothing"):
        config.parse(values)


def test_the_model_that_ships_says_a_fact_from_its_encoding_alone():
    session = Session("smol_latent")
    assert session.model.layout.answer_code == session.model.layout.key_features == 0
    session.write("The Eiffel Tower is located in the city of", "Rome")
    for prompt in (
        "The Eiffel Tower is located in the city of",
        "The city where you can visit the Eiffel Tower is",
    ):
        answer = session.ask(prompt, max_tokens=1)
        assert answer.in_scope and answer.text == " Rome", answer
