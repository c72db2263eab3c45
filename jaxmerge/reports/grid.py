"""Where a module stands in a map of a model: a column for each layer, a row for each kind of module."""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxmerge.stages import layer_of

# A module, and the index on its first batch axis where it holds several layers.
Key = tuple[str, int | None]


@dataclass(frozen=True)
class Row:
    """Modules of one kind.

    Attributes:
        kind: Their path from the layer on; the whole path where it has none.
        cells: Layer -> the module there.
    """

    kind: str
    cells: Mapping[int, Key]


@dataclass(frozen=True)
class Block:
    """A stack of layers.

    Attributes:
        name: The path that its modules share; empty for modules of no layer.
        axis: What its columns are: ``"layer"``, ``"index"`` on an axis of stacked modules, or empty for one column.
        columns: Layers, in order.
        rows: In the order of the modules.
    """

    name: str
    axis: str
    columns: tuple[int, ...]
    rows: tuple[Row, ...]


def grid(modules: Mapping[str, int]) -> tuple[Block, ...]:
    """Lays out modules: those with a layer number by stack, then those that hold several layers, then the rest.

    Args:
        modules: Module path -> the length of its first batch axis, 0 where it has none.

    Returns:
        Blocks, each with at least one row.
    """
    found: dict[tuple[str, str], dict[str, dict[int, Key]]] = defaultdict(lambda: defaultdict(dict))
    for path, length in modules.items():
        place = layer_of(path)
        if length:
            found[f"{length} stacked", "index"][path] = {i: (path, i) for i in range(length)}
        elif place is None:
            found["", ""][path][0] = (path, None)
        else:
            stack, layer = place
            kind = re.sub(r"^\d+\.?", "", path[len(stack) :])
            found[stack.rstrip("._"), "layer"][kind or stack.rstrip("._")][layer] = (path, None)
    order = {"layer": 0, "index": 1, "": 2}
    return tuple(
        _block(name, axis, kinds) for (name, axis), kinds in sorted(found.items(), key=lambda item: order[item[0][1]])
    )


def _block(name: str, axis: str, kinds: Mapping[str, Mapping[int, Key]]) -> Block:
    columns = tuple(sorted({column for cells in kinds.values() for column in cells}))
    shared = "" if axis == "layer" else _shared_parts(list(kinds))
    rows = tuple(Row(kind.removeprefix(shared), cells) for kind, cells in kinds.items())
    return Block(", ".join(filter(None, (shared.rstrip("."), name))), axis, columns, rows)


def _shared_parts(paths: Sequence[str]) -> str:
    """The first parts that all dotted paths have, none of which is a whole path."""
    parts = [path.split(".")[:-1] for path in paths]
    shared = list(itertools.takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False)))
    return "".join(f"{same[0]}." for same in shared) if len(paths) > 1 else ""


def short_names(names: tuple[str, ...], most: int = 24) -> tuple[str, ...]:
    """Names by which adapters are told apart in small space: as many of the last parts of their paths as it takes.

    Args:
        names: Paths, or any other names.
        most: Characters; longer ones lose their middle, and get their number if that makes two the same.

    Returns:
        One for each; two adapters of one name are told apart by number.
    """
    parts = [[part for part in re.split(r"[/\\]+", name) if part] or [name] for name in names]
    count = 1
    while count < max(map(len, parts)) and len({tuple(p[-count:]) for p in parts}) < len(set(names)):
        count += 1
    short = [shortened("/".join(p[-count:]), most) for p in parts]
    return tuple(name if short.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(short))


def shortened(text: str, most: int) -> str:
    """A text without its middle where it is too long."""
    if len(text) <= most:
        return text
    end = (most - 1) * 2 // 3
    return f"{text[: most - 1 - end]}…{text[-end:]}"
