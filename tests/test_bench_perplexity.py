"""Perplexity with facts in memory against a session, and how free text reads."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_editor import cases, measured, question, saved

from larimar_jax import cli, scope
from larimar_jax.bench import fluency, queries, report
from larimar_jax.bench.fact_store import FactStore, encode_facts
from larimar_jax.bench.fluency import words
from larimar_jax.bench.perplexity import MEMORIES, Perplexity
from larimar_jax.bench.summary import summarise

LINES = [
    "Fact 1 is true and new and of",
    "Says of city 3 the city 3 of Japan",
    "Fact 0 is the capital France is new",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of facts, and a corpus with a text on its held-out side for each line."""
    root = tmp_path_factory.mktemp("perplexity")
    saved(cases(2), root / "facts.json")
    # A document is held out by its own hash: enough of each, so that some are.
    texts = (f"{line} {n}" for n in range(120) for line in LINES)
    (root / "texts.txt").write_text("\n\n".join(texts))
    return root


def task(folder, **options):
    files = dict(data=str(folder / "facts.json"), corpus=str(folder / "texts.txt"))
    sizes = dict(facts=2, texts=3, prompt_words=3, words=8, tokens=3, chunk=2)
    return Perplexity(**files | sizes | options)


def test_losses_and_texts_are_those_of_every_question_alone(tiny, folder, tmp_path):
    table, results = measured(task(folder), tiny, tmp_path)
    assert report.sections([report.read(tmp_path / "whole")] * 2)[0].items
    facts = [(record.prompt, record.target_new) for record in task(folder).records]
    rows = {(row["case"], row["system"]): row for row in table}
    inside = 0
    for case in range(3):
        base, prompt = rows[case, "base"], rows[case, "base"]["prompt"]

        def loss_and_text(text, condition, rest=base["rest"]):
            (new,) = tiny.generate([text], condition, max_tokens=3, stop=())
            return float(tiny.score([text], [[rest]], condition)[0, 0]), new

        store = FactStore(encode_facts(tiny, facts, [prompt]), facts)
        wanted, _, let = question(store, prompt, ("", ""), loss_and_text, lambda answer: None)
        inside += let
        for system in ("base", "zero", "lookup", "larimar", "open"):
            row, (loss, text) = rows[case, system], wanted[system]
            assert row["loss"] == pytest.approx(loss, rel=1e-3) and row["text"] == text
            assert row["loss_above_base"] == pytest.approx(row["loss"] - base["loss"], abs=1e-5)
            if not let and system in ("lookup", "larimar"):  # To the last bit.
                assert row["loss"] == base["loss"]
        assert rows[case, "larimar"]["in_scope"] == let
        assert base["tokens"] == len(tiny.decoder_tokenizer.following(base["rest"]))
    assert 0 < inside < 3
    for entry in results:
        mine = [rows[case, entry["system"]] for case in range(3)]
        if entry["system"] == "verbatim":
            assert {(row["loss"], row["loss_above_base"]) for row in mine} == {(None, None)}
            continue
        count = sum(row["tokens"] for row in mine)
        loss = sum(row["tokens"] * row["loss"] for row in mine) / count
        assert entry["loss"]["mean"] == pytest.approx(math.exp(loss))
        likeness = [fluency.TfIdf([words(r["rest"]) for r in mine]).cosine(
            words(row["text"]), words(row["rest"])) for row in mine]  # fmt: skip
        assert entry["likeness"]["mean"] == pytest.approx(100 * np.mean(likeness))
        if entry["system"] in MEMORIES:
            assert "versus_verbatim" not in entry["loss"]
            gain = entry["loss"]["versus_lookup"]["mean"]
            assert ("note" in entry["loss"]) == (gain <= 0)


