"""What commands print: tables for people, JSON for machines, problems, and a progress bar."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# As wide as the terminal; wide enough for any path where the output goes into a file or a pipe.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table.

    Args:
        columns: Heading and justification, ``"left"`` or ``"right"``.
        rows: One cell per column.

    Returns:
        The table, to be printed.
    """
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading, justify in columns:
        made.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*[escape(str(cell)) for cell in row])
    return made


def print_json(value: Any) -> None:
    """Prints JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def report_problems(problems: Sequence[str], as_json: bool) -> int:
    """Tells what is wrong with the inputs, a line each; returns the exit code 1."""
    if as_json:
        print_json({"ok": False, "problems": list(problems)})
    for problem in problems:
        sys.stderr.write(f"jaxmerge: {problem}\n")
    return 1


def report_error(error: ValueError | OSError | MemoryError, as_json: bool) -> int:
    """Tells why a command could not read or write an adapter; returns the exit code 1."""
    if isinstance(error, ValueError):
        return report_problems(str(error).splitlines(), as_json)
    what = "out of memory"
    if isinstance(error, OSError):
        what = f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"
    return report_problems([f"{what}; nothing was written"], as_json)


@contextmanager
def progress(label: str, total: int) -> Iterator[Any]:
    """A progress bar on standard error, if that is a terminal; yields a function that advances it."""
    console = Console(stderr=True)
    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps=1: bar.advance(task, steps)


def report(summary: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> int:
    """Tells what was done, as JSON or by a function that prints it for people; returns the exit code 0."""
    (print_json if as_json else show)(summary)
    return 0
