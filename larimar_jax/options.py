"""The option that several commands share: settings that differ from a file's."""

import argparse


def overrides(parser: argparse.ArgumentParser, about: str) -> None:
    """Adds `--set KEY=VALUE …`, which may be given several times, as `overrides`: a list of texts."""
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=about,
    )
