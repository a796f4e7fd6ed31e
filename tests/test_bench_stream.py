"""A stream of edits into a tiny model: its memory is that of one write, its answers those of a loop."""

import argparse
import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from test_bench import cases

from larimar_jax.bench import answers, metrics, report, runner, store, stream, systems

# Every record has a rephrasing but the fourth.
RECORDS = [
    dataclasses.replace(case, paraphrases=() if n == 3 else (f"Says something of fact {n}:",))
    for n, case in enumerate(cases(8))
]
# Six edits are one wording each of six facts, or these of three and a half.
WORDINGS = [*((f"Of fact {n}:",) for n in range(4)), *[()] * 4]


def build(tiny, **more):
    return stream.Stream(tiny, RECORDS, 6, 4, 2, data={}, **dict(chunk=3) | more)


@pytest.fixture
def made(tiny):
    return build(tiny)


def test_the_curve_asks_what_is_written_and_the_end_asks_everything(made):
    assert made.points == [4, 6]
    curve = [case for case in made.cases if case.kind == "rephrased"]
    assert [case.edits for case in curve] == [4, 4, 6, 6]
    for case in curve:
        index = int(case.case_id.split("/")[2])
        assert index < case.edits and index != 3
        assert (case.prompt, case.gold) == (RECORDS[index].paraphrases[0], RECORDS[index].target_new)
        assert case.fact == f"{RECORDS[index].prompt} {case.gold}"
    end = [case for case in made.cases if case.kind != "rephrased"]
    assert [(case.case_id, case.prompt) for case in end] == [
        (f"{kind}/{n}", RECORDS[n].prompt) for n, kind in enumerate(["edit"] * 6 + ["unwritten"] * 2)
    ]
    assert [case.fact is None for case in end] == [False] * 6 + [True] * 2


def test_some_of_the_written_prompts_can_stand_for_all_at_the_end(tiny, made):
    some = stream.Stream(tiny, RECORDS, 6, 4, 2, data={}, retained=3)
    every, drawn = ([c for c in one.cases if c.kind == "edit"] for one in (made, some))
    assert len(drawn) == 3 < len(every) and [c for c in every if c in drawn] == drawn
    assert some.settings["retained"] == 3


def test_each_wording_is_an_edit_and_facts_follow_one_another(tiny):
    made = build(tiny, wordings=WORDINGS)
    assert made.told == [
        (n, prompt) for n in range(3) for prompt in (RECORDS[n].prompt, f"Of fact {n}:")
    ]
    assert made.settings["facts"] == 3 and made.settings["wordings"] == 2
    assert made.settings["unwritten"] == 5
    curve = [case.case_id for case in made.cases if case.kind == "rephrased"]
    # The third fact is not begun after four edits.
    assert curve[:2] == ["rephrased/4/0", "rephrased/4/1"] and len(curve) == 4
    edits = [case for case in made.cases if case.kind == "edit"]
    assert [case.prompt for case in edits] == [prompt for _, prompt in made.told]
    assert edits[1].fact == f"Of fact 0: {RECORDS[0].target_new}"
    # The last fact may be cut off among its wordings.
    assert stream.Stream(tiny, RECORDS, 5, 4, 2, data={}, wordings=WORDINGS).told == made.told[:5]
    with pytest.raises(ValueError, match="8 records make 12 edits, not 13"):
        stream.Stream(tiny, RECORDS, 13, 4, 2, data={}, wordings=WORDINGS)


def test_a_rephrasing_that_an_edit_writes_is_not_asked_as_held_out(tiny):
    own = [dataclasses.replace(RECORDS[5], prompt=RECORDS[0].paraphrases[0])]
    made = stream.Stream(tiny, [*RECORDS[:5], *own], 6, 6, 6, data={})
    asked = [case.case_id for case in made.cases if case.kind == "rephrased"]
    assert asked == [f"rephrased/6/{n}" for n in (1, 2, 4, 5)]


