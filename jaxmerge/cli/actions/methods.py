"""Listing the grid: methods, spaces, stages and PEFT's combination types."""

import argparse
import dataclasses
from collections.abc import Sequence

from jaxmerge.catalog import COMBINATION_TYPES, METHODS, SPACES, STAGES, Hyperparameter, Method, Space, Stage
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
    if options.markdown:
        out.file.write("\n\n".join(markdown().values()) + "\n")
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


def markdown() -> dict[str, str]:
    """The tables of methods, spaces and stages as the README has them."""
    return {
        "methods": _markdown(
            ("method", "what it does", "spaces", "options (default)", "source"),
            [
                (f"`{name}`", row.summary + _takes(row), _spaces(row), _flags(row), _link(row.paper))
                for name, row in METHODS.items()
            ],
        ),
        "spaces": _markdown(
            ("space", "what a method sees", "exact?", "options (default)", "source"),
            [(f"`{name}`", row.summary, row.exact, _flags(row), _link(row.paper)) for name, row in SPACES.items()],
        ),
        "stages": _markdown(
            ("stage", "what it does to a merge", "options (default)", "source"),
            [
                (
                    f"`{name}`",
                    row.summary,
                    _one_of(row) + ", ".join(map(_with_default, row.hyperparameters)),
                    _link(row.paper),
                )
                for name, row in STAGES.items()
            ],
        ),
    }


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flags(row: Method | Space) -> str:
    flags = [_with_default(h, f"--{h.name.replace('_', '-')}") for h in row.hyperparameters]
    return ", ".join([*flags, *(["`--seed`"] if isinstance(row, Method) and row.random else [])])


def _with_default(hyperparameter: Hyperparameter, name: str | None = None) -> str:
    default = "" if hyperparameter.default is None else f" ({hyperparameter.default})"
    return f"`{name or hyperparameter.name}`{default}"


def _takes(row: Method) -> str:
    return f"; {row.least} adapters" if row.most == row.least else ""


def _link(paper: str) -> str:
    """A source with its link, from its arXiv number or address."""
    name, _, where = paper.rpartition(", ")
    if where.startswith("arXiv:"):
        return f"[{name}](https://arxiv.org/abs/{where.removeprefix('arXiv:')})"
    return f"[{name}]({where})" if where.startswith("https://") else paper


def _spaces(row: Method) -> str:
    """Where a method makes sense, its own space first."""
    return ", ".join([row.space, *(space for space in row.spaces if space != row.space)])


def _options(row: Method | Space | Stage) -> str:
    alone = _one_of(row) if isinstance(row, Stage) else ""
    return alone + (", ".join(h.name for h in row.hyperparameters) or "-")


def _one_of(row: Stage) -> str:
    return "one of " if row.one_of else ""


def _print(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    out.print(table([(heading, "left") for heading in headings], rows))
    out.print()


_RANKS = {"sum": "sum of the ranks", "max": "largest rank", "equal": "the one rank of all"}
