"""A benchmark as a task: its options, its cases and its rows.

A task is a frozen dataclass. Its fields are its options, from which the command line is generated.
`cases` lists what is measured, and `evaluate` yields one row for each measurement, a flat dict:

    case, system, kind      which case, under which system (queries.py), on which kind of prompt
    factors                 what else tells rows apart, such as the number of facts in memory
    metrics                 numbers, None where a metric does not apply
    anything else           texts, for people who read cases

Everything after that is shared by all tasks: resumable folders (runner.py), means, standard errors
and the differences to both lookups (summary.py), tables, figures, comparisons and pages
(report.py).
"""

import argparse
import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from larimar_jax.data import edit_records
from larimar_jax.data.edit_records import EditRecord, provenance
from larimar_jax.data.paraphrases import Paraphrases

COUNTERFACT = "CounterFact's JSON file, either schema, or multi-CounterFact's"
ZSRE = "ZsRE's JSON file, of MEND or of KnowEdit"


def option(
    help: str,
    *,
    default: Any = dataclasses.MISSING,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    recorded: bool = True,
    least: int = 1,
) -> Any:
    """Return a dataclass field that is an option of the command line.

    Args:
        default: without one, the option is required.
        parse: from the text of a value; by default the field's type. recorded: whether it is part
            of a run's settings. least: what a number may be, or each of several.
    """
    metadata = dict(help=help, metavar=metavar, parse=parse, recorded=recorded, least=least)
    return dataclasses.field(default=default, metadata=metadata)


class Metric(NamedTuple):
    """How a column of rows is summarised and shown.

    label: in tables. scale: values are shown times this, 100 for percent. digits: after the point.
    lower: whether less is better. weight: the column that weighs each row. exponential: whether exp
    of the mean is shown, as for a perplexity. median: whether the median over cases is taken, as
    for seconds. compared: whether a memory's is compared with the lookups'. gain: whether the value
    is itself a difference to the lookup.
    """

    label: str
    scale: float = 100.0
    digits: int = 1
    lower: bool = False
    weight: str | None = None
    exponential: bool = False
    median: bool = False
    compared: bool = True
    gain: bool = False


class Pivot(NamedTuple):
    """A table. rows: the columns of a row that name its line. columns: what is spread over the
    table's columns; None for the metrics. cells: metrics of a cell, one below the other. where:
    which values are taken; "last" is the largest. labels: names of the line's columns."""

    rows: tuple[str, ...] = ("system",)
    columns: str | None = "kind"
    cells: tuple[str, ...] = ()
    where: Mapping[str, Any] = types.MappingProxyType({})
    title: str = ""
    caption: str = "percent ± standard error"
    labels: tuple[str, ...] = ()


