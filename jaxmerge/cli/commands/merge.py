"""``jaxmerge merge``: several adapters into one."""

import argparse
from typing import Any

from jaxmerge.cli import groups, values

DESCRIPTION = (
    "Merge LoRA adapters of one base model into one adapter. Without options the result is the exact mean of "
    "their weight changes."
)
EXAMPLES = """\
examples:
  jaxmerge merge tests/adapters/sms tests/adapters/movie -o merged
  jaxmerge merge tests/adapters/sms tests/adapters/movie -o small --rank 16 --weights 1 0.5
  jaxmerge merge tests/adapters/sms tests/adapters/movie -o knots --method ties --space knots --density 0.2
  jaxmerge merge tests/adapters/sms tests/adapters/movie -o cut --rank 8 --report report.html
  jaxmerge merge merged/recipe.yaml -o again
"""


def add_parser(commands: Any) -> None:
    """Adds the command to those of the parser."""
    parser = commands.add_parser("merge", help="merge adapters into one", description=DESCRIPTION, epilog=EXAMPLES)
    groups.add_adapters(parser, text="adapter folders, in order; or a recipe, which says all the rest but OUT")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done and what it costs; write nothing"
    )
    how = groups.add_how(parser)
    how.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per adapter, any sign (equal)")
    how.add_argument("--seed", type=values.seed, metavar="N", help="for methods that draw; N is jax.random.key(N)")
    groups.add_numbers(how)
    cut = parser.add_argument_group("how each module is cut at the end, by its singular values σ, in place of --rank")
    groups.add_rules(cut)
    cut.add_argument("--max-rank", type=values.count, metavar="M", help="the most that such a rule may find")
    how.add_argument(
        "--density-scope",
        choices=("module", "model"),
        help="whether a density is of each module, as in PEFT, or of the whole model, as in the TIES paper (module)",
    )
    what = parser.add_argument_group("what is written")
    groups.add_dtype(what, "the sources'")
    groups.add_format(what, required=False)
    what.add_argument(
        "--extras",
        metavar="same|average|ADAPTER",
        help="tensors that are not LoRA factors, where adapters differ: refuse, average, or take those of one "
        "adapter, named as on the command line or by its number from 1 (same)",
    )
    what.add_argument("--allow-different-bases", action="store_true", help="merge across base models")
    groups.add_force(what)
    groups.add_report(parser)
    groups.add_machine(parser)
    groups.add_reading(parser)
    groups.add_json(parser)
    groups.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Merges; returns 1, with nothing written, if something is wrong with the inputs."""
    from jaxmerge.cli.actions import merge

    return merge.run(options)
