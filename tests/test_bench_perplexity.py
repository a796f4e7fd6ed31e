"""Perplexity with facts in memory against a session, and how free text reads."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_editor import cases, rows_of_both_ways, saved

from larimar_jax import cli
from larimar_jax.bench import fluency, queries, report, runner
from larimar_jax.bench.fluency import words
from larimar_jax.bench.metrics import weighted
from larimar_jax.bench.perplexity import MEMORIES, Perplexity
from larimar_jax.bench.summary import summarise
from larimar_jax.session import Session

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
    (root / "texts.txt").write_text(
        "\n\n".join(f"{line} {n}" for n in range(120) for line in LINES)
    )
    return root


def task(folder, **options):
    files = dict(data=str(folder / "facts.json"), corpus=str(folder / "texts.txt"))
    sizes = dict(facts=2, texts=3, prompt_words=3, words=8, tokens=3, chunk=2)
    return Perplexity(**files | sizes | options)


def test_losses_and_texts_are_those_of_a_session_and_of_the_base_model(tiny, folder, tmp_path):
    made = task(folder)
    summary = runner.run(made, tmp_path / "run", editor=tiny, quiet=True)
    run = report.read(tmp_path / "run")
    assert report.sections([run] * 2)[0].items
    session = Session(tiny)
    for record in made.records:
        session.write(record.prompt, record.target_new)
    rows = {(row["case"], row["system"]): row for row in run.rows}
    inside = 0
    for case in range(3):
        base, ours = rows[case, "base"], rows[case, "larimar"]
        text, rest = base["prompt"], [[base["rest"]]]
        let = bool(ours["in_scope"])
        inside += let
        near = session.ask(text, max_tokens=1).fact if let else None
        facts = [f"{f.prompt} {f.answer}. {text}" for f in session.list() if f.id == near]
        options = dict(max_tokens=3, stop=())
        wanted = {
            "base": (tiny.score([text], rest), tiny.generate([text], **options)),
            "zero": (
                tiny.score([text], rest, tiny.zero(1)),
                tiny.generate([text], tiny.zero(1), **options),
            ),
            "larimar": (session.score([text], rest), [session.ask(text, **options).text]),
        }
        if let:
            wanted["lookup"] = tiny.score(facts, rest), tiny.generate(facts, **options)
            wanted["open"] = wanted["larimar"]
        else:
            wanted["lookup"] = wanted["base"]
            for name in ("loss", "text"):
                # To the last bit.
                assert ours[name] == rows[case, "lookup"][name] == base[name]
        for system, (loss, decoded) in wanted.items():
            row = rows[case, system]
            assert row["loss"] == pytest.approx(float(loss[0, 0]), rel=1e-3)
            assert row["text"] == decoded[0]
            assert row["loss_above_base"] == pytest.approx(row["loss"] - base["loss"], abs=1e-5)
        assert base["tokens"] == len(tiny.decoder_tokenizer.following(base["rest"]))
    assert 0 < inside < 3
    for entry in summary["results"]:
        mine = [rows[case, entry["system"]] for case in range(3)]
        if entry["system"] == "verbatim":
            assert (
                {row["loss"] for row in mine} == {row["loss_above_base"] for row in mine} == {None}
            )
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


def test_a_run_that_is_taken_up_ends_with_the_same_lines(tiny, folder, tmp_path):
    rows_of_both_ways(lambda: task(folder), tiny, tmp_path)


def test_texts_are_compared_with_the_lookups_at_one_length(folder):
    """A memory that says three words of a lookup's twelve loses nothing by having stopped; one word
    has no entropy."""
    long = "a port by the sea a port by the sea a port"

    @dataclasses.dataclass
    class Known:
        facts: list | None = None
        editor = type("Editor", (), {"tokens": staticmethod(str.split)})
        nearest, in_scope = [("x", "y")] * 2, np.zeros(2)

        def cached(self, name, key, make):
            return fluency.TfIdf([words("by the river")])

        def shared_memory(self, store, prompts, facts):
            return self

        def score(self, pairs):
            return {name: np.ones((len(pairs), 1)) for name in queries.SYSTEMS}

        def generate(self, tokens):
            texts = dict.fromkeys(queries.SYSTEMS, [long, long])
            return texts | {"open": ["by the hill", "a port by"], "larimar": ["rome", "rome"]}

    made = task(folder, texts=2)
    rows = list(made.evaluate(Known(), made._texts[:2]))
    entries = {entry["system"]: entry for entry in summarise(made, rows)}
    three = fluency.ngram_entropy("abc")
    assert entries["open"]["entropy"]["mean"] == pytest.approx(three)
    assert entries["base"]["entropy"]["mean"] > 2 * three
    assert entries["open"]["entropy_gain"]["mean"] == 0.0
    assert "does not beat the lookup" in entries["open"]["entropy_gain"]["note"]
    assert (
        entries["larimar"]["entropy"]["mean"] is entries["larimar"]["entropy_gain"]["mean"] is None
    )
    assert (entries["larimar"]["words"]["mean"], entries["base"]["words"]["mean"]) == (1.0, 12.0)


def test_the_error_of_the_ratio_is_that_of_drawing_texts_again():
    """Against the bootstrap."""
    rng = np.random.default_rng(0)
    tokens, apart = rng.integers(5, 40, 300).astype(np.float64), rng.normal(0.2, 0.5, 300)
    draws = [rng.integers(0, 300, 300) for _ in range(300)]
    drawn = [weighted(apart[d], tokens[d], exponential=True).mean for d in draws]
    error = weighted(apart, tokens, exponential=True).standard_error
    assert error == pytest.approx(np.std(drawn), rel=0.15)
    assert weighted(apart[:1], tokens[:1], exponential=True).standard_error is None


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
