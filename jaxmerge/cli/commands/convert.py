"""``jaxmerge convert``: the same adapter in another format."""

import argparse
from typing import Any

from jaxmerge.cli import groups

DESCRIPTION = (
    "Write an adapter in another format, exactly: PEFT to and from Tunix, MaxText and others. A layout is what modules "
    "are called there, by model."
)
EXAMPLES = """\
examples:
  jaxmerge convert llama-adapter for-tunix --format tunix --layout llama3 --head-dim 128
  jaxmerge convert for-tunix for-vllm --format peft --layout llama3
"""


def add_parser(commands: Any) -> None:
    """Adds the command to those of the parser."""
    parser = commands.add_parser(
        "convert", help="write an adapter in another format", description=DESCRIPTION, epilog=EXAMPLES
    )
    groups.add_input_and_output(parser)
    what = parser.add_argument_group("what is written")
    groups.add_format(what, required=True)
    groups.add_force(what)
    groups.add_reading(parser)
    groups.add_json(parser)
    groups.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Converts; returns 1, with nothing written, if something is wrong with the input."""
    from jaxmerge.cli.actions import convert

    return convert.run(options)
