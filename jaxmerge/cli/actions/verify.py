"""Verifying, and telling what was found."""

import argparse

from rich.markup import escape

from jaxmerge.cli.console import out, print_json, report_error, report_problems, table
from jaxmerge.verification import Verification, verify

_STATUS = {
    "same": "made again to the bit",
    "close": "made again, but for rounding",
    "different": "not what its recipe makes",
    "unknown": "could not be made again",
}


def run(options: argparse.Namespace) -> int:
    """Verifies; returns 1 if something is wrong."""
    try:
        found = verify(options.path, modules=None if options.all else options.modules)
    except (ValueError, OSError, MemoryError) as error:
        return report_error(error, options.json)
    if options.json:
        print_json(found.to_json())
    elif options.quiet and not found.ok:
        return report_problems(found.problems, as_json=False)
    else:
        _print(found)
    return 0 if found.ok else 1


def _print(found: Verification) -> None:
    style = {"same": "green", "close": "green", "different": "red", "unknown": "yellow"}[found.status]
    how_many = f", {len(found.sampled)} of {found.modules} modules" if found.sampled else ""
    off = f", at most {100 * found.error:.2g} % off" if found.error else ""
    out.print(f"[bold]{escape(found.path)}[/bold]  [{style}]{_STATUS[found.status]}[/{style}]{how_many}{off}")
    out.print(f"method {found.method}, space {found.space}")
    out.print()
    if found.adapters:
        rows = [
            (i + 1, one.name, one.weight, _number(one.found), _number(one.projection), "yes" if one.present else "no")
            for i, one in enumerate(found.adapters)
        ]
        columns = [("", "right"), ("adapter", "left"), ("weight", "right"), ("found", "right"),
                   ("projection", "right"), ("in it", "left")]  # fmt: skip
        out.print(table(columns, rows))
        out.print()
        out.print(
            "found: the adapter's number in the weighted sum of all that is nearest to the result; "
            "projection: what lies along it, with what others have in common with it",
            style="dim",
        )
    for problem in found.problems:
        out.print(escape(problem), style="red")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
