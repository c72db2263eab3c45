"""Converting, and telling what was written."""

import argparse

from rich.markup import escape

from jaxmerge.cli.console import out, report, report_error, table, working
from jaxmerge.cli.groups import conversion, reading
from jaxmerge.converting import Converted, convert


def run(options: argparse.Namespace) -> int:
    """Converts; returns 1, with nothing written, if something is wrong with the input."""
    read = reading(options)
    read["tree"] = read.pop("layout")
    try:
        with working("converting"):
            converted = convert(options.input, options.output, force=options.force, **conversion(options), **read)
    except (ValueError, OSError, MemoryError) as error:
        return report_error(error, options.json)
    return report({"ok": True, **converted.to_json()}, options.json, lambda _: _print(converted))


def _print(converted: Converted) -> None:
    out.print(f"[bold]{escape(converted.output)}[/bold]  {escape(', '.join(converted.settings))}")
    out.print()
    out.print(table(*converted.table()))
    out.print()
    for line in converted.summary:
        out.print(escape(line))
