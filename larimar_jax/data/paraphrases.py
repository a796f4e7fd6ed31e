"""Other wordings of a benchmark's prompts, and other questions about their subjects, by its own records.

A record words its fact twice or more, and other records use the same words for other subjects: "The
mother tongue of {} is" stands beside "{} spoke the language" in one record and beside "{}, a native" in
another, so each is a wording of the others' facts too. Prompts without their subject are the nodes of a
graph, whose edges are the records; what can be reached from a prompt's node are its other wordings. A
prompt that no chain of records connects with the fact's own is of another relation.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from larimar_jax.data.edit_records import EditRecord

_SUBJECT = "{}"


class Paraphrases:
    """The wordings that the given records have.

    The more records, the more wordings; records that are only evaluated may be among them.
    """

    def __init__(self, records: Iterable[EditRecord]):
        self._beside: dict[str, collections.Counter[str]] = {}
        for record in records:
            own = _template(record.prompt, record.subject)
            for paraphrase in record.paraphrases:
                other = _template(paraphrase, record.subject)
                if own is None or other is None or own == other:
                    continue
                for start, end in ((own, other), (other, own)):
                    self._beside.setdefault(start, collections.Counter())[end] += 1
        self._reached: dict[str, tuple[str, ...]] = {}
        self._relations: list[tuple[str, ...]] = []
        self._relation: dict[str, int] = {}
        for template in self._beside:
            if template not in self._relation:
                templates = (template, *self._search(template))
                self._relation |= dict.fromkeys(templates, len(self._relations))
                self._relations.append(templates)

    def of(self, record: EditRecord) -> tuple[str, ...]:
        """Return other wordings of a record's prompt, the nearest first: by the number of records
        between, then by how many records have both. Empty where its prompt does not hold its subject."""
        template = _template(record.prompt, record.subject)
        if template is None:
            return ()
        if template not in self._reached:
            self._reached[template] = self._search(template)
        return tuple(other.replace(_SUBJECT, record.subject) for other in self._reached[template])

    def unseen(self, record: EditRecord) -> tuple[str, ...]:
        """Return `of` without the words of the record's own paraphrases: what may be written where the
        paraphrases are the questions."""
        own = {_template(text, record.subject) for text in record.paraphrases}
        return tuple(text for text in self.of(record) if _template(text, record.subject) not in own)

    def relation(self, record: EditRecord) -> int | None:
        """Return the number of the relation of a record's prompt: wordings of one another share it.
        None where the prompt does not hold its subject, or no record words it in two ways."""
        return self._relation.get(_template(record.prompt, record.subject) or "")

    def graph(self, least: int) -> tuple[list[str], Float[np.ndarray, "n n"]]:
        """Return the prompts, {} for their subject, that at least `least` records have beside another,
        and how many records have each two of them."""
        templates = [t for t, beside in self._beside.items() if sum(beside.values()) >= least]
        places = {template: place for place, template in enumerate(templates)}
        counts = np.zeros((len(templates), len(templates)), np.float32)
        for template, place in places.items():
            for other, records in self._beside[template].items():
                if other in places:
                    counts[place, places[other]] = records
        return templates, counts

    def elsewhere(
        self, record: EditRecord, count: int, rng: np.random.Generator
    ) -> tuple[str, ...]:
        """Return up to `count` prompts of other relations about the record's subject: of `count`
        relations drawn without replacement, a wording each. Empty for a prompt of no known relation."""
        own = self.relation(record)
        if own is None:
            return ()
        drawn = [n for n in rng.permutation(len(self._relations)) if n != own][:count]
        templates = [self._relations[n][rng.integers(len(self._relations[n]))] for n in drawn]
        return tuple(template.replace(_SUBJECT, record.subject) for template in templates)

    def _search(self, template: str) -> tuple[str, ...]:
        reached, ring = dict.fromkeys([template]), [template]
        while ring:
            counts: collections.Counter[str] = collections.Counter()
            for node in ring:
                for other, records in self._beside.get(node, {}).items():
                    if other not in reached:
                        counts[other] += records
            ring = [node for node, _ in counts.most_common()]
            reached |= dict.fromkeys(ring)
        return tuple(reached)[1:]


@dataclasses.dataclass(frozen=True)
class ScopeQuestions:
    """A fact's written prompt with questions beside it: what a scope detector learns from.

    paraphrases: which mean the fact. neighbours: the same of other subjects. others: of another relation
    of this subject; empty where none is known, or the prompt does not hold its subject. relation: the
    number of the fact's relation; None where that is not known.
    """

    prompt: str
    subject: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]
    others: tuple[str, ...]
    relation: int | None


def scope_questions(
    records: Sequence[EditRecord], paraphrases: Paraphrases, *, others: int, seed: int
) -> list[ScopeQuestions]:
    """Return the questions of each record, in the records' order.

    Args:
        paraphrases: of these records, and of any more: the more, the fewer relations count as two.
        others: the number of questions of other relations to draw for a record.
        seed: of that draw.
    """
    rng = np.random.default_rng(seed)
    return [
        ScopeQuestions(
            record.prompt,
            record.subject,
            tuple(record.paraphrases),
            tuple(record.neighbourhood),
            paraphrases.elsewhere(record, others, rng),
            paraphrases.relation(record),
        )
        for record in records
    ]


def _template(text: str, subject: str) -> str | None:
    """Return the sentence of a text that names the subject, without it; None where none does."""
    place = text.rfind(subject)
    if place < 0 or _SUBJECT in text:
        return None
    begin = max(text.rfind(". ", 0, place) + 1, text.rfind("\n", 0, place))
    sentence = text[max(begin, 0) :].strip()
    return sentence.replace(subject, _SUBJECT, 1)
