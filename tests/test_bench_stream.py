"""A stream of edits into a tiny model, against one question at a time."""

import collections
import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from known_editor import cases, knowedit, question, rows, same, values

from larimar_jax.bench import metrics, runner, stream, summary
from larimar_jax.bench.editor import written
from larimar_jax.bench.fact_store import FactStore, encode_facts
from larimar_jax.bench.systems import Systems
from larimar_jax.data.edit_records import EditRecord

# Three wordings that records share, of which each has one that it neither is nor asks; another fact.
SHARED = ["Where is {}?", "What is the place of {}?", "In what town is {}?"]
RECORDS = [
    ("Of the lake", "Who made Of the lake?", "By whom is Of the lake?"),
    *(
        (f"Tower {n}", SHARED[n % 3].format(f"Tower {n}"), SHARED[(n + 1) % 3].format(f"Tower {n}"))
        for n in range(5)
    ),
]


@pytest.fixture
def build(tmp_path):
    """A task over records in KnowEdit's schema."""

    def build(records=RECORDS, **options):
        raw = [
            EditRecord(n, prompt, subject, f"new {n}", f"true {n}", (rephrasing,), (), ())
            for n, (subject, prompt, rephrasing) in enumerate(records)
        ]
        path = knowedit(raw, tmp_path / f"zsre{len(records)}.json")
        return stream.Stream(data=path, **options)

    return build


@pytest.fixture
def short(build):
    """Six edits of eight facts, the last two of them never written."""
    records = [(case.subject, case.prompt, f"Says of fact {n}:") for n, case in enumerate(cases(8))]
    return build(records, edits=6, unwritten=2, every=2, queries=2, chunk=5)


def test_answers_are_those_of_every_question_alone(tiny, short, tmp_path):
    result = runner.run(short, tmp_path / "run", editor=tiny, quiet=True)
    facts = short.stream.written(6)
    questions = {case.case_id: case for case in short.cases(None)}
    assert [case.kind for case in questions.values()].count("rephrased") == 3 * 2
    encoded = encode_facts(tiny, facts, [case.prompt for case in questions.values()])
    editor, kinds = Systems(tiny).editor, collections.Counter()
    table, by_text = runner.read_rows(tmp_path / "run"), {written(*fact): fact for fact in facts}
    for number, by_system in values(table, "text").items():
        case = questions[number]
        limit = len(tiny.decoder_tokenizer.ids(f" {case.gold}")) + 3

        def text_of(text, condition, limit=limit):
            return tiny.generate([text], condition, max_tokens=limit, stop=())[0]

        def forced(answer, limit=limit):
            return editor.text(editor.tokens(answer)[:limit])

        store = FactStore(encoded, facts[: case.edits])
        right = by_text.get(case.fact, ("", ""))
        wanted, *_ = question(store, case.prompt, right, text_of, forced)
        same(by_system, wanted)
        kinds[case.kind, "prompt" in by_system] += 1
    for row in table:
        gold = questions[row["case"]].gold.split()
        first = next((line for line in row["text"].split("\n") if line.strip()), "")
        words = re.findall(r"\S+", first)[: len(gold)]
        words[-1:] = [re.sub(r"[.,;:!?]+$", "", word) for word in words[-1:]]
        assert row["f1"] == pytest.approx(metrics.token_f1([w for w in words if w], gold))
    # Of what was never written there is no fact for the prompt.
    assert {*kinds} == {("edit", True), ("rephrased", True), ("unwritten", False)}
    ends = [entry for entry in result["results"] if entry["edits"] == 6]
    assert {entry["kind"] for entry in ends} == {"edit", "rephrased", "unwritten"}
    assert summary.select(result["results"], short.overview) == ends


def test_a_run_that_is_taken_up_streams_the_same_blocks(tiny, short):
    systems, questions = Systems(tiny), short.cases(None)
    work = dataclasses.replace(runner.start(short, tiny), systems=systems)
    late = work.rows(questions[5:10])  # Going back starts anew, and gives the same.
    assert [*work.rows(questions[:5]), *late] == rows(short, tiny, 10)
    streamed = short._after(systems, 6)
    at_once = FactStore(streamed._encoded, streamed.facts)
    memory, prepared = tiny.memory, tiny.prepared
    latents = [
        memory.read(prepared, store.state, jnp.asarray(store.keys)).latent
        for store in (streamed, at_once)
    ]
    np.testing.assert_allclose(*latents, atol=1e-3)
    assert int(streamed.state.count) == 6 and int(short._after(systems, 4).state.count) == 4


def test_facts_with_all_their_wordings_come_first(build):
    task = build(edits=11, unwritten=0, wordings=2, every=5)
    towers = [SHARED[(n + shift) % 3].format(f"Tower {n}") for n in range(5) for shift in (0, 2)]
    edits = task.stream
    assert [prompt for _, prompt in edits.prompts] == [*towers, "Who made Of the lake?"]
    assert [r.target_new for r in edits.records] == [*(f"new {n}" for n in range(1, 6)), "new 0"]
    assert task.points == [5, 10, 11]
    # What was never written is scored on what is right.
    task = dataclasses.replace(task, edits=10, unwritten=1)
    assert [(c.prompt, c.gold) for c in task.cases(None) if c.kind == "unwritten"] == [
        ("Who made Of the lake?", "true 0")
    ]
    task = build(edits=4, unwritten=2)
    assert [prompt for _, prompt in task.stream.prompts] == [prompt for _, prompt, _ in RECORDS[:4]]
    # No rephrasing of the curve is what an edit writes.
    written = {prompt for _, prompt in build(edits=11, unwritten=0, wordings=2).stream.prompts}
    assert not written & {c.prompt for c in task.cases(None) if c.kind == "rephrased"}


def test_only_so_many_of_the_written_prompts_are_drawn_at_the_end(short):
    every = [c.case_id for c in short.cases(None) if c.kind == "edit"]
    some = dataclasses.replace(short, retained=3).cases(None)
    drawn = [c.case_id for c in some if c.kind == "edit"]
    assert len(drawn) == 3 and drawn == sorted(set(drawn) & set(every))


def test_what_the_file_cannot_give_is_refused(build):
    with pytest.raises(ValueError, match="6 records, which make 11 edits in at most 2 wordings"):
        build(edits=12, unwritten=0, wordings=2).cases(None)
    with pytest.raises(ValueError, match="--edits 11 and --unwritten 1 need more"):
        build(edits=11, unwritten=1, wordings=2).cases(None)
    for wrong in ("edits", "wordings", "every", "retained"):
        with pytest.raises(ValueError, match="must be at least 1"):
            build(**{wrong: 0})