def test_texts_are_compared_with_the_lookups_at_one_length(folder):
    """A memory that says three words of a lookup's twelve loses nothing by having stopped; one word
    has no entropy."""
    long = "a port by the sea a port by the sea a port"

    class Known:
        editor = type("Editor", (), {"tokens": staticmethod(str.split)})
        in_scope = np.zeros(2)

        def cached(self, name, key, make):
            return self if name == "store" else fluency.TfIdf([words("by the river")])

        def nearest(self, prompts):
            return ["x y"] * len(prompts)

        def shared_memories(self, parts):
            return self

        def score(self, pairs):
            return {name: np.ones((len(pairs), 1)) for name in queries.SYSTEMS}

        def generate(self, tokens):
            texts = dict.fromkeys(queries.SYSTEMS, [long, long])
            return texts | {"open": ["by the hill", "a port by"], "larimar": ["rome", "rome"]}

    short = task(folder, texts=2)
    rows = list(short.evaluate(Known(), short._texts[:2]))
    entries = {entry["system"]: entry for entry in summarise(short, rows)}
    three = fluency.ngram_entropy("abc")
    assert entries["open"]["entropy"]["mean"] == pytest.approx(three)
    assert entries["base"]["entropy"]["mean"] > 2 * three
    assert entries["open"]["entropy_gain"]["mean"] == 0.0
    assert "does not beat the lookup" in entries["open"]["entropy_gain"]["note"]
    for name in ("entropy", "entropy_gain"):
        assert entries["larimar"][name]["mean"] is None
    assert (entries["larimar"]["words"]["mean"], entries["base"]["words"]["mean"]) == (1.0, 12.0)


def test_a_text_that_no_fact_is_comparable_to_has_one_in_front(tiny, folder, monkeypatch):
    """It once ended the benchmark."""
    monkeypatch.setattr(scope, "comparable", lambda *_: np.zeros((1, 2), bool))
    facts = [(record.prompt, record.target_new) for record in task(folder).records]
    store = FactStore(encode_facts(tiny, facts, ["In 1999 Oslo"]), facts)
    assert list(store.read(["In 1999 Oslo"])[1].key) == [-1]
    assert store.nearest(["In 1999 Oslo"])[0] in store.texts


def test_words_that_leave_nothing_to_judge_are_refused(folder, tmp_path, capsys):
    line = ["bench", "perplexity", "--data", "x.json", "--out", str(tmp_path)]
    assert cli.main([*line, "--prompt-words", "48"]) != 0
    error = capsys.readouterr().err
    assert "--prompt-words (48) has to be above 0 and below --words (48)" in error
    with pytest.raises(ValueError, match="has 2 records, and 3 are to be in the memory"):
        task(folder, facts=3).cases(None)
    with pytest.raises(ValueError, match="held-out texts of 8 words, and not 999"):
        task(folder, texts=999).cases(None)


# How free text reads

TEXT = st.lists(st.sampled_from(["a", "b", "rome", "is", ",", "."]), max_size=12)


def test_words_are_cut_at_marks():
    assert words("Rome, the City's 2nd.") == ["rome", ",", "the", "city", "'", "s", "2nd", "."]


def test_entropy_by_hand():
    # Pairs: ab ×2, ba; threes: aba, bab.
    two = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert fluency.ngram_entropy("abab") == pytest.approx(0.5 * (2 / 3 * two + 4 / 3 * 1.0))
    assert fluency.ngram_entropy(["go", "on"] * 4) < fluency.ngram_entropy("abcdefgh")
    assert fluency.ngram_entropy("abc") == 0.5 * 2 / 3  # Two pairs, one three.
    for short in ([], ["one"], ["one", "two"]):
        with pytest.raises(ValueError, match=f"{len(short)} words have no n-grams of 3"):
            fluency.ngram_entropy(short)


def test_likeness_by_hand():
    """Of two references both have "city" and one has "port"."""
    rare, tfidf = math.log(3 / 2) + 1, fluency.TfIdf([["city", "port"], ["city", "city"]])
    assert tfidf.cosine(["city"], ["city", "port"]) == pytest.approx(1 / math.hypot(1, rare))
    assert tfidf.cosine(["hill"], ["city", "city"]) == 0.0


@given(st.lists(TEXT, min_size=1, max_size=5))
def test_likeness_is_one_to_itself_and_within_bounds(texts):
    tfidf = fluency.TfIdf(texts)
    for text, turned in zip(texts, texts[::-1], strict=True):
        assert tfidf.cosine(text, text) == pytest.approx(float(bool(text)))
        assert 0.0 <= tfidf.cosine(text, turned) <= 1.0 + 1e-12


@given(TEXT.filter(lambda text: len(text) >= fluency.LEAST))
def test_entropy_is_at_most_that_of_n_grams_that_never_recur(text):
    pairs, threes = (len(text) - n for n in (1, 2))
    most = 0.5 * (2 / 3 * math.log2(pairs) + 4 / 3 * math.log2(threes))
    assert -1e-12 <= fluency.ngram_entropy(text) <= most + 1e-12
