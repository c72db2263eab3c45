"""Inspecting: what is in adapters, and what cannot be merged."""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from jaxmerge import io
from jaxmerge.base import Adapter, nonfinite_modules
from jaxmerge.cli.actions.remarks import conversion_remark
from jaxmerge.cli.console import out, print_json, report_problems, table
from jaxmerge.cli.groups import reading
from jaxmerge.io import peft
from jaxmerge.io.peft.keys import natural_order
from jaxmerge.io.trees import MissingAlphaError
from jaxmerge.metrics import norms
from jaxmerge.words import pattern, span


def run(options: argparse.Namespace) -> int:
    """Describes every path; exits with 1 if one cannot be read at all."""
    described, problems = [], []
    for i, path in enumerate(options.adapters):
        try:
            described.append(describe(io.as_path(path), reading(options, i, len(options.adapters))))
        except ValueError as error:
            problems += str(error).splitlines()
    if options.json:
        print_json({"ok": not problems, "adapters": described, "problems": problems})
        return 1 if problems else 0
    for description in described:
        _print(description)
    return report_problems(problems, as_json=False) if problems else 0


def describe(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is in an adapter, as JSON holds it.

    Raises:
        ValueError: If its files are missing or broken.
    """
    return _describe_tree(path, options) if io.is_tree(path) else _describe_peft(path)


def _describe_tree(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    problems = []
    try:
        io.peek(path, **options)
    except MissingAlphaError as error:
        problems = str(error).splitlines()
        options = {**options, "alpha": 1.0}
    adapter = io.load(path, **options)
    described = {
        "path": str(path),
        "format": adapter.metadata.format,
        "base_model": adapter.metadata.base_model,
        "parameters": int(sum(leaf.size for lora in adapter.modules.values() for leaf in (lora.a, lora.b))),
        **_described(adapter, problems),
    }
    if problems:  # The scale, and with it the norm, is not known.
        for module in described["modules"].values():
            module.update(scale=None, norm=None)
    return described


def _describe_peft(path: Path) -> dict[str, Any]:
    headers = peft.read_headers(path)
    contents = headers.contents
    description: dict[str, Any] = {
        "path": str(path),
        "format": "peft",
        "file": str(headers.weights),
        "base_model": headers.config.get("base_model_name_or_path"),
        "peft_type": headers.config.get("peft_type"),
        "tensors": len(headers.tensors),
        "parameters": int(sum(np.prod(tensor.shape, dtype=np.int64) for tensor in headers.tensors.values())),
        "cannot_be_merged": list(contents.problems),
        "modules": {},
        "extras": {},
    }
    if contents.problems:
        return description
    return description | _described(peft.load(path), [])


def _described(adapter: Adapter, problems: Sequence[str]) -> dict[str, Any]:
    own_base = [adapter.metadata.own_base] if adapter.metadata.own_base else []
    broken = nonfinite_modules(adapter)
    return {
        "cannot_be_merged": [*problems, *own_base, *[f"module {module} holds NaN or inf" for module in broken]],
        "sha256": json.loads(adapter.metadata.provenance)["sha256"],
        "converted": conversion_remark(adapter),
        "modules": _modules(adapter, broken),
        "extras": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in adapter.extras.items()
        },
    }


def _modules(adapter: Adapter, broken: Sequence[str]) -> dict[str, Any]:
    layouts = dict(adapter.metadata.layouts)
    sound = Adapter({path: lora for path, lora in adapter.modules.items() if path not in broken})
    with np.errstate(all="ignore"):
        norm = {path: value for path, value in norms(sound).items() if np.isfinite(value)}
    return {
        path: {
            "kind": getattr(layouts.get(path), "kind", "linear"),
            "out": lora.features[0],
            "in": lora.features[1],
            "batch": list(lora.batch),
            "rank": lora.rank,
            "scale": lora.scale,
            "dtype": str(lora.a.dtype),
            "bias": lora.bias is not None,
            "norm": norm.get(path),
        }
        for path, lora in sorted(adapter.modules.items(), key=lambda item: natural_order(item[0]))
    }


def _print(description: dict[str, Any]) -> None:
    title = f"{description['format']}, {description['parameters']:,} parameters"
    out.print(f"[bold]{escape(description['path'])}[/bold]  {title}")
    if description["base_model"]:
        out.print(f"base model: {escape(str(description['base_model']))}")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for path, module in description["modules"].items():
        shape = f"{module['out']}×{module['in']}"
        groups[pattern(path), module["kind"], shape, module["rank"], module["scale"], module["dtype"]].append(module)
    if groups:
        left, right = ["module", "kind", "dtype"], ["out×in", "rank", "scale", "count", "norm of the change"]
        headings = [(name, "left") for name in left] + [(name, "right") for name in right]
        rows = []
        for (path, kind, shape, rank, scale, dtype), members in groups.items():
            finite = [member["norm"] for member in members if member["norm"] is not None]
            norm = span(finite) if len(finite) == len(members) else "unknown" if scale is None else "NaN or inf"
            rows.append(
                (
                    path,
                    kind,
                    dtype,
                    shape,
                    rank,
                    "alpha / rank" if scale is None else f"{scale:.4g}",
                    len(members),
                    norm,
                )
            )
        out.print(table(headings, rows))
    if description.get("converted"):
        out.print(escape(description["converted"]))
    if description["extras"]:
        out.print(f"not LoRA factors: {escape(', '.join(description['extras']))}")
    for problem in description["cannot_be_merged"]:
        out.print(f"[yellow]problem:[/yellow] {escape(problem)}")
    out.print()
