"""What a merge would do, as ``--dry-run`` tells it."""

from rich.markup import escape

from jaxmerge.cli.console import out, table, wrapped
from jaxmerge.previewing import Preview


def print_preview(found: Preview) -> None:
    """Prints a preview for people."""
    out.print("[bold]nothing is written[/bold]  " + escape(", ".join(found.settings)))
    out.print()
    for part in found.tables():
        out.print(table(*part))
        out.print()
    out.print(found.summary)
    for warning in found.warnings:
        out.print(escape(wrapped(warning)), style="yellow")
