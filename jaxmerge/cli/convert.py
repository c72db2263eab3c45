"""``jaxmerge convert``: the same adapter in another format."""

import argparse
from pathlib import Path
from typing import Any

from rich.markup import escape

from jaxmerge import io
from jaxmerge.base import Adapter, nonfinite_modules
from jaxmerge.cli.console import conversion, out, pattern, print_json, reading, report_error, report_problems, table
from jaxmerge.cli.remarks import conversion_remark
from jaxmerge.layouts import Conversion


def run(options: argparse.Namespace) -> int:
    """Converts; returns 1, with nothing written, if something is wrong with the input."""
    try:
        source, target = Path(options.input), Path(options.output)
        options.adapters = [options.input]
        if problems := io.overlap_problems([source], target):
            return report_problems(problems, options.json)
        io.check_target(
            [io.peek(source, **reading(options, 0))], target, Conversion(**conversion(options)), options.force
        )
        adapter = io.load(source, **reading(options, 0))
        if broken := nonfinite_modules(adapter):
            return report_problems([f"{source}: NaN or inf in {broken[0]}"], options.json)
        converted = io.save(adapter, target, force=options.force, **conversion(options))
    except (ValueError, OSError, MemoryError) as error:
        return report_error(error, options.json)
    summary = summarise(options, adapter, converted)
    if options.json:
        print_json(summary)
    else:
        _print(summary)
    return 0


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
