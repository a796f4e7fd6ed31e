"""What the benchmarks' controls share, against plain loops."""

import numpy as np

from larimar_jax.bench import controls


def test_facts_stand_in_front_as_one_sentence_or_not_at_all():
    found = controls.in_front(["Rome is old", "Oslo is cold.", None], ["A", "B", "C"])
    assert found == ["Rome is old. A", "Oslo is cold. B", "C"]


def test_every_text_is_measured_once_for_each_of_its_targets():
    calls = []

    def measure(prompts, targets):
        calls.append(list(zip(prompts, targets, strict=True)))
        return np.asarray([[len(prompt), len("".join(target))] for prompt, target in calls[-1]])

    sides = {"base": ["a", "bb", "a"], "lookup": ["x a", "bb", "a"], "prompt": ["x a", "y bb", "x a"]}
    targets = [["one", "two"], ["one", "two"], ["three"]]
    found = controls.measured(measure, sides, targets)
    for name, prompts in sides.items():
        want = [[len(p), len("".join(t))] for p, t in zip(prompts, targets, strict=True)]
        np.testing.assert_array_equal(found[name], want)
    (call,) = calls
    assert len(call) == len(set(call)) == 6  # of 9: bb, a and x a with the same targets again


def test_targets_may_be_texts():
    found = controls.measured(
        lambda prompts, targets: np.asarray(targets, object), {"base": ["p", "p"]}, ["s", "t"]
    )
    assert found["base"].tolist() == ["s", "t"]


def test_a_cell_has_its_note_below():
    found = {"mean": 50.0, "standard_error": None, "note": "does not beat the lookup"}
    assert controls.noted(found) == "50.0\ndoes not beat\nthe lookup"
    assert controls.noted({}, "7") == "7"
