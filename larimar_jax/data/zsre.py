"""ZsRE question answering, in the MEND schema and in the KnowEdit one."""

from pathlib import Path
from typing import Literal

from larimar_jax.data import edit_records
from larimar_jax.data.edit_records import EditRecord, Field, MalformedRecord

__all__ = ["EditRecord", "MalformedRecord", "load"]

Target = Literal["answer", "alternative"]
# MEND marks its locality questions, which come from Natural Questions, with this.
_NATURAL_QUESTIONS = "nq question: "


def load(
    source: str | Path,
    limit: int | None = None,
    target: Target | None = None,
    *,
    skipped: list[str] | None = None,
) -> list[EditRecord]:
    """ZsRE's records (metrics: teacher-forced accuracy of rewrite, paraphrase, neighbourhood).

    Args:
        source: a JSON or JSONL file, or a Hugging Face data set's id.
        limit: read the first `limit` records only.
        target: what `target_new` is: "answer", the question's right answer (the protocol of ROME
            and of Larimar's tables, which teach the model what it does not know), or "alternative",
            the false answer that the record proposes (`alt`, KnowEdit's `target_new`). None takes
            the protocol of the record's own schema: "answer" for MEND, "alternative" for KnowEdit.
        skipped: where it is given, malformed records are left out, and what is wrong with each is
            appended here.
    Returns:
        Records in the file's order; `case_id` is the index in the file, `target_true` the answer
        that was not chosen. A MEND locality question loses its mark "nq question:" and gets a
        question mark.
    Raises:
        MalformedRecord: a record misses a field or holds a wrong type; names file, record, line and
            field.
        FileNotFoundError: nothing is at `source`.
    """
    if target not in (None, "answer", "alternative"):
        raise ValueError(f"target must be 'answer', 'alternative' or None, not {target!r}")

    def parse(field: Field, index: int) -> EditRecord:
        if "src" in field.raw:
            return _mend(field, index, target or "answer")
        return _knowedit(field, index, target or "alternative")

    return edit_records.load(source, parse, limit, skipped)


def _mend(field: Field, index: int, target: Target) -> EditRecord:
    locality = field.text("loc")
    if locality.startswith(_NATURAL_QUESTIONS):
        locality = locality.removeprefix(_NATURAL_QUESTIONS) + "?"
    answers = (field.first("answers"), *field.texts("answers")[1:])
    alternative = field.text("alt", empty=target == "answer")
    return _record(
        field,
        index,
        target,
        answers,
        alternative,
        prompt=field.text("src"),
        paraphrases=field.texts("rephrase"),
        neighbourhood=(locality,),
        neighbourhood_targets=(field.first("loc_ans"),),
    )


def _knowedit(field: Field, index: int, target: Target) -> EditRecord:
    locality = field.groups("locality")
    portability = field.groups("portability") if "portability" in field.raw else []
    return _record(
        field,
        index,
        target,
        (field.first("ground_truth"), *field.texts("ground_truth")[1:]),
        field.text("target_new"),
        prompt=field.text("prompt"),
        paraphrases=field.texts("rephrase_prompt"),
        neighbourhood=tuple(item.text("prompt") for item in locality),
        neighbourhood_targets=tuple(item.first("ground_truth") for item in locality),
        portability=tuple(
            (item.text("prompt"), item.first("ground_truth")) for item in portability
        ),
    )


def _record(field, index, target, answers, alternative, **prompts) -> EditRecord:
    right = target == "answer"
    return EditRecord(
        case_id=index,
        subject=field.text("subject"),
        target_new=answers[0] if right else alternative,
        target_true=alternative if right else answers[0],
        answers=answers if right else (alternative,),
        **prompts,
    )
