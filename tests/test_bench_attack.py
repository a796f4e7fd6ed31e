"""The rephrase attack on a tiny model: what is drawn, what counts, and which facts are attacked."""

import argparse
import json

import jax
import jax.numpy as jnp
import labelled
import numpy as np
import pytest
from rich.console import Console

from larimar_jax import bench
from larimar_jax.bench import attack, report, runner
from larimar_jax.bench.editor import LarimarEditor, Recall
from larimar_jax.bench.store import Store, encoded
from larimar_jax.data.edit_records import EditRecord


def cases(count):
    found = []
    for n in range(count):
        record = EditRecord(
            3 * n, f"Fact {n} is", f"Fact {n}", "Rome", "zq" if n else "it", (f"Is fact {n}:",), (), ()
        )
        found.append((record, (f"Is fact {n}:", f"Fact {n} is")))
    return found


def experiment(tiny, order=(0, 1, 2), **more):
    options = dict(samples=2, tokens=3, temperature=1.0, data={}, chunk=2) | more
    return attack.Attack(tiny, [cases(3)[n] for n in order], **options)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack")
    return folder, runner.run(experiment(tiny), folder, quiet=True)


def test_what_is_drawn_is_drawn_after_each_wording_under_each_memory(tiny, finished):
    records = runner.read_cases(finished[0])
    facts = [(record.prompt, "unknown") for record, _ in cases(3)]
    prompts = [text for _, wordings in cases(3) for text in wordings]
    store = Store(encoded(tiny, facts, prompts), facts)
    recalled, nearest = store.recall(prompts[:4])
    alone = LarimarEditor(tiny).recall(facts[:2], [w for _, w in cases(2)])
    # What a case draws depends on nothing beside it; a wording has two rows.
    times = np.repeat(np.arange(4), 2)
    own = [jax.random.fold_in(jax.random.key(0), case_id) for case_id in (0, 3)]
    rng = jnp.concatenate([jax.random.split(key, 4) for key in own])
    options = dict(max_tokens=3, temperature=1.0, rng=rng, stop=())
    written = ["Fact 0 is unknown", "Fact 1 is unknown", "Fact 2 is unknown"]
    plain = [prompts[row] for row in times]
    told = [f"{written[row // 2]}. {prompts[row]}" for row in times]
    near = [f"{written[nearest[row]]}. {prompts[row]}" for row in times]
    base = tiny.generate(plain, **options)
    wanted = {
        "base": base,
        "zero": tiny.generate(plain, tiny.zero(8), **options),
        "prompt": tiny.generate(told, **options),
        "open": tiny.generate(plain, alone.condition(times), **options),
    }
    for name, texts, recall in (
        ("lookup", wanted["prompt"], alone),
        ("lookup_batch", tiny.generate(near, **options), recalled),
        ("larimar", wanted["open"], alone),
        ("batch", tiny.generate(plain, recalled.condition(times), **options), recalled),
    ):
        inside = recall.in_scope[times]
        wanted[name] = [t if let else b for t, b, let in zip(texts, base, inside, strict=True)]
    for name, texts in wanted.items():
        assert records[0]["text"][name] + records[1]["text"][name] == texts
    assert wanted["open"] != base and len({*map(str, wanted.values())}) > 4
    assert any(recalled.in_scope) and not all(recalled.in_scope)
    for record in records:
        for name, texts in record["text"].items():
            assert record["leaked"][name] == [record["target_true"] in text for text in texts]
    leaks = [leak for record in records for leak in record["leaked"]["base"]]
    assert any(leaks) and not all(leaks)


def test_the_order_of_cases_changes_no_sample(tiny, finished):
    order = [2, 0, 1]
    made = experiment(tiny, order)
    found = {r["case_id"]: r["text"] for r in made.run(made.cases[:2]) + made.run(made.cases[2:])}
    for record in runner.read_cases(finished[0]):
        # What is nearest of all edits depends on their order where they are all alike.
        for name in set(attack.SYSTEMS) - {"batch", "lookup_batch"}:
            assert found[record["case_id"]][name] == record["text"][name], name


