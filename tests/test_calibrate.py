"""The internal scope detector: what it learns, what it is judged by, and the file it is put into."""

import argparse
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import calibrate, formats, pipeline, scope
from larimar_jax.data import vocabulary
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.data.paraphrases import Paraphrases, ScopeQuestions, scope_questions
from larimar_jax.weights import model_file

WIDTH, SUBJECTS, RELATIONS = 24, 40, 6
FEW = calibrate.Recipe(steps=120, batch=32, rate=1e-2, folds=3)


def facts():
    """Questions "wording relation subject"; each subject has one fact."""
    made = []
    for subject in range(SUBJECTS):
        relation = subject % RELATIONS
        others = [(relation + n) % RELATIONS for n in (1, 2)]
        made.append(
            ScopeQuestions(
                f"a {relation} {subject}",
                str(subject),
                (f"b {relation} {subject}",),
                (f"a {relation} {(subject + RELATIONS) % SUBJECTS}",),
                tuple(f"a {other} {subject}" for other in others),
                relation,
            )
        )
    return made


def encoder():
    """Encodings that say the wording loudest, then the subject, and the relation hardly at all."""
    draw = np.random.default_rng(0)
    basis = np.linalg.qr(draw.standard_normal((WIDTH, WIDTH)))[0]
    parts = {
        "wording": draw.standard_normal((2, 4)) @ basis[:4],
        "relation": draw.standard_normal((RELATIONS, 6)) @ basis[4:10],
        "subject": draw.standard_normal((SUBJECTS, 14)) @ basis[10:],
    }
    calls = []

    def encode(texts):
        calls.append(texts)
        rows = [text.split() for text in texts]
        return np.stack([
            3 * parts["wording"]["ab".index(w)]
            + 0.6 * parts["relation"][int(r)]
            + parts["subject"][int(s)]
            for w, r, s in rows
        ])

    return encode, calls


def test_it_learns_what_a_question_asks_and_is_judged_on_relations_that_it_has_not_seen():
    encode, calls = encoder()
    found = calibrate.calibrate(encode, facts(), FEW)
    assert len(calls) == 1 and len(set(calls[0])) == len(calls[0])
    before, after = found.external, found.internal
    assert found.share > 0 and before.pairwise > 0.3 and after.pairwise < 0.5 * before.pairwise
    assert after.missed < before.missed
    # Of another relation than those of the facts, it tells what is asked better as well.
    encoded = {text: row for text, row in zip(calls[0], encode(calls[0]), strict=True)}

    def cosine(one, other, projection):
        one, other = (encoded[text] @ projection for text in (one, other))
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    gaps = []
    for projection in (np.eye(WIDTH), found.projection):
        mine = [cosine(f.prompt, f.paraphrases[0], projection) for f in facts()]
        theirs = [cosine(f.prompt, f.neighbours[0], projection) for f in facts()]
        gaps.append(np.mean(mine) - np.mean(theirs))
    assert gaps[1] > gaps[0] + 0.2


def test_what_it_says_of_a_fold_is_what_a_detector_fitted_on_the_others_does():
    """Two folds, once more by hand: who is fitted on what, and against whose prompts."""
    encode, _ = encoder()
    recipe = dataclasses.replace(FEW, folds=2)
    some = [fact for fact in facts() if fact.relation in (0, 1)]
    found = calibrate.calibrate(encode, some, recipe)
    scores = {"paraphrases": [], "neighbours": [], "others": []}
    for fold in (0, 1):
        rest = [fact for fact in some if fact.relation != fold]
        # Fitted on these alone: their own relations are then the folds.
        relabelled = [dataclasses.replace(fact, relation=n % 2) for n, fact in enumerate(rest)]
        texts = {text: None for fact in some for text in (fact.prompt, *fact.paraphrases,
                                                          *fact.neighbours, *fact.others)}
        places = {text: n for n, text in enumerate(texts)}
        unit = np.asarray(encode(list(texts)), np.float32)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        look = calibrate._Lookup(places, unit)
        rows, owner = calibrate._rows(relabelled, look)
        every = np.arange(len(owner), dtype=np.int32)
        fitted = np.asarray(calibrate._fit(rows, every, np.int32(len(every)), recipe))
        projection = np.eye(WIDTH) + found.share * (fitted - np.eye(WIDTH))
        for fact in some:
            if fact.relation == fold:
                for kind, values in scores.items():
                    for text in getattr(fact, kind):
                        one, other = (look([t])[0] @ projection for t in (fact.prompt, text))
                        size = np.linalg.norm(one) * np.linalg.norm(other)
                        values.append(one @ other / size)
    scores = {kind: np.array(values) for kind, values in scores.items()}
    want = scope.detection(scores["paraphrases"], scores["neighbours"])
    assert found.internal.pairwise == pytest.approx(want.error, abs=0.08)
    assert found.internal.others == pytest.approx(np.mean(scores["others"] >= found.threshold), abs=0.1)


def test_without_a_step_it_is_the_encoders_own_cosine():
    encode, _ = encoder()
    found = calibrate.calibrate(encode, facts(), dataclasses.replace(FEW, steps=0))
    np.testing.assert_array_equal(found.projection, np.eye(WIDTH))
    assert found.external == found.internal and found.share == 0


def test_facts_that_nothing_else_is_asked_of_leave_the_fit_finite():
    encode, _ = encoder()
    some = [dataclasses.replace(f, others=f.others[: n % 3]) for n, f in enumerate(facts())]
    none = [dataclasses.replace(fact, others=()) for fact in facts()]
    for told in (some, none):
        found = calibrate.calibrate(encode, told, dataclasses.replace(FEW, steps=20))
        assert np.isfinite(found.projection).all() and found.share > 0


