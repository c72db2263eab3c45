"""Verifying, and telling what was found."""

import argparse

from rich.markup import escape

from jaxmerge.cli.console import out, print_json, report_error, report_problems, table, working
from jaxmerge.verification import Verification, verify


def run(options: argparse.Namespace) -> int:
    """Verifies; returns 1 if something is wrong."""
    try:
        with working("verifying"):
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
    status, *more = found.facts
    out.print(f"[bold]{escape(found.path)}[/bold]  {', '.join([f'[{style}]{status}[/{style}]', *more])}")
    out.print(f"method {found.method}, space {found.space}")
    out.print()
    if found.adapters:
        out.print(table(*found.table()))
        out.print()
        out.print(
            f"found, in these {len(found.sampled)} modules: the adapter's number in the weighted sum of all that is "
            "nearest to the result; projection: what lies along it, with what others have in common with it",
            style="dim",
        )
    for problem in found.problems:
        out.print(escape(problem), style="red")