@pytest.mark.parametrize("nearest", [[0, 0, 1, 1], [2, 0, 1, 1]])
def test_a_lookup_draws_after_the_edit_that_is_nearest_where_the_scope_lets_it(
    tiny, monkeypatch, nearest
):
    """Of all edits; also where every fact finds its own, whose samples are there."""
    facts = [f"Fact {n} is unknown" for n in range(3)]
    made, texts = experiment(tiny), []
    inside = np.array([True, False, True, True])

    class Known:
        def __init__(self):
            self.texts = facts

        def recall(self, prompts):
            found = Recall(np.ones(4, np.float32), inside, lambda rows: tiny.zero(len(rows)))
            return found, nearest

    def generate(_, prompts, condition=None, **options):
        texts.append(prompts)
        return [f"{prompt}|{'z' if condition is not None else ''}" for prompt in prompts]

    monkeypatch.setattr(made, "_all", Known)
    monkeypatch.setattr(type(tiny), "generate", generate)
    records = made.run(made.cases[:2])
    prompts = [text for _, wordings in cases(2) for text in wordings]
    for row, (text, fact, let) in enumerate(zip(prompts, nearest, inside, strict=True)):
        want = f"{facts[fact]}. {text}|" if let else f"{text}|"
        assert records[row // 2]["text"]["lookup_batch"][2 * (row % 2) :][:2] == [want] * 2
    # Nothing is drawn twice after the same texts without a memory.
    assert len(texts) == 5 + (nearest[0] != 0)


def test_a_memory_that_leaks_no_less_than_the_lookup_of_its_edits_says_so():
    def leaks(count):
        return [True] * count + [False] * (4 - count)

    found = {"open": leaks(1), "larimar": leaks(0), "batch": leaks(2)}
    record = dict.fromkeys(attack.SYSTEMS, leaks(1)) | found | {"lookup_batch": leaks(3)}
    results = attack.Attack.summarise(None, [{"leaked": record}])
    notes = {(name, rate) for name, row in results.items() for rate in row if "note" in row[rate]}
    # Of four samples one is enough.
    assert notes == {("open", "attack"), ("open", "sample"), ("batch", "attack")}
    assert results["larimar"]["sample"]["versus_lookup"]["mean"] == 25
    summary = {"settings": {"wordings": 2, "samples": 2}, "cases": 1, "results": results}
    rows = {row[0]: row[1:] for row in report.grid(attack.tables(summary)[0]).rows}
    one, many = (line.values for line in attack.headlines(summary))
    assert [one[name]["mean"] for name in ("lookup", "larimar")] == [100, 0]
    assert [many[name]["mean"] for name in many] == [100, 100] and list(many) == ["lookup", "larimar"]
    noted = rows["Larimar with scope, all edits at once"]
    assert ["does not beat\nthe lookup" in cell for cell in noted] == [True, False]


def test_an_attack_succeeds_with_one_sample_of_all(finished):
    _, summary = finished
    records = [
        {"leaked": dict.fromkeys(attack.SYSTEMS, leaks)}
        for leaks in ([False, False, True, False], [False] * 4)
    ]
    found = attack.Attack.summarise(None, records)["larimar"]
    assert found["attack"]["mean"] == 50 and found["sample"]["mean"] == 12.5
    assert set(summary["results"]) == set(attack.SYSTEMS)


def test_facts_are_attacked_that_the_base_model_knows(tiny):
    # What the model says after a prompt it knows, if it is text that reads back as the same tokens.
    made, prompts = [], [f"Fact {n} {word}" for n in range(8) for word in ("is", "says", "of")]
    for prompt, text in zip(prompts, tiny.generate(prompts, max_tokens=1, stop=()), strict=True):
        if text.strip() and tiny.judge([prompt], [[text.strip()]]).accuracy[0, 0] == 1:
            made.append((EditRecord(0, prompt, "Fact", "new", text.strip(), (), (), ()), ("W",)))
    assert len(made) > 2
    unknown = (EditRecord(1, "Fact 0 is", "Fact", "new", "zqzq", (), (), ()), ("W",))
    assert attack.known(tiny, [unknown, *made], 2) == made[:2]
    with pytest.raises(ValueError, match="of 1 records the base LM knows 0, and 2 are"):
        attack.known(tiny, [unknown], 2)


def test_a_run_resumes_line_for_line_and_people_see_it(tiny, finished, tmp_path):
    folder, summary = finished
    lines = (folder / runner.CASES).read_bytes()
    runner.run(experiment(tiny), tmp_path, quiet=True)
    (tmp_path / runner.CASES).write_bytes(lines[: len(lines) // 3])
    runner.run(experiment(tiny), tmp_path, quiet=True)
    assert (tmp_path / runner.CASES).read_bytes() == lines
    console = Console(width=120)
    with console.capture() as captured:
        for shown in attack.tables(json.loads(json.dumps(summary))):
            console.print(shown)
    assert "2 wordings x 2 samples" in captured.get() and "all edits at once" in captured.get()
    record = runner.read_cases(folder)[1]
    assert attack.texts(record)[0] == "Fact 1 is → zq, edited to “unknown”"
    assert len(attack.texts(record)) == 3
    assert len(labelled.check(attack, summary)) == len(attack.SYSTEMS)
    assert attack.values(record) == {
        f"{label}, withstood": float(not any(record["leaked"][name]))
        for name, label in attack.SYSTEMS.items()
    }


def test_the_command_reads_its_options_and_needs_a_sample(tiny):
    parser = argparse.ArgumentParser()
    bench.benchmark("attack").arguments(parser)
    told = parser.parse_args(["--data", "x", "--facts", "7"])
    assert (told.facts, told.wordings, told.samples, told.temperature) == (7, 4, 5, 1.0)
    with pytest.raises(ValueError, match="0 samples of 3 tokens"):
        experiment(tiny, samples=0)
