"""Merging: check everything, merge, write, and say what was lost."""

import argparse
import dataclasses
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import jax
from rich.markup import escape

from jaxmerge import io
from jaxmerge.base import Adapter, energy_kept
from jaxmerge.catalog import METHODS, all_hyperparameters
from jaxmerge.cli.actions.machine import join, keep_programs, placing
from jaxmerge.cli.actions.remarks import format_remarks
from jaxmerge.cli.actions.sources import load_all, peek_all
from jaxmerge.cli.console import out, progress, report, report_error, report_problems, table
from jaxmerge.cli.groups import conversion, rules
from jaxmerge.io.atomic import existing_ancestor
from jaxmerge.io.peft.keys import natural_order
from jaxmerge.layouts import Conversion
from jaxmerge.memory import Overflow
from jaxmerge.merging.plan import plan_merge
from jaxmerge.metrics import energy_at_rank, spectra
from jaxmerge.resizing import Rule, rule_of, truncate
from jaxmerge.sharding import first_process, seen_everywhere
from jaxmerge.words import kept_span, pattern, percent, span


def run(options: argparse.Namespace) -> int:
    """Merges; returns 1, with nothing written, if something is wrong with the inputs."""
    keep_programs(options)
    try:
        join(options)
        if problems := header_problems(options):
            return report_problems(problems, options.json)
        adapters = load_all(options, placing(options)["mesh"])
        if problems := twins(adapters):
            return report_problems(problems, options.json)
        plan = plan_merge(adapters, options.weights, **merge_arguments(options))
        results, beside = [], existing_ancestor(Path(options.output).parent)
        count = sum(map(len, plan.buckets.values()))
        with Overflow(beside, plan.memory) as overflow, progress("merging", count) as advance:
            for result in plan.run():
                results.append(overflow.keep(result))
                advance(len(result))
        merged = _with_seed(plan.finish(results), options.seed)
        if rule := _rule(options):
            merged = truncate(merged, rule)
        written = io.save(merged, options.output, force=options.force, **conversion(options))
        merged = jax.tree.map(seen_everywhere, merged)
    except (ValueError, OSError, MemoryError) as error:
        return report_error(error, options.json)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return report_error(MemoryError(), options.json)
    summary = summarise(options, adapters, merged, written)
    return report(summary, options.json, _print) if first_process() else 0


def _with_seed(merged: Adapter, seed: int | None) -> Adapter:
    """The adapter with the seed in its provenance, beside the key that was made from it."""
    record = {**json.loads(merged.metadata.provenance), **({} if seed is None else {"seed": seed})}
    return dataclasses.replace(merged, metadata=dataclasses.replace(merged.metadata, provenance=json.dumps(record)))


def _rule(options: argparse.Namespace) -> Rule | None:
    """How modules are cut at the end; a ValueError if it cannot be."""
    given = rules(options)
    # A rank alone is the merge's own.
    return rule_of(**given) if any(given[name] is not None for name in given if name != "rank") else None


def merge_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options as arguments of `jaxmerge.merge`."""
    names = {h.name for h in all_hyperparameters()}
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return {
        "method": options.method,
        "space": options.space,
        "combination_type": options.combination_type,
        "rank": options.rank,
        "dtype": options.dtype,
        "key": None if options.seed is None else jax.random.key(options.seed),
        "extras": _extras(options),
        "stages": options.stages,
        "density_scope": options.density_scope,
        "allow_different_bases": options.allow_different_bases,
        **placing(options),
        **given,
    }


def _extras(options: argparse.Namespace) -> str | int:
    chosen = options.extras
    if chosen in ("same", "average"):
        return chosen
    if chosen in options.adapters:
        return options.adapters.index(chosen)
    if chosen.isdecimal() and 1 <= int(chosen) <= len(options.adapters):
        return int(chosen) - 1
    raise ValueError(f"--extras {chosen}: give same, average, one of the adapters, or its number from 1")


def header_problems(options: argparse.Namespace) -> list[str]:
    """Everything that can be known to be wrong before a weight is read."""
    peeked, problems = peek_all(options)
    paths, output = [io.as_path(path) for path in options.adapters], io.as_path(options.output)
    for path in (*paths, output):
        if not str(path).isprintable():
            problems.append(f"{str(path)!r}: has characters in its name that cannot be written down")
    seen: dict[Path, Path] = {}
    for path in paths:
        first = seen.setdefault(Path(os.path.realpath(path)), path)
        if first is not path:
            problems.append(f"{path}: is given twice; one weight for it says the same")
    problems += io.overlap_problems(paths, output)
    if options.density is not None and not 0 < options.density <= 1:
        problems.append(f"--density {options.density:g} is not in (0, 1]")
    try:
        io.check_target(peeked or [Adapter({})], output, Conversion(**conversion(options)), options.force)
    except ValueError as error:
        problems += str(error).splitlines()
    complete = len(peeked) == len(paths)
    if not complete and options.weights is not None and len(options.weights) != len(paths):
        problems.append(f"{len(options.weights)} weights for {len(paths)} adapters: give one weight per adapter")
    try:
        _rule(options)
    except ValueError as error:
        problems += str(error).splitlines()
    if peeked:
        try:
            arguments = merge_arguments(options)
            if not complete:  # The rest can still be compared with each other.
                arguments |= {"extras": "average", "rank": None}
            if options.density is not None and not options.density > 0:
                arguments["density"] = 1.0  # Told above.
            plan_merge(peeked, options.weights if complete else None, **arguments)
        except ValueError as error:
            problems += str(error).splitlines()
    return list(dict.fromkeys(problems))


def twins(adapters: list[Adapter]) -> list[str]:
    """Adapters with the same tensors and scales under two paths."""
    seen: dict[tuple[Any, ...], str] = {}
    problems = []
    for adapter in adapters:
        source = json.loads(adapter.metadata.provenance)
        scales = tuple((path, lora.scale) for path, lora in adapter.modules.items())
        first = seen.setdefault((source["sha256"], scales), source["path"])
        if first != source["path"]:
            problems.append(f"{source['path']}: is the same adapter as {first}; one weight for it says the same")
    return problems


def summarise(
    options: argparse.Namespace, adapters: list[Adapter], merged: Adapter, written: Adapter
) -> dict[str, Any]:
    """What was done and what it cost, as JSON holds it."""
    record = json.loads(merged.metadata.provenance)
    kept = float(energy_kept(merged))
    summary = {
        "ok": True,
        "output": options.output,
        **{name: record[name] for name in ("method", "space", "combination_type", "hyperparameters", "stages")},
        "seed": options.seed,
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
    remarks = _remarks(adapters, merged, kept) + format_remarks(options.format, adapters, merged, written)
    return summary | {"remarks": remarks}


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
        if rank > largest:
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
        remarks.append(f"rank {span(ranks)} keeps {percent(kept)} of the energy; {more}")
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


def _print(summary: dict[str, Any]) -> None:
    settings = {"method": summary["method"], "space": summary["space"], **summary["hyperparameters"]}
    if summary["combination_type"]:
        settings = {"combination_type": summary["combination_type"], **settings}
    if summary["seed"] is not None:
        settings["seed"] = summary["seed"]
    words = [f"{name} {value}" for name, value in settings.items()]
    words += [f"then {' '.join([name, *(f'{k} {v}' for k, v in own.items())])}" for name, own in summary["stages"]]
    out.print(f"[bold]{escape(summary['output'])}[/bold]  " + ", ".join(words))
    out.print()
    inputs = [
        (i + 1, source["path"], f"{source['weight']:g}", span(source["ranks"]), source["sha256"][:12])
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
