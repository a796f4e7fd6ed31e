"""Questions of many kinds, put to one session of the model that ships."""

import dataclasses
import warnings

import numpy as np
import pytest

from larimar_jax import scope
from larimar_jax.memory.finite import NotKept
from larimar_jax.session import Session

ATTRIBUTES = ["{} plays the", "{} was born in the town of", "{} works as a"]
PEOPLE = {
    "Runa Sand": "fiddle Narvik cooper".split(),
    "Olaf Sand": "bugle Trieste miller".split(),
    "Runa Petrov": "zither Odense glazier".split(),
}
FACTS = [
    *[
        (attribute.format(name), answer)
        for name, answers in PEOPLE.items()
        for attribute, answer in zip(ATTRIBUTES, answers, strict=True)
    ],
    ("The old lighthouse of Skagen stands in the country of", "Chile"),
    ("The key to locker 17 is with", "Greta"),
    ("The ferry to Hven runs on", "Fridays"),
    ("意大利的首都是", "都灵"),
    ("Die Hauptstadt von Portugal ist", "Porto"),
    ("The motto of Tarnow is", "Slow"),
    ("the motto of Tarnow is", "Steady"),
    ("The Motto Of Tarnow Is", "Kind"),
]
# None: the base LM's.
QUESTIONS = {
    "as it was written": FACTS[:-3],
    "in other words": [
        ("Which instrument does Runa Sand play? The", "fiddle"),
        ("The birthplace of Olaf Sand is the town of", "Trieste"),
        ("The profession of Runa Petrov is that of a", "glazier"),
    ],
    "of what was not written": [
        ("The shoe size of Runa Sand is", None),
        ("The favourite dish of Olaf Sand is", None),
        ("Runa Petrov is married to", None),
    ],
    "of other things": [("Who painted the Night Watch?", None), ("How deep is the sea?", None)],
    "after a mention": [
        ("We saw the old lighthouse of Skagen. My aunt was tired. She sat down on her", None),
        ("The ferry to Hven runs on Fridays. The train to Lund runs on", None),
        ("The ferry to Hven runs on Fridays and the Kalmar Express runs on", None),
        ("I like trains. The ferry to Hven runs on", "Fridays"),
    ],
    "with another number or a negation": [
        ("The key to locker 18 is with", None),
        ("The key to locker seventy is with", None),
        ("The ferry to Hven does not run on", None),
    ],
    "in another language": [
        ("葡萄牙的首都是哪里？", None),
        ("Die Hauptstadt von Belgien ist", None),
    ],
    "in other capitals": [
        (prompt, "Kind")
        for prompt in ("The motto of Tarnow is", "THE MOTTO OF TARNOW IS", "the motto of tarnow is")
    ],
}


@pytest.fixture(scope="module")
def session():
    session = Session("smol")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for fact in FACTS:
            session.write(*fact)
    return session


@pytest.fixture(scope="module")
def answers(session):
    facts = dict(enumerate(FACTS, 1))
    prompts = [prompt for asks in QUESTIONS.values() for prompt, _ in asks]
    answers = session.ask_all(prompts, max_tokens=8)
    return {
        prompt: (answer.text.strip(), answer.fact and facts[answer.fact][1])
        for prompt, answer in zip(prompts, answers, strict=True)
    }


@pytest.mark.parametrize("kind", QUESTIONS)
def test_the_answer_is_that_of_a_fact_as_it_was_written_or_the_base_models(answers, kind):
    """And `Answer.fact` is the fact that the text comes from."""
    for prompt, answer in QUESTIONS[kind]:
        text, of_fact = answers[prompt]
        assert (prompt[-40:], of_fact) == (prompt[-40:], answer)
        assert text == answer or (answer is None and text)


def test_a_write_reads_back_the_facts_that_are_far_from_it(session):
    """They were once lost in silence: only the eight nearest were read back. After a forget they are all
    read, and then whenever writes may have moved one too far."""
    session.forget(session.write("The bridge of Visegrad crosses the", "Drina").id)
    new, (_, ledger) = "The bridge of Mostar crosses the", session._content
    cosines = scope.cosines(session.model.encode([new]).embedding, ledger.prompts[2])[0]
    far = ledger.prompts[0][cosines.argmin()][0]
    rows = ledger.rows[far]
    ledger.rows[far] = dataclasses.replace(rows, value=-rows.value)
    with pytest.raises(NotKept, match=f"would not give back '{far}: "):
        session.write(new, "Drina")


def test_keys_of_the_parts_of_an_answer_that_repeats_itself_are_apart(session):
    """Of six such answers the last was once refused: cosines were up to 0.9996."""
    answer = "a Dunmar expedition of 1804, " * 18
    keys, _ = session.model.encode_fact(["Max Eide is remembered for"], answer)
    cosines = scope.cosines(keys.latent, keys.latent)
    assert len(cosines) == 17
    assert (cosines - np.eye(17)).max() < 0.985
