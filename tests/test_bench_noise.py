"""Addressing with noise, on a tiny model against a plain loop."""

import argparse
import json
import math

import jax
import jax.numpy as jnp
import labelled
import numpy as np
import pytest
from rich.console import Console
from test_bench import cases

from larimar_jax import bench
from larimar_jax.bench import noise, report, runner

NAMES = ["base", "zero", "prompt", "lookup", "0", "0.5"]


def experiment(tiny, order=(0, 1, 2, 3)):
    chosen = [cases(4)[n] for n in order]
    return noise.Noise(tiny, chosen, [0.5, 0.0], tokens=3, data={}, chunk=2)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    return folder, runner.run(experiment(tiny), folder, quiet=True)


def test_what_is_read_is_the_mean_plus_noise_of_that_size(tiny, finished):
    records = runner.read_cases(finished[0])
    chunk = cases(2)
    memory, prepared = tiny.dual, tiny.prepared
    keys = [jax.random.fold_in(jax.random.key(0), case.case_id) for case in chunk]
    for number, (case, record) in enumerate(zip(chunk, records[:2], strict=True)):
        assert list(record["loss"]) == NAMES
        prompts = [case.prompt, *case.paraphrases]
        key, value = tiny.encode([case.prompt, record["written"]], [None, case.target_new]).latent
        fact = jnp.asarray(key[None]), jnp.asarray(value[None])
        state = memory.write(prepared, memory.empty(prepared), *fact)
        asked = np.zeros((4, len(key)), np.float32)
        asked[: len(prompts)] = tiny.encode(prompts).latent
        mean = memory.address(prepared, jnp.asarray(asked))
        drawn = mean + 0.5 * jax.random.normal(keys[number], mean.shape)
        matrix = memory.matrix(prepared, state)
        pairs = [[case.target_new, case.target_true]] * len(prompts)
        fact_first = [f"{record['written']}. {prompt}" for prompt in prompts]
        embedded = tiny.encode(prompts).embedding
        embedded /= np.linalg.norm(embedded, axis=1, keepdims=True)
        inside = embedded @ embedded[0] >= tiny.scope_threshold
        assert record["in_scope"]["edit"] + record["in_scope"]["paraphrase"] == inside.tolist()
        let = [fact_first[n] if within else prompts[n] for n, within in enumerate(inside)]
        read = [
            tiny.condition(np.asarray(weights @ matrix)[: len(prompts)]) for weights in (mean, drawn)
        ]
        sides = [(prompts, None), (prompts, tiny.zero(len(prompts))), (fact_first, None), (let, None)]
        for name, (asked, condition) in zip(NAMES, [*sides, *((prompts, c) for c in read)], strict=True):
            wanted = tiny.score(asked, pairs, condition)
            found = record["loss"][name]["edit"] + record["loss"][name]["paraphrase"]
            np.testing.assert_allclose(found, wanted, rtol=2e-4)
            (text,) = tiny.generate(asked[:1], condition, max_tokens=3, stop=())
            assert record["text"][name] == text
            # Each is judged to the length of the shortest.
            text = " ".join(text.split()[: min(len(said.split()) for said in record["text"].values())])
            spoken = tiny.score([case.prompt], [[text]])[0, 0] if text else None
            assert record["surprise"][name] == (spoken and pytest.approx(float(spoken), rel=1e-5))


def test_the_order_of_cases_changes_no_draw(tiny, finished):
    made = experiment(tiny, [2, 0, 3, 1])
    found = {r["case_id"]: r for r in made.run(made.cases[:2]) + made.run(made.cases[2:])}
    for record in runner.read_cases(finished[0]):
        assert found[record["case_id"]]["text"] == record["text"]
        for name, losses in record["loss"].items():
            for kind in noise.KINDS:
                again = found[record["case_id"]]["loss"][name][kind]
                np.testing.assert_allclose(again, losses[kind], atol=1e-5)


def test_the_summary_is_that_of_the_records(finished):
    folder, summary = finished
    records = runner.read_cases(folder)
    assert summary["results"] == noise.Noise.summarise(None, records)
    found = summary["results"]["0.5"]
    assert found["edit"]["cases"] == 4 and found["paraphrase"]["cases"] == 2
    said = [r["surprise"]["0.5"] for r in records if r["surprise"]["0.5"] is not None]
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(said)))
    assert found["silent"] == 4 - len(said)
    records[0]["surprise"] = dict.fromkeys(records[0]["surprise"])
    silent = noise.Noise.summarise(None, records[:1])["0"]
    assert silent["silent"] == 1 and silent["perplexity"] is None and silent["fluency"] == {}


def test_a_width_that_does_not_beat_the_lookup_says_so():
    hold, fail = [[1.0, 2.0]], [[2.0, 1.0]]
    found = {"lookup": (fail, 3.0), "0": (hold, 4.0), "0.5": (fail, 2.0)}
    controls = dict.fromkeys(["base", "zero", "prompt"], (hold, 1.0))
    record = {
        "loss": {n: {"edit": loss, "paraphrase": []} for n, (loss, _) in (controls | found).items()},
        "surprise": {name: spoken for name, (_, spoken) in (controls | found).items()},
    }
    results = noise.Noise.summarise(None, [record])
    assert results["0"]["edit"]["versus_lookup"]["mean"] == 100 and "note" not in results["0"]["edit"]
    assert results["0.5"]["edit"]["note"] == "does not beat the lookup"
    assert results["0"]["fluency"]["note"] and "note" not in results["0.5"]["fluency"]
    assert results["0.5"]["fluency"]["versus_lookup"]["mean"] == 100
    rows = report.grid(noise.tables({"cases": 1, "results": results})[0]).rows
    assert [row[0] for row in rows] == [*noise.CONTROLS.values(), "0", "0.5"]
    assert ["\n" in "".join(row) for row in rows] == [False] * 4 + [True] * 2


def test_a_run_resumes_line_for_line_and_people_see_it(tiny, finished, tmp_path):
    folder, summary = finished
    lines = (folder / runner.CASES).read_bytes()
    runner.run(experiment(tiny), tmp_path, quiet=True)
    (tmp_path / runner.CASES).write_bytes(lines[: len(lines) // 3])
    runner.run(experiment(tiny), tmp_path, quiet=True)
    assert (tmp_path / runner.CASES).read_bytes() == lines
    console = Console(width=120)
    with console.capture() as captured:
        for shown in noise.tables(json.loads(json.dumps(summary))):
            console.print(shown)
    assert "base LM" in captured.get() and "0.5" in captured.get()
    record = runner.read_cases(folder)[1]
    assert noise.texts(record)[0] == "written: Fact 1 is new 1"
    assert labelled.check(noise, summary)[:2] == ["base LM: edit S", "nearest neighbour: edit S"]
    labels = ["base LM", "z = 0", "fact in the prompt", "nearest neighbour", "σ_W = 0", "σ_W = 0.5"]
    assert list(noise.values(record)) == [f"{label}, edit" for label in labels]


def test_the_command_reads_its_options_and_a_width_below_zero_is_refused(tiny):
    parser = argparse.ArgumentParser()
    bench.benchmark("noise").arguments(parser)
    told = parser.parse_args(["--data", "x", "--sigmas", "0", "0.2"])
    assert told.sigmas == [0.0, 0.2] and told.tokens == 20
    for sigmas in ([], [-1.0], [math.inf]):
        with pytest.raises(ValueError, match="σ_W is a standard deviation"):
            noise.Noise(tiny, cases(1), sigmas, tokens=3, data={})
