"""What sentences name, and the wordings of relations that a detector tells them apart by."""

import numpy as np
import pytest

from larimar_jax.data import lexical, relations

KEY = "The gate code of Villa Morena is"


@pytest.mark.parametrize(
    ("key", "query", "is_same"),
    [
        (KEY, "What is the code for the gate of villa Morena?", True),
        (KEY, "The gate code of Villa Serena is", False),
        ("Ida Lund plays the", "Ida Holm plays the", False),
        ("Ida Lund was born in the town of", "IDA LUND WAS BORN IN THE TOWN OF", True),
        ("Ida Lund was born in the town of", "IDA HOLM WAS BORN IN THE TOWN OF", False),
        ("José Núñez lives in", "where does jose nunez live?", True),
        ("the tides of narvik come at", "the tides of bergen come at", False),
        ("Locker 12 belongs to", "Locker 13 belongs to", False),
        ("Locker 12 belongs to", "Who has locker 12?", True),
        ("The second reserve of Luton is", "The 2nd reserve of Luton is", True),
        ("The second reserve of Luton is", "The third reserve of Luton is", False),
        ("Pope Leo XI was born in", "Pope Leo XIII was born in", False),
        ("Tram twenty of Lodz goes to", "Tram thirty of Lodz goes to", False),
        ("Tram twenty of Lodz goes to", "Where does tram 20 of Lodz go?", True),
        ("The sixteenth gate of Luton is", "The seventeenth gate of Luton is", False),
        ("The twenty-first gate of Luton is", "The twentieth gate of Luton is", False),
        ("The twenty-first gate of Luton is", "The 21st gate of Luton is", True),
        ("Release 2.1 of Larix adds", "Release 1.2 of Larix adds", False),
        ("Crate 10,000 of Larix holds", "Crate 10000 of Larix holds", True),
        ("The star NGC 88 is in", "The star NGC 88 is where NGC 88 is in", True),
        ("The one who sang in Luton is", "The first who sang in Luton is", True),
        ("Ida Lund plays the", "Ida Lund sings and Per Dahl plays the", False),
        ("Ida Lund plays the", "Beside Per Dahl in Oslo, Ida Lund plays the", True),
        ("Ida Lund plays the", "What Horn Does Ida Lund Play?", True),
        ("The museum is open on", "The museum of Luton is open on", False),
        ("The bakery is open on", "The bakery is not open on", False),
        ("The bakery is open on", "The bakery isn't open on", False),
        ("The oldest gate of Luton is", "What is the youngest gate of Luton?", False),
        ("The oldest and newest gate of Luton is", "The newest gate of Luton is", True),
        ("The bakery is open on", "The bakery is closed on", False),
        ("The northern gate of Luton is", "The north gate of Luton is", True),
        ("In May Ida Lund swims in", "In June Ida Lund swims in", False),
        ("In June Ida Lund may swim in", "Ida Lund swims in June in", True),
        ("Die Hauptstadt von Peru ist", "Die Hauptstadt von Kuba ist", False),
        ("東京の市長は", "東京の市長は", True),
        ("東京の市長は", "大阪の市長は", False),
        ("Мэр Москвы", "Мэр города Москвы", False),
        ("東京の市長は", "東京の市長は？", True),
        ("कुल का नाम", "कल का नाम", False),
        ("🍒 means", "🍓 means", False),
        ("The tea in ☕ is", "What is the tea in ☕?", True),
    ],
)
def test_names_numbers_and_negation_tell_questions_apart(key, query, is_same):
    assert lexical.comparable([query], [key]).tolist() == [[is_same]]
    # Beside other keys and queries it is decided the same.
    among = lexical.comparable(["Nothing", query], [key, "Ulla Berg sings"])
    assert among.shape == (2, 2) and among[1, 0] == is_same


def test_every_text_may_mean_itself():
    texts = [text for wordings in relations.wordings() for text in wordings[:2]]
    assert np.diag(lexical.comparable(texts, texts)).all()


@pytest.mark.parametrize(
    ("text", "frame"),
    [
        ("Where was Duke Otto of the Alps born?", "Where was X born?"),
        ("Room 101 is on the", "Room X is on the"),
        ("Does Ida Lund know Per Dahl?", "Does X know X?"),
        ("the mayor of narvik is", "the mayor of X is"),
        ("Ida's dog, Rex, eats", "X's dog, X, eats"),
        ("Anna I was followed by", "X was followed by"),
        ("What is it?", "What is it?"),
    ],
)
def test_the_frame_of_a_sentence_has_no_names(text, frame):
    assert lexical.evidence(text).frame == frame


def test_a_relation_has_many_wordings_and_shares_few_with_another():
    wordings = relations.wordings()
    assert len(wordings) > 200 and min(map(len, wordings)) >= 7
    assert all("X" in text.split("'")[0].split() or "X" in text for text in sum(wordings, ()))
    texts = sum(wordings, ())
    assert len(texts) - len(set(texts)) < 0.02 * len(texts)
