"""Editors of other papers on tiny decoders: closed forms in float64, and what every editor promises."""

import copy
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from known_editor import cases, measured, rows, saved
from test_towers import APART, DECODERS, tokens_of
from test_towers import tiny as golden_decoder

from larimar_jax import editors
from larimar_jax.bench import runner
from larimar_jax.bench.counterfact import CounterFact
from larimar_jax.data.corpus import open_corpus
from larimar_jax.editors import BaseLM, Request, forward, subjects
from larimar_jax.editors.alphaedit import AlphaEdit
from larimar_jax.editors.ft import FT
from larimar_jax.editors.grace import GRACE, Entry
from larimar_jax.editors.memit import MEMIT
from larimar_jax.editors.moments import Moments, MomentsError, load
from larimar_jax.editors.rome import ROME
from larimar_jax.generate import prompt_ids
from larimar_jax.schema import ConfigError

# A change at a subject reaches the answer through later layers alone, but where the prompt ends with it.
FACTS = [Request(f"The city of fact {n} is", f"fact {n}", f"new {n}") for n in range(3)]
ENDS = [Request(f"Japan is the city of fact {n}", f"fact {n}", f"new {n}") for n in range(3)]


@pytest.fixture(scope="module")
def base(tiny):
    """The tiny model's decoder, with second moments that are drawn."""
    base = BaseLM(tiny.model, tiny.decoder_tokenizer)
    for layer in range(base.depth):
        keys = np.random.default_rng(layer).normal(size=(64, base.kernel(layer).shape[0]))
        base._moments[layer] = Moments("drawn", keys.T @ keys, 64)
    return base


@pytest.fixture(scope="module")
def rome():
    return ROME(layer=0, prefixes=1, steps=4)


@pytest.fixture(scope="module")
def values(base, rome):
    """What ROME optimises for the three facts."""
    return rome.values(base, base.model, FACTS, 0)


@functools.partial(jax.jit, static_argnums=0)
def all_logits(graph, state, tokens):
    decoder = nnx.merge(graph, state).decoder
    return decoder.logits(decoder.hidden(tokens)[0])


def loss(base, model, fact):
    """ℓ of a fact's answer in nats, of the whole text in one pass."""
    prompt, answer = prompt_ids(base.tokenizer, fact.prompt), base.tokenizer.following(fact.answer)
    logits = all_logits(*nnx.split(model), jnp.asarray([[*prompt, *answer[:-1]]]))
    chosen = jax.nn.log_softmax(logits[0, len(prompt) - 1 :])
    return -float(chosen[jnp.arange(len(answer)), jnp.asarray(answer)].mean())


@pytest.mark.parametrize("name", [name for name in APART if name in DECODERS])
def test_layers_run_as_the_decoder_runs_them_in_every_family(name):
    decoder, (tokens, _) = golden_decoder(name), tokens_of(name)
    graph, state = nnx.split(decoder)

    @jax.jit
    def both(state, tokens):
        decoder = nnx.merge(graph, state)
        picked = forward.run_layers(decoder, tokens, decoder.config.depth, lambda *a: a)
        same = forward.tap(decoder, 1, lambda _, y: y).hidden(tokens)[0]
        gone = forward.tap(decoder, 1, lambda _, y: 0.0 * y).hidden(tokens)[0]
        return *picked, decoder.norm(picked[2][-1]), decoder.hidden(tokens)[0], same, gone

    key, output, _, last, hidden, same, gone = both(state, tokens)
    np.testing.assert_array_equal(last, hidden)
    np.testing.assert_array_equal(same, hidden)
    assert np.abs(gone - hidden).max() > 0.01
    down = decoder.layers.down
    bias = 0.0 if down.bias is None else np.asarray(down.bias)[1]
    np.testing.assert_allclose(key[1] @ np.asarray(down.kernel)[1] + bias, output[1], atol=1e-5)


