"""Where the benchmarks of editing have what an `EditRecord` holds; a new one is a row of `SCHEMAS`."""

from collections.abc import Callable
from typing import Any, Literal

from larimar_jax.data.record_files import fail

Target = Literal["answer", "alternative"]
Values = dict[str, Any]
Finish = Callable[[Values, Target], Values]
# MEND marks its locality questions, which come from Natural Questions, with this.
_NATURAL_QUESTIONS = "nq question: "


def rome(values: Values, target: Target) -> Values:
    template = values["prompt"]
    if "{}" not in template:
        fail("requested_rewrite.prompt", f"has no '{{}}' for the subject: {template!r}")
    prompt = template.replace("{}", values["subject"], 1)
    # The neighbours share the true object by construction.
    targets = (values["target_true"],) * len(values["neighbourhood"])
    return values | {"prompt": prompt, "neighbourhood_targets": targets}


def flat(values: Values, target: Target) -> Values:
    answers, prompts = (len(values[f]) for f in ("neighbourhood_targets", "neighbourhood"))
    if answers != prompts:
        fail("locality_ground_truth", f"has {answers} answers for {prompts} locality prompts")
    return values


def mend(values: Values, target: Target) -> Values:
    locality = values["neighbourhood"]
    if locality.startswith(_NATURAL_QUESTIONS):
        locality = locality.removeprefix(_NATURAL_QUESTIONS) + "?"
    targets = (values["neighbourhood_targets"],)
    return _zsre(values | {"neighbourhood": (locality,), "neighbourhood_targets": targets}, target)


def knowedit(values: Values, target: Target) -> Values:
    values = _grouped(values)
    if values["answers"]:
        return _zsre(values, target)
    # The sets of new facts name no answer before the edit.
    del values["answers"]
    return values | {"target_new": values.pop("alternative"), "target_true": ""}


def _grouped(values: Values) -> Values:
    """Return values without questions that have no answer, those that follow as pairs."""
    for name, answers in (
        ("portability", "portability_answers"),
        ("neighbourhood", "neighbourhood_targets"),
    ):
        kinds = values.get(f"{name}_kinds") or [""] * len(values[name])
        rows = [row for row in zip(values[name], values[answers], kinds, strict=True) if row[1]]
        prompts, texts, kinds = zip(*rows, strict=True) if rows else ((), (), ())
        values |= {name: prompts, answers: texts, f"{name}_kinds": kinds}
    pairs = zip(values["portability"], values.pop("portability_answers"), strict=True)
    return values | {"portability": tuple(pairs)}


def wikibio(values: Values, target: Target) -> Values:
    return values | {"target_true": "", "paraphrases": ()}


def template(values: Values, target: Target) -> Values:
    empty = dict.fromkeys(("paraphrases", "neighbourhood", "neighbourhood_targets"), ())
    return rome({"target_true": ""} | empty | values, target)


def mquake(values: Values, target: Target) -> Values:
    follows = tuple((question, values["new_answer"]) for question in values.pop("questions"))
    kinds = ("multi-hop",) * len(follows)
    del values["new_answer"]
    return template(values | {"portability": follows, "portability_kinds": kinds}, target)


def ripple(values: Values, target: Target) -> Values:
    """Of sentences "… of SUBJECT is ANSWER." before and after the edit."""
    prompt, is_, answer = values.pop("sentence").removesuffix(".").rpartition(" is ")
    if not is_:
        fail("edit.prompt", 'is no sentence "… is ANSWER."')
    before = "".join(values.pop("before")).removesuffix(".").rpartition(" is ")[2]
    values |= {"prompt": f"{prompt} is", "target_new": answer, "target_true": before}
    for name, kinds in (("portability", FOLLOWS), ("neighbourhood", STAYS)):
        parts = [[values.pop(f"{k}_{side}") for k in kinds] for side in ("prompts", "answers")]
        counts = map(len, parts[0])
        values[f"{name}_kinds"] = [k for k, n in zip(kinds, counts, strict=True) for _ in range(n)]
        values[name], answers = (tuple(text for each in part for text in each) for part in parts)
        values[f"{name}_{'answers' if name == 'portability' else 'targets'}"] = answers
    return _grouped(values | {"subject": prompt.rpartition(" of ")[2], "paraphrases": ()})


