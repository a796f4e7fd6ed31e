"""Single edits under Larimar and its controls, side by side on the same prompts and weights.

    base      the untouched language model
    zero      z = 0: the memory slot is there and holds zeros
    prompt    the fact written in front of every prompt, whatever it asks
    lookup    the fact in front of the prompts that the scope detector lets through, and no matrix
    larimar   memory-conditioned decoding of the prompts that the scope detector lets through
    open      memory-conditioned decoding of every prompt
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from larimar_jax import options
from larimar_jax.bench import metrics
from larimar_jax.bench.editor import Editor
from larimar_jax.pipeline import Pipeline, load

SYSTEMS = {
    "base": "base LM",
    "zero": "z = 0",
    "prompt": "fact in the prompt",
    "lookup": "nearest neighbour",
    "larimar": "Larimar with scope",
    "open": "Larimar without scope",
}
MEMORY_SYSTEMS = ("larimar", "open")
CONTROL = "lookup"


def model_options(parser: argparse.ArgumentParser) -> None:
    """Declares which model a benchmark is of."""
    parser.add_argument("--model", default="smol", help="checkpoint, by name or path (%(default)s)")
    options.overrides(
        parser, "settings of `editing` that differ from the checkpoint's, such as editing.ridge=0.1"
    )


def model(args: argparse.Namespace) -> Pipeline:
    """The model that a command line names, or the same that is `loaded` already."""
    loaded = getattr(args, "loaded", None)
    return load(args.model, args.overrides) if loaded is None else loaded


def named(model: Pipeline) -> dict[str, Any]:
    """What decides a model's numbers, for a run's settings."""
    return {
        "name": model.source,
        "fingerprint": model.fingerprint,
        "editing": dataclasses.asdict(model.config.editing),
    }


# (prompts, their targets, the condition or None for the base LM) → values [n, …].
Measure = Callable[[Sequence[str], Sequence[Any], Any], np.ndarray]


MODES = ("rome", "released")
Mode = Literal["rome", "released"]


def mode_option(parser: argparse.ArgumentParser) -> None:
    """Declares which protocol a benchmark follows."""
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="rome",
        help="rome: the scope decision sees the prompt only, and what is out of scope is decoded by the "
        "untouched LM; released: as the authors' code does it, with the prompt and each candidate, and "
        "z = 0 out of scope (%(default)s)",
    )


class Seen(NamedTuple):
    """What of a chunk's queries is seen by whom, where that is not the query itself.

    asked: of each case and query, what the memory is asked. scoped: of each query, all in one row, the
    c texts that the scope detector compares with the written fact (§6), each of which is decided apart.
    """

    asked: Sequence[Sequence[str]]
    scoped: Sequence[Sequence[str]]


class Measured(NamedTuple):
    """Of a chunk of cases, all their queries in one row, R of them. written: the text of each fact.
    scope_score, in_scope: [R], or [R, c] of what the scope detector saw. values: [R, …] of every
    system."""

    written: list[str]
    scope_score: np.ndarray
    in_scope: np.ndarray
    values: Mapping[str, np.ndarray]


def measured(
    editor: Editor,
    facts: Sequence[tuple[str, str]],
    queries: Sequence[Sequence[str]],
    targets: Sequence[Any],
    measure: Measure,
    *,
    mode: Mode = "rome",
    seen: Seen | None = None,
    wordings: Sequence[Sequence[str]] = (),
) -> Measured:
    """Writes each case's fact into a memory of its own, and measures its queries under every system.

    Args:
        facts: (prompt, answer) of each case. queries: of each case. targets: one a query, in one row.
        mode: what is decoded out of scope: by the base LM (rome), or with z = 0 (released).
        seen: see there; values of c candidates are [R, c], and each follows its own decision.
        wordings: of each case, in which its fact is written too. The controls are given its prompt's.
    """
    written = [editor.written(*fact) for fact in facts]
    prompts = [prompt for row in queries for prompt in row]
    supported = [
        f"{fact.rstrip('.')}. {prompt}"
        for fact, row in zip(written, queries, strict=True)
        for prompt in row
    ]
    read, score, inside = _recall(editor, facts, queries, seen, wordings)
    # One call for all that the base LM reads: it is packed better (packing.py).
    alone = measure([*prompts, *supported], [*targets, *targets], None)
    base, with_fact = alone[: len(prompts)], alone[len(prompts) :]
    zero = measure(prompts, targets, editor.zero(len(prompts)))
    through = measure(prompts, targets, read)
    outside = base if mode == "rome" else zero
    passed = inside.reshape(*inside.shape, *[1] * (base.ndim - inside.ndim))
    found = {
        "base": base,
        "zero": zero,
        "prompt": with_fact,
        # Outside the scope the decoder is the untouched LM, whose numbers are there already; the
        # authors' code has no other LM than z = 0.
        "lookup": np.where(passed, with_fact, outside),
        "larimar": np.where(passed, through, outside),
        "open": through,
    }
    return Measured(written, score, inside, found)


def _recall(
    editor: Editor,
    facts: Sequence[tuple[str, str]],
    queries: Sequence[Sequence[str]],
    seen: Seen | None,
    wordings: Sequence[Sequence[str]],
) -> tuple[Any, np.ndarray, np.ndarray]:
    """The condition of every query, its likeness to its fact, and whether that is in scope."""
    if seen is None:
        found = editor.recall(facts, queries, wordings)
        everyone = np.arange(len(found.in_scope))
        return found.condition(everyone), found.scope_score, found.in_scope
    # Behind what the memory of a case is asked, what the scope detector sees of it.
    texts, asked_rows, scoped_rows, query = [], [], [], 0
    for row in seen.asked:
        mine = seen.scoped[query : query + len(row)]
        place = sum(map(len, texts))
        asked_rows += range(place, place + len(row))
        place += len(row)
        for candidates in mine:
            scoped_rows.append(list(range(place, place + len(candidates))))
            place += len(candidates)
        texts.append([*row, *(text for candidates in mine for text in candidates)])
        query += len(row)
    found = editor.recall(facts, texts, wordings, told=True)
    rows = np.asarray(scoped_rows, np.int64)
    condition = found.condition(np.asarray(asked_rows))
    return condition, found.scope_score[rows], found.in_scope[rows]


def by_kind(kinds: Sequence[str], values: Sequence[Any], order: Sequence[str]) -> dict[str, list]:
    """Values of one case's queries as {kind: its values}, in the order of the kinds."""
    return {
        kind: [value for k, value in zip(kinds, values, strict=True) if k == kind]
        for kind in order
    }


