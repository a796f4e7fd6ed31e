"""The scope benchmark on a tiny model, with and without a trained detector."""

import copy
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_bench import cases

from larimar_jax import cli
from larimar_jax import scope as detector
from larimar_jax.bench import report, runner, scope, systems


def projected(model, seed=0):
    """The same model with a detector that compares other directions."""
    made = copy.copy(model)
    width = model.model.encoder.config.width
    draw = np.random.default_rng(seed).standard_normal((width, width))
    made.projection = jnp.asarray(draw, jnp.float32)
    return made


@pytest.mark.parametrize("trained", [False, True])
def test_scores_are_those_of_one_query_at_a_time(tiny, tmp_path, trained):
    model = projected(tiny) if trained else tiny
    records = [
        dataclasses.replace(case, paraphrases=(f"Says. Something of {n}:", case.prompt)[: n % 3])
        for n, case in enumerate(cases(5))
    ]
    others = [(f"What does {n} say? It says",)[: n % 2] for n in range(5)]
    made = scope.Scope(model, records, others, data={})
    summary = runner.run(made, tmp_path / "run", quiet=True)
    assert report.sections([report.read(tmp_path / "run")] * 2)[0].items
    assert list(summary["results"]) == (["external", "internal"] if trained else ["external"])
    prompts = [record.prompt for record in records]
    # The external detector knows nothing of what was trained.
    embeddings = {"external": tiny.encode, "internal": model.encode}
    for name, result in summary["results"].items():

        def embed(texts, name=name):
            return embeddings[name](texts).embedding

        written = embed(prompts)
        everything = {store: {kind: [] for kind in scope.KINDS} for store in scope.STORES}
        for number, line in enumerate(runner.read_cases(tmp_path / "run")):
            one = records[number]
            asked = (one.paraphrases, one.neighbourhood, others[number])
            for kind, queries in zip(scope.KINDS, asked, strict=True):
                assert line[kind]["queries"] == list(queries)
                for row, query in enumerate(queries):
                    sentences, owners = detector.parts([query])
                    alone = detector.match(embed(sentences), owners, written[[number]])
                    among = detector.match(embed(sentences), owners, written)
                    for store, match in (("pairwise", alone), ("store", among)):
                        score = line[kind][name][store][row]
                        assert score == pytest.approx(match.score[0], abs=1e-5)
                        everything[store][kind].append(score)
        for store, found in everything.items():
            found = {kind: np.array(values) for kind, values in found.items()}
            want = detector.detection(found["paraphrase"], found["neighbourhood"])
            assert result[store]["auroc"] == pytest.approx(want.auroc)
            assert result[store]["error"] == pytest.approx(want.error)
        assert result["found_own"]["cases"] == 3
        assert result["pairwise"]["passing"]["other"]["cases"] == 2


def test_a_detector_that_maps_nothing_decides_as_without_one(tiny):
    same = copy.copy(tiny)
    same.projection = jnp.eye(tiny.model.encoder.config.width)
    texts = ["Fact 1 is", "Neighbour 2 says"]
    np.testing.assert_allclose(same.encode(texts).embedding, tiny.encode(texts).embedding, atol=1e-6)
    other = projected(tiny).encode(texts)
    np.testing.assert_array_equal(other.latent, tiny.encode(texts).latent)
    np.testing.assert_array_equal(other.pooled, tiny.encode(texts).embedding)


def test_the_command_puts_questions_of_other_relations_to_each_subject(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "load", lambda source, overrides: tiny)
    facts = [
        dict(
            case_id=n,
            prompt=f"Fact {n} {('is', 'says')[n % 2]}",
            subject=f"Fact {n}",
            target_new="new",
            ground_truth="true",
            rephrase_prompt=f"Of fact: Fact {n} {('was', 'said')[n % 2]}",
            locality_prompt=f"Neighbour {n} is",
            locality_ground_truth="true",
        )
        for n in range(4)
    ]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    out = tmp_path / "run"
    command = ["bench", "scope", "--data", str(tmp_path / "facts.json"), "--out", str(out)]
    assert cli.main([*command, "--limit", "2", "--others", "1"]) == 0
    first, second = runner.read_cases(out)
    assert first["other"]["queries"][0] in ("Fact 0 says", "Of fact: Fact 0 said")
    assert second["other"]["queries"][0] in ("Fact 1 is", "Of fact: Fact 1 was")
