"""Rows to numbers: means within a case, then over cases, and what a memory gains on the lookups.

An entry of a summary is a group of rows that share system, kind and factors:

    {"system": …, "kind": …, factor: …, metric: estimate}
    estimate = {"mean", "standard_error", "cases"}, as shown: in percent, where the metric's scale
    is 100

and an estimate of a memory also has `versus_lookup` and `versus_verbatim`, the paired differences
over the same cases, and a `note` that names what it does not beat.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from larimar_jax import editors
from larimar_jax.bench import metrics, queries
from larimar_jax.bench.task import Metric, Task

Row = Mapping[str, Any]
# Of a group: system, kind, factors. Of a metric in it: case → (value, weight).
Key = tuple[Any, ...]
Values = dict[Any, tuple[float, float]]


def summarise(task: Task, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return an entry for every group of rows, in the order in which groups appear, and those that
    are derived."""
    groups = group(task, rows)
    entries = []
    for key, columns in groups.items():
        entry = dict(zip(("system", "kind", *task.factors), key, strict=True))
        for name, values in columns.items():
            estimate = estimate_of(task.metrics[name], values)
            if key[0] not in queries.CONTROLS:
                estimate |= _versus(task, groups, entry, key, name)
            entry[name] = estimate
        entries.append(entry)
    entries += task.derived(rows)
    order = {kind: place for place, kind in enumerate(task.kinds)}
    return sorted(entries, key=lambda entry: order.get(entry["kind"], len(order)))


def group(task: Task, rows: Sequence[Row]) -> dict[Key, dict[str, Values]]:
    """Return {(system, kind, *factors): {metric: {case: (mean of its rows, weight)}}}; a metric
    that is None in a row leaves that row out."""
    groups: dict[Key, dict[str, dict[Any, list[tuple[float, float]]]]] = {}
    for row in rows:
        key = (row["system"], row["kind"], *(row.get(factor) for factor in task.factors))
        columns = groups.setdefault(key, {name: {} for name in task.metrics})
        for name, metric in task.metrics.items():
            if row.get(name) is not None:
                weight = 1.0 if metric.weight is None else float(row[metric.weight])
                columns[name].setdefault(row["case"], []).append((float(row[name]), weight))
    return {
        key: {
            name: {case: tuple(np.mean(own, axis=0).tolist()) for case, own in values.items()}
            for name, values in columns.items()
        }
        for key, columns in groups.items()
    }


def estimate_of(metric: Metric, values: Values) -> dict[str, Any]:
    """Return the estimate of a metric from its value in every case."""
    numbers, weights = np.asarray(list(values.values()), np.float64).reshape(-1, 2).T
    if metric.median:
        middle = float(np.median(numbers)) * metric.scale if len(numbers) else None
        return {"mean": middle, "standard_error": None, "cases": len(numbers)}
    return vars(metrics.weighted(numbers, weights, metric.scale, metric.exponential))


def _versus(
    task: Task, groups: Mapping[Key, Mapping[str, Values]], entry: Row, key: Key, name: str
) -> dict[str, Any]:
    """Return the paired differences to each lookup, positive where the memory is better, and a
    note."""
    metric, ours = task.metrics[name], groups[key][name]
    if metric.gain and ours and estimate_of(metric, ours)["mean"] <= 0.0:
        return {"note": f"does not beat {queries.LOOKUPS['lookup']}"}
    if metric.gain or metric.median or not metric.compared:
        return {}
    sign = -1.0 if task.lower_is_better(name, entry) else 1.0
    versus: dict[str, Any] = {}
    behind = []
    for control, label in queries.LOOKUPS.items():
        theirs = control_values(groups, (control, *key[1:]), name)
        both = [case for case in ours if case in theirs]
        if not both:
            continue
        weights = np.asarray([ours[case][1] for case in both])
        apart = sign * np.asarray([ours[case][0] - theirs[case][0] for case in both])
        # Each case by its weight, as in the mean.
        difference = metrics.estimate(apart * weights / weights.mean(), metric.scale)
        versus[f"versus_{control}"] = vars(difference)
        if difference.mean <= 0.0:
            behind.append(label)
    if behind:
        versus["note"] = f"does not beat {' or '.join(behind)}"
    return versus


def control_values(groups: Mapping[Key, Mapping[str, Values]], key: Key, name: str) -> Values:
    """Return a control's values in a group; where the control does not depend on the factors, those
    without."""
    for candidate in (key, (*key[:2], *[None] * (len(key) - 2))):
        if groups.get(candidate, {}).get(name):
            return groups[candidate][name]
    return {}


def harmonic_score(
    task: Task, rows: Sequence[Row], name: str, kinds: Sequence[str], label: str
) -> list[dict[str, Any]]:
    """Return entries of kind `label`: the harmonic mean of a metric over kinds, of the cases that
    have all of them."""
    groups, entries = group(task, rows), []
    for system in dict.fromkeys(key[0] for key in groups):
        columns = [groups.get((system, kind), {}).get(name, {}) for kind in kinds]
        cases = [case for case in columns[0] if all(case in column for column in columns)]
        table = np.asarray([[column[case][0] for column in columns] for case in cases], np.float64)
        estimate = vars(metrics.harmonic(table.reshape(len(cases), len(kinds))))
        entries.append({"system": system, "kind": label, name: estimate})
    score = {entry["system"]: entry[name] for entry in entries}
    for system, estimate in score.items():
        behind = [
            words
            for control, words in queries.LOOKUPS.items()
            if control in score and estimate["cases"] and estimate["mean"] <= score[control]["mean"]
        ]
        if system not in queries.CONTROLS and behind:
            estimate["note"] = f"does not beat {' or '.join(behind)}"
    return entries


def case_values(task: Task, rows: Sequence[Row]) -> dict[Any, dict[Key, float]]:
    """Return {case: {(system, kind, *factors): value}} of a task's first metric."""
    name = next(iter(task.metrics))
    cases: dict[Any, dict[Key, float]] = {}
    for key, columns in group(task, rows).items():
        for case, (value, _) in columns[name].items():
            cases.setdefault(case, {})[key] = value
    return cases


def by_case(rows: Sequence[Row]) -> dict[Any, list[Row]]:
    """Return the rows of every case, which stand together."""
    groups = itertools.groupby(rows, key=lambda row: row["case"])
    return {case: list(group) for case, group in groups}


def label(task: Task, value: Any) -> str:
    """Return the name of a system, kind or factor's value, for people."""
    if value in (others := editors.names()):
        return others[value].__name__
    return str(task.labels.get(value, queries.LABELS.get(value, value)))


def group_label(task: Task, key: Key) -> str:
    """Return the name of a group of rows, for people."""
    system, kind, *factors = key
    parts = [label(task, system), label(task, kind)]
    parts += [
        f"{label(task, name)} = {label(task, value)}"
        for name, value in zip(task.factors, factors, strict=True)
        if value is not None
    ]
    return ", ".join(parts)


def select(results: Sequence[Row], where: Mapping[str, Any]) -> list[Row]:
    """Return the entries with these values; a tuple holds several, and "last" is the largest."""
    entries = list(results)
    for name, wanted in where.items():
        values = [entry.get(name) for entry in entries]
        if wanted == "last":
            wanted = max((value for value in values if value is not None), default=None)
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        entries = [entry for entry, value in zip(entries, values, strict=True) if value in allowed]
    return entries
