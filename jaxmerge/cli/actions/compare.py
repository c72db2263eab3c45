"""Comparing: how adapters interfere, and what that says about merging them."""

import argparse

from rich.markup import escape

from jaxmerge.cli.actions import reporting
from jaxmerge.cli.actions.sources import load_all, peek_all
from jaxmerge.cli.console import out, print_json, report_error, report_problems, table, wrapped
from jaxmerge.comparison import comparison_problems, tables
from jaxmerge.merging.checks import checked_weights
from jaxmerge.tables import Table


def run(options: argparse.Namespace) -> int:
    """Compares; returns 1 if something is wrong with the inputs."""
    try:
        if problems := [*header_problems(options), *reporting.problems_of(options)]:
            return report_problems(problems, options.json)
        told = reporting.measured(None, load_all(options), options, weights=options.weights)
        reporting.save(told, options)
    except (ValueError, OSError, MemoryError) as error:
        return report_error(error, options.json)
    found, advice = told.comparison, told.advice
    assert found is not None  # There are at least two adapters.
    if options.json:
        print_json({"ok": True, **found.to_json(), "advice": [item._asdict() for item in advice]})
        return 0
    for part in (show(found) for show in (tables.adapters, tables.pairs, tables.legend, tables.kinds, tables.energy)):
        out.print(table(*part) if isinstance(part, Table) else "\n".join(map(wrapped, part.splitlines())))
        out.print()
    for item in advice:
        out.print(f"[bold]{escape(wrapped(item.what))}[/bold]")
        out.print(escape(wrapped(f"{item.why} [{item.source}]" if item.source else item.why, indent=2)))
    return 0


def header_problems(options: argparse.Namespace) -> list[str]:
    """Everything that can be known to be wrong before a weight is read."""
    peeked, problems = peek_all(options)
    checked_weights(options.weights, len(options.adapters), False, problems)
    if peeked:
        problems += comparison_problems(peeked, options.allow_different_bases)
    return list(dict.fromkeys(problems))
