"""A stream of edits into a tiny model: its memory is that of one write, its answers those of a loop."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from test_bench import cases

from larimar_jax.bench import metrics, report, runner, store, stream

# Every record has a rephrasing but the fourth.
RECORDS = [
    dataclasses.replace(case, paraphrases=() if n == 3 else (f"Says something of fact {n}:",))
    for n, case in enumerate(cases(8))
]


@pytest.fixture
def made(tiny):
    return stream.Stream(tiny, RECORDS, 6, 4, 2, data={}, chunk=3)


def test_the_curve_asks_what_is_written_and_the_end_asks_everything(made):
    assert made.points == [4, 6]
    curve = [case for case in made.cases if case.kind == "rephrased"]
    assert [case.edits for case in curve] == [4, 4, 6, 6]
    assert all(case.index < case.edits and case.index != 3 for case in curve)
    end = [case for case in made.cases if case.kind != "rephrased"]
    assert [(case.kind, case.index) for case in end] == [
        *(("edit", i) for i in range(6)), ("unwritten", 6), ("unwritten", 7)
    ]


def test_answers_are_those_of_one_write_and_one_prompt_at_a_time(tiny, made, tmp_path):
    summary = runner.run(made, tmp_path / "run", quiet=True)
    assert report.sections([report.read(tmp_path / "run")])[0].items
    facts = [(record.prompt, record.target_new) for record in RECORDS[:6]]
    queries = [text for r in RECORDS for text in (r.prompt, *r.paraphrases)]
    encoded = store.encoded(tiny, facts, queries)
    records = runner.read_cases(tmp_path / "run")
    for case, record in zip(made.cases, records, strict=True):
        prompt, gold = record["prompt"], RECORDS[case.index].target_new
        assert prompt == (
            RECORDS[case.index].paraphrases[0]
            if case.kind == "rephrased"
            else RECORDS[case.index].prompt
        )
        at_once = store.Store(encoded, facts[: case.edits])
        recall, nearest = at_once.recall([prompt])
        assert record["in_scope"] == bool(recall.in_scope[0])
        words = max(len(tiny.decoder_tokenizer.ids(f" {r.target_new}")) for r in RECORDS) + 3
        options = dict(max_tokens=words, stop=())
        base = tiny.generate([prompt], **options)[0]
        want = {"base": base, "lookup": base, "larimar": base}
        if record["in_scope"]:
            in_front = f"{at_once.texts[nearest[0]]}. {prompt}"
            want["lookup"] = tiny.generate([in_front], **options)[0]
            condition = recall.condition(np.array([0]))
            want["larimar"] = tiny.generate([prompt], condition, **options)[0]
        for name, text in record["said"].items():
            # The longest answer of its chunk says how much is decoded.
            assert want[name].startswith(text) or text.startswith(want[name])
            wanted = gold.split()
            first = next((line for line in text.split("\n") if line.strip()), "")
            found = metrics.token_f1(first.rstrip(".").split()[: len(wanted)], wanted)
            assert record["f1"][name] == pytest.approx(found)
    for kind in stream.KINDS:
        rows = [r["f1"]["larimar"] for r in records if r["kind"] == kind and r["edits"] == 6]
        assert summary["results"]["f1"]["larimar"][kind]["mean"] == pytest.approx(
            100 * np.mean(rows)
        )


def test_an_answer_is_the_first_line_that_says_something():
    assert stream._line("\n \n Orion.\nNot this") == " Orion."
    assert stream._line("\n") == ""


def test_a_streamed_memory_is_the_one_that_is_written_at_once(made):
    streamed = made._after(6)
    again = store.Store(made._encoded, streamed.facts)
    memory, prior = made.model.memory, made.model.prior
    got, want = (
        memory.read(prior, s.state, jnp.asarray(s.keys)).latent for s in (streamed, again)
    )
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert int(streamed.state.count) == 6
    # Going back starts anew, and gives the same.
    four = made._after(4)
    np.testing.assert_array_equal(made._after(6).state.solution, streamed.state.solution)
    assert int(four.state.count) == 4


def test_a_run_that_was_cut_off_goes_on_line_for_line(tiny, made, tmp_path):
    folder = tmp_path / "run"
    runner.run(made, folder, quiet=True)
    whole = (folder / runner.CASES).read_bytes()
    (folder / runner.CASES).write_bytes(whole[: len(whole) // 2])
    runner.run(stream.Stream(tiny, RECORDS, 6, 4, 2, data={}, chunk=3), folder, quiet=True)
    assert (folder / runner.CASES).read_bytes() == whole
