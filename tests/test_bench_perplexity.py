"""Perplexity with facts in memory, against one text at a time."""

import numpy as np
import pytest

from larimar_jax import cli
from larimar_jax.bench import fluency, perplexity, report, runner, store
from larimar_jax.session import Session

FACTS = [("Fact 1 is", "new 1"), ("The capital of Japan is", "city 2")]
TEXTS = [
    perplexity.Text(0, "Fact 1 is", "true and new"),
    perplexity.Text(1, "Says of", "the city 3 of Japan"),
    perplexity.Text(2, "The capital of Japan is", "France"),
]


@pytest.fixture
def made(tiny):
    return perplexity.Perplexity(tiny, FACTS, TEXTS, tokens=3, data={}, chunk=2)


def test_losses_are_those_of_a_session_and_of_the_base_model(tiny, made, tmp_path):
    summary = runner.run(made, tmp_path / "run", quiet=True)
    run = report.read(tmp_path / "run")
    assert report.sections([run] * 2)[0].items
    assert report.compare(run, run).items[-1].caption == "hundredths of a nat per token"
    session = Session(tiny)
    for fact in FACTS:
        session.write(*fact)
    full = store.Store(store.encoded(tiny, FACTS, [text.begun for text in TEXTS]), FACTS)
    records = runner.read_cases(tmp_path / "run")
    assert [record["in_scope"] for record in records] == [True, False, True]
    total = {name: 0.0 for name in perplexity.SYSTEMS}
    for record, text in zip(records, TEXTS, strict=True):
        asked = ([text.begun], [[text.rest]])
        recall, (near,) = full.recall([text.begun])
        condition = recall.condition(np.array([0]))
        assert record["nearest"] == " ".join(FACTS[near])
        told = [f"{record['nearest']}. {text.begun}"]
        wanted = {
            "base": tiny.score(*asked),
            "zero": tiny.score(*asked, tiny.zero(1)),
            "prompt": tiny.score(told, [[text.rest]]),
            "lookup": tiny.score(told if record["in_scope"] else [text.begun], [[text.rest]]),
            "larimar": session.score(*asked),
            "open": tiny.score(*asked, condition),
        }
        tokens = len(tiny.decoder_tokenizer.following(text.rest))
        assert record["tokens"] == tokens
        options = dict(max_tokens=3, stop=())
        spoken = {
            "base": tiny.generate([text.begun], **options),
            "zero": tiny.generate([text.begun], tiny.zero(1), **options),
            "prompt": tiny.generate(told, **options),
            "open": tiny.generate([text.begun], condition, **options),
        }
        spoken["lookup"] = spoken["prompt" if record["in_scope"] else "base"]
        spoken["larimar"] = spoken["open" if record["in_scope"] else "base"]
        assert record["text"] == {name: value[0] for name, value in spoken.items()}
        assert perplexity.texts(record)[1] == f"base LM: {spoken['base'][0]}"
        for name, value in wanted.items():
            assert record["loss"][name] == pytest.approx(float(value[0, 0]), rel=1e-3)
            total[name] += tokens * record["loss"][name]
    count = sum(record["tokens"] for record in records)
    for name, value in total.items():
        found = summary["results"][name]
        assert found["perplexity"] == pytest.approx(np.exp(value / count))
        assert found["ratio"] == pytest.approx(np.exp((value - total["base"]) / count))
    assert summary["results"]["base"]["ratio_error"] == 0.0
    for name in ("larimar", "open"):
        found, gain = summary["results"][name], (total["lookup"] - total[name]) / count
        assert found["versus_lookup"]["mean"] == pytest.approx(100 * gain)
        assert ("note" in found) == (gain <= 0)
        rests = [fluency.words(text.rest) for text in TEXTS]
        mine = [fluency.words(record["text"][name]) for record in records]
        assert found["words"] == pytest.approx(np.mean([len(one) for one in mine]))
        likeness = fluency.reference_scores(mine, rests)
        assert found["likeness"]["mean"] == pytest.approx(100 * np.mean(likeness))
    rows = report.grid(perplexity.tables(summary)[0]).rows
    noted = {row[0] for row in rows if "does not beat\nthe lookup" in row[1]}
    assert noted == {
        perplexity.SYSTEMS[name] for name in perplexity.SYSTEMS if "note" in summary["results"][name]
    }


def test_texts_are_compared_with_the_lookup_s_at_one_length(made):
    """A memory that says three words of a lookup's twelve loses nothing by having stopped; one word has
    no entropy."""
    long = "a port by the sea a port by the sea a port"
    losses = dict.fromkeys(perplexity.SYSTEMS, 1.0)
    record = {"tokens": 4, "in_scope": False, "rest": "by the river", "loss": losses}
    texts = dict.fromkeys(perplexity.SYSTEMS, long)
    found = made.summarise([
        record | {"text": texts | {"open": "by the hill", "larimar": "rome"}},
        record | {"text": texts | {"open": "a port by", "larimar": "rome"}},
    ])
    told = {name: found[name]["entropy"] for name in ("base", "open", "larimar")}
    three = 100 * fluency.ngram_entropy("abc")
    assert told["open"]["mean"] == pytest.approx(three) and told["base"]["mean"] > 2 * three
    assert told["open"]["versus_lookup"]["mean"] == 0.0
    assert told["larimar"]["mean"] is None and "versus_lookup" not in told["larimar"]
    assert found["larimar"]["words"] == 1.0 and found["base"]["words"] == 12.0
    summary = {"cases": 2, "results": found, "settings": {"tokens": 9}}
    rows = report.grid(perplexity.tables(summary)[0]).rows
    assert [row[4] for row in rows if row[0] == perplexity.SYSTEMS["larimar"]] == ["–"]


def test_a_text_out_of_scope_is_the_base_models_to_the_last_bit(made, tmp_path):
    runner.run(made, tmp_path / "run", quiet=True)
    outside = runner.read_cases(tmp_path / "run")[1]
    assert outside["loss"]["larimar"] == outside["loss"]["lookup"] == outside["loss"]["base"]


def test_a_run_that_was_cut_off_ends_with_the_same_lines(made, tiny, tmp_path):
    runner.run(made, tmp_path / "run", quiet=True)
    path = tmp_path / "run" / runner.CASES
    lines = path.read_bytes()
    path.write_bytes(lines[: len(lines) // 2])
    again = perplexity.Perplexity(tiny, FACTS, TEXTS, tokens=3, data={}, chunk=2)
    runner.run(again, tmp_path / "run", quiet=True)
    assert path.read_bytes() == lines


def test_the_error_of_the_ratio_is_that_of_drawing_texts_again():
    """Against the bootstrap."""
    rng = np.random.default_rng(0)
    tokens, base = rng.integers(5, 40, 300).astype(np.float64), rng.normal(4, 1, 300)
    texts = np.stack([base + rng.normal(0.2, 0.5, 300), base, tokens])
    drawn = [perplexity.ratio(*texts[:, rng.integers(0, 300, 300)])[0] for _ in range(300)]
    assert perplexity.ratio(*texts)[1] == pytest.approx(np.std(drawn), rel=0.15)
    assert perplexity.ratio(*texts[:, :1])[1] is None


def test_words_that_leave_nothing_to_judge_are_refused(tmp_path, capsys):
    told = ["bench", "perplexity", "--data", "x.json", "--out", str(tmp_path), "--begun", "48"]
    assert cli.main(told) != 0
    assert "--begun (48) has to be above 0 and below --words (48)" in capsys.readouterr().err
