"""``jaxmerge resize``: smaller ranks."""

import argparse
from typing import Any

from jaxmerge.cli import groups, values

DESCRIPTION = (
    "Give an adapter smaller ranks: the best approximation of each module, of the rank that a rule finds for it."
)
EXAMPLES = """\
examples:
  jaxmerge resize tests/adapters/sms small --rank 8
  jaxmerge resize tests/adapters/sms smaller --energy 0.9 --max-rank 8
"""


def add_parser(commands: Any) -> None:
    """Adds the command to those of the parser."""
    parser = commands.add_parser(
        "resize", help="give an adapter smaller ranks", description=DESCRIPTION, epilog=EXAMPLES
    )
    groups.add_input_and_output(parser)
    how = parser.add_argument_group("the rank of each module; σ are its singular values")
    rule = how.add_mutually_exclusive_group(required=True)
    rule.add_argument("--rank", type=values.count, metavar="R", help="the same for all that have as much")
    groups.add_rules(rule)
    how.add_argument(
        "--max-rank", type=values.count, metavar="M", help="the most that a rule other than --rank may find"
    )
    what = parser.add_argument_group("what is written")
    groups.add_dtype(what, "the adapter's")
    groups.add_format(what, required=False)
    groups.add_force(what)
    groups.add_reading(parser)
    groups.add_json(parser)
    groups.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Resizes; returns 1, with nothing written, if something is wrong with the input."""
    from jaxmerge.cli.actions import resize

    return resize.run(options)
