"""The report that a command writes beside what it prints."""

import argparse
from collections.abc import Sequence
from typing import Any

from jaxmerge import reports
from jaxmerge.base import Adapter
from jaxmerge.cli.console import following
from jaxmerge.sharding import first_process


def problems_of(options: argparse.Namespace) -> list[str]:
    """Why a report may not be written where it is wanted, a line each; known before a weight is read."""
    if options.report is None:
        return []
    try:
        reports.check_target(options.report, options.force, beside=getattr(options, "output", None))
    except ValueError as error:
        return [f"--{line}" for line in str(error).splitlines()]
    return []


def measured(
    merged: Adapter | None, adapters: Sequence[Adapter], options: argparse.Namespace, **given: Any
) -> reports.Report:
    """The report of a merge or a comparison, with a progress bar.

    Args:
        merged: As in `jaxmerge.report`.
        adapters: As in `jaxmerge.report`.
        options: Of the command.
        **given: More arguments of `jaxmerge.report`.

    Returns:
        The report.

    Raises:
        ValueError: If the adapters do not fit each other.
    """
    allowed = merged is not None or options.allow_different_bases  # A merge has been allowed already.
    with following("comparing" if merged is None else "measuring") as advance:
        return reports.report(merged, adapters, allow_different_bases=allowed, on_progress=advance, **given)


def save(report: reports.Report, options: argparse.Namespace, done: str = "") -> None:
    """Writes a report, if one is wanted, from the first of several processes.

    Args:
        report: The report.
        options: Of the command.
        done: What is written already, for errors.

    Raises:
        ValueError: If it cannot be written.
    """
    if options.report is None or not first_process():
        return
    try:
        report.save(options.report, force=options.force)
    except OSError as error:
        raise ValueError(f"report {options.report}: {error.strerror or error}{done and f'; {done}'}") from None
