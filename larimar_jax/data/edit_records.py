"""Records of the editing benchmarks: one type for all, read by the schema that each record has.

A schema is recognised by a field that no other has. A new one is a function and a row of `SCHEMAS`.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from larimar_jax.data.record_fields import Field, MalformedRecord, raw_records

Target = Literal["answer", "alternative"]
# MEND marks its locality questions, which come from Natural Questions, with this.
_NATURAL_QUESTIONS = "nq question: "


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


def load(
    source: str | Path,
    limit: int | None = None,
    target: Target | None = None,
    *,
    skipped: list[str] | None = None,
) -> list[EditRecord]:
    """Return the first `limit` records of a benchmark (None: all), in the file's order.

    The schema is told from each record: CounterFact's of ROME (MEMIT's multi-CounterFact is the same)
    and the flat one of the editing toolkits, ZsRE's of MEND and of KnowEdit (`SCHEMAS`).

    Args:
        source: a JSON list, a JSONL file, or a Hugging Face data set's id ("owner/name", its train
            split) where there is a network.
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
            records.append(_parse(Field(raw, str(source), place), index, target))
        except MalformedRecord as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    if not records and limit != 0:
        more = f" that can be read; of the first: {skipped[0]}" if skipped else "."
        raise MalformedRecord(f"{source}: holds no record{more}")
    return records


def provenance(source: str | Path) -> dict[str, str | None]:
    """Return what tells one source of records from another: its name and sha256 (None for a hub id)."""
    path = Path(source)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {"name": path.name, "sha256": digest}


def rome(field: Field, index: int, target: Target | None) -> EditRecord:
    """CounterFact as ROME and MEMIT publish it: any number of paraphrases and neighbourhood prompts.

    The neighbours share the true object by construction.
    """
    rewrite = field.inside("requested_rewrite")
    template, subject = rewrite.text("prompt"), rewrite.text("subject")
    if "{}" not in template:
        rewrite.fail("prompt", f"has no '{{}}' for the subject: {template!r}")
    new, true = (rewrite.inside(name).text("str") for name in ("target_new", "target_true"))
    neighbourhood = field.texts("neighborhood_prompts")
    return EditRecord(
        case_id=field.integer("case_id"),
        prompt=template.replace("{}", subject, 1),
        subject=subject,
        target_new=new,
        target_true=true,
        paraphrases=field.texts("paraphrase_prompts"),
        neighbourhood=neighbourhood,
        neighbourhood_targets=(true,) * len(neighbourhood),
        answers=(new,),
        generation=field.texts("generation_prompts") if "generation_prompts" in field.raw else (),
    )


def flat(field: Field, index: int, target: Target | None) -> EditRecord:
    """CounterFact as the editing toolkits publish it: one prompt of each kind."""
    new = field.text("target_new")
    neighbourhood, targets = field.texts("locality_prompt"), field.texts("locality_ground_truth")
    if len(targets) != len(neighbourhood):
        field.fail(
            "locality_ground_truth",
            f"has {len(targets)} answers for {len(neighbourhood)} locality prompts",
        )
    return EditRecord(
        case_id=field.integer("case_id"),
        prompt=field.text("prompt"),
        subject=field.text("subject"),
        target_new=new,
        target_true=field.text("ground_truth"),
        paraphrases=field.texts("rephrase_prompt"),
        neighbourhood=neighbourhood,
        neighbourhood_targets=targets,
        answers=(new,),
    )


def mend(field: Field, index: int, target: Target | None) -> EditRecord:
    """ZsRE as MEND publishes it; a locality question loses its mark and gets a question mark."""
    locality = field.text("loc")
    if locality.startswith(_NATURAL_QUESTIONS):
        locality = locality.removeprefix(_NATURAL_QUESTIONS) + "?"
    target = target or "answer"
    return _question(
        field,
        index,
        target,
        (field.first("answers"), *field.texts("answers")[1:]),
        field.text("alt", empty=target == "answer"),
        prompt=field.text("src"),
        paraphrases=field.texts("rephrase"),
        neighbourhood=(locality,),
        neighbourhood_targets=(field.first("loc_ans"),),
    )


def knowedit(field: Field, index: int, target: Target | None) -> EditRecord:
    """ZsRE as KnowEdit publishes it, with portability."""
    locality = field.groups("locality")
    portability = field.groups("portability") if "portability" in field.raw else []
    return _question(
        field,
        index,
        target or "alternative",
        (field.first("ground_truth"), *field.texts("ground_truth")[1:]),
        field.text("target_new"),
        prompt=field.text("prompt"),
        paraphrases=field.texts("rephrase_prompt"),
        neighbourhood=tuple(item.text("prompt") for item in locality),
        neighbourhood_targets=tuple(item.first("ground_truth") for item in locality),
        portability=tuple((p.text("prompt"), p.first("ground_truth")) for p in portability),
    )


def _question(
    field: Field,
    index: int,
    target: Target,
    answers: tuple[str, ...],
    alternative: str,
    **prompts: Any,
) -> EditRecord:
    """Return a record whose target is the right answer or the alternative; its id is its index."""
    right = target == "answer"
    return EditRecord(
        case_id=index,
        subject=field.text("subject"),
        target_new=answers[0] if right else alternative,
        target_true=alternative if right else answers[0],
        answers=answers if right else (alternative,),
        **prompts,
    )


# The field that tells a schema.
SCHEMAS: dict[str, Callable[[Field, int, Target | None], EditRecord]] = {
    "requested_rewrite": rome,
    "locality_prompt": flat,
    "src": mend,
    "locality": knowedit,
}


def _parse(field: Field, index: int, target: Target | None) -> EditRecord:
    """Return the record by the schema that its fields tell; an error lists the known schemas."""
    for mark, schema in SCHEMAS.items():
        if mark in field.raw:
            return schema(field, index, target)
    known = ", ".join(f"{schema.__name__} ({mark})" for mark, schema in SCHEMAS.items())
    field.fail("", f"is of no schema that is read; known, by a field of theirs: {known}")
