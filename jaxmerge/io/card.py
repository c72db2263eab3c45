"""The README.md beside a merged adapter: a model card in PEFT's manner."""

import json
from collections.abc import Mapping
from typing import Any

from jaxmerge.values import described, settings


def model_card(config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Writes the card.

    Args:
        config: The adapter's adapter_config.json.
        record: Its provenance.

    Returns:
        Markdown with the metadata block that model hubs read.
    """
    base = config.get("base_model_name_or_path")
    tags = [*([f"base_model:adapter:{base}"] if base else []), "lora", "merge", "jaxmerge"]
    front = [
        *([f"base_model: {json.dumps(base, ensure_ascii=False)}"] if base else []),
        "library_name: peft",
        "tags:",
        *[f"- {json.dumps(tag, ensure_ascii=False)}" for tag in tags],
    ]
    return "\n".join(["---", *front, "---", "", *_body(base, config, record), ""])


def called(source: Mapping[str, Any]) -> str:
    """What an adapter that was merged is called.

    Args:
        source: Its record in the provenance.

    Returns:
        Its name, if it has one, and where it lay, or what it was merged from.
    """
    place = source.get("path", "in memory")
    if "inputs" in source and "method" in source:
        place = f"{source['method']} of {', '.join(map(called, source['inputs']))}"
    return f"{source['name']} ({place})" if "name" in source else place


def _hash(source: Mapping[str, Any]) -> str:
    return f"`{source['sha256'][:16]}`" if "sha256" in source else ""


def _body(base: str | None, config: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    of = f" of `{base}`" if base else ""
    if "resize" in record:
        return _resized(of, record)
    if "inputs" not in record:
        return ["# LoRA adapter", "", f"A LoRA adapter{of}, written by jaxmerge."]
    rows = [
        f"| `{called(source)}` | {described(weight)} | {_hash(source)} |"
        for source, weight in zip(record["inputs"], record["weights"], strict=True)
    ]
    return [
        "# Merged LoRA adapter",
        "",
        f"A LoRA adapter{of}, merged from {len(rows)} with jaxmerge: "
        + ", ".join(settings(record, full=True))
        + f". Rank {config['r']}; {100 * record['energy_kept']:.4g} % of the merge's energy (squared Frobenius "
        "norm) is kept.",
        "",
        "| adapter | weight | sha256 |",
        "|---|---|---|",
        *rows,
        "",
        "`jaxmerge.json` holds everything needed to make it again.",
    ]


def _resized(of: str, record: Mapping[str, Any]) -> list[str]:
    (source,) = record["inputs"]
    rule = ", ".join(f"{name} {value}" for name, value in record["resize"].items())
    ranks = sorted({module["rank"] for module in record["modules"].values()})
    return [
        "# Resized LoRA adapter",
        "",
        f"A LoRA adapter{of}, resized with jaxmerge from `{source.get('path', 'memory')}`: {rule}. Rank "
        f"{' … '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}; {100 * record['energy_kept']:.4g} % of its "
        "energy (squared Frobenius norm) is kept.",
        "",
        "`jaxmerge.json` holds everything needed to make it again.",
    ]