def uniedit(values: Values, target: Target) -> Values:
    pairs = list(zip(values.pop("general"), values.pop("general_answers"), strict=True))
    own = values["target_new"]
    values["paraphrases"] = tuple(prompt for prompt, answer in pairs if answer == own)
    values["portability"] = tuple(pair for pair in pairs if pair[1] != own)
    return values | {"target_true": ""}


def _zsre(values: Values, target: Target) -> Values:
    """Return values whose target is the right answer or the alternative."""
    answers, alternative = values.pop("answers"), values.pop("alternative")
    if target == "answer":
        return values | {"target_new": answers[0], "target_true": alternative, "answers": answers}
    if not alternative:
        fail("alt", "is empty")
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
    "answers": "ground_truth?:filled",
    "alternative": "target_new:text",
    "paraphrases": "rephrase_prompt?:texts",
    "neighbourhood": "locality.*.prompt:text",
    "neighbourhood_kinds": "locality.*.prompt:group",
    "neighbourhood_targets": "locality.*.ground_truth:answer",
    "portability": "portability?.*.prompt:text",
    "portability_kinds": "portability?.*.prompt:group",
    "portability_answers": "portability?.*.ground_truth:answer",
}
WIKIBIO = {
    "prompt": "text:text",
    "subject": "concept:text",
    "target_new": "labels:text",
    "neighbourhood": "locality.*.prompt:text",
    "neighbourhood_kinds": "locality.*.prompt:group",
    "neighbourhood_targets": "locality.*.ground_truth:answer",
}
MQUAKE = {
    "case_id": "case_id:number",
    "prompt": "requested_rewrite.!.prompt:text",
    "subject": "requested_rewrite.!.subject:text",
    "target_new": "requested_rewrite.!.target_new.str:text",
    "target_true": "requested_rewrite.!.target_true.str:text",
    "questions": "questions:texts",
    "new_answer": "new_answer:text",
}
# Kinds of RippleEdits' questions: what follows from an edit, and what has to stay.
FOLLOWS = (
    "Subject_Aliasing",
    "Logical_Generalization",
    "Compositionality_I",
    "Compositionality_II",
)
STAYS = ("Relation_Specificity", "Forgetfulness")
RIPPLE = {"sentence": "edit.prompt:text", "before": "edit.original_fact?.prompt:text"} | {
    f"{kind}_{side}": f"{kind}?.*.test_queries.*.{path}"
    for kind in (*FOLLOWS, *STAYS)
    for side, path in (("prompts", "prompt:text"), ("answers", "answers:answer"))
}
UNIEDIT = {
    "prompt": "edit.prompt:text",
    "subject": "edit.subject:text",
    "target_new": "edit.target:text",
    "general": "generality.*.prompt:text",
    "general_answers": "generality.*.target:text",
    "neighbourhood": "locality.*.prompt:text",
    "neighbourhood_targets": "locality.*.target:text",
}
FASTEDIT = {
    "prompt": "prompt:text",
    "subject": "subject:text",
    "target_new": "target:text",
    "paraphrases": "queries:texts",
}
KNOWN = {
    "case_id": "known_id:number",
    "prompt": "template:text",
    "subject": "subject:text",
    "target_new": "attribute:text",
}
ALPHAEDIT = {
    "case_id": "case_id:number",
    "prompt": "prompt:text",
    "subject": "subject:text",
    "target_new": "target_new.str:text",
}
# By the field that tells a schema, where those before it are missing: its paths, what makes their
# values those of `EditRecord`, and the target of its own protocol.
SCHEMAS: dict[str, tuple[dict[str, str], Finish, Target]] = {
    "new_single_hops": (MQUAKE, mquake, "answer"),
    "requested_rewrite": (ROME, rome, "answer"),
    "locality_prompt": (FLAT, flat, "answer"),
    "src": (MEND, mend, "answer"),
    "concept": (WIKIBIO, wikibio, "answer"),
    "generality": (UNIEDIT, uniedit, "answer"),
    "locality": (KNOWEDIT, knowedit, "alternative"),
    "Relation_Specificity": (RIPPLE, ripple, "answer"),
    "queries": (FASTEDIT, template, "answer"),
    "known_id": (KNOWN, template, "answer"),
    "target_new": (ALPHAEDIT, template, "answer"),
}
