"""What commands print: tables for people, JSON for machines, problems, and a progress bar."""

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# As wide as the terminal, or as COLUMNS says; wide enough for any path where the output goes into a file or a pipe.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)

# Spaces between columns, and how much of a long word in one, such as a module's path, must fit in a line.
_BETWEEN, _WORD = 3, 24
# A space at which no line ends.
_UNBROKEN = "\xa0"


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]]) -> "Fitted":
    """A plain table.

    Args:
        columns: Heading and justification, ``"left"`` or ``"right"``.
        rows: One cell per column.

    Returns:
        The table, to be printed.
    """
    return Fitted(columns, [list(map(str, row)) for row in rows])


class Fitted(NamedTuple):
    """A table, or where the terminal is too narrow for it a paragraph for each row."""

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Numbers are never broken, and words of the other columns only where they are long."""
        needed = sum(map(self._needed, range(len(self.columns)))) + _BETWEEN * (len(self.columns) - 1)
        if needed > options.max_width:
            yield from self._paragraphs(options.max_width)
            return
        made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for heading, side in self.columns:
            made.add_column(heading, justify=side, overflow="fold", no_wrap=side == "right")  # type: ignore[arg-type]
        for row in self.rows:
            made.add_row(*map(escape, row))
        for line in console.render_lines(made, options, pad=False):
            yield from _stripped(line)
            yield Segment.line()

    def _needed(self, i: int) -> int:
        heading, side = self.columns[i]
        texts = [*heading.splitlines(), *(row[i] for row in self.rows)]
        parts = texts if side == "right" else [word[:_WORD] for text in texts for word in text.split()]
        return max(map(cell_len, parts), default=0)

    def _paragraphs(self, width: int) -> Iterator[Text]:
        first = next(i for i, (heading, _) in enumerate(self.columns) if heading)
        for row in self.rows:
            yield Text(" ".join(filter(None, row[: first + 1])), overflow="fold", no_wrap=False)
            text = "; ".join(self._named(i, row[i]) for i in range(first + 1, len(row)) if row[i])
            for line in textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  "):
                yield Text(line.replace(_UNBROKEN, " "))

    def _named(self, i: int, cell: str) -> str:
        heading, side = " ".join(self.columns[i][0].split()), self.columns[i][1]
        told = cell.replace(" ", _UNBROKEN) if side == "right" else cell
        return f"{heading}: {told}" if heading else told


def _stripped(line: list[Segment]) -> list[Segment]:
    """A line without the blanks that its last cell is filled up with."""
    while line and not line[-1].text.strip():
        line = line[:-1]
    return [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)] if line else []


def wrapped(text: str, indent: int = 0) -> str:
    """A paragraph that breaks between words, and ends no line with blanks."""
    blanks = " " * indent
    return textwrap.fill(
        text, out.width, initial_indent=blanks, subsequent_indent=blanks, break_long_words=False, break_on_hyphens=False
    )


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
def progress(label: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error, if that is a terminal; yields a function that advances it by some steps."""
    with _bar(MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps=1: bar.advance(task, steps)


@contextmanager
def following(label: str) -> Iterator[Callable[[int, int], None]]:
    """The same, where a function of the library says what is done: yields its ``on_progress``."""
    with _bar(MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def working(label: str) -> Iterator[None]:
    """A sign of life on standard error, if that is a terminal, while nobody knows for how long."""
    with _bar(TimeElapsedColumn()) as bar:
        bar.add_task(label, total=None)
        yield


def _bar(*columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    shown = TextColumn("{task.description}"), BarColumn(), *columns
    return Progress(*shown, console=console, transient=True, disable=out.quiet or not console.is_terminal)


def report(summary: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> int:
    """Tells what was done, as JSON or by a function that prints it for people; returns the exit code 0."""
    (print_json if as_json else show)(summary)
    return 0
