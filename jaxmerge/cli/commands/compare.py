"""``jaxmerge compare``: how adapters interfere, and what that says about merging them."""

import argparse
from typing import Any

from jaxmerge.cli import groups, values

DESCRIPTION = (
    "Say how adapters interfere, from their factors alone and in seconds: cosines, norms, overlap of subspaces, signs "
    "that differ, the energy of their sum by rank; and what that says about how to merge them."
)
EXAMPLES = """\
examples:
  jaxmerge compare tests/adapters/sms tests/adapters/movie tests/adapters/names
  jaxmerge compare tests/adapters/sms tests/adapters/movie --report report.html
  jaxmerge compare tests/adapters/sms tests/adapters/movie --json --quiet
"""


def add_parser(commands: Any) -> None:
    """Adds the command to those of the parser."""
    parser = commands.add_parser("compare", help="say how adapters interfere", description=DESCRIPTION, epilog=EXAMPLES)
    groups.add_adapters(parser, values.AtLeastTwo)
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="of the sum, one per adapter (equal)")
    parser.add_argument("--allow-different-bases", action="store_true", help="compare across base models")
    written = groups.add_report(parser)
    written.add_argument("--force", action="store_true", help="replace the report")
    groups.add_reading(parser)
    groups.add_json(parser)
    groups.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Compares; returns 1 if something is wrong with the inputs."""
    from jaxmerge.cli.actions import compare

    return compare.run(options)