@pytest.mark.parametrize("wordings", [(), WORDINGS])
def test_answers_are_those_of_one_write_and_one_prompt_at_a_time(tiny, wordings, tmp_path):
    made = build(tiny, wordings=wordings)
    summary = runner.run(made, tmp_path / "run", quiet=True)
    assert report.sections([report.read(tmp_path / "run")] * 2)[0].items
    facts = [(prompt, RECORDS[index].target_new) for index, prompt in made.told]
    queries = [text for r in RECORDS for text in (r.prompt, *r.paraphrases)]
    encoded = store.encoded(tiny, facts, queries)
    records = runner.read_cases(tmp_path / "run")
    for case, record in zip(made.cases, records, strict=True):
        prompt, gold = record["prompt"], record["gold"]
        assert (prompt, gold) == (case.prompt, case.gold)
        words = len(tiny.decoder_tokenizer.ids(f" {gold}")) + 3
        options = dict(max_tokens=words, stop=())
        at_once = store.Store(encoded, facts[: case.edits])
        recall, nearest = at_once.recall([prompt])
        assert record["in_scope"] == bool(recall.in_scope[0])
        base = tiny.generate([prompt], **options)[0]
        want = {"base": base, "lookup": base, "larimar": base, "prompt": None}
        want["zero"] = tiny.generate([prompt], tiny.zero(1), **options)[0]
        if case.fact is not None:
            want["prompt"] = tiny.generate([f"{case.fact}. {prompt}"], **options)[0]
        if record["in_scope"]:
            in_front = f"{at_once.texts[nearest[0]]}. {prompt}"
            want["lookup"] = tiny.generate([in_front], **options)[0]
            condition = recall.condition(np.array([0]))
            want["larimar"] = tiny.generate([prompt], condition, **options)[0]
        assert set(record["said"]) == set(stream.SYSTEMS)
        for name, text in record["said"].items():
            if want[name] is None:
                assert text is None and record["f1"][name] is None
                continue
            assert text == want[name]
            wanted = gold.split()
            first = next((line for line in text.split("\n") if line.strip()), "")
            said = re.findall(r"\S+", first)[: len(wanted)]
            said[-1:] = [re.sub(r"[.,;:!?]+$", "", word) for word in said[-1:]]
            found = metrics.token_f1([word for word in said if word], wanted)
            assert record["f1"][name] == pytest.approx(found)
    for system in stream.SYSTEMS:
        for kind in stream.KINDS:
            rows = [r["f1"][system] for r in records if r["kind"] == kind and r["edits"] == 6]
            mean = summary["results"]["f1"][system][kind]["mean"]
            if None in rows:
                assert mean is None and (system, kind) == ("prompt", "unwritten")
            else:
                assert mean == pytest.approx(100 * np.mean(rows))
    for kind in stream.KINDS:
        row = summary["results"]["f1"]["larimar"][kind]
        beside = row["mean"] - summary["results"]["f1"]["lookup"][kind]["mean"]
        assert row["versus_lookup"]["mean"] == pytest.approx(beside)
        assert ("note" in row) == (beside <= 0)


def test_no_text_is_decoded_twice_under_one_condition(tiny, monkeypatch):
    decoded, generate = [], tiny.generate

    def counting(texts, condition=None, **options):
        decoded.append((list(texts), condition))
        return generate(texts, condition, **options)

    monkeypatch.setattr(tiny, "generate", counting)
    prompts, facts = ["a", "b", "a", "c"], ["a 1", "b 2", "a 1", None]
    latent = np.ones((2, tiny.memory.latent), np.float32)
    condition = tiny.condition(latent)
    told = answers.answers(tiny, prompts, facts, {1: "b 2", 3: "b 2"}, condition, tokens=[3] * 4)
    assert [texts for texts, _ in decoded] == [
        ["a", "b", "c", "a 1. a", "b 2. b", "b 2. c"], ["a", "b", "c"], ["b", "c"]
    ]  # fmt: skip
    assert [condition is None for _, condition in decoded] == [True, False, False]
    assert told["base"][0] == told["base"][2] == told["larimar"][0] == told["lookup"][2]
    assert told["prompt"][1] == told["lookup"][1] and told["prompt"][3] is None
    decoded.clear()
    alone = answers.answers(tiny, ["c"], [None], {}, None, tokens=[3])
    assert len(decoded) == 2 and alone["lookup"] == alone["larimar"] == alone["base"]


