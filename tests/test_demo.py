"""The demo runs on any model, counts what it shows, and draws it."""

import numpy as np
from rich.console import Console

from larimar_jax import demo
from larimar_jax.session import Session


def test_the_demo_measures_counts_and_draws(tmp_path):
    result = demo.measure(Session("smol"), lambda text: None)
    total = len(demo.EDITS)
    assert list(result.texts) == list(result.probability)
    assert {len(texts) for texts in result.texts.values()} == {total}
    assert all(map(demo.has_answer, result.texts["after"], (edit.answer for edit in demo.EDITS)))
    assert all(result.unchanged)
    assert all(value.shape == (total,) for value in result.probability.values())
    assert all(np.isfinite(value) and value > 0 for value in result.milliseconds.values())
    picture = tmp_path / "demo.png"
    demo.draw(result, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_world_model_says_what_is_written_and_edited_and_not_what_is_forgotten(tmp_path):
    episode = demo.write_episode(Session("world"))
    before, written, edited, forgotten = (episode.likeness[stage] for stage in demo.STAGES)
    np.testing.assert_allclose(before, 0, atol=1e-3)
    np.testing.assert_allclose(np.diag(written), 1, atol=1e-2)
    for after, former, row in ((edited, written, 2), (forgotten, edited, 5)):
        assert np.abs(after - former).max(axis=1).argmax() == row
    demo.draw_episode(episode, tmp_path / "world.png")
    assert (tmp_path / "world.png").read_bytes().startswith(b"\x89PNG")
    answers = [answer for _, answer in episode.facts]
    edited = [episode.correction if row == 2 else answer for row, answer in enumerate(answers)]
    forgotten = [episode.texts["before"][5] if row == 5 else a for row, a in enumerate(edited)]
    for stage, expected in zip(demo.STAGES[1:], (answers, edited, forgotten), strict=True):
        texts = [text.strip().rstrip(".") for text in episode.texts[stage]]
        assert texts == [answer.strip().rstrip(".") for answer in expected]


def test_counts_are_of_answers_in_texts_and_the_table_fits_80_columns():
    answers = [edit.answer for edit in demo.EDITS]
    nothing = ["nothing of what was written, at some length"] * len(answers)
    texts = dict(before=nothing, after=answers, paraphrase=[*answers[:-1], "nothing"])
    forgotten = [nothing[0] if row == demo.FORGOTTEN else a for row, a in enumerate(answers)]
    rest = dict(probability={}, milliseconds={"write it": 1.0})
    result = demo.Result(texts | {"forgotten": forgotten}, unchanged=[True] * 12, **rest)
    worse = demo.Result(texts | {"forgotten": answers}, unchanged=[False] * 12, **rest)
    for name, count, worse_count in (
        ("new answer before writing", "0 of 12", "0 of 12"),
        ("new answer after writing", "12 of 12", "12 of 12"),
        ("new answer to a paraphrase", "11 of 12", "11 of 12"),
        ("forgotten fact: answer as before writing", "yes", "no"),
        ("other facts after forgetting", "11 of 11", "11 of 11"),
        ("unrelated prompts as before", "12 of 12", "0 of 12"),
    ):
        assert (demo.counts(result)[name], demo.counts(worse)[name]) == (count, worse_count)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    demo.show(console, worse)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 45
    text = "\n".join(lines)
    assert all(edit.answer in text for edit in demo.EDITS) and text.count("changed") == 12
    assert "nothing of" in text and "…" in text and "write it" in text


def test_no_edit_repeats_the_truth_or_asks_with_the_answer():
    assert len(demo.EDITS) == 12
    for edit in demo.EDITS:
        for text in (edit.prompt, edit.paraphrase, edit.unrelated):
            assert edit.answer.lower() not in text.lower()
        assert edit.answer != edit.truth and edit.prompt != edit.paraphrase
