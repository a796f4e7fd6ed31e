"""An editor whose answers are known, records to edit it with, and tasks over them."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from plain import under_every_system

from larimar_jax.bench import runner
from larimar_jax.bench.editor import LarimarEditor, Recall, written
from larimar_jax.data.edit_records import EditRecord


def fraction(*parts) -> float:
    """Return a number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class KnownEditor(LarimarEditor):
    """An editor whose base LM scores by hash, and whose memory halves the loss of what is written.

    A token is a word.
    """

    settings = {"name": "known"}

    def __init__(self):
        pass

    def written(self, prompt, answer):
        return f"{prompt} {answer}."

    def recall(self, facts, queries, wordings=(), by_text=False):
        scores = np.asarray([fraction("scope", q) for row in queries for q in row], np.float32)
        flat = [fact for fact, row in zip(facts, queries, strict=True) for _ in row]
        return Recall(
            scope_score=scores,
            in_scope=scores > 0.4,
            condition=lambda rows: [flat[row] for row in rows],
        )

    def zero(self, rows):
        return [("", "")] * rows

    def score(self, prompts, candidates, condition):
        losses = [[fraction(p, t) for t in row] for p, row in zip(prompts, candidates, strict=True)]
        if condition is not None:
            rows = zip(losses, condition, candidates, strict=True)
            losses = [
                [loss / (1 + (answer == t)) for loss, t in zip(row, targets, strict=True)]
                for row, (_, answer), targets in rows
            ]
        return np.asarray(losses, np.float32).reshape(-1, 2)

    def hits(self, prompts, targets, condition):
        rows = zip(prompts, targets, condition or [("", "")] * len(prompts), strict=True)
        return [
            np.asarray([answer == t or fraction(p, t, k) > 0.5 for k in range(len(t.split()))])
            for p, t, (_, answer) in rows
        ]

    def generate(self, prompts, condition, tokens):
        answers = [("", "")] * len(prompts) if condition is None else condition
        return [
            f" {answer or prompt[-4:]} and"[: 2 * limit]
            for prompt, (_, answer), limit in zip(prompts, answers, tokens, strict=True)
        ]

    def tokens(self, target):
        return [int.from_bytes(word.encode(), "big") for word in target.split()]

    def text(self, tokens):
        return "".join(f" {token.to_bytes(32, 'big').strip(bytes(1)).decode()}" for token in tokens)


def cases(count):
    """Return records with differing numbers of prompts."""
    return [
        EditRecord(
            case_id=3 * n + 1,
            prompt=f"Fact {n} is",
            subject=f"Fact {n}",
            target_new=f"new {n}",
            target_true=f"true {n}",
            paraphrases=tuple(f"Says {k} of fact {n}:" for k in range(n % 3)),
            neighbourhood=tuple(f"Neighbour {k} of {n} is" for k in range(1 + n % 2)),
            neighbourhood_targets=(f"true {n}",) * (1 + n % 2),
        )
        for n in range(count)
    ]


def saved(records, path):
    """Write records as a file of CounterFact's flat schema, and return its path."""
    names = {name: name for name in ("case_id", "prompt", "subject", "target_new")} | dict(
        ground_truth="target_true",
        rephrase_prompt="paraphrases",
        locality_prompt="neighbourhood",
        locality_ground_truth="neighbourhood_targets",
    )
    raw = [{field: getattr(r, name) for field, name in names.items()} for r in records]
    path.write_text(json.dumps(raw))
    return str(path)


def knowedit(records, path):
    """Write records as KnowEdit's ZsRE, and return its path."""

    def questions(prompts=(), answers=()):
        pairs = zip(prompts, answers, strict=True)
        return [dict(prompt=prompt, ground_truth=[answer]) for prompt, answer in pairs]

    raw = [
        dict(
            subject=r.subject,
            target_new=r.target_new,
            prompt=r.prompt,
            ground_truth=[r.target_true],
            rephrase_prompt=list(r.paraphrases),
            locality={"near": questions(r.neighbourhood, r.neighbourhood_targets)},
            portability={"Reasoning": questions(*zip(*r.portability, strict=True))},
        )
        for r in records
    ]
    path.write_text(json.dumps(raw))
    return str(path)


def rows(task, editor, count=None):
    """Return the rows of a task's first cases, computed in its chunks."""
    work = runner.start(task, editor)
    chunks = dataclasses.replace(work, cases=work.cases[:count]).chunks()
    return [row for chunk in chunks for row in work.rows(chunk)]


def measured(task, editor, folder):
    """Return the rows of a task, run at once and taken up after every second chunk, and its results."""
    result = runner.run(dataclasses.replace(task), folder / "whole", editor=editor, quiet=True)
    part = runner.Share(0, 2)
    assert runner.run(task, folder / "cut", part, editor=editor, quiet=True) is None
    runner.run(dataclasses.replace(task), folder / "cut", editor=editor, quiet=True)
    whole, cut = ((folder / name / runner.ROWS).read_bytes() for name in ("whole", "cut"))
    assert cut == whole
    return runner.read_rows(folder / "cut"), result["results"]


def values(rows, metric, **chosen):
    """Return {case: {system: [values of a metric]}} of the rows with the chosen columns."""
    table = {}
    for row in rows:
        if all(row.get(name) == value for name, value in chosen.items()):
            by_system = table.setdefault(row["case"], {})
            by_system.setdefault(row["system"], []).append(row.get(metric))
    return table


def question(store, prompt, fact, measure, forced, always=False):
    """Put one question to one memory of many facts.

    Args:
        fact: the right one.
        forced: an answer → the value of verbatim lookup.
        always: whether the query counts as in scope whatever the detector decides.
    Returns:
        {system: measure(text, condition)}, the number of the nearest fact, the decision of the scope.
    """
    model, (latent, match) = store.model, store.read([prompt])
    near, inside = int(match.key[0]), bool(match.within(model.scope_threshold)[0])
    conditions = model.zero(1), model.condition(latent)
    texts = written(*fact), store.texts[near]
    verbatim = forced(store.facts[near][1])
    by_system = under_every_system(measure, prompt, *conditions, *texts, verbatim, inside or always)
    return by_system, near, inside


def same(have, wanted, place=0, **tolerance):
    """Compare {system: [values]} at a place with {system: value}, of the systems that are there."""
    have = {system: values[place] for system, values in have.items()}
    wanted = {system: wanted[system] for system in have}
    assert have == (pytest.approx(wanted, **tolerance) if tolerance else wanted)
