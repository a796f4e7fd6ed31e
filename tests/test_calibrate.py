"""The internal scope detector: what it learns, what it is judged by, and the file it is put into."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import cli, pipeline, schema, scope
from larimar_jax.data import vocabulary
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.data.paraphrases import Paraphrases, ScopeQuestions, scope_questions
from larimar_jax.train import calibrate, train_commands
from larimar_jax.weights import model_file

WIDTH, SUBJECTS, RELATIONS = 24, 40, 6
FEW = calibrate.Recipe(steps=120, batch=32, rate=1e-2, folds=3)


def facts():
    """Return questions "wording relation subject"; each subject has one fact."""
    result = []
    for subject in range(SUBJECTS):
        relation = subject % RELATIONS
        others = tuple(f"a {(relation + n) % RELATIONS} {subject}" for n in (1, 2))
        neighbour = f"a {relation} {(subject + RELATIONS) % SUBJECTS}"
        prompts = (f"a {relation} {subject}", str(subject), (f"b {relation} {subject}",))
        result.append(ScopeQuestions(*prompts, (neighbour,), others, relation))
    return result


def encoder():
    """Return encodings that state the wording loudest, then the subject, the relation hardly at all."""
    draw = np.random.default_rng(0)
    basis = np.linalg.qr(draw.standard_normal((WIDTH, WIDTH)))[0]
    wording = 3 * draw.standard_normal((2, 4)) @ basis[:4]
    relation = 0.6 * draw.standard_normal((RELATIONS, 6)) @ basis[4:10]
    subject = draw.standard_normal((SUBJECTS, 14)) @ basis[10:]
    calls = []

    def encode(texts):
        calls.append(texts)
        rows = [text.split() for text in texts]
        return np.stack(
            [wording["ab".index(w)] + relation[int(r)] + subject[int(s)] for w, r, s in rows]
        )

    return encode, calls


def test_it_learns_what_a_question_asks_and_is_judged_on_relations_that_it_has_not_seen():
    encode, calls = encoder()
    result = calibrate.calibrate(encode, facts(), FEW)
    assert len(calls) == 1 and len(set(calls[0])) == len(calls[0])
    before, after = result.external, result.internal
    assert result.share > 0 and before["pairwise"] > 0.3
    assert after["pairwise"] < 0.5 * before["pairwise"] and after["missed"] < before["missed"]
    # Of another relation than those of the facts, it tells what is asked better as well.
    encoded = {text: row for text, row in zip(calls[0], encode(calls[0]), strict=True)}

    def cosine(one, other, projection):
        one, other = (encoded[text] @ projection for text in (one, other))
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    gaps = []
    for projection in (np.eye(WIDTH), result.projection):
        mine = [cosine(f.prompt, f.paraphrases[0], projection) for f in facts()]
        theirs = [cosine(f.prompt, f.neighbours[0], projection) for f in facts()]
        gaps.append(np.mean(mine) - np.mean(theirs))
    assert gaps[1] > gaps[0] + 0.2


def test_a_fold_is_judged_by_a_detector_that_was_fitted_on_the_others():
    """Two folds, once more by hand: who is fitted on what, and against whose prompts."""
    encode, _ = encoder()
    recipe = dataclasses.replace(FEW, folds=2)
    pair = [fact for fact in facts() if fact.relation in (0, 1)]
    result = calibrate.calibrate(encode, pair, recipe)
    scores = {"paraphrases": [], "neighbours": [], "others": []}
    look = calibrate._lookup(encode, pair)
    for fold in (0, 1):
        rest = [fact for fact in pair if fact.relation != fold]
        rows, owner = calibrate._rows(rest, look)
        every = np.arange(len(owner), dtype=np.int32)
        fitted = np.asarray(calibrate._fit(rows, every, np.int32(len(every)), recipe))
        projection = np.eye(WIDTH) + result.share * (fitted - np.eye(WIDTH))
        for fact in pair:
            for kind, values in scores.items() if fact.relation == fold else ():
                for text in getattr(fact, kind):
                    a, b = (look([t])[0] @ projection for t in (fact.prompt, text))
                    values.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    scores = {kind: np.array(values) for kind, values in scores.items()}
    want = scope.detection(scores["paraphrases"], scores["neighbours"])
    others = np.mean(scores["others"] >= result.threshold)
    assert result.internal["pairwise"] == pytest.approx(want.error, abs=0.08)
    assert result.internal["others"] == pytest.approx(others, abs=0.1)


def test_degenerate_questions_leave_the_fit_finite_and_no_step_the_encoders_own_cosine():
    encode, _ = encoder()
    result = calibrate.calibrate(encode, facts(), dataclasses.replace(FEW, steps=0))
    np.testing.assert_array_equal(result.projection, np.eye(WIDTH))
    assert result.external == result.internal and result.share == 0
    few = [dataclasses.replace(f, others=f.others[: n % 3]) for n, f in enumerate(facts())]
    none = [dataclasses.replace(fact, others=()) for fact in facts()]
    for variant in (few, none):
        result = calibrate.calibrate(encode, variant, dataclasses.replace(FEW, steps=20))
        assert np.isfinite(result.projection).all() and result.share > 0


def test_a_recipe_or_facts_that_it_cannot_learn_from_are_refused():
    encode, calls = encoder()
    with pytest.raises(
        schema.ConfigError, match=r"batch: must be above 0.*\n.*folds: must be at le"
    ):
        schema.from_dict(calibrate.Recipe, dict(folds=1, batch=0))
    with pytest.raises(ValueError, match="2 records of 2 relations do not make 3 folds"):
        calibrate.calibrate(encode, facts()[:2], FEW)
    broken = [dataclasses.replace(fact, neighbours=()) for fact in facts()]
    with pytest.raises(ValueError, match="'a 0 0' has no paraphrase or no neighbour"):
        calibrate.calibrate(encode, broken, FEW)
    assert not calls


def test_what_else_is_asked_of_a_subject_is_of_other_relations():
    rows = ("Ann speaks", "Ann, a native", "Ann"), ("Bob was born in", "Bob hails from", "Bob")
    rows += ("Cy plays", "Cy on the", "Cy"), ("It speaks", "It sings", "Eve")
    records = [
        EditRecord(n, prompt, subject, "new", "true", (paraphrase,), ("Who?",), ("me",))
        for n, (prompt, paraphrase, subject) in enumerate(rows)
    ]

    def questions(others):
        return scope_questions(records, Paraphrases(records), others=others, seed=0)

    result = questions(5)
    places = [("Ann was born in", "Ann hails from"), ("Ann plays", "Ann on the")]
    assert len(result[0].others) == 2
    assert all(len({*result[0].others} & {*pair}) == 1 for pair in places)
    assert result[3].others == () and result[0].paraphrases == ("Ann, a native",)
    assert [fact.relation for fact in result] == [0, 1, 2, None]
    assert [len(fact.others) for fact in questions(1)] == [1, 1, 1, 0]
    assert questions(5) == result


def test_the_file_is_the_model_with_a_detector_in_it(tmp_path, capsys):
    data, out = tmp_path / "counterfact.json", tmp_path / "detector.safetensors"
    verbs = (("speaks", "is a native of"), ("was born in", "hails from"))
    record = dict(target_new="Rome", ground_truth="Paris", locality_ground_truth="Paris")
    records = [
        record
        | dict(case_id=n, prompt=f"Person {n} {verb}", subject=f"Person {n}")
        | dict(
            rephrase_prompt=f"Rain fell. Person {n} {same}", locality_prompt=f"Somebody {n} {verb}"
        )
        for n in range(40)
        for verb, same in [verbs[n % 2]]
    ]
    data.write_text(json.dumps(records))
    line = ["calibrate", "smol", "--data", str(data), "--out", str(out)]
    helps = train_commands.calibrate.__doc__
    for name, default in dataclasses.asdict(calibrate.Recipe()).items():
        assert re.search(rf"  {name} N: .* \({default:g}\)\n", helps)
    assert cli.main([*line, "--steps", "20", "--folds", "2"]) == 0
    before, after = pipeline.load("smol"), pipeline.load(out)
    assert f"threshold {after.scope_threshold:.3f}" in capsys.readouterr().out
    assert after.fingerprint != before.fingerprint
    texts = ["Person 3 speaks", "The capital of France is"]
    before.relations = None  # Frames would be encoded in the same batch.
    mine, theirs = after.encode(texts), before.encode(texts)
    np.testing.assert_array_equal(mine.latent, theirs.latent)
    np.testing.assert_array_equal(mine.pooled, theirs.pooled)
    projected = mine.pooled @ np.asarray(after.projection)
    np.testing.assert_allclose(mine.embedding, projected, atol=1e-5)
    source, _ = model_file.load_exported(model_file.locate("smol"))
    result, meta = model_file.load_exported(out)
    assert result.keys() == source.keys() - {*scope.ARRAYS} | {scope.PROJECTION}
    for name in source.keys() - {*scope.ARRAYS}:
        np.testing.assert_array_equal(result[name], source[name])
    assert meta["scope"]["records"] == 40 and meta["scope"]["recipe"]["steps"] == 20
    assert meta["scope"]["data"]["name"] == "counterfact.json"
    assert set(meta["scope"]["unseen_relations"]) == {"external", "internal"}


def test_tokenizers_beside_a_model_are_those_that_it_needs(tmp_path):
    for name in ("tokenizer.json", "decoder_tokenizer.json", "config.json"):
        (tmp_path / name).write_text("{}")
    result = [path.name for path in vocabulary.files(tmp_path)]
    assert result == ["tokenizer.json", "decoder_tokenizer.json"]


def test_an_earlier_model_s_tokenizer_is_replaced_along_with_it(tmp_path):
    (copy := tmp_path / "tokenizer.json").write_text("{}")
    recipe = dataclasses.replace(FEW, steps=1)
    calibrate.model("world", tmp_path / "model.safetensors", "world-train:60", recipe)
    assert copy.read_text() == (model_file.locate("world").parent / copy.name).read_text()


def test_a_detector_of_another_width_is_refused(tmp_path):
    path = tmp_path / "wrong.safetensors"
    source = model_file.locate("smol")
    _, meta = model_file.load_exported(source)
    model_file.amend(source, path, {scope.PROJECTION: jnp.eye(3)}, meta)
    message = r"scope/projection: \(3, 3\) in the file, 384 columns"
    with pytest.raises(model_file.ExportError, match=message):
        pipeline.load(path)
