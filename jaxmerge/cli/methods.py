"""``jaxmerge methods``: the grid."""

import argparse
import dataclasses
from collections.abc import Sequence

from jaxmerge.catalog import COMBINATION_TYPES, METHODS, SPACES, STAGES, Method, Space, Stage
from jaxmerge.cli.console import out, print_json, table


def run(options: argparse.Namespace) -> int:
    """Lists methods, spaces, stages and PEFT's combination types."""
    if options.json:
        print_json(
            {
                name: {row: dataclasses.asdict(value) for row, value in rows.items()}
                for name, rows in (
                    ("methods", METHODS),
                    ("spaces", SPACES),
                    ("stages", STAGES),
                    ("combination_types", COMBINATION_TYPES),
                )
            }
        )
        return 0
    _print(
        ("method", "spaces", "options", "what it does", "source"),
        [(name, _spaces(row), _options(row), row.summary, row.paper) for name, row in METHODS.items()],
    )
    _print(
        ("space", "what tasks are in it", "exactness", "options", "source"),
        [(name, row.summary, row.exact, _options(row), row.paper) for name, row in SPACES.items()],
    )
    _print(
        ("stage", "what it does to a merge", "options", "source"),
        [(name, row.summary, _options(row), row.paper) for name, row in STAGES.items()],
    )
    _print(
        ("PEFT's combination_type", "method", "space", "rank"),
        [(name, row.method, row.space, _RANKS[row.rank]) for name, row in COMBINATION_TYPES.items()],
    )
    return 0


def _spaces(row: Method) -> str:
    """Where a method makes sense, its own space first."""
    return ", ".join([row.space, *(space for space in row.spaces if space != row.space)])


def _options(row: Method | Space | Stage) -> str:
    return ", ".join(h.name for h in row.hyperparameters) or "-"


def _print(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    out.print(table([(heading, "left") for heading in headings], rows))
    out.print()


_RANKS = {"sum": "sum of the ranks", "max": "largest rank", "equal": "the one rank of all"}
