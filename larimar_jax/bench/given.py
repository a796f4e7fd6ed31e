"""The file of records that a benchmark is given: its options, its records, and what a run says of it."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from larimar_jax.data.edit_records import EditRecord, provenance
from larimar_jax.data.paraphrases import Paraphrases

COUNTERFACT = "CounterFact's JSON file, either schema, or multi-CounterFact's"


def options(parser: argparse.ArgumentParser, what: str, *, required: bool = True) -> None:
    """Declares `--data` and `--skip-bad`. what: the file, for people. required: whether there has to be
    one."""
    parser.add_argument("--data", required=required, metavar="FILE", help=what)
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave malformed records out, and say in the result which (default: the first one stops "
        "the run)",
    )


def read(
    args: argparse.Namespace,
    load: Callable[..., list[EditRecord]],
    limit: int | None,
    **more: Any,
) -> tuple[list[EditRecord], dict[str, Any]]:
    """The records, and what decides them, for a run's settings: the file's name, its sha256 (None for a
    data set of the hub), and what was skipped.

    Args:
        load: a reader, such as `data.edit_records.load`. more: its arguments besides these.
    Raises:
        MalformedRecord: where bad records are not to be skipped.
    """
    skipped: list[str] | None = [] if args.skip_bad else None
    records = load(args.data, limit, skipped=skipped, **more)
    found: dict[str, Any] = provenance(args.data)
    if skipped:
        found["skipped"] = skipped
        print(f"{len(skipped)} malformed records are left out:", *skipped, sep="\n  ", file=sys.stderr)
    return records, found


def wordings(
    args: argparse.Namespace,
    load: Callable[..., list[EditRecord]],
    records: Sequence[EditRecord],
    count: int,
) -> list[tuple[str, ...]]:
    """Of each record at most `count` other wordings of its prompt, none of them one that it asks, from
    all records of the file."""
    if count < 0:
        raise ValueError(f"--rephrasings must be at least 0, not {count}: it is a number of wordings.")
    found = Paraphrases(load(args.data, None, skipped=[] if args.skip_bad else None))
    return [found.unseen(record)[:count] for record in records]


def notes(settings: Mapping[str, Any]) -> list[str]:
    """Of a run's settings, what its tables do not say of its data: how many records were left out."""
    data = settings.get("data")
    skipped = data.get("skipped") if isinstance(data, Mapping) else None
    return [f"{len(skipped)} malformed records of {data['name']} were left out"] if skipped else []