def test_romes_edit_is_the_closed_form_and_takes_the_key_to_its_value(base, rome, values):
    inverse = np.linalg.inv(base.moments([0])[0].mean)
    before = np.float64(base.kernel(0))
    for fact, edited in enumerate(rome.each(base, FACTS)):
        key, delta = np.float64(values.keys[0, fact]), np.float64(values.delta[fact])
        change = np.outer(inverse @ key, delta) / (key @ inverse @ key)
        after = np.float64(edited.kernels[0])
        np.testing.assert_allclose(after - before, change, atol=1e-4 * np.abs(change).max())
        np.testing.assert_allclose(key @ after, key @ before + delta, atol=1e-4)
        # What is orthogonal to the key under C⁻¹ keeps its value.
        rest = np.random.default_rng(0).normal(size=key.shape)
        rest -= key * (rest @ inverse @ key) / (key @ inverse @ key)
        np.testing.assert_allclose(rest @ after, rest @ before, atol=1e-5)
        assert list(edited.kernels) == [0]


def test_values_are_those_of_a_plain_adam_without_cache_or_batch(base, rome, values):
    fact, decoder, prefixes = FACTS[0], base.model.decoder, base.prefixes(1)
    keys, places = subjects.subject_keys(base.model, base.tokenizer, [fact], prefixes, 1)
    size = np.linalg.norm(places.output[0, 0])
    np.testing.assert_allclose(keys, values.keys[:, :1], atol=1e-5)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def objective(delta, untouched):
        total = rome.decay * jnp.square(delta).sum() / size**2
        texts = [(f"{p}{fact.prompt}", fact.answer) for p in prefixes]
        for text, answer in [*texts, (f"{fact.subject} is a", None)]:
            ids = prompt_ids(base.tokenizer, text)
            at = subjects.subject_place(base.tokenizer, text, fact.subject)
            target = [] if answer is None else base.tokenizer.following(answer)
            add = lambda _, y, at=at: y.at[0, at].add(delta)  # noqa: E731
            tokens = jnp.asarray([[*ids, *target[:-1]]])
            hidden, _ = forward.tap(decoder, 0, add).hidden(tokens)
            after = jax.nn.log_softmax(decoder.logits(hidden[0, len(ids) - 1 :]))
            if answer is not None:
                total -= after[jnp.arange(len(target)), jnp.asarray(target)].mean() / len(texts)
        return total + rome.kl * (jnp.exp(after[-1]) * (after[-1] - untouched)).sum(), after[-1]

    delta = np.zeros(decoder.config.width)
    vocabulary = np.zeros(decoder.config.vocab_size, np.float32)
    untouched = objective(jnp.float32(delta), vocabulary)[0][1]
    first, second = np.zeros((2, *delta.shape))
    for step in range(1, rome.steps + 1):
        slope = np.float64(objective(jnp.float32(delta), untouched)[1])
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * np.square(slope)
        mean, power = first / (1 - 0.9**step), second / (1 - 0.999**step)
        delta = delta - rome.rate * mean / (np.sqrt(power) + 1e-8)
        delta *= min(1.0, rome.clamp * size / np.linalg.norm(delta))
    np.testing.assert_allclose(values.delta[0], delta, atol=2e-3 * np.abs(delta).max())


def test_an_edit_is_learned_and_a_revert_is_exact_to_the_bit(base, rome):
    alone = rome.each(base, FACTS[:1])[0]
    once = rome.apply(rome.start(base), FACTS[:1])
    np.testing.assert_allclose(once.kernels[0], alone.kernels[0], atol=1e-5)
    twice = rome.apply(once, FACTS[1:2])
    assert loss(base, alone.model(), FACTS[0]) < loss(base, base.model, FACTS[0])
    np.testing.assert_array_equal(twice.revert().kernels[0], once.kernels[0])
    assert not np.array_equal(twice.kernels[0], once.kernels[0])
    assert once.revert().model() is base.model
    with pytest.raises(ValueError, match="no edit to take back"):
        once.revert().revert()
    before, after = (nnx.to_flat_state(nnx.state(m)) for m in (base.model, twice.model()))
    differing = [
        path
        for (path, old), (_, new) in zip(before, after, strict=True)
        if not np.array_equal(old[...], new[...])
    ]
    assert ["/".join(map(str, path)) for path in differing] == ["decoder/layers/down/kernel"]


