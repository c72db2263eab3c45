"""From one format to another: PEFT's modules to a Flax tree's, and back.

First everything is settled from names and shapes, then factors are moved. PEFT's modules stand in the middle: a tree
goes to them, and from them to another tree.
"""

import dataclasses
import json
from collections.abc import Sequence

from jaxmerge.base import Adapter, Metadata
from jaxmerge.io.convert.moves import from_peft, to_peft
from jaxmerge.io.convert.pieces import settle
from jaxmerge.io.convert.targets import TARGETS, Target
from jaxmerge.layouts import Conversion

__all__ = ["TARGETS", "Target", "check", "convert", "placed", "target_metadata", "wanted"]


def wanted(metadata: Metadata, conversion: Conversion) -> bool:
    """Whether anything is to be converted at all.

    Raises:
        ValueError: If the format is unknown, or the options do not go together.
    """
    format = conversion.format
    if format not in (None, "peft", metadata.format, *TARGETS):
        raise ValueError(f"unknown format {format!r}: there are peft, {', '.join(TARGETS)}")
    if conversion.layout is not None:
        if format is None:
            raise ValueError(f"layout {conversion.layout} is for a conversion: give a format too")
        return format != "peft" or metadata.format != "peft"
    if given := [name for name in ("head_dim", "layers") if getattr(conversion, name) is not None]:
        raise ValueError(f"{given[0]} is for a conversion: give a layout too")
    if format in (None, metadata.format):
        return False
    if metadata.format != "peft" and metadata.place is not None and _is_same(metadata, TARGETS.get(format)):
        return False
    raise ValueError(f"from {metadata.format} to {format}: give a layout, which says what modules are called there")


def _is_same(metadata: Metadata, target: Target | None) -> bool:
    return target is not None and (target.tree, target.place.item) == (metadata.format, metadata.place.item)


def check(adapters: Sequence[Adapter], conversion: Conversion) -> bool:
    """Raises the ValueError that the conversion of a merge of these adapters would raise; shapes are enough.

    Returns:
        Whether there is anything to convert.
    """
    one = adapters[0]
    needed = wanted(one.metadata, conversion)
    if needed:
        modules = {path: lora for adapter in adapters for path, lora in adapter.modules.items()}
        layouts = tuple({path: kind for a in adapters for path, kind in a.metadata.layouts}.items())
        extras = {name: tensor for adapter in adapters for name, tensor in adapter.extras.items()}
        metadata = dataclasses.replace(one.metadata, layouts=layouts)
        settle(Adapter(modules=modules, extras=extras, metadata=metadata), conversion)
    return needed


def placed(adapter: Adapter, conversion: Conversion) -> Adapter:
    """A tree that was made in memory with the place of the format it is to be written in; any other as it is."""
    metadata, target = adapter.metadata, TARGETS.get(str(conversion.format))
    if metadata.tree is None or metadata.place is not None or conversion.layout is not None or target is None:
        return adapter
    if target.tree != metadata.format:
        return adapter
    return dataclasses.replace(
        adapter, metadata=dataclasses.replace(metadata, place=target.place, config=target.config)
    )


def target_metadata(format: str) -> Metadata:
    """Where and as what a format is written."""
    return Metadata() if format == "peft" else Metadata(format=TARGETS[format].tree, place=TARGETS[format].place)


def convert(adapter: Adapter, conversion: Conversion) -> Adapter:
    """The adapter in another format.

    Args:
        adapter: Of concrete arrays.
        conversion: What is asked for.

    Returns:
        The adapter, on the host; itself if there is nothing to convert.

    Raises:
        ValueError: If a module has no place in the target; it names all of them.
    """
    if not wanted(adapter.metadata, conversion):
        return adapter
    out_of, into = settle(adapter, conversion)
    if out_of is not None:
        adapter = to_peft(adapter, out_of)
    if into is not None:
        adapter = from_peft(adapter, into, TARGETS[str(conversion.format)])
    record = json.loads(adapter.metadata.provenance)
    record["converted"] = {name: value for name, value in dataclasses.asdict(conversion).items() if value is not None}
    return dataclasses.replace(
        adapter, energy={}, metadata=dataclasses.replace(adapter.metadata, provenance=json.dumps(record))
    )
