"""Comparing: how adapters interfere, and what that says about merging them."""

import argparse

from rich.markup import escape
from rich.padding import Padding

from jaxmerge.cli.actions.sources import load_all, peek_all
from jaxmerge.cli.console import following, out, print_json, report_error, report_problems, table
from jaxmerge.comparison import compare, comparison_problems, tables
from jaxmerge.merging.checks import checked_weights
from jaxmerge.reports.advice import advise
from jaxmerge.tables import Table


def run(options: argparse.Namespace) -> int:
    """Compares; returns 1 if something is wrong with the inputs."""
    try:
        if problems := header_problems(options):
            return report_problems(problems, options.json)
        adapters, bases = load_all(options), options.allow_different_bases
        with following("comparing") as advance:
            found = compare(adapters, options.weights, allow_different_bases=bases, on_progress=advance)
    except (ValueError, OSError, MemoryError) as error:
        return report_error(error, options.json)
    advice = advise(found)
    if options.json:
        print_json({"ok": True, **found.to_json(), "advice": [item._asdict() for item in advice]})
        return 0
    for part in (told(found) for told in (tables.adapters, tables.pairs, tables.legend, tables.kinds, tables.energy)):
        out.print(table(*part) if isinstance(part, Table) else part, soft_wrap=False)
        out.print()
    for item in advice:
        out.print(f"[bold]{escape(item.what)}[/bold]", soft_wrap=False)
        why = f"{item.why} [{item.source}]" if item.source else item.why
        out.print(Padding(escape(why), (0, 0, 0, 2), expand=False), soft_wrap=False)
    return 0


def header_problems(options: argparse.Namespace) -> list[str]:
    """Everything that can be known to be wrong before a weight is read."""
    peeked, problems = peek_all(options)
    checked_weights(options.weights, len(options.adapters), False, problems)
    if peeked:
        problems += comparison_problems(peeked, options.allow_different_bases)
    return list(dict.fromkeys(problems))
