"""Records of the editing benchmarks: one type for all, read by the schema that each record has.

A schema is recognised by a field that no other has. It says where in a raw record each field of
`EditRecord` is. A new one is a row of `SCHEMAS`. An error names file, record, line and field.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

from larimar_jax.data.record_files import MalformedRecord, raw_records

Target = Literal["answer", "alternative"]
Values = dict[str, Any]
Finish = Callable[[Values, Target], Values]
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


def get(record: Any, path: str) -> Any:
    """Return the value at a path of a raw record, such as "requested_rewrite.target_new.str:text".

    "*" stands for every item of every list in an object, {group: [item, …], …}, and gives a tuple. "?"
    allows that a name is missing, which gives (). After the colon is what the value must be: a "number";
    "text", whose outer blanks go; "blank", text that may be empty; "texts", a string or a list of
    strings, as a tuple; "filled", texts of which there are any; "first", the first of these.

    Raises:
        MalformedRecord: of a missing field or a wrong type; names the field.
    """
    names, kind = path.split(":")
    values = tuple(_read(value, place, kind) for place, value in _walk(record, names.split(".")))
    return values[0] if values and "*" not in path else values


def _walk(value: Any, names: list[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value that a path leads to, after its own path."""
    if not names:
        yield path, value
        return
    _require(value, path, "an object", dict)
    name, *inner = names
    if name == "*":
        for group, items in value.items():
            place = f"{path}.{group}"
            for i, item in enumerate(_require(items, place, "a list", list)):
                yield from _walk(item, inner, f"{place}[{i}]")
    elif (key := name.removesuffix("?")) in value:
        yield from _walk(value[key], inner, f"{path}.{key}".removeprefix("."))
    elif key == name:
        present = ", ".join(sorted(value)) or "none"
        _fail(f"{path}.{key}".removeprefix("."), f"is missing (the record has {present})")


def _read(value: Any, path: str, kind: str) -> Any:
    if kind == "number":
        return _require(value, path, "a whole number", int)
    if kind in ("text", "blank"):
        text = _require(value, path, "text", str).strip()
        return text if text or kind == "blank" else _fail(path, "is empty")
    single = type(_require(value, path, "text or a list of texts", str, list)) is str
    items = [(path, value)] if single else ((f"{path}[{i}]", v) for i, v in enumerate(value))
    texts = tuple(_read(item, place, "text") for place, item in items)
    if kind != "texts" and not texts:
        _fail(path, "is an empty list")
    return texts[0] if kind == "first" else texts


def _require(value: Any, path: str, what: str, *types: type) -> Any:
    # Not isinstance(): True is an int.
    if type(value) not in types:
        _fail(path, f"must be {what}, not {type(value).__name__}")
    return value


def _fail(path: str, why: str) -> NoReturn:
    """Raise MalformedRecord about the field at `path`; about the whole record where that is empty."""
    raise MalformedRecord(
        f"{f'field {path!r} ' if path else ''}{why}. The file may be cut short or of another schema; "
        "compare it with the benchmark's original."
    )


def rome(values: Values, target: Target) -> Values:
    template = values["prompt"]
    if "{}" not in template:
        _fail("requested_rewrite.prompt", f"has no '{{}}' for the subject: {template!r}")
    prompt = template.replace("{}", values["subject"], 1)
    # The neighbours share the true object by construction.
    targets = (values["target_true"],) * len(values["neighbourhood"])
    return values | {"prompt": prompt, "neighbourhood_targets": targets}


def flat(values: Values, target: Target) -> Values:
    answers, prompts = (len(values[f]) for f in ("neighbourhood_targets", "neighbourhood"))
    if answers != prompts:
        _fail("locality_ground_truth", f"has {answers} answers for {prompts} locality prompts")
    return values


def mend(values: Values, target: Target) -> Values:
    locality = values["neighbourhood"]
    if locality.startswith(_NATURAL_QUESTIONS):
        locality = locality.removeprefix(_NATURAL_QUESTIONS) + "?"
    targets = (values["neighbourhood_targets"],)
    return _zsre(values | {"neighbourhood": (locality,), "neighbourhood_targets": targets}, target)


def knowedit(values: Values, target: Target) -> Values:
    pairs = zip(values["portability"], values.pop("portability_answers"), strict=True)
    return _zsre(values | {"portability": tuple(pairs)}, target)


def _zsre(values: Values, target: Target) -> Values:
    """Return values whose target is the right answer or the alternative."""
    answers, alternative = values.pop("answers"), values.pop("alternative")
    if target == "answer":
        return values | {"target_new": answers[0], "target_true": alternative, "answers": answers}
    if not alternative:
        _fail("alt", "is empty")
    return values | {"target_new": alternative, "target_true": answers[0]}


# CounterFact as ROME and MEMIT publish it, with any number of prompts, and as the editing toolkits do,
# with one of each kind; ZsRE as MEND publishes it, and as KnowEdit does, with portability.
ROME = {
    "case_id": "case_id:number",
    "prompt": "requested_rewrite.prompt:text",
    "subject": "requested_rewrite.subject:text",
    "target_new": "requested_rewrite.target_new.str:text",
    "target_true": "requested_rewrite.target_true.str:text",
    "paraphrases": "paraphrase_prompts:texts",
    "neighbourhood": "neighborhood_prompts:texts",
    "generation": "generation_prompts?:texts",
}
FLAT = {
    "case_id": "case_id:number",
    "prompt": "prompt:text",
    "subject": "subject:text",
    "target_new": "target_new:text",
    "target_true": "ground_truth:text",
    "paraphrases": "rephrase_prompt:texts",
    "neighbourhood": "locality_prompt:texts",
    "neighbourhood_targets": "locality_ground_truth:texts",
}
MEND = {
    "prompt": "src:text",
    "subject": "subject:text",
    "answers": "answers:filled",
    "alternative": "alt:blank",
    "paraphrases": "rephrase:texts",
    "neighbourhood": "loc:text",
    "neighbourhood_targets": "loc_ans:first",
}
KNOWEDIT = {
    "prompt": "prompt:text",
    "subject": "subject:text",
    "answers": "ground_truth:filled",
    "alternative": "target_new:text",
    "paraphrases": "rephrase_prompt:texts",
    "neighbourhood": "locality.*.prompt:text",
    "neighbourhood_targets": "locality.*.ground_truth:first",
    "portability": "portability?.*.prompt:text",
    "portability_answers": "portability?.*.ground_truth:first",
}
# By the field that tells a schema: its paths, what makes their values those of `EditRecord`, and the
# target of its own protocol.
SCHEMAS: dict[str, tuple[dict[str, str], Finish, Target]] = {
    "requested_rewrite": (ROME, rome, "answer"),
    "locality_prompt": (FLAT, flat, "answer"),
    "src": (MEND, mend, "answer"),
    "locality": (KNOWEDIT, knowedit, "alternative"),
}


def _parse(raw: Any, index: int, target: Target | None) -> EditRecord:
    """Return the record by the schema that its fields tell; an error lists the known schemas."""
    _require(raw, "", "an object", dict)
    for mark, (paths, finish, protocol) in SCHEMAS.items():
        if mark in raw:
            values = {name: get(raw, path) for name, path in paths.items()}
            values = finish({"case_id": index} | values, target or protocol)
            return EditRecord(**{"answers": (values["target_new"],)} | values)
    known = ", ".join(f"{finish.__name__} ({mark})" for mark, (_, finish, _) in SCHEMAS.items())
    _fail("", f"is of no schema that is read; known, by a field of theirs: {known}")
