"""What commands print: tables for people, JSON for machines, problems, and a progress bar."""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
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


def reading(options: argparse.Namespace, index: int) -> dict[str, Any]:
    """How the adapter at a position is read, as arguments of `jaxmerge.load`.

    Raises:
        ValueError: If the alphas are neither one nor one per adapter.
    """
    alphas, n = options.alpha, len(options.adapters)
    if alphas is not None and len(alphas) not in (1, n):
        raise ValueError(f"{len(alphas)} alphas for {n} adapters: give one for all, or one per adapter")
    alpha = None if alphas is None else alphas[index if len(alphas) > 1 else 0]
    pattern = None if options.pattern is None else tuple(options.pattern)
    return {
        "alpha": alpha,
        "scan_axis": options.scan_axis,
        "item": options.item,
        "layout": options.tree,
        "pattern": pattern,
    }


def conversion(options: argparse.Namespace) -> dict[str, Any]:
    """What the output's format is, as arguments of `jaxmerge.save`."""
    return {name: getattr(options, name) for name in ("format", "layout", "head_dim", "layers")}


def pattern(path: str) -> str:
    """A module path with its numbers starred, so that layers of one kind share it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def percent(fraction: float) -> str:
    """A fraction in percent. Never 100 for something that is less."""
    if fraction >= 1:
        return "100 %"
    return f"{min(100 * fraction, 99.9999):.6g} %" if fraction > 0.999 else f"{100 * fraction:.1f} %"


def kept_span(fractions: Sequence[float]) -> str:
    """One fraction in percent, or the smallest and the largest of several."""
    low, high = percent(min(fractions)), percent(max(fractions))
    return low if math.isclose(min(fractions), max(fractions)) or low == high else f"{low} … {high}"


def span(values: Iterable[float], digits: int = 4) -> str:
    """One number, or the smallest and the largest of several."""
    shown = sorted(set(values))
    ends = [f"{value:.{digits}g}" for value in (shown[0], shown[-1])]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} … {ends[1]}"