# Three wordings that records share, of which each has one that it neither is nor asks; and another fact.
SHARED = ["Where is {}?", "What is the place of {}?", "In what town is {}?"]
TOLD = [
    ("Of the lake", "Who made Of the lake?", "By whom is Of the lake?"),
    *(
        (f"Tower {n}", SHARED[n % 3].format(f"Tower {n}"), SHARED[(n + 1) % 3].format(f"Tower {n}"))
        for n in range(5)
    ),
]


def experiment(tiny, tmp_path, monkeypatch, *told):
    path = tmp_path / "zsre.json"
    records = [
        dict(
            subject=subject,
            target_new=f"new {n}",
            prompt=prompt,
            ground_truth=[f"true {n}"],
            rephrase_prompt=rephrasing,
            locality={},
        )
        for n, (subject, prompt, rephrasing) in enumerate(TOLD)
    ]
    path.write_text(json.dumps(records))
    monkeypatch.setattr(systems, "load", lambda source, overrides: tiny)
    parser = argparse.ArgumentParser()
    stream.arguments(parser)
    return stream.experiment(parser.parse_args(["--data", str(path), *told]))


def test_facts_with_all_their_wordings_come_first(tiny, tmp_path, monkeypatch):
    told = ["--edits", "11", "--unwritten", "0", "--wordings", "2", "--every", "5"]
    made = experiment(tiny, tmp_path, monkeypatch, *told)
    towers = [
        SHARED[(n + shift) % 3].format(f"Tower {n}") for n in range(5) for shift in (0, 2)
    ]
    assert [prompt for _, prompt in made.told] == [*towers, "Who made Of the lake?"]
    assert [r.target_new for r in made.records] == [*(f"new {n}" for n in range(1, 6)), "new 0"]
    assert made.points == [5, 10, 11]
    told[1:4:2] = "10", "1"
    made = experiment(tiny, tmp_path, monkeypatch, *told)
    # Asked for what is right, as nothing was written.
    assert [(c.prompt, c.gold) for c in made.cases if c.kind == "unwritten"] == [
        ("Who made Of the lake?", "true 0")
    ]
    alone = experiment(tiny, tmp_path, monkeypatch, "--edits", "4", "--unwritten", "2")
    assert [prompt for _, prompt in alone.told] == [prompt for _, prompt, _ in TOLD[:4]]


def test_what_the_file_cannot_give_is_refused(tiny, tmp_path, monkeypatch):
    told = ["--edits", "12", "--unwritten", "0", "--wordings", "2"]
    with pytest.raises(ValueError, match="6 records, which make 11 edits in at most 2 wordings"):
        experiment(tiny, tmp_path, monkeypatch, *told)
    with pytest.raises(ValueError, match="--edits 11 and --unwritten 1 ask for more"):
        experiment(tiny, tmp_path, monkeypatch, "--edits", "11", "--unwritten", "1", *told[4:])
    for wrong in ("--edits", "--wordings", "--every"):
        with pytest.raises(ValueError, match="must be at least 1"):
            experiment(tiny, tmp_path, monkeypatch, wrong, "0")


def test_an_answer_is_the_first_line_that_says_something():
    assert answers.line("\n \n Orion.\nNot this") == " Orion."
    assert answers.line("\n") == ""


def test_a_streamed_memory_is_the_one_that_is_written_at_once(made):
    streamed = made._after(6)
    again = store.Store(made._encoded, streamed.facts)
    memory, prepared = made.model.memory, made.model.prepared
    got, want = (
        memory.read(prepared, s.state, jnp.asarray(s.keys)).latent for s in (streamed, again)
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
    runner.run(build(tiny), folder, quiet=True)
    assert (folder / runner.CASES).read_bytes() == whole
