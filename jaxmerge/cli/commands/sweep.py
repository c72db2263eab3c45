"""``jaxmerge sweep``: many settings of a merge, scored."""

import argparse
from typing import Any

from jaxmerge.catalog import SCORES
from jaxmerge.cli import groups, values

DESCRIPTION = (
    "Score every combination of weights, scales, densities and seeds, without data: the energy that truncation keeps, "
    "the smallest cosine between the merge and a task, and the norm of the merge. Nothing is written."
)
EXAMPLES = """\
examples:
  jaxmerge sweep tests/adapters/sms tests/adapters/movie --rank 8 --weights 1 1 --weights 1 0.5
  jaxmerge sweep tests/adapters/sms tests/adapters/movie --method ties --space core --density 0.2 0.5 --scale 0.5 1
"""


def add_parser(commands: Any) -> None:
    """Adds the command to those of the parser."""
    parser = commands.add_parser(
        "sweep", help="score many settings of a merge, without data", description=DESCRIPTION, epilog=EXAMPLES
    )
    groups.add_adapters(parser)
    groups.add_how(parser)
    grid = parser.add_argument_group("the grid: every combination of these is a setting")
    grid.add_argument(
        "--weights",
        nargs="+",
        type=float,
        action="append",
        metavar="W",
        help="one per adapter; may be given repeatedly",
    )
    grid.add_argument("--scale", nargs="+", type=float, metavar="X", help="what the merge is multiplied by (1)")
    grid.add_argument("--seed", nargs="+", type=values.seed, metavar="N", help="for methods that draw")
    groups.add_numbers(grid, nargs="+", metavar="X")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--sort", choices=SCORES, default="worst_cosine", help="best first by this score (worst_cosine)")
    shown.add_argument("--plot", metavar="FILE.png", help="draw the scores; .svg and .pdf too (needs matplotlib)")
    groups.add_machine(parser)
    groups.add_reading(parser)
    groups.add_json(parser)
    groups.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Sweeps; returns 1 if something is wrong with the inputs."""
    from jaxmerge.cli.actions import sweep

    return sweep.run(options)
