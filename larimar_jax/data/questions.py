"""What a scope detector learns from and is judged by: questions that mean a fact, and others.

Taken from the records of an editing benchmark. A record's paraphrases ask for its fact; its neighbours
ask the same of other subjects; and prompts of other records, put to this record's subject, ask something
else of it. `Wordings` tells these last from paraphrases: a prompt that no chain of records connects with
the fact's own is of another relation.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from larimar_jax.data.edit_records import EditRecord
from larimar_jax.data.paraphrases import Wordings


@dataclasses.dataclass(frozen=True)
class Asked:
    """A fact's written prompt with questions beside it.

    paraphrases: which mean the fact. neighbours: the same of other subjects. others: something else
    of this subject; empty where no other relation is known, or the prompt does not hold its subject.
    relation: facts of the same number ask the same in other words; None where that is not known.
    """

    prompt: str
    subject: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]
    others: tuple[str, ...]
    relation: int | None


def asked(
    records: Sequence[EditRecord], wordings: Wordings, *, others: int, seed: int
) -> list[Asked]:
    """One `Asked` a record, in their order.

    Args:
        wordings: of these records, and of any more: the more, the fewer relations are taken for two.
        others: the number of questions of other relations to draw for a record.
        seed: what they are drawn with.
    """
    rng, made = np.random.default_rng(seed), []
    for record in records:
        made.append(
            Asked(
                record.prompt,
                record.subject,
                tuple(record.paraphrases),
                tuple(record.neighbourhood),
                wordings.elsewhere(record, others, rng),
                wordings.relation(record),
            )
        )
    return made
