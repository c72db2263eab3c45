"""``jaxmerge inspect``: what is in adapters."""

import argparse
from typing import Any

from jaxmerge.cli import groups

DESCRIPTION = "Say what is in adapters: modules, ranks, scales, dtypes, norms; what cannot be merged, and why."
EXAMPLES = """\
examples:
  jaxmerge inspect tests/adapters/sms tests/adapters/movie
  jaxmerge inspect tests/adapters/sms --json
"""


def add_parser(commands: Any) -> None:
    """Adds the command to those of the parser."""
    parser = commands.add_parser("inspect", help="say what is in adapters", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("adapters", nargs="+", metavar="PATH", help="adapter folders")
    groups.add_reading(parser)
    groups.add_json(parser)
    groups.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Describes every path; returns 1 if one cannot be read at all."""
    from jaxmerge.cli.actions import inspect

    return inspect.run(options)