def test_fine_tuning_stays_within_its_bound(base):
    ft = FT(layer=0, steps=3, rate=0.02, bound=0.03)
    for fact, edited in zip(FACTS, ft.each(base, FACTS), strict=True):
        change = np.asarray(edited.kernels[0] - base.kernel(0))
        assert 0.02 < np.abs(change).max() <= 0.0300001
        assert loss(base, edited.model(), fact) < loss(base, base.model, fact)
    together = ft.apply(ft.start(base), FACTS)
    assert len(together.changes) == 1
    means = [np.mean([loss(base, m, f) for f in FACTS]) for m in (together.model(), base.model)]
    assert means[0] < means[1]
    done = FT(layer=0, stop=1e9).each(base, FACTS)[0]
    np.testing.assert_array_equal(done.kernels[0], base.kernel(0))


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_memits_and_alphaedits_updates_solve_their_normal_equations(base):
    moments = base.moments([1])[1]
    size = len(moments.total)
    keys, earlier, rest = drawn(size, 3), drawn(size, 2, seed=1), drawn(size, seed=2)
    have = MEMIT(moments_weight=7.0).directions(moments, keys, earlier)
    left = 7.0 * moments.mean + keys @ keys.T
    np.testing.assert_allclose(left @ have, keys, atol=1e-9)
    editor = AlphaEdit(free=0.75, ridge=0.3)
    have, basis = editor.directions(moments, keys, earlier), editor.basis(moments)
    project = basis @ basis.T
    left = project @ (keys @ keys.T + earlier @ earlier.T) + 0.3 * np.eye(size)
    np.testing.assert_allclose(left @ have, project @ keys, atol=1e-9)
    # Keys outside its space are not touched, and general ones no more than the eigenvalues allow.
    np.testing.assert_allclose((rest - project @ rest) @ have, 0.0, atol=1e-12)
    largest = moments.spectrum[0][basis.shape[1] - 1]
    assert np.trace(have.T @ moments.mean @ have) <= largest * np.square(have).sum()


def test_memit_spreads_a_fact_over_its_layers_and_reaches_z(base):
    memit = MEMIT(layers=(0, 1), prefixes=0, steps=4, moments_weight=1e-6)
    values = memit.values(base, base.model, ENDS, 1)
    edited = memit.apply(memit.start(base), ENDS)
    assert sorted(edited.kernels) == [0, 1] and len(edited.changes) == 1
    _, places = subjects.subject_keys(edited.model(), base.tokenizer, ENDS, [""], 2)
    np.testing.assert_allclose(places.hidden[1], values.hidden + values.delta, atol=2e-3)
    alone = memit.each(base, ENDS)
    for each, fact in zip(alone, ENDS, strict=True):
        assert loss(base, each.model(), fact) < loss(base, base.model, fact)
    again = memit.apply(memit.start(base), ENDS[:1])
    np.testing.assert_allclose(alone[0].kernels[0], again.kernels[0], atol=1e-4)
    for layer, kernel in memit.apply(edited, ENDS[:1]).revert().kernels.items():
        np.testing.assert_array_equal(kernel, edited.kernels[layer])


def test_alphaedit_keeps_what_it_edited_before(base):
    editor = AlphaEdit(layers=(1,), prefixes=0, steps=4, free=0.9, ridge=1e-6)
    once = editor.apply(editor.start(base), ENDS[:1])
    twice = editor.apply(once, ENDS[1:])
    key = np.float64(once.changes[0].keys[1][:, 0])
    before, after = (np.float64(each.kernels[1]) for each in (once, twice))
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(key @ after, key @ before, atol=1e-4)


