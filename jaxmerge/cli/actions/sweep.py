"""Sweeping: score every setting of a grid without data, in a table and a plot."""

import argparse
from pathlib import Path
from typing import Any

from jaxmerge.base import Adapter
from jaxmerge.catalog import SCORES, all_hyperparameters
from jaxmerge.cli.actions.machine import join, keep_programs, placing
from jaxmerge.cli.actions.sources import load_all
from jaxmerge.cli.console import following, out, print_json, report_error, report_problems, table
from jaxmerge.datafree import scores
from jaxmerge.sweeps import sweep


def run(options: argparse.Namespace) -> int:
    """Sweeps; returns 1 if something is wrong with the inputs."""
    keep_programs(options)
    plot = None if options.plot is None else Path(options.plot)
    try:
        join(options)
        if plot is not None:
            _check_plot(plot)
        rows = _rows(options, load_all(options))
        if plot is not None:
            _draw(rows, plot)
    except (ValueError, OSError, MemoryError) as error:
        return report_error(error, options.json)
    if not rows:
        return report_problems(["the grid is empty"], options.json)
    if options.json:
        print_json({"ok": True, "adapters": options.adapters, "settings": rows})
    else:
        names = list(_grid(options))
        shown = sorted(rows, key=lambda row: -row[options.sort])
        columns = [(name, "right") for name in (*names, *map(_heading, SCORES))]
        out.print(
            table(columns, [[*(_value(row[n]) for n in names), *(f"{row[n]:.4g}" for n in SCORES)] for row in shown])
        )
    return 0


def _grid(options: argparse.Namespace) -> dict[str, list[Any]]:
    """The options with several values."""
    numeric = {h.name for h in all_hyperparameters() if h.traceable}
    grid = {name: getattr(options, name) for name in ("weights", "scale", "seed", *sorted(numeric))}
    return {name: values for name, values in grid.items() if values is not None}


def _rows(options: argparse.Namespace, adapters: list[Adapter]) -> list[dict[str, Any]]:
    choices = {h.name for h in all_hyperparameters() if not h.traceable}
    fixed = {name: getattr(options, name) for name in choices if getattr(options, name) is not None}
    names = ("method", "space", "combination_type", "rank")
    arguments = {name: getattr(options, name) for name in names} | placing(options) | fixed
    arguments["stages"] = options.stages
    grid = _grid(options) or {"scale": [1.0]}
    with following("sweeping") as advance:
        found = sweep(adapters, scores(adapters), grid, on_progress=advance, **arguments)
    return [
        {**setting, **{name: float(found.scores[name][i]) for name in SCORES}}
        for i, setting in enumerate(found.settings)
    ]


def _value(value: Any) -> str:
    return " ".join(f"{x:g}" for x in value) if isinstance(value, list) else f"{value:g}"


def _heading(name: str) -> str:
    return name.replace("_", " ")


def _check_plot(path: Path) -> None:
    """Refuses a picture that cannot be drawn, before any work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'jaxmerge[plots]'") from None
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path}: give a file that ends in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no such folder")


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    from jaxmerge import plots

    settings = [{name: value for name, value in row.items() if name not in SCORES} for row in rows]
    plots.sweep(settings, {score: [row[score] for row in rows] for score in SCORES}).savefig(path, dpi=200)
