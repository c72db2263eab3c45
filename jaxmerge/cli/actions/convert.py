"""Converting: the same adapter in another format."""

import argparse
from typing import Any

from rich.markup import escape

from jaxmerge import io
from jaxmerge.base import Adapter, nonfinite_modules
from jaxmerge.cli.actions.remarks import conversion_remark
from jaxmerge.cli.actions.sources import load_one
from jaxmerge.cli.console import out, report, report_error, table
from jaxmerge.cli.groups import conversion
from jaxmerge.words import pattern


def run(options: argparse.Namespace) -> int:
    """Converts; returns 1, with nothing written, if something is wrong with the input."""
    try:
        adapter = load_one(options)
        if broken := nonfinite_modules(adapter):
            raise ValueError(f"{io.as_path(options.input)}: NaN or inf in {broken[0]}")
        converted = io.save(adapter, options.output, force=options.force, **conversion(options))
    except (ValueError, OSError, MemoryError) as error:
        return report_error(error, options.json)
    return report(summarise(options, adapter, converted), options.json, _print)


def summarise(options: argparse.Namespace, adapter: Adapter, converted: Adapter) -> dict[str, Any]:
    """What was written, as JSON holds it."""
    return {
        "ok": True,
        "output": options.output,
        **conversion(options),
        "modules_read": len(adapter.modules),
        "ranks_read": sorted({lora.rank for lora in adapter.modules.values()}),
        "modules": {
            path: {"out": lora.features[0], "in": lora.features[1], "batch": list(lora.batch), "rank": lora.rank}
            for path, lora in converted.modules.items()
        },
        "rank_on_disk": io.rank_on_disk(converted),
        "remarks": [f"{options.input}: {words}"] if (words := conversion_remark(adapter)) else [],
    }


def _print(summary: dict[str, Any]) -> None:
    options = {name: summary[name] for name in ("layout", "head_dim", "layers") if summary[name] is not None}
    settings = ", ".join(f"{name} {value}" for name, value in {"format": summary["format"], **options}.items())
    out.print(f"[bold]{escape(summary['output'])}[/bold]  {settings}")
    out.print()
    groups: dict[tuple[Any, ...], int] = {}
    for path, module in summary["modules"].items():
        batch = "".join(f"{size}×" for size in module["batch"])
        key = pattern(path), f"{batch}{module['out']}×{module['in']}", module["rank"]
        groups[key] = groups.get(key, 0) + 1
    headings = [("module", "left"), ("out×in", "right"), ("rank", "right"), ("count", "right")]
    out.print(table(headings, [(*group, count) for group, count in groups.items()]))
    out.print()
    ranks = ", ".join(map(str, summary["ranks_read"]))
    out.print(f"{summary['modules_read']} modules of rank {ranks} read, {len(summary['modules'])} written, exact")
    for remark in summary["remarks"]:
        out.print(escape(remark))
    if summary["rank_on_disk"]:
        out.print(f"filled up with zeros to rank {summary['rank_on_disk']}, the one rank that the format has")
