"""CounterFact, in the original schema of ROME and in the flat one of the editing toolkits.

MEMIT's multi-CounterFact (`multi_counterfact.json`, whose edits do not contradict each other, so that
thousands can be written at once) is the original schema.
"""

from pathlib import Path

from larimar_jax.data import edit_records
from larimar_jax.data.edit_records import EditRecord, Field, MalformedRecord

__all__ = ["EditRecord", "MalformedRecord", "load"]


def load(
    source: str | Path, limit: int | None = None, *, skipped: list[str] | None = None
) -> list[EditRecord]:
    """CounterFact's records (metrics: edit, paraphrase and neighbourhood S and M).

    The schema is told from each record: the original one has `requested_rewrite`, with several
    paraphrases and neighbourhood prompts, as many as it gives; the flat one has one of each. Fields
    that no metric needs (relation ids, attribute prompts) are passed over.

    Args:
        source: a JSON or JSONL file, or a Hugging Face data set's id.
        limit: read the first `limit` records only.
        skipped: where it is given, malformed records are left out, and what is wrong with each is
            appended here.
    Returns:
        Records in the file's order. `neighbourhood_targets` repeats `target_true` in the original
        schema: its neighbours share the true object by construction.
    Raises:
        MalformedRecord: a record misses a field or holds a wrong type; names file, record, line and
            field.
        FileNotFoundError: nothing is at `source`.
    """
    return edit_records.load(source, _parse, limit, skipped)


def _parse(field: Field, index: int) -> EditRecord:
    return _original(field) if "requested_rewrite" in field.raw else _flat(field)


def _original(field: Field) -> EditRecord:
    rewrite = field.inside("requested_rewrite")
    template, subject = rewrite.text("prompt"), rewrite.text("subject")
    if "{}" not in template:
        rewrite.fail("prompt", f"has no '{{}}' for the subject: {template!r}")
    new = rewrite.inside("target_new").text("str")
    true = rewrite.inside("target_true").text("str")
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


def _flat(field: Field) -> EditRecord:
    new = field.text("target_new")
    neighbourhood = field.texts("locality_prompt")
    targets = field.texts("locality_ground_truth")
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
