"""Inspecting, and telling what was found."""

import argparse

from rich.markup import escape

from jaxmerge.cli.console import out, print_json, report_problems, table
from jaxmerge.cli.groups import reading
from jaxmerge.inspection import Inspection, inspect


def run(options: argparse.Namespace) -> int:
    """Describes every path; exits with 1 if one cannot be read at all."""
    found, problems = [], []
    for i, path in enumerate(options.adapters):
        try:
            found.append(inspect(path, **reading(options, i, len(options.adapters))))
        except ValueError as error:
            problems += str(error).splitlines()
    if options.json:
        print_json({"ok": not problems, "adapters": [one.to_json() for one in found], "problems": problems})
        return 1 if problems else 0
    for one in found:
        _print(one)
    return report_problems(problems, as_json=False) if problems else 0


def _print(found: Inspection) -> None:
    out.print(f"[bold]{escape(found.path)}[/bold]  {', '.join(found.facts)}")
    if found.base_model:
        out.print(f"base model: {escape(str(found.base_model))}")
    if found.modules:
        out.print(table(*found.table()))
    for remark in found.remarks():
        out.print(escape(remark))
    for problem in found.cannot_be_merged:
        out.print(f"[yellow]problem:[/yellow] {escape(problem)}")
    out.print()
