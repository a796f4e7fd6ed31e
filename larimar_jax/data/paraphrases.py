"""Other wordings of a benchmark's prompts, taken from the benchmark's own records.

A record words its fact twice or more, and other records use the same words for other subjects: "The
mother tongue of {} is" stands beside "{} spoke the language" in one record and beside "{}, a native" in
another, so each is a wording of the others' facts too. Prompts without their subject are the nodes of a
graph, whose edges are the records; what can be reached from a prompt's node are its other wordings.
"""

import collections
from collections.abc import Iterable

import numpy as np

from larimar_jax.data.edit_records import EditRecord

_SUBJECT = "{}"


class Wordings:
    """The wordings that the given records have.

    The more records, the more wordings; records that are only evaluated may be among them.
    """

    def __init__(self, records: Iterable[EditRecord]):
        self._beside: dict[str, collections.Counter[str]] = {}
        for record in records:
            mine = _template(record.prompt, record.subject)
            for paraphrase in record.paraphrases:
                other = _template(paraphrase, record.subject)
                if mine is None or other is None or mine == other:
                    continue
                for one, another in ((mine, other), (other, mine)):
                    self._beside.setdefault(one, collections.Counter())[another] += 1
        self._reached: dict[str, tuple[str, ...]] = {}
        self._relations: list[tuple[str, ...]] = []
        self._relation: dict[str, int] = {}
        for template in self._beside:
            if template not in self._relation:
                found = (template, *self._search(template))
                self._relation |= dict.fromkeys(found, len(self._relations))
                self._relations.append(found)

    def of(self, record: EditRecord) -> tuple[str, ...]:
        """Other wordings of a record's prompt, the nearest first: by the number of records between, then
        by how many records say so. Empty where its prompt does not hold its subject."""
        template = _template(record.prompt, record.subject)
        if template is None:
            return ()
        if template not in self._reached:
            self._reached[template] = self._search(template)
        return tuple(found.replace(_SUBJECT, record.subject) for found in self._reached[template])

    def unseen(self, record: EditRecord) -> tuple[str, ...]:
        """`of`, without the words of the record's own paraphrases: what may be written where these are
        what is asked."""
        own = {_template(text, record.subject) for text in record.paraphrases}
        return tuple(text for text in self.of(record) if _template(text, record.subject) not in own)

    def relation(self, record: EditRecord) -> int | None:
        """The number of the relation that a record's prompt is of: wordings of one another share it.
        None where the prompt does not hold its subject, or no record words it in two ways."""
        return self._relation.get(_template(record.prompt, record.subject) or "")

    def elsewhere(
        self, record: EditRecord, count: int, rng: np.random.Generator
    ) -> tuple[str, ...]:
        """Up to `count` prompts of other relations, put to the record's subject: of `count` relations
        drawn without replacement, a wording each. Empty where its prompt is of no known relation."""
        mine = self.relation(record)
        if mine is None:
            return ()
        drawn = [n for n in rng.permutation(len(self._relations)) if n != mine][:count]
        found = [self._relations[n][rng.integers(len(self._relations[n]))] for n in drawn]
        return tuple(template.replace(_SUBJECT, record.subject) for template in found)

    def _search(self, template: str) -> tuple[str, ...]:
        seen, ring = dict.fromkeys([template]), [template]
        while ring:
            counts: collections.Counter[str] = collections.Counter()
            for node in ring:
                for other, records in self._beside.get(node, {}).items():
                    if other not in seen:
                        counts[other] += records
            ring = [node for node, _ in counts.most_common()]
            seen |= dict.fromkeys(ring)
        return tuple(seen)[1:]


def _template(text: str, subject: str) -> str | None:
    """The sentence of a text that names the subject, without it; None where none does."""
    place = text.rfind(subject)
    if place < 0 or _SUBJECT in text:
        return None
    begin = max(text.rfind(". ", 0, place) + 1, text.rfind("\n", 0, place))
    sentence = text[max(begin, 0) :].strip()
    return sentence.replace(subject, _SUBJECT, 1)
