"""The synthetic world: what is reserved for edits is in no sentence, and hard wordings are held out."""

import re

import pytest

from larimar_jax.data import corpus, edit_records, segments, world

RECORDS = edit_records.load("world:200:5")


@pytest.fixture(scope="module")
def sentences():
    documents = corpus.open_corpus("world:2000:3").documents()
    return [sentence for d in documents for sentence in segments.sentences(d.text)]


def template(text, subject):
    """Return a prompt without its subject and without context, in lower case."""
    text = text.replace(subject, "{}").lower()
    return next(
        (text.removeprefix(b.lower()) for b in world.BEFORE if text.startswith(b.lower())), text
    )


def test_a_source_gives_the_same_text_and_records_each_time_and_another_seed_gives_others():
    first, again, other = (corpus.open_corpus(f"world:50:{seed}") for seed in (1, 1, 2))
    assert list(first.documents()) == list(again.documents()) != list(other.documents())
    assert first.identity == again.identity != other.identity
    assert RECORDS == edit_records.load("world:200:5") != edit_records.load("world:200:6")
    assert RECORDS[:10] == edit_records.load("world:10:5")


def test_names_numbers_and_emblems_of_records_are_in_no_sentence(sentences):
    text, words = "\n".join(sentences), set(re.findall(r"\w+", " ".join(sentences)))
    fixed = set(" ".join(world.WORDINGS + world.BEFORE).split())
    for record in RECORDS:
        prompts = " ".join((record.prompt, *record.paraphrases, *record.neighbourhood))
        names = {w for w in re.findall(r"[A-Z]\w+", prompts)} - fixed
        assert record.subject in names and not names & words
        if record.target_new.istitle() or record.target_new.isdigit():
            is_closed = any(record.target_new in answers for answers in world.CLOSED.values())
            assert is_closed or record.target_new not in words
        elif " " in record.target_new:
            assert not re.search(
                rf"(is|emblem[,:]?|names|hear) {record.target_new}([.,]| and| to this)", text
            )


def test_hard_paraphrases_are_in_wordings_that_no_sentence_uses_with_the_relation(sentences):
    forms = {
        wording.format(relation=relation, subject="{}").lower()
        for relation in world.RELATIONS
        for wording in world.wordings(relation, hard=False)
    }
    for sentence in sentences:
        subject = re.search(r"\b[A-Z][a-z]{8}\b", sentence.replace("Travellers", ""))
        assert subject and any(template(sentence, subject[0]).startswith(f) for f in forms), (
            sentence
        )
    hard = edit_records.load("world-hard:200:5")
    for easy, other in zip(RECORDS, hard, strict=True):
        assert (easy.prompt, easy.target_new) == (other.prompt, other.target_new)
        assert all(template(p, easy.subject) in forms for p in easy.paraphrases)
        assert not any(template(p, easy.subject) in forms for p in other.paraphrases)


def test_a_subject_has_two_facts_and_the_displaced_answer_is_another():
    for first, second in zip(RECORDS[::2], RECORDS[1::2], strict=True):
        assert first.subject == second.subject and first.prompt != second.prompt
    assert all(r.target_new != r.target_true and len(r.neighbourhood) == 4 for r in RECORDS)


def test_records_to_fit_a_detector_on_are_about_names_of_the_corpus():
    assert not any(world.is_reserved(r.subject) for r in edit_records.load("world-train:100"))
