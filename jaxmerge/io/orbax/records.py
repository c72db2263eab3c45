"""What is written down beside a tree: alpha, rank, where scanned layers lie."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmerge.base import Adapter, Metadata
from jaxmerge.io import keras, peft, trees
from jaxmerge.io.orbax.places import Place


def completed(options: Mapping[str, Any], custom: Mapping[str, Any], stored: trees.Alpha) -> dict[str, Any]:
    """The options, with what is written down beside the tree where they leave it open."""
    alpha, scan_axis, layout = options.get("alpha"), options.get("scan_axis"), options.get("layout")
    ours = custom.get("jaxmerge", {}).get("format")
    if layout is None and options.get("pattern") is None and isinstance(ours, str) and ours in trees.TREE_FORMATS:
        layout = ours
    if scan_axis is None and isinstance(custom.get("scan_layers"), bool):
        scan_axis = "some" if custom["scan_layers"] else "none"
    if scan_axis is None and isinstance(axis := custom.get("jaxmerge", {}).get("scan_axis"), int):
        scan_axis = axis
    return {**options, "alpha": stored if alpha is None else alpha, "scan_axis": scan_axis, "layout": layout}


def stored_alpha(path: Path, custom: Mapping[str, Any], place: Place) -> trees.Alpha:
    """The alpha that is written down beside the tree, if it is."""
    if custom.get("jaxmerge", {}).get("alpha") == "rank":
        return "rank"
    lora = custom.get("lora")
    sources = {
        "lora.lora_alpha in its custom metadata": lora.get("lora_alpha") if isinstance(lora, dict) else None,
        f"lora_alpha in its {peft.CONFIG}": json.loads(place.sidecar or "{}").get("lora_alpha"),
    }
    for where, value in sources.items():
        if value is None or value == 0:  # MaxText's word for one that was never set.
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {where} is {value!r}, not a number")
        return float(value)
    return (keras.alphas(place.model_config) or None) if place.model_config else None


def check_alpha(path: Path, adapter: Adapter, alpha: trees.Alpha, stored: trees.Alpha) -> None:
    """Refuses an alpha that contradicts the checkpoint's own."""
    if alpha is None or stored is None or isinstance(stored, Mapping) or alpha == stored:
        return
    if "rank" in (alpha, stored) and all(
        lora.rank == (stored if alpha == "rank" else alpha) for lora in adapter.modules.values()
    ):
        return
    own = "that it is each module's rank" if stored == "rank" else stored
    raise ValueError(
        f"{path}: alpha {alpha} was given, but the checkpoint itself says {own}: leave alpha out, or give one per "
        "adapter"
    )


def is_of_one_rank(metadata: Metadata) -> bool:
    """Whether what is written has all modules of one rank, the smaller filled up with zeros."""
    row = trees.TREE_FORMATS.get(metadata.format)
    return (row is not None and row.one_rank) or _is_maxtext(json.loads(metadata.config))


def _is_maxtext(custom: Mapping[str, Any]) -> bool:
    stored = custom.get("lora")
    return isinstance(stored, dict) and "lora_alpha" in stored


def with_rank(custom: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Custom metadata in which MaxText's rank and alpha are those of the adapter: equal, as its scale is folded in."""
    if not _is_maxtext(custom):
        return custom
    (rank,) = {lora.rank for lora in adapter.modules.values()}
    return {**custom, "lora": {**custom["lora"], "lora_rank": rank, "lora_alpha": float(rank)}}
