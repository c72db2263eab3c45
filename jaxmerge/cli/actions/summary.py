"""What is said of a merge once it is done."""

import json
from collections import Counter, defaultdict
from typing import Any

from rich.markup import escape

from jaxmerge.base import Adapter, energy_kept
from jaxmerge.catalog import METHODS
from jaxmerge.cli.actions.remarks import format_remarks
from jaxmerge.cli.console import out, table
from jaxmerge.io.card import called
from jaxmerge.io.peft.keys import natural_order
from jaxmerge.metrics import energy_at_rank, spectra
from jaxmerge.recipes.checks import cell_of, notes_of
from jaxmerge.recipes.model import Recipe
from jaxmerge.values import described, settings
from jaxmerge.words import kept_span, pattern, percent, span


def summarise(
    output: str, recipe: Recipe, adapters: list[Adapter], merged: Adapter, written: Adapter
) -> dict[str, Any]:
    """What was done and what it cost, as JSON holds it.

    Args:
        output: Where the result lies.
        recipe: What was asked for.
        adapters: As they were read or made.
        merged: What was made of them.
        written: The result as it was written.

    Returns:
        The summary, for `print_summary`.
    """
    record = json.loads(merged.metadata.provenance)
    kept = float(energy_kept(merged))
    summary = {
        "ok": True,
        "output": output,
        **{name: record[name] for name in ("method", "space", "combination_type", "hyperparameters", "stages")},
        "seed": recipe.seed,
        "inputs": [
            {**source, "weight": weight, "ranks": sorted({lora.rank for lora in adapter.modules.values()})}
            for source, weight, adapter in zip(record["inputs"], record["weights"], adapters, strict=True)
        ],
        "energy_kept": kept,
        "modules": {
            path: {
                "out": lora.features[0],
                "in": lora.features[1],
                "rank": lora.rank,
                "sources": [i + 1 for i, adapter in enumerate(adapters) if path in adapter.modules],
                "energy_kept": float(merged.energy[path].kept),
            }
            for path, lora in sorted(merged.modules.items(), key=lambda item: natural_order(item[0]))
        },
        "extras": {
            name: [i + 1 for i, adapter in enumerate(adapters) if name in adapter.extras] for name in merged.extras
        },
    }
    remarks = [*notes_of(recipe), *_mean(recipe), *_remarks(adapters, merged, kept)]
    return summary | {"remarks": remarks + format_remarks(recipe.format, adapters, merged, written)}


def _mean(recipe: Recipe) -> list[str]:
    """That nobody has chosen how much of each adapter there is; of little else does more hang."""
    count = len(recipe.adapters)
    chosen = recipe.stages or any(source.weight is not None for source in recipe.adapters)
    method, space = cell_of(recipe) or ("", "")
    if chosen or count < 2 or method != "linear" or space == "factors":
        return []
    return [
        f"the mean: 1/{count} of each adapter; --weights chooses, and --stage norm_restore gives it the adapters' size"
    ]


def _remarks(adapters: list[Adapter], merged: Adapter, kept: float) -> list[str]:
    """What the user should know of the ranks, and of approximations."""
    record = json.loads(merged.metadata.provenance)
    remarks = []
    ranks = Counter(lora.rank for lora in merged.modules.values())
    rank = ranks.most_common(1)[0][0]
    largest = max(lora.rank for adapter in adapters for lora in adapter.modules.values())
    if record["space"] == "factors" and len(adapters) > 1:
        remarks.append(
            "space factors is an approximation: products of one adapter's B and another's A come in; "
            "the exact choice is --method linear in space full"
        )
    elif METHODS[record["method"]].linear and kept == 1:
        origin = _sum_of_ranks(adapters, merged, rank)
        remarks.append(f"rank {rank}{origin}, exact")
        if rank > largest and record["space"] != "ctm":  # Which compresses otherwise for a smaller rank.
            at_largest = energy_at_rank(spectra(merged), largest)
            remarks[-1] += f"; --rank {largest} keeps {percent(at_largest)} of the energy"
    if all(float(energy.total) == 0 for energy in merged.energy.values()):
        remarks = ["the merge is 0 everywhere"]
    if kept < 1:
        exact = max(
            sum(adapter.modules[path].rank for adapter in adapters if path in adapter.modules)
            for path in merged.modules
        )
        exact = min(exact, max(min(lora.features) for lora in merged.modules.values()))
        more = f"the exact rank is {exact}" if METHODS[record["method"]].linear else "a higher --rank keeps more"
        # At the largest rank there is, what lacks is rounding.
        rest = f"; {more}" if max(ranks) < exact else ""
        remarks.append(f"rank {span(ranks)} keeps {percent(kept)} of the energy{rest}")
    elif len(remarks) == 0:
        remarks.append(f"rank {span(ranks)} holds all of the merge")
    missed = sum(float(energy.missed) for energy in merged.energy.values())
    captured = sum(float(energy.total) - float(energy.lost) for energy in merged.energy.values())
    if missed > 1e-3 * captured:
        remarks.append(f"the best rank-{rank} approximation may keep up to {percent(missed / captured)} more of that")
    if len(ranks) > 1:
        remarks.append(f"ranks differ between modules: {span(ranks)}")
    some = [name for name in merged.extras if not all(name in adapter.extras for adapter in adapters)]
    if merged.extras:
        remarks.append(f"passed on beside the factors: {', '.join(merged.extras)}")
    if some:
        remarks.append(f"only some adapters hold: {', '.join(some)}")
    return remarks


def _sum_of_ranks(adapters: list[Adapter], merged: Adapter, rank: int) -> str:
    path = next(path for path, lora in merged.modules.items() if lora.rank == rank)
    ranks = [adapter.modules[path].rank for adapter in adapters if path in adapter.modules]
    if len(ranks) == 1 or sum(ranks) != rank:
        return ""
    same = len(set(ranks)) == 1
    return f" = {len(ranks)}×{ranks[0]}" if same else f" = {'+'.join(map(str, ranks))}"


def print_summary(summary: dict[str, Any]) -> None:
    """Prints a summary for people."""
    out.print(f"[bold]{escape(summary['output'])}[/bold]  " + escape(", ".join(settings(summary, full=True))))
    out.print()
    inputs = [
        (i + 1, called(source), described(source["weight"]), span(source["ranks"]), source.get("sha256", "")[:12])
        for i, source in enumerate(summary["inputs"])
    ]
    out.print(
        table([("", "right"), ("adapter", "left"), ("weight", "right"), ("rank", "right"), ("sha256", "left")], inputs)
    )
    out.print()
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for path, module in summary["modules"].items():
        sources = "all" if len(module["sources"]) == len(inputs) else ", ".join(map(str, module["sources"]))
        groups[pattern(path), f"{module['out']}×{module['in']}", sources].append(module)
    rows = [
        (
            name,
            shape,
            span([module["rank"] for module in members]),
            sources,
            len(members),
            kept_span([module["energy_kept"] for module in members]),
        )
        for (name, shape, sources), members in groups.items()
    ]
    headings = [("module", "left"), ("out×in", "right"), ("rank", "right"), ("from", "left"),
                ("count", "right"), ("energy kept", "right")]  # fmt: skip
    out.print(table(headings, rows))
    out.print()
    for remark in summary["remarks"]:
        style = "yellow" if ("keeps" in remark and "exact;" not in remark) or "approximation" in remark else "none"
        out.print(escape(remark), style=style)
