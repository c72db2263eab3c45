"""``jaxmerge completion``: what a shell needs to complete commands, options and adapters."""

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "fish", "tcsh")

DESCRIPTION = """\
Print a script by which a shell completes commands, options, their choices, and the folders of adapters. To have it in
every bash, zsh or fish:

  echo 'eval "$(jaxmerge completion bash)"' >> ~/.bashrc
  jaxmerge completion zsh > "${fpath[1]}/_jaxmerge"
  jaxmerge completion fish > ~/.config/fish/completions/jaxmerge.fish
"""
EXAMPLES = """\
examples:
  jaxmerge completion bash
"""


def add_parser(commands: Any) -> None:
    """Adds the command to those of the parser."""
    parser = commands.add_parser(
        "completion", help="print what a shell needs to complete these", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(options: argparse.Namespace) -> int:
    """Prints the script."""
    from jaxmerge.cli.actions import completion

    return completion.run(options)
