"""Which modules become which parameters, settled from names and shapes alone."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxmerge.base import Adapter
from jaxmerge.io.convert.regroup import missing_size
from jaxmerge.io.convert.targets import TARGETS, Target
from jaxmerge.io.trees import TREE_FORMATS, Rule, TreeLayout, layout_of
from jaxmerge.layouts import Conversion, Row, Table, fill, layer_number, match, placeholders, rows_of_scanned, tables
from jaxmerge.words import folded


@dataclass(frozen=True)
class Piece:
    """One parameter of a tree, and the modules of PEFT's that it is.

    Attributes:
        row: Of the table.
        module: The tree's module.
        sources: PEFT's modules by the numbers of the axes that they are entries of.
        sizes: Of all axes.
    """

    row: Row
    module: str
    sources: Mapping[tuple[int, ...], str]
    sizes: Mapping[str, int]


def settle(adapter: Adapter, conversion: Conversion) -> tuple[list[Piece] | None, list[Piece] | None]:
    """Settles a conversion.

    Args:
        adapter: Its leaves may be mere shapes.
        conversion: What is asked for.

    Returns:
        What to take a tree apart into, and what to put a tree together from; None for what is not to be done.

    Raises:
        ValueError: If a module has no place in the result, or something is wanting; it tells everything at once.
    """
    known = tables(str(conversion.layout))
    fixed = {} if conversion.head_dim is None else {"head_dim": conversion.head_dim}
    problems = [f"{name} is no LoRA factor: format {conversion.format} has no place for it" for name in adapter.extras]
    problems += [
        f"module {path} has a lora_bias, for which other formats have no place"
        for path, lora in adapter.modules.items()
        if lora.bias is not None
    ]
    if any(value is not None and value < 1 for value in (conversion.head_dim, conversion.layers)):
        problems.append("head_dim and layers are whole numbers from 1")
    out_of = into = None
    features = {path: lora.features for path, lora in adapter.modules.items()}
    if adapter.metadata.format != "peft":
        out_of = _taken_apart(adapter, _table_of(adapter, known, problems), fixed, problems)
        features = {path: shape for piece in out_of for path, shape in _features(piece).items()}
    if conversion.format != "peft" and not problems:
        target = TARGETS[str(conversion.format)]
        table = known.get("", known.get(str(conversion.format)))
        if table is None:
            raise ValueError(
                f"layout {conversion.layout} has no table for {conversion.format}, only for {', '.join(known)}"
            )
        # PEFT's own word that some layers of the model are not adapted.
        partial = bool(json.loads(adapter.metadata.config).get("layers_to_transform"))
        into = _put_together(features, table, fixed, conversion, partial, problems)
        problems += [found for piece in into if isinstance(found := target_layout(piece, target), str)]
    if problems:
        raise ValueError("\n".join(folded(dict.fromkeys(problems))))
    return out_of, into


def _table_of(adapter: Adapter, known: Mapping[str, Table], problems: list[str]) -> Sequence[Row]:
    """The table that knows all of a tree's modules."""
    scanned = max((kind.batch[0] for _, kind in adapter.metadata.layouts if kind.batch), default=0)
    tried = [rows_of_scanned(table, scanned) for table in known.values()]
    strangers = [
        [path for path in adapter.modules if all(match(row.module, path) is None for row in rows)] for rows in tried
    ]
    if [] in strangers:
        return tried[strangers.index([])]
    problems.append(f"{_several(min(strangers, key=len))} not in the layout's table")
    return ()


def _several(paths: Sequence[str]) -> str:
    """Some modules and the number of the others, with the verb."""
    if len(paths) == 1:
        return f"module {paths[0]} is"
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return f"modules {', '.join(paths[:4])}{more} are"


