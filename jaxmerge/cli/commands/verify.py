"""``jaxmerge verify``: whether a merged adapter is what it says."""

import argparse
from typing import Any

from jaxmerge.cli import groups, values

DESCRIPTION = (
    "Check a merged adapter against what it was made of: the hashes of its adapters' files, a sample of modules made "
    "again, and how much of each adapter is in it."
)
EXAMPLES = """\
examples:
  jaxmerge merge tests/adapters/sms tests/adapters/movie -o merged --rank 16
  jaxmerge verify merged
  jaxmerge verify merged --all
"""


def add_parser(commands: Any) -> None:
    """Adds the command to those of the parser."""
    parser = commands.add_parser(
        "verify", help="is a merged adapter what it says?", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("path", metavar="OUT", help="a merged adapter, with what jaxmerge wrote beside it")
    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument(
        "--modules", type=values.count, default=16, metavar="N", help="how many modules to make again (16)"
    )
    how_many.add_argument("--all", action="store_true", help="make all of them again")
    groups.add_json(parser)
    groups.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Verifies; returns 1 if something is wrong."""
    from jaxmerge.cli.actions import verify

    return verify.run(options)
