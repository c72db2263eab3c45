"""``jaxmerge methods``: the grid."""

import argparse
import dataclasses
from collections.abc import Sequence

from jaxmerge.catalog import COMBINATION_TYPES, METHODS, SPACES
from jaxmerge.cli.console import out, print_json, table


def run(options: argparse.Namespace) -> int:
    """Lists methods, spaces and PEFT's combination types."""
    if options.json:
        print_json(
            {
                name: {row: dataclasses.asdict(value) for row, value in rows.items()}
                for name, rows in (
                    ("methods", METHODS),
                    ("spaces", SPACES),
                    ("combination_types", COMBINATION_TYPES),
                )
            }
        )
        return 0
    _print(
        ("method", "default space", "options", "what it does", "source"),
        [
            (name, row.space, ", ".join(h.name for h in row.hyperparameters) or "-", row.summary, row.paper)
            for name, row in METHODS.items()
        ],
    )
    _print(
        ("space", "what tasks are in it", "exactness"),
        [(name, row.summary, row.exact) for name, row in SPACES.items()],
    )
    _print(
        ("PEFT's combination_type", "method", "space", "rank"),
        [(name, row.method, row.space, _RANKS[row.rank]) for name, row in COMBINATION_TYPES.items()],
    )
    return 0


def _print(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    out.print(table([(heading, "left") for heading in headings], rows))
    out.print()


_RANKS = {"sum": "sum of the ranks", "max": "largest rank", "equal": "the one rank of all"}