def test_a_recipe_that_makes_no_sense_names_what_is_wrong():
    with pytest.raises(ValueError, match="batch must be at least 1, folds must be at least 2"):
        calibrate.Recipe(folds=1, batch=0)


def test_the_commands_defaults_are_the_recipes():
    told = argparse.ArgumentParser()
    formats.calibrate_options(told, told)
    arguments = vars(told.parse_args(["smol", "--data", "d", "--out", "o"]))
    assert {n: arguments[n] for n in dataclasses.asdict(calibrate.Recipe())} == dataclasses.asdict(
        calibrate.Recipe()
    )


def test_what_it_cannot_learn_from_is_refused():
    encode, calls = encoder()
    with pytest.raises(ValueError, match="2 records of 2 relations do not make 3 folds"):
        calibrate.calibrate(encode, facts()[:2], FEW)
    broken = [dataclasses.replace(fact, neighbours=()) for fact in facts()]
    with pytest.raises(ValueError, match="'a 0 0' has no paraphrase or no neighbour"):
        calibrate.calibrate(encode, broken, FEW)
    assert not calls


def record(number, prompt, paraphrase, subject):
    return EditRecord(number, prompt, subject, "new", "true", (paraphrase,), ("Who?",), ("me",))


def test_what_else_is_asked_of_a_subject_is_of_other_relations():
    records = [
        record(0, "Ann speaks", "Ann, a native", "Ann"),
        record(1, "Bob was born in", "Bob hails from", "Bob"),
        record(2, "Cy plays", "Cy on the", "Cy"),
        record(3, "It speaks", "It sings", "Eve"),
    ]
    found = scope_questions(records, Paraphrases(records), others=5, seed=0)
    places = [("Ann was born in", "Ann hails from"), ("Ann plays", "Ann on the")]
    assert len(found[0].others) == 2
    assert all(len({*found[0].others} & {*pair}) == 1 for pair in places)
    assert found[3].others == () and found[0].paraphrases == ("Ann, a native",)
    assert [one.relation for one in found] == [0, 1, 2, None]
    assert [len(one.others) for one in scope_questions(records, Paraphrases(records), others=1, seed=0)] \
        == [1, 1, 1, 0]
    again = scope_questions(records, Paraphrases(records), others=5, seed=0)
    assert again == found


@pytest.fixture(scope="module")
def counterfact(tmp_path_factory):
    """Forty records in the flat schema."""
    import json

    path = tmp_path_factory.mktemp("data") / "counterfact.json"
    verbs = (("speaks", "is a native of"), ("was born in", "hails from"))
    path.write_text(json.dumps([
        dict(
            case_id=n,
            prompt=f"Person {n} {verbs[n % 2][0]}",
            subject=f"Person {n}",
            target_new="Rome",
            ground_truth="Paris",
            rephrase_prompt=f"Rain fell. Person {n} {verbs[n % 2][1]}",
            locality_prompt=f"Somebody {n} {verbs[n % 2][0]}",
            locality_ground_truth="Paris",
        )
        for n in range(40)
    ]))
    return path


def test_the_file_is_the_model_with_a_detector_in_it(counterfact, tmp_path, capsys):
    out = tmp_path / "made.safetensors"
    told = argparse.ArgumentParser()
    formats.calibrate_options(told, told)
    line = ["smol", "--data", str(counterfact), "--out", str(out), "--steps", "20", "--folds", "2"]
    arguments = told.parse_args(line)
    formats.calibrate(arguments)
    shown = capsys.readouterr().out
    before, after = pipeline.load("smol"), pipeline.load(out)
    assert f"threshold {after.scope_threshold:.3f}" in shown
    assert after.fingerprint != before.fingerprint
    texts = ["Person 3 speaks", "The capital of France is"]
    mine, theirs = after.encode(texts), before.encode(texts)
    np.testing.assert_array_equal(mine.latent, theirs.latent)
    np.testing.assert_array_equal(mine.pooled, theirs.pooled)
    np.testing.assert_allclose(mine.embedding, mine.pooled @ np.asarray(after.projection), atol=1e-5)
    old, _ = model_file.load_exported(model_file.locate("smol"))
    new, meta = model_file.load_exported(out)
    assert new.keys() == old.keys() | {scope.PROJECTION}
    for name in old.keys() - {scope.PROJECTION}:
        np.testing.assert_array_equal(new[name], old[name])
    assert meta["scope"]["records"] == 40 and meta["scope"]["recipe"]["steps"] == 20
    assert meta["scope"]["data"]["name"] == "counterfact.json"
    assert set(meta["scope"]["unseen_relations"]) == {"external", "internal"}


def test_tokenizers_beside_a_model_are_those_that_it_needs(tmp_path):
    for name in ("tokenizer.json", "decoder_tokenizer.json", "config.json"):
        (tmp_path / name).write_text("{}")
    found = [path.name for path in vocabulary.files(tmp_path)]
    assert found == ["tokenizer.json", "decoder_tokenizer.json"]


def test_a_detector_of_another_width_is_refused(tmp_path):
    path = tmp_path / "wrong.safetensors"
    source = model_file.locate("smol")
    _, meta = model_file.load_exported(source)
    model_file.amend(source, path, {scope.PROJECTION: jnp.eye(3)}, meta)
    with pytest.raises(model_file.ExportError, match=r"scope/projection: \(3, 3\) in the file, \(384, 38"):
        pipeline.load(path)
