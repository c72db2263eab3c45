"""Resizing: smaller ranks, and what each module keeps."""

import argparse
from collections import defaultdict
from typing import Any

from rich.markup import escape

from jaxmerge import io
from jaxmerge.base import Adapter, energy_kept
from jaxmerge.cli.actions.remarks import format_remarks
from jaxmerge.cli.actions.sources import load_one
from jaxmerge.cli.console import out, report, report_error, table, working
from jaxmerge.cli.groups import conversion, rules
from jaxmerge.io.peft.keys import natural_order
from jaxmerge.resizing import resize, rule_of
from jaxmerge.words import by, kept_span, pattern, percent, span


def run(options: argparse.Namespace) -> int:
    """Resizes; returns 1, with nothing written, if something is wrong with the input."""
    try:
        rule = rule_of(**rules(options))
        adapter = load_one(options, mapped=True)
        with working("resizing"):
            resized = resize(adapter, dtype=options.dtype, **rules(options))
        with working("writing"):
            written = io.save(resized, options.output, force=options.force, **conversion(options))
    except (ValueError, OSError, MemoryError) as error:
        return report_error(error, options.json)
    return report(summarise(options, rule.record(), adapter, resized, written), options.json, _print)


def summarise(
    options: argparse.Namespace, rule: dict[str, Any], adapter: Adapter, resized: Adapter, written: Adapter
) -> dict[str, Any]:
    """What was kept, as JSON holds it."""
    modules = {
        path: {
            "out": lora.features[0],
            "in": lora.features[1],
            "batch": list(lora.batch),
            "rank_before": adapter.modules[path].rank,
            "rank": lora.rank,
            "energy_kept": float(resized.energy[path].kept),
        }
        for path, lora in sorted(resized.modules.items(), key=lambda item: natural_order(item[0]))
    }
    kept = float(energy_kept(resized))
    parameters = [_parameters(adapter), _parameters(resized)]
    before, after = (span({module[name] for module in modules.values()}) for name in ("rank_before", "rank"))
    remarks = [
        f"rank {before} to {after} keeps {percent(kept)} of the energy, in {percent(parameters[1] / parameters[0])} of "
        "the numbers"
    ]
    if all(module["rank"] == module["rank_before"] for module in modules.values()):
        remarks.append("no module has more: nothing was cut")
    if all(float(energy.total) == 0 for energy in resized.energy.values()):
        remarks = ["the adapter is 0 everywhere"]
    if resized.extras:
        remarks.append(f"passed on beside the factors: {', '.join(resized.extras)}")
    return {
        "ok": True,
        "output": options.output,
        "rule": rule,
        **conversion(options),
        "energy_kept": kept,
        "parameters": parameters,
        "modules": modules,
        "extras": list(resized.extras),
        "remarks": remarks + format_remarks(options.format, [adapter], resized, written),
    }


def _parameters(adapter: Adapter) -> int:
    return int(sum(leaf.size for lora in adapter.modules.values() for leaf in (lora.a, lora.b)))


def _print(summary: dict[str, Any]) -> None:
    rule = ", ".join(f"{name} {value:g}" for name, value in summary["rule"].items())
    out.print(f"[bold]{escape(summary['output'])}[/bold]  {rule}")
    out.print()
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for path, module in summary["modules"].items():
        size = by(*module["batch"], module["out"], module["in"])
        groups[pattern(path), size, module["rank_before"]].append(module)
    rows = [
        (*group, span([m["rank"] for m in members]), len(members), kept_span([m["energy_kept"] for m in members]))
        for group, members in groups.items()
    ]
    headings = [("module", "left"), ("out×in", "right"), ("rank before", "right"), ("rank", "right"),
                ("count", "right"), ("energy kept", "right")]  # fmt: skip
    out.print(table(headings, rows))
    out.print()
    for remark in summary["remarks"]:
        out.print(escape(remark))