def _taken_apart(adapter: Adapter, rows: Sequence[Row], fixed: Mapping[str, int], problems: list[str]) -> list[Piece]:
    layouts, pieces = dict(adapter.metadata.layouts), []
    for path in adapter.modules if rows else ():
        row, values = next((row, found) for row in rows if (found := match(row.module, path)) is not None)
        layout: TreeLayout = layouts[path]
        batch, inputs, outputs = sides(row)
        if len(batch) != len(layout.batch):
            problems.append(
                f"module {path} has {len(layout.batch)} axes of layers, the layout's table says {len(batch)}"
            )
            continue
        sizes: dict[str, int] | None = {**fixed, **dict(zip(batch, layout.batch, strict=True))}
        for names, found in ((inputs, layout.inputs), (outputs, layout.outputs)):
            if len(names) == len(found):
                sizes = {**sizes, **dict(zip(names, found, strict=True))}
                continue
            more = missing_size(math.prod(found), names, sizes)
            if more is None:
                problems.append(_uncut(path, math.prod(found), names, fixed))
                break
            sizes |= more
        else:
            out = math.prod(sizes[name] for name in row.outputs.split())
            if problem := _head_problem(path, row, out, fixed):
                problems.append(problem)
                continue
            sources = {
                index: fill(row.peft, {**values, **dict(zip(row.unrolled, index, strict=True))})
                for index in np.ndindex(*[sizes[name] for name in row.unrolled])
            }
            pieces.append(Piece(row, path, sources, sizes))
    return pieces


def _put_together(
    features: Mapping[str, tuple[int, int]],
    table: Table,
    fixed: Mapping[str, int],
    conversion: Conversion,
    partial: bool,
    problems: list[str],
) -> list[Piece]:
    layers = conversion.layers or max((_layer(path) for path in features), default=-1) + 1
    rows = table(layers) if callable(table) else table
    found = {
        path: [(row, values) for row in rows if (values := match(row.peft, path)) is not None] for path in features
    }
    if strangers := [path for path, fits in found.items() if not fits]:
        problems.append(f"{_several(strangers)} not in the layout's table, and would have no place in the result")
    groups: dict[tuple[Row, str], dict[tuple[int, ...], str]] = {}
    for path, fits in found.items():
        for row, values in fits:
            group = groups.setdefault((row, fill(row.module, values)), {})
            group[tuple(values[name] for name in row.unrolled)] = path
    owners: dict[str, Row] = {}
    chosen: dict[tuple[Row, str], dict[tuple[int, ...], str]] = {}
    for path, fits in found.items():
        keys = [(row, fill(row.module, values)) for row, values in fits]
        # Of several parameters that a module may be part of, the first whose other parts are there and of its shape.
        key = next((key for key in keys if _is_whole(key[0], groups[key], features)), keys[-1] if keys else None)
        if key is not None and owners.setdefault(key[1], key[0]) != key[0]:
            problems.append(f"module {path} and another would both become {key[1]}")
        elif key is not None:
            index = next(index for index, source in groups[key].items() if source == path)
            chosen.setdefault(key, {})[index] = path
    stacks = [row for row, _ in chosen if (number := layer_number(row.peft)) and number[0] in row.unrolled]
    if stacks or callable(table):
        problems += _layer_problems(features, layers, conversion, partial)
    counts = _counts(chosen, rows, layers)
    pieces = []
    for (row, module), sources in chosen.items():
        sizes: dict[str, int] = {**fixed, **counts, **{name: len(c) for name, c in placeholders(row.peft).items() if c}}
        shapes = {features[path] for path in sources.values()}
        if len(shapes) > 1:
            problems.append(
                f"modules {', '.join(sources.values())} are one parameter, {module}, and have different shapes"
            )
            continue
        ((out, in_),) = shapes
        if problem := _head_problem(next(iter(sources.values())), row, out, fixed):
            problems.append(problem)
            continue
        for names, size in ((row.inputs.split(), in_), (row.outputs.split(), out)):
            more = missing_size(size, names, sizes)
            if more is None:
                path = next(iter(sources.values()))
                problems.append(_uncut(path, size, names, fixed))
                break
            sizes |= more
        else:
            pieces.append(Piece(row, module, sources, sizes))
    return pieces


