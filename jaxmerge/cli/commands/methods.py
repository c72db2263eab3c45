"""``jaxmerge methods``: the grid."""

import argparse
from typing import Any

from jaxmerge.cli import groups

DESCRIPTION = (
    "List the methods, the spaces that each of them makes sense in, the stages that may follow, and which of PEFT's "
    "combination types are which of these."
)
EXAMPLES = """\
examples:
  jaxmerge methods
  jaxmerge methods --json
"""


def add_parser(commands: Any) -> None:
    """Adds the command to those of the parser."""
    about = "list methods, spaces and PEFT's combination types"
    parser = commands.add_parser("methods", help=about, description=DESCRIPTION, epilog=EXAMPLES)
    groups.add_json(parser)
    groups.add_quiet(parser)
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")


def run(options: argparse.Namespace) -> int:
    """Lists methods, spaces, stages and PEFT's combination types."""
    from jaxmerge.cli.actions import methods

    return methods.run(options)
