"""The scope benchmark on a tiny model, with and without a trained detector."""

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from known_editor import cases, saved

from larimar_jax import cli, scope
from larimar_jax.bench import runner, scope_detection, systems
from larimar_jax.bench.scope_detection import KINDS, STORES, Scope


def projected(model, seed=0):
    """The same model with a detector that compares other directions."""
    changed = copy.copy(model)
    width = model.model.encoder.config.width
    draw = np.random.default_rng(seed).standard_normal((width, width))
    changed.projection = jnp.asarray(draw, jnp.float32)
    return changed


@pytest.mark.parametrize("trained", [False, True])
def test_scores_are_those_of_one_query_at_a_time(tiny, tmp_path, monkeypatch, trained):
    model = projected(tiny) if trained else tiny
    records = [
        dataclasses.replace(case, paraphrases=(f"Says. Something of {n}:", case.prompt)[: n % 3])
        for n, case in enumerate(cases(5))
    ]
    nothing = dict(neighbourhood=(), neighbourhood_targets=(), paraphrases=())
    records.append(dataclasses.replace(records[0], case_id=99, **nothing))
    others = [("What does it say? It says",)[: n % 2] for n in range(5)] + [()]
    questions = [dataclasses.make_dataclass("Q", ["others"])(each) for each in others]
    monkeypatch.setattr(scope_detection, "scope_questions", lambda *_, **__: questions)
    task = Scope(data=saved(records, tmp_path / "f.json"), chunk=2)
    result = runner.run(task, tmp_path / "run", editor=model, quiet=True)
    prompts = [record.prompt for record in records]
    detectors = ("external", "internal") if trained else ("external",)
    # The external detector knows nothing of what was trained.
    encoders = {"external": tiny, "internal": model}
    rows = runner.read_rows(tmp_path / "run")
    assert {row["case"] for row in rows} == {record.case_id for record in records[:5]}
    assert len(rows) == 2 * len(detectors) * (4 + 7 + 2)
    for detector in detectors:
        keys, scores = encoders[detector].encode(prompts).embedding, {}
        for row in (row for row in rows if row["system"] == detector):
            own = next(n for n, record in enumerate(records) if record.case_id == row["case"])
            texts = (records[own].paraphrases, records[own].neighbourhood, others[own])
            assert row["query"] in dict(zip(KINDS, texts, strict=True))[row["kind"]]
            embedding = encoders[detector].encode([scope.question(row["query"])]).embedding
            written = keys[[own]] if row["store"] == "pairwise" else keys
            match = scope.nearest_key(embedding, written)
            assert row["score"] == pytest.approx(match.score[0], abs=1e-5)
            if (row["kind"], row["store"]) == ("paraphrase", "store"):
                assert row["own_prompt"] == float(match.key[0] == own)
            scores.setdefault((row["kind"], row["store"]), []).append(row)
        entries = {
            (entry["kind"], entry["store"]): entry
            for entry in result["results"]
            if entry["system"] == detector
        }
        pairwise = None
        for store in STORES:
            sides = [np.array([r["score"] for r in scores[kind, store]]) for kind in KINDS[:2]]
            wanted = scope.detection(*sides)
            pairwise = pairwise or wanted.threshold
            entry = entries["detection", store]
            assert entry["auroc"]["mean"] == pytest.approx(wanted.auroc)
            assert entry["error"]["mean"] == pytest.approx(100 * wanted.error)
            # What decides does so at the model's threshold, another detector at its own.
            threshold = tiny.scope_threshold if detector == detectors[-1] else pairwise
            for kind in KINDS:
                for row in scores[kind, store]:
                    assert row["passes"] == float(row["score"] >= threshold)
        assert entries["paraphrase", "store"]["own_prompt"]["cases"] == 3
        assert entries["other", "pairwise"]["passes"]["cases"] == 2


def test_a_detector_that_maps_nothing_decides_as_without_one(tiny):
    same = copy.copy(tiny)
    same.projection = jnp.eye(tiny.model.encoder.config.width)
    texts = ["Fact 1 is", "Neighbour 2 says"]
    embedding = tiny.encode(texts).embedding
    np.testing.assert_allclose(same.encode(texts).embedding, embedding, atol=1e-6)
    mapped = projected(tiny).encode(texts)
    np.testing.assert_array_equal(mapped.latent, tiny.encode(texts).latent)
    np.testing.assert_array_equal(mapped.pooled, embedding)


def test_the_command_puts_questions_of_other_relations_to_each_subject(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "load", lambda source, overrides: tiny)
    facts = [
        dataclasses.replace(
            case,
            prompt=f"Fact {n} {('is', 'says')[n % 2]}",
            paraphrases=(f"Of fact: Fact {n} {('was', 'said')[n % 2]}",),
        )
        for n, case in enumerate(cases(4))
    ]
    out = tmp_path / "run"
    line = ["bench", "scope", "--data", saved(facts, tmp_path / "f.json"), "--out", str(out)]
    assert cli.main([*line, "--limit", "2", "--others", "1"]) == 0
    asides = {r["case"]: r["query"] for r in runner.read_rows(out) if r["kind"] == "other"}
    assert asides[1] in ("Fact 0 says", "Of fact: Fact 0 said")
    assert asides[4] in ("Fact 1 is", "Of fact: Fact 1 was")