def test_graces_radii_follow_its_rule(base):
    """Beside a plain loop over (key, ε, answer)."""
    book, plain = GRACE(layer=1, radius=1.0).start(base), []
    for n, place in enumerate(drawn(40, 2) * 2.0):
        place, answer = np.float32(place), "ab"[n % 3 % 2]
        book = book.plus(Entry(place, np.zeros(3, np.float32), answer))
        near = min(plain, key=lambda e: np.linalg.norm(e[0] - place), default=None)
        distance = np.inf if near is None else float(np.linalg.norm(np.float64(near[0]) - place))
        if near is None or distance > 1.0 + near[1]:
            plain.append([place, 1.0, answer])
        elif near[2] == answer:
            near[1] = max(near[1], distance)
        else:
            near[1] = min(near[1], distance / 2)
            plain.append([place, min(1.0, distance / 2), answer])
    np.testing.assert_array_equal(book.keys, [key for key, _, _ in plain])
    np.testing.assert_allclose(book.radii, [radius for _, radius, _ in plain])
    assert book.answers == tuple(answer for *_, answer in plain) and 2 < len(plain) < 40
    np.testing.assert_array_equal(book.revert().plus(book.changes[-1]).radii, book.radii)
    # The same key with another answer: the newest counts.
    last = book.plus(Entry(book.keys[0], np.ones(3, np.float32), "c"))
    assert last.nearest(book.keys[0]) == (len(plain), 0.0)


def test_grace_answers_within_its_radius_and_is_the_base_lm_itself_outside(tiny, base):
    grace = GRACE(layer=1, radius=1e-3, steps=30, rate=0.3)
    book = grace.apply(grace.start(base), FACTS[:2])
    inside, outside = book.models([FACTS[1].prompt, "The capital of France is"])
    assert outside is base.model and grace.start(base).models(["Any"]) == [base.model]
    prompt = prompt_ids(base.tokenizer, FACTS[1].prompt)
    answer = base.tokenizer.following(FACTS[1].answer)
    value = jnp.asarray(book.values[1])
    put = lambda _, y: y.at[:, : len(prompt)].set(value)  # noqa: E731
    decoder = forward.tap(base.model.decoder, 1, put)
    logits = decoder.logits(decoder.hidden(jnp.asarray([[*prompt, *answer[:-1]]]))[0][0])
    plain = jax.nn.log_softmax(logits[len(prompt) - 1 :])
    wanted = -float(plain[jnp.arange(len(answer)), jnp.asarray(answer)].mean())
    edited = copy.copy(tiny)
    edited.model = inside
    have = edited.score([FACTS[1].prompt] * 2, [[FACTS[1].answer]] * 2)
    np.testing.assert_allclose(have, wanted, atol=1e-4)
    assert wanted < loss(base, base.model, FACTS[1]) - 0.5
    text = edited.generate([FACTS[1].prompt], max_tokens=2, stop=())[0]
    first = int(plain[0].argmax())
    assert text.startswith(base.tokenizer.decode([first]))


def test_a_subject_ends_at_its_last_token_wherever_it_stands(tiny):
    tokenizer = tiny.decoder_tokenizer
    text = "The capital of France is new France city"
    for subject, until in (("Capital", "The capital"), ("France", text[:-5]), ("", text)):
        place = subjects.subject_place(tokenizer, text, subject)
        assert place == len(prompt_ids(tokenizer, until)) - 1
    assert subjects.subject_place(tokenizer, text, "Norway") == len(prompt_ids(tokenizer, text)) - 1