def target_layout(piece: Piece, target: Target) -> tuple[Rule, str, TreeLayout] | str:
    """How a parameter lies in a format.

    Args:
        piece: The parameter.
        target: The format.

    Returns:
        The rule by which its factors are called, its module without the parameter, and its layout; or why the format
        has no place for it.
    """
    parameter, row = piece.row.parameter, piece.row
    module = piece.module.removesuffix(f".{parameter}")
    rule = next((rule for rule in TREE_FORMATS[target.tree].rules if rule.knows(module, parameter)), None)
    if rule is None:
        return f"module {piece.module}: format {target.tree} has no parameter called {parameter}"
    batch, inputs, outputs = (tuple(piece.sizes[name] for name in names) for names in sides(row))
    layout = layout_of(rule, batch, inputs, outputs, row.scan_axis)
    if layout is None:
        a, b = rule.axes[0]
        return f"module {piece.module}: in format {target.tree} its A must have the axes {a}, and its B {b}"
    named = "{parameter" in rule.leaf
    return rule, module, dataclasses.replace(layout, parameter=parameter if named else "")


def _is_whole(row: Row, group: Mapping[tuple[int, ...], str], features: Mapping[str, tuple[int, int]]) -> bool:
    enumerated = any(placeholders(row.peft)[name] for name in row.unrolled)
    return not enumerated or (len(group) > 1 and len({features[path] for path in group.values()}) == 1)


def _layer(path: str) -> int:
    """The layer that a module of PEFT's is in; -1 for none."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", path)
    return int(found[1]) if found else -1


def _layer_problems(paths: Iterable[str], layers: int, conversion: Conversion, partial: bool) -> list[str]:
    """Whether it is known how many layers there are, where they become an axis."""
    present = {_layer(path) for path in paths} - {-1}
    if conversion.layers is not None:
        beyond = max(present, default=0)
        return [f"there is a layer {beyond}, which a model of {layers} layers has not"] if beyond >= layers else []
    if partial or present != set(range(layers)):
        return [
            f"not every layer is adapted, and format {conversion.format} stacks them: give layers, the model's number"
        ]
    return []


def _counts(
    chosen: Mapping[tuple[Row, str], Mapping[tuple[int, ...], str]], rows: Sequence[Row], layers: int
) -> dict[str, int]:
    """The sizes of axes that are numbers in PEFT's paths: of layers those of the model, else as many as there are."""
    counts: dict[str, int] = {}
    for (row, _), sources in chosen.items():
        for i, name in enumerate(row.unrolled):
            found = 1 + max(index[i] for index in sources)
            if (place := layer_number(row.peft)) is not None and place[0] == name:
                _, factor, offset = place
                others = dict.fromkeys(placeholders(row.peft), 0)
                paths = [fill(row.peft, others | {name: n}) for n in range(-(-(layers - offset) // factor))]
                # Layers that a row before this one takes are no entries of its axis.
                found = sum(next(r for r in rows if match(r.peft, path) is not None) == row for path in paths)
            counts[name] = max(counts.get(name, 0), found)
    return counts


def _head_problem(path: str, row: Row, out: int, fixed: Mapping[str, int]) -> str | None:
    """Whether the size of a head is known and fits, where the tree's heads are not those of PEFT."""
    if not (row.rotary or row.head_scale) or ("head_dim" in fixed and out % fixed["head_dim"] == 0):
        odd = row.rotary and fixed["head_dim"] % 2
        return f"head_dim {fixed['head_dim']} is odd, and rotary pairs have two halves" if odd else None
    return _uncut(path, out, ("head_dim",), fixed)


def _uncut(path: str, size: int, names: Sequence[str], fixed: Mapping[str, int]) -> str:
    if "head_dim" not in names:
        return f"module {path}: its {size} features cannot be {' × '.join(names)}"
    if "head_dim" not in fixed:
        return "the format keeps attention heads apart, or their rows in another order: give head_dim, the size of one"
    return f"module {path}: its {size} features are no whole number of heads of {fixed['head_dim']}"


def sides(row: Row) -> tuple[list[str], list[str], list[str]]:
    """The axes of a parameter that are in both factors, in A alone, in B alone."""
    batch = [name for name in row.a_axes if name in row.b_axes]
    return batch, [n for n in row.a_axes if n not in batch], [n for n in row.b_axes if n not in batch]


def _features(piece: Piece) -> dict[str, tuple[int, int]]:
    out, in_ = (math.prod(piece.sizes[name] for name in side.split()) for side in (piece.row.outputs, piece.row.inputs))
    return dict.fromkeys(piece.sources.values(), (out, in_))
