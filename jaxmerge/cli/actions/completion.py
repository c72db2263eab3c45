"""Completion by shells, from the parser itself."""

import argparse
import sys

import shtab

from jaxmerge.cli import build_parser

# What an argument is the path of. Adapters are folders, but for those of KerasHub, and recipes stand in their place.
_ADAPTERS = shtab.glob("*.yaml", "*.yml", "*.lora.h5")
_PATHS = {
    "adapters": _ADAPTERS,
    "input": _ADAPTERS,
    "output": shtab.DIRECTORY,
    "path": _ADAPTERS,
    "layout": shtab.glob("*.json"),
    "plot": shtab.FILE,
    "report": shtab.FILE,
}


def run(options: argparse.Namespace) -> int:
    """Prints the script of a shell."""
    parser = build_parser()
    for command in parser.commands.values():
        for action in command._actions:
            if action.dest in _PATHS:
                action.complete = _PATHS[action.dest]  # type: ignore[attr-defined]
    sys.stdout.write(shtab.complete(parser, options.shell) + "\n")
    return 0
