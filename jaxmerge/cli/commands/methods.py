"""``jaxmerge methods``: the grid."""

import argparse
from typing import Any

from jaxmerge.cli import groups


def add_parser(commands: Any) -> None:
    """Adds the command to those of the parser."""
    parser = commands.add_parser("methods", help="list methods, spaces and PEFT's combination types")
    groups.add_json(parser)
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")


def run(options: argparse.Namespace) -> int:
    """Lists methods, spaces, stages and PEFT's combination types."""
    from jaxmerge.cli.actions import methods

    return methods.run(options)
