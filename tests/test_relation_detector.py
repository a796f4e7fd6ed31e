"""The scope detector that knows relations: what it learns from records, and the file it is put into."""

import json

import numpy as np
import pytest

from larimar_jax import cli, pipeline, scope
from larimar_jax.data import lexical, relations
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.data.paraphrases import Paraphrases
from larimar_jax.train import relation_detector
from larimar_jax.weights import model_file

WIDTH, RELATIONS, WORDS = 48, 12, 8


@pytest.fixture
def few(monkeypatch):
    """Twelve relations of eight wordings, "relation wording", in place of those that ship."""
    wordings = tuple(tuple(f"{r} {w} X" for w in range(WORDS)) for r in range(RELATIONS))
    monkeypatch.setattr(relations, "wordings", lambda: wordings)
    return wordings


def encode(texts):
    """Return a direction of a text's relation, its first word, and as much of its very own."""
    rows = []
    for text in texts:
        relation, wording, *_ = text.split()
        parts = [np.random.default_rng([7, int(n)]).standard_normal(WIDTH) for n in (relation,)]
        parts.append(np.random.default_rng([8, int(relation), int(wording)]).standard_normal(WIDTH))
        rows.append(sum(parts))
    return np.float32(rows)


def records(count):
    """Records whose prompt asks for relation 0, and their paraphrase in words that look like nothing."""
    names = [f"Name{n}" for n in range(count)]
    return [EditRecord(0, f"0 3 {n}", n, "a", "b", (f"99 0 {n}",), (), ()) for n in names]


def scores(detector, query, keys):
    rows = scope.relation_embedding(encode([query, *keys]), encode([query, *keys]), *detector)
    return rows[1:] @ rows[0]


def test_a_question_is_nearest_to_wordings_of_its_own_relation(few):
    trained = relation_detector.train(encode, Paraphrases([]))
    for relation, wordings in enumerate(few):
        others = [words[0] for r, words in enumerate(few) if r != relation]
        near = scores(trained.detector, wordings[0], wordings[1:])
        far = scores(trained.detector, wordings[0], others)
        assert near.min() > trained.threshold > far.max()
    missed, passed = ([point[n] for point in trained.curve] for n in (1, 2))
    assert missed == sorted(missed) and passed == sorted(passed)[::-1]
    near = [share for at, _, share in trained.curve if abs(at - trained.threshold) <= 0.05]
    assert min(near) <= 0.05 <= max(near)


def test_records_teach_it_wordings_that_look_like_nothing(few):
    before = relation_detector.train(encode, Paraphrases(records(2))).detector
    after = relation_detector.train(encode, Paraphrases(records(3))).detector
    assert (
        len(before.wordings) == RELATIONS * WORDS
        and len(after.wordings) == len(before.wordings) + 2
    )
    questions = ("99 0 X", ["0 3 X", "0 5 X", "4 3 X"])
    old, new = scores(before, *questions), scores(after, *questions)
    assert (new[:2] > old[:2] + 0.2).all() and new[2] < 0.5
    np.testing.assert_allclose(after.relations.sum(axis=1), 1, atol=2e-3)


def test_the_score_is_that_of_its_formula():
    draw = np.random.default_rng(0)
    texts, frames, wordings = (draw.standard_normal((n, 6)) for n in (2, 2, 5))
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    frames /= np.linalg.norm(frames, axis=1, keepdims=True)
    wordings /= np.linalg.norm(wordings, axis=1, keepdims=True)
    labels = draw.dirichlet(np.ones(3), 5)
    shares = [np.exp(scope.SHARPNESS * wordings @ f) for f in frames]
    p, q = ((s / s.sum()) @ labels for s in shares)
    want = (1 - scope.WHOLE) * np.sqrt(p * q).sum() + scope.WHOLE * texts[0] @ texts[1]
    rows = scope.relation_embedding(*map(np.float32, (texts, frames, wordings, labels)))
    assert rows[0] @ rows[1] == pytest.approx(want, abs=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_the_file_is_the_model_with_this_detector_in_it(few, tmp_path, capsys):
    data, out = tmp_path / "counterfact.json", tmp_path / "detector.safetensors"
    row = dict(target_new="Rome", ground_truth="Paris", locality_ground_truth="Paris")
    row |= dict(case_id=1, prompt="Ann speaks", subject="Ann", rephrase_prompt="Ann, a native")
    data.write_text(json.dumps([row | dict(locality_prompt="Bob speaks")]))
    line = ["calibrate", "smol", "--data", str(data), "--out", str(out), "--relations"]
    assert cli.main(line) == 0
    model, (arrays, _) = pipeline.load(out), model_file.load_exported(out)
    assert f"threshold {model.scope_threshold:.3f}" in capsys.readouterr().out
    assert arrays["scope/wordings"].shape == (RELATIONS * WORDS, 384) and model.projection is None
    texts = ["Where was Ann born?", "The gate of Rome is"]
    encodings, frames = (
        model.encode(texts),
        model.encode([lexical.evidence(text).frame for text in texts]),
    )
    want = scope.relation_embedding(encodings.pooled, frames.pooled, *model.relations)
    np.testing.assert_allclose(encodings.embedding, want, atol=1e-4)
    assert scope.comparable(model.relations, texts, texts).tolist() == [
        [True, False],
        [False, True],
    ]
    arrays["scope/wordings"] = arrays["scope/wordings"][:, :5]
    model_file.save_exported(out, arrays, model_file.load_exported(out)[1])
    with pytest.raises(model_file.ExportError, match=r"scope/wordings: \(96, 5\) in the file, 384"):
        pipeline.load(out)
