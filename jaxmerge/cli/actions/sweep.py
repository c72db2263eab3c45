"""Sweeping: score every setting of a grid without data, in a table and a plot."""

import argparse
import json
from pathlib import Path
from typing import Any

from jaxmerge.base import Adapter
from jaxmerge.catalog import SCORES, all_hyperparameters
from jaxmerge.cli.actions.machine import join, keep_programs, placing
from jaxmerge.cli.actions.sources import load_all
from jaxmerge.cli.console import out, print_json, report_error, report_problems, table
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
            _draw(rows, list(_grid(options)), plot)
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
    found = sweep(adapters, scores(adapters), grid, **arguments)
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
        raise ValueError("--plot needs matplotlib: pip install 'jaxmerge[plot]'") from None
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path}: give a file that ends in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no such folder")


def _draw(rows: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """One panel per score: along the longest axis of the grid, a line for every value of the others."""
    from matplotlib.figure import Figure

    values = {name: list(dict.fromkeys(json.dumps(row[name]) for row in rows)) for name in names}
    numeric = [name for name in names if name != "weights"]
    along = max(numeric or names, key=lambda name: len(values[name]))
    figure = Figure(figsize=(4 * len(SCORES), 3.4), layout="constrained")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label = ", ".join(f"{name} {_value(row[name])}" for name in names if name != along)
        lines.setdefault(label, []).append(row)
    panels = figure.subplots(1, len(SCORES))
    for panel, score in zip(panels, SCORES, strict=True):
        for label, points in lines.items():
            at = [_value(p[along]) if along == "weights" else p[along] for p in points]
            panel.plot(at, [p[score] for p in points], marker="o", markersize=3, label=label)
        panel.set_xlabel(along)
        panel.set_title(_heading(score))
        panel.grid(alpha=0.3)
    if 1 < len(lines) <= 12:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=150)