def versus_lookup(ours: Sequence[float], control: Sequence[float]) -> dict[str, Any]:
    """The paired difference to the lookup over the same cases, with a note where it is not positive."""
    if not ours:
        return {}
    difference = metrics.paired_difference(ours, control)
    found: dict[str, Any] = {"versus_lookup": vars(difference)}
    if difference.mean <= 0.0:
        found["note"] = "does not beat the lookup"
    return found


def bars(
    axes: Any,
    results: Mapping[str, Any],
    kinds: Sequence[str],
    of: Callable[[Any], Mapping[str, float]],
) -> None:
    """Draws a bar for each system and kind; `of` finds the estimate in {system: {kind: …}}."""
    width = 0.8 / len(SYSTEMS)
    for number, (system, label) in enumerate(SYSTEMS.items()):
        found = [of(results[system][kind]) for kind in kinds]
        axes.bar(
            np.arange(len(kinds)) + (number - (len(SYSTEMS) - 1) / 2) * width,
            [row["mean"] or 0.0 for row in found],
            width,
            yerr=[row["standard_error"] or 0.0 for row in found],
            label=label,
        )
    axes.set_xticks(np.arange(len(kinds)), kinds)
    axes.set_ylim(0, 100)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=9)


def curves(
    axes: Any, points: Sequence[int], lines: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    """Draws a line for each label: its estimates at the points, in percent."""
    for label, found in lines.items():
        errors = [row["standard_error"] or 0.0 for row in found]
        axes.errorbar(points, [row["mean"] for row in found], errors, marker="o", label=label)
    axes.set_ylim(0, 101)
    axes.legend(fontsize=9)


def doubling(axes: Any, sizes: Sequence[int]) -> None:
    """Puts sizes that double at even distances."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])


def percent(value: Mapping[str, Any]) -> str:
    """A mean with its standard error, for tables."""
    error = value["standard_error"]
    return number(value["mean"]) + ("" if error is None else f" ± {error:.1f}")


def number(value: float | None) -> str:
    """A mean, for tables."""
    return "–" if value is None else f"{value:.1f}"


def check_finite(case_id: Any, kinds: Sequence[str], values: Mapping[str, np.ndarray]) -> None:
    """Raises metrics.UnusableScore where a value of a case's queries is not a number."""
    for system, rows in values.items():
        broken = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))
        if broken.size:
            raise metrics.UnusableScore(
                f"case {case_id}, {kinds[broken[0]]}, system {system}: a score is not finite. The "
                "model's logits overflowed: run it in float32, or check the checkpoint it was loaded "
                "from."
            )
