"""Addressing with noise, on a tiny model against a plain loop."""

import argparse
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_bench import cases

from larimar_jax import bench
from larimar_jax.bench import noise, runner


def experiment(tiny):
    return noise.Noise(tiny, cases(4), [0.5, 0.0], tokens=3, data={}, chunk=2)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    return folder, runner.run(experiment(tiny), folder, quiet=True)


def test_what_is_read_is_the_mean_plus_noise_of_that_size(tiny, finished):
    records = runner.read_cases(finished[0])
    chunk = cases(2)
    memory, prior = tiny.dual, tiny.prior
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 8)
    for number, (case, record) in enumerate(zip(chunk, records[:2], strict=True)):
        assert list(record["loss"]) == ["base", "0", "0.5"]
        prompts = [case.prompt, *case.paraphrases]
        key, value = tiny.encode([case.prompt, record["written"]], [None, case.target_new]).latent
        fact = jnp.asarray(key[None]), jnp.asarray(value[None])
        state = memory.write(prior, memory.empty(prior), *fact)
        asked = np.zeros((4, len(key)), np.float32)
        asked[: len(prompts)] = tiny.encode(prompts).latent
        mean = memory.address(prior, jnp.asarray(asked))
        drawn = mean + 0.5 * jax.random.normal(keys[number], mean.shape)
        matrix = memory.matrix(prior, state)
        pairs = [[case.target_new, case.target_true]] * len(prompts)
        for name, weights in (("base", None), ("0", mean), ("0.5", drawn)):
            condition = None
            if weights is not None:
                condition = tiny.condition(np.asarray(weights @ matrix)[: len(prompts)])
            wanted = tiny.score(prompts, pairs, condition)
            found = record["loss"][name]["edit"] + record["loss"][name]["paraphrase"]
            np.testing.assert_allclose(found, wanted, rtol=2e-4)
            (text,) = tiny.generate([case.prompt], condition, max_tokens=3, stop=())
            assert record["text"][name] == text
            spoken = tiny.score([case.prompt], [[text]])[0, 0] if text.strip() else None
            assert record["surprise"][name] == (spoken and pytest.approx(float(spoken), rel=1e-5))


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
    assert silent["silent"] == 1 and silent["perplexity"] is None


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
    assert set(noise.values(record)) == {f"σ_W = {s}, edit" for s in ("base", "0", "0.5")}


def test_the_command_reads_its_options_and_a_width_below_zero_is_refused(tiny):
    parser = argparse.ArgumentParser()
    bench.benchmark("noise").arguments(parser)
    told = parser.parse_args(["--data", "x", "--sigmas", "0", "0.2"])
    assert told.sigmas == [0.0, 0.2] and told.tokens == 20
    for sigmas in ([], [-1.0], [math.inf]):
        with pytest.raises(ValueError, match="σ_W is a standard deviation"):
            noise.Noise(tiny, cases(1), sigmas, tokens=3, data={})
