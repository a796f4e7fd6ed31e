"""Records of the editing benchmarks: one type for all, read by the schema that each record has.

A schema is recognised by a field that no other has. It says where in a raw record each field of
`EditRecord` is. A new one is a row of `SCHEMAS`. An error names file, record, line and field.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from larimar_jax.data.edit_schemas import SCHEMAS, Target
from larimar_jax.data.record_files import MalformedRecord, fail, get, raw_records, require


@dataclasses.dataclass(frozen=True)
class EditRecord:
    """One edit and the prompts that judge it, whatever benchmark it comes from.

    Attributes:
        case_id: the benchmark's own number, or the record's index where it has none.
        prompt: the edit prompt, with its subject filled in.
        subject: what the fact is about.
        target_new: the answer to be written, without a leading space.
        target_true: the answer it displaces ("" where the benchmark gives none).
        paraphrases: other wordings of the prompt, which must change with it.
        neighbourhood: prompts that must *not* change.
        neighbourhood_targets: the right answer to each of `neighbourhood`, in its order.
        answers: every accepted spelling of `target_new`, the first of them `target_new` itself.
        generation: prompts for free generation, where the benchmark has them.
        portability: (prompt, answer) pairs that follow from the edit, where the benchmark has them.
        portability_kinds, neighbourhood_kinds: the benchmark's name for the kind of each of these, such
            as "Reasoning" or "Relation_Specificity", where it has such names.
    """

    case_id: int
    prompt: str
    subject: str
    target_new: str
    target_true: str
    paraphrases: tuple[str, ...]
    neighbourhood: tuple[str, ...]
    neighbourhood_targets: tuple[str, ...]
    answers: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    portability: tuple[tuple[str, str], ...] = ()
    portability_kinds: tuple[str, ...] = ()
    neighbourhood_kinds: tuple[str, ...] = ()

    def questions(self) -> Iterator[tuple[str, str, str]]:
        """Yield kind, prompt and right answer of the edit, its paraphrases and its neighbourhood."""
        yield "edit", self.prompt, self.target_new
        yield from (("paraphrase", prompt, self.target_new) for prompt in self.paraphrases)
        near = zip(self.neighbourhood, self.neighbourhood_targets, strict=True)
        yield from (("neighbourhood", *pair) for pair in near)


def load(
    source: str | Path,
    limit: int | None = None,
    target: Target | None = None,
    *,
    skipped: list[str] | None = None,
) -> list[EditRecord]:
    """Return the first `limit` records of a benchmark (None: all), in the file's order.

    The schema is told from each record: CounterFact's of ROME (MEMIT's multi-CounterFact is the same)
    and the flat one of the editing toolkits, ZsRE's of MEND and of KnowEdit, KnowEdit's other sets, and
    those of MQuAKE, RippleEdits, UniEdit, FastEdit, AlphaEdit's edits and ROME's known facts
    (`SCHEMAS`).

    Args:
        source: a JSON list (as it is, or as "data" of an object), a JSONL file, "world:COUNT:SEED"
            (data/world.py), or a Hugging Face data set's id ("owner/name", its train split) where
            there is a network.
        target: what a ZsRE record's `target_new` is: "answer", the question's right answer (the protocol
            of ROME and of Larimar's tables, which teach the model what it does not know), or
            "alternative", the false answer that the record proposes. None takes the protocol of the
            record's own schema: "answer" for MEND, "alternative" for KnowEdit.
        skipped: where it is a list, a malformed record does not raise: the reason is appended here, and
            the record does not count for `limit`.
    Raises:
        MalformedRecord: a record misses a field or holds a wrong type; names file, record, line and
            field. Or the file is no JSON, or holds no record.
        FileNotFoundError: nothing is at `source`.
        ValueError: no such `target`.
    """
    if target not in (None, "answer", "alternative"):
        raise ValueError(f"target must be 'answer', 'alternative' or None, not {target!r}")
    records: list[EditRecord] = []
    for index, (place, raw) in enumerate(raw_records(source)):
        if limit is not None and len(records) >= limit:
            break
        try:
            if isinstance(raw, MalformedRecord):
                raise raw
            records.append(_parse(raw, index, target))
        except MalformedRecord as error:
            reason = f"{source}, {place}: {error}"
            if skipped is None:
                raise MalformedRecord(reason) from error
            skipped.append(reason)
    if not records and limit != 0:
        more = f" that can be read; of the first: {skipped[0]}" if skipped else "."
        raise MalformedRecord(f"{source}: holds no record{more}")
    return records


def provenance(source: str | Path) -> dict[str, str | None]:
    """Return what tells one source of records from another: its name and sha256 (None for a hub id)."""
    path = Path(source)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {"name": path.name, "sha256": digest}


def _parse(raw: Any, index: int, target: Target | None) -> EditRecord:
    """Return the record by the schema that its fields tell; an error lists the known schemas."""
    require(raw, "", "an object", dict)
    for mark, (paths, finish, protocol) in SCHEMAS.items():
        if mark in raw:
            values = {name: get(raw, path) for name, path in paths.items()}
            values = finish({"case_id": index} | values, target or protocol)
            return EditRecord(**{"answers": (values["target_new"],)} | values)
    known = ", ".join(f"{finish.__name__} ({mark})" for mark, (_, finish, _) in SCHEMAS.items())
    fail("", f"is of no schema that is read; known, by a field of theirs: {known}")