class Plot(NamedTuple):
    """A figure. x: several columns for bars, or a factor for curves; groups without that factor are
    level lines. y: a metric.
    where: as of a Pivot. log: "x" for sizes that double, "y" for a logarithmic height."""

    x: str | tuple[str, ...] = ("kind",)
    y: str = ""
    where: Mapping[str, Any] = types.MappingProxyType({})
    log: str = ""
    xlabel: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark; the first line of a task's docstring is its help."""

    name: ClassVar[str]
    """On the command line and in settings; by default the name of the file."""
    metrics: ClassVar[Mapping[str, Metric]]
    """The first one is compared between runs and heads the overview."""
    factors: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[str, ...]] = ()
    """The order of kinds in tables; else that of appearance."""
    labels: ClassVar[Mapping[Any, str]] = {}
    """Names of kinds, systems and factors in tables, where they differ from queries.LABELS."""
    tables: ClassVar[tuple[Pivot, ...]] = (Pivot(),)
    plots: ClassVar[tuple[Plot, ...]] = (Plot(),)
    paper: ClassVar[Mapping[tuple, float]] = {}
    """The paper's numbers of Larimar-1.3B, by (kind, *factors)."""
    paper_if: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings of a run that measures what these numbers are of."""
    overview: ClassVar[Mapping[str, Any]] = {}
    """Which entries stand in a report's overview, as `where` of a Pivot."""
    reference: ClassVar[str] = ""
    """The paper's numbers in words, shown below the tables."""
    quoted: ClassVar[bool] = True
    """Whether a report shows its worst and best cases."""
    needs_model: ClassVar[bool] = False
    listed: ClassVar[bool] = True
    """Whether it is a command of `larimar bench`."""

    chunk: int = option("cases computed together", default=25)

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "name" not in vars(cls):
            cls.name = cls.__module__.rpartition(".")[2]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata.get("least", -math.inf)
            numbers = value if isinstance(value, tuple) else (value,)
            beyond = [n for n in numbers if type(n) in (int, float) and not least <= n < math.inf]
            if beyond or value == () != field.default:
                raise ValueError(
                    f"--{field.name.replace('_', '-')} must be at least {least}, not {value}: "
                    f"{field.metadata['help']}"
                )

    def cases(self, systems: Any) -> Sequence[Any]:
        """Return all cases in a fixed order, each with a `case_id` of its own."""
        raise NotImplementedError

    def evaluate(self, systems: Any, cases: Sequence[Any]) -> typing.Iterator[dict[str, Any]]:
        """Yield the rows of a chunk of cases, at least one a case; the runner orders them by case."""
        raise NotImplementedError

    def derived(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return entries of the summary that are no mean over cases."""
        return []

    def lower_is_better(self, metric: str, entry: Mapping[str, Any]) -> bool:
        """Return whether less is better in a group of rows."""
        return self.metrics[metric].lower

    def data_settings(self) -> dict[str, Any]:
        """Return what decides the data, for a run's settings."""
        return {}

    def options(self) -> dict[str, Any]:
        """Return the options that decide a run's numbers."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("recorded", False)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditTask(Task):
    """A benchmark of a model with a file of edits."""

    needs_model: ClassVar[bool] = True

    model: str = option("checkpoint, by name or path", default="smol", recorded=False)
    overrides: tuple[str, ...] = option(
        "settings of `editing` that differ from the checkpoint's, such as editing.ridge=0.1",
        default=(),
        metavar="KEY=VALUE",
        recorded=False,
    )
    data: str = option(COUNTERFACT, metavar="FILE", recorded=False)
    skip_bad: bool = option(
        "leave malformed records out, and name them in the settings (default: the first one stops "
        "the run)",
        default=False,
        recorded=False,
    )

    def read(self, limit: int | None, skipped: list[str] | None) -> list[EditRecord]:
        """Return the first `limit` records of the file."""
        target = getattr(self, "target", None)
        return edit_records.load(self.data, limit, target, skipped=skipped)

    def records_needed(self) -> int | None:
        """Return how many records are read; None for all."""
        return getattr(self, "limit", None)

    @functools.cached_property
    def _source(self) -> tuple[list[EditRecord], list[str]]:
        skipped: list[str] = []
        records = self.read(self.records_needed(), skipped if self.skip_bad else None)
        if skipped:
            lines = (f"{len(skipped)} malformed records are left out:", *skipped)
            print(*lines, sep="\n  ", file=sys.stderr)
        return records, skipped

    @property
    def records(self) -> list[EditRecord]:
        """The records, in the file's order.

        Raises:
            MalformedRecord: where bad records are not to be skipped.
        """
        return self._source[0]

    def data_settings(self) -> dict[str, Any]:
        """Return the file's name, its sha256 (None for a data set of the hub) and what was
        skipped."""
        skipped = self._source[1]
        return provenance(self.data) | ({"skipped": skipped} if skipped else {})

    def cases(self, systems: Any) -> Sequence[Any]:
        return self.records

    def require(self, count: int, why: str, fewer: str) -> None:
        """Raise ValueError where the file has fewer records than a task needs."""
        if len(self.records) < count:
            raise ValueError(
                f"{self.data} has {len(self.records)} records, and {count} {why}: give a "
                f"larger file, or fewer {fewer}"
            )

    def other_wordings(self, records: Sequence[EditRecord], count: int) -> list[tuple[str, ...]]:
        """Return at most `count` other wordings of each record's prompt, from all records of the
        file; none of them is one that the record asks."""
        if not count:
            return [()] * len(records)
        wordings = Paraphrases(self.read(None, [] if self.skip_bad else None))
        return [wordings.unseen(record)[:count] for record in records]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedTask(EditTask):
    """A benchmark of edits that other editors of the same decoder take part in (peers.py)."""

    editors: str = option(
        "other editors of the same decoder, measured beside Larimar, such as rome,grace (files of "
        "larimar_jax/editors)",
        default="",
        metavar="NAMES",
        recorded=False,
    )
    editor_settings: tuple[str, ...] = option(
        "settings of these that differ from their defaults, such as rome.layer=9",
        default=(),
        metavar="KEY=VALUE",
        recorded=False,
    )


# The command line


def add_arguments(parser: argparse.ArgumentParser, task: type[Task]) -> None:
    """Declare the options of a task, one for each field made by `option`."""
    types_of = typing.get_type_hints(task)
    for field in dataclasses.fields(task):
        if "help" not in field.metadata:
            continue
        help, default = field.metadata["help"].replace("%", "%%"), field.default
        settings = _argument(types_of[field.name], field.metadata["parse"])
        if field.metadata["metavar"]:
            settings["metavar"] = field.metadata["metavar"]
        if field.name == "overrides":
            settings["action"] = "extend"
        settings["required"] = default is dataclasses.MISSING
        if not settings["required"]:
            settings["default"] = list(default) if isinstance(default, tuple) else default
            if default not in (None, ()) and default is not False and "default" not in help:
                several = default if isinstance(default, tuple) else (default,)
                help += f" ({' '.join(map(str, several))})"
        flag = "set" if field.name == "overrides" else field.name.replace("_", "-")
        parser.add_argument(f"--{flag}", dest=field.name, help=help, **settings)


def _argument(annotation: Any, parse: Callable | None) -> dict[str, Any]:
    """What argparse needs of a field's type."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is bool:
        return {"action": "store_true"}
    if origin is Literal:
        return {"choices": parts}
    if origin is tuple:
        return _argument(parts[0], parse) | {"nargs": "+"}
    # What may be None is of its first type.
    return _argument(parts[0], parse) if parts else {"type": parse or annotation}


def build(task: type[Task], values: Mapping[str, Any]) -> Task:
    """Return the task of a parsed command line, or of a run's settings for a report, where what
    names data and model is "" and not read; ValueError where its options make no sense."""
    required = [f.name for f in dataclasses.fields(task) if f.default is dataclasses.MISSING]
    names = {field.name for field in dataclasses.fields(task)}
    values = dict.fromkeys(required, "") | {n: v for n, v in values.items() if n in names}
    return task(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
