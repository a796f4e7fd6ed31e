"""The demo runs on any model, counts what it shows, and draws it."""

import dataclasses

import numpy as np
from rich.console import Console

from larimar_jax import demo
from larimar_jax.session import Session


def test_the_demo_measures_counts_and_draws(tiny, tmp_path):
    result = demo._measure(Session(tiny), lambda text: None)
    total = len(demo.EDITS)
    assert {len(part) for part in (result.before, result.after, result.paraphrased)} == {total}
    assert all(value.shape == (total, 2) for value in result.probability.values())
    assert all(np.isfinite(value) and value > 0 for value in result.milliseconds.values())
    picture = tmp_path / "demo.png"
    demo.draw(result, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))
    demo._print(console, result)
    text = console.export_text()
    assert demo.EDITS[0].answer in text and "write it" in text


def test_counts_are_what_was_said():
    answers = [edit.answer for edit in demo.EDITS]
    nothing = ["nothing"] * len(answers)
    result = demo.Result(
        before=nothing,
        after=answers,
        paraphrased=[*answers[:-1], "nothing"],
        unchanged=[True] * len(answers),
        forgotten=["nothing" if row == demo.FORGOTTEN else a for row, a in enumerate(answers)],
        probability={},
        milliseconds={},
    )
    counts = demo.counts(result)
    assert counts["new answer said before writing"] == "0 of 12"
    assert counts["new answer said after writing"] == "12 of 12"
    assert counts["new answer said to a paraphrase"] == "11 of 12"
    assert counts["forgotten fact: answer as before writing"] == "yes"
    assert counts["other facts after forgetting"] == "11 of 11"
    worse = dataclasses.replace(result, forgotten=answers, unchanged=[False] * 12)
    assert demo.counts(worse)["forgotten fact: answer as before writing"] == "no"
    assert demo.counts(worse)["unrelated prompts as before"] == "0 of 12"


def test_no_edit_repeats_the_truth_or_asks_with_the_answer():
    for edit in demo.EDITS:
        for text in (edit.prompt, edit.paraphrase, edit.unrelated):
            assert edit.answer.lower() not in text.lower()
        assert edit.answer != edit.truth and edit.prompt != edit.paraphrase