def test_unknown_editors_and_settings_are_named():
    assert editors.build("rome, ft", ["rome.layer=9"])["rome"].layer == 9
    with pytest.raises(ConfigError, match=r"no editor 'rom'; did you mean rome\?") as error:
        editors.build("rom,ft", ["ft.lr=1", "grace.radius=2"])
    assert "ft.lr: unknown key" in str(error.value) and "grace" in str(error.value)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("LARIMAR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"The city {n} of fact {n % 7} is new." for n in range(80)))
    return str(path)


def test_second_moments_are_sums_over_tokens_and_go_on_where_they_were(tiny, corpus, monkeypatch):
    monkeypatch.setattr("larimar_jax.editors.moments.BATCHES", 1)
    base = BaseLM(tiny.model, tiny.decoder_tokenizer)
    part = load(base, [1], corpus, 200)[1]
    assert 200 <= part.tokens < 800 and part.documents % 16 == 0
    whole = load(base, [0, 1], corpus, 10**6)
    documents = list(open_corpus(corpus).side(held_out=False))
    total = 0.0
    for document in documents:
        ids = prompt_ids(base.tokenizer, document.text)
        row = np.zeros((1, 64), np.int32)
        row[0, : len(ids)] = ids
        places = _keys(tuple(row[0]), tiny)[:, : len(ids)]
        total = total + np.einsum("lti,ltj->lij", places, places)
    for layer, moments in whole.items():
        assert moments.documents == len(documents)
        np.testing.assert_allclose(moments.total, total[layer], rtol=1e-4, atol=1e-4)
    again = load(base, [1], corpus, 10**6)[1]
    np.testing.assert_array_equal(again.total, whole[1].total)
    with pytest.raises(MomentsError, match="have no inverse.*larimar moments --tokens"):
        Moments("few", np.outer(*2 * [np.ones(4)]), 1).solve(np.ones((4, 1)))
    (path,) = pathlib.Path(corpus).parent.rglob("layer-1.npz")
    path.write_bytes(b"PK")
    with pytest.raises(MomentsError, match="is damaged.*Remove it"):
        load(base, [1], corpus)


def _keys(row, tiny):
    return np.float64(_run(tiny.graph, tiny.state, np.asarray([row], np.int32)))[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, tokens):
    return forward.run_layers(nnx.merge(graph, state).decoder, tokens, 2, lambda k, y, h: k)


def test_editors_are_further_systems_of_a_benchmark(tiny, base, tmp_path, monkeypatch):
    records = [dataclasses.replace(case, subject=f"fact {n}") for n, case in enumerate(cases(4))]
    plain = CounterFact(data=saved(records, tmp_path / "facts.json"), chunk=2)
    settings = ("rome.layer=0", "rome.prefixes=1", "rome.steps=2", "grace.steps=2")
    task = dataclasses.replace(plain, editors="rome,grace", editor_settings=settings)
    monkeypatch.setattr("larimar_jax.editors.moments.load", lambda *_: base._moments)
    table, results = measured(task, tiny, tmp_path)
    assert [r for r in table if r["system"] not in ("rome", "grace")] == rows(plain, tiny)
    assert {row["system"] for row in table} >= {"rome", "grace", "larimar"}
    by_system = {r["system"]: r for r in results if r["kind"] == "edit"}
    assert by_system["rome"]["S"]["cases"] == 4 and "versus_verbatim" in by_system["rome"]["S"]
    settings = runner.start(task, tiny).settings["editors"]
    assert settings["rome"]["moments"] == {"0": ["drawn", 64]} and settings["grace"]["steps"] == 2
    edited = ROME(layer=0, prefixes=1, steps=2).each(
        base, [Request("Fact 2 is", "fact 2", "new 2")]
    )
    row = next(r for r in table if r["system"] == "rome" and r["prompt"] == "Neighbour 0 of 2 is")
    fact = Request(row["prompt"], "", row["new"])
    assert row["loss_new"] == pytest.approx(loss(base, edited[0].model(), fact), abs=1e-3)
