"""From one format to another: PEFT's modules to a Flax tree's, and back.

First everything is settled from names and shapes (`plan`), then factors are moved (`convert`). PEFT's modules stand in
the middle: a tree goes to them, and from them to another tree.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxmerge.base import Adapter, LoRA, Metadata, promote
from jaxmerge.io.orbax import Place
from jaxmerge.io.peft_keys import Layout, natural_order
from jaxmerge.io.regroup import RANK, Factors, missing_size, stacked
from jaxmerge.io.trees import TREE_FORMATS, Rule, Tree, TreeLayout, layout_of
from jaxmerge.layouts import Conversion, Row, Table, fill, layer_number, match, placeholders, tables


@dataclass(frozen=True)
class Target:
    """A format that adapters are written in.

    Attributes:
        tree: Its row in `TREE_FORMATS`.
        place: Where in the checkpoint it lies.
        wrappers: Keys around the tree.
        value: Whether every leaf is in a key ``value`` of its own, as nnx saves them.
        config: The checkpoint's custom metadata, as JSON.
    """

    tree: str
    place: Place
    wrappers: tuple[str, ...] = ()
    value: bool = True
    config: str = "{}"


def _maxtext(scanned: bool) -> str:
    # Its rank and alpha are filled in when it is written.
    return json.dumps({"scan_layers": scanned, "lora": {"enable_lora": True, "lora_rank": 0, "lora_alpha": 0.0}})


TARGETS: Mapping[str, Target] = {
    "tunix": Target("qwix", Place(0, "model_params", False)),
    # MaxText restores adapters from a bare tree with its metadata beside it, and from nothing else (as of 2026-08).
    "maxtext": Target("qwix", Place(None, None, False), config=_maxtext(scanned=True)),
    "maxtext-unscanned": Target("qwix", Place(None, None, False), config=_maxtext(scanned=False)),
    "qwix": Target("qwix", Place(None, "state", True)),
    "nnx": Target("nnx", Place(None, "state", True)),
    "gemma": Target("gemma", Place(None, None, False), value=False),
    "openpi": Target("openpi", Place(0, "params", False), wrappers=("params",)),
    "keras": Target("keras", Place(0, "pytree", False), wrappers=("trainable_variables",), value=False),
}


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
        _settle(Adapter(modules=modules, extras=extras, metadata=metadata), conversion)
    return needed


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
    out_of, into = _settle(adapter, conversion)
    if out_of is not None:
        adapter = _to_peft(adapter, out_of)
    if into is not None:
        adapter = _from_peft(adapter, into, TARGETS[str(conversion.format)])
    record = json.loads(adapter.metadata.provenance)
    record["converted"] = {name: value for name, value in dataclasses.asdict(conversion).items() if value is not None}
    return dataclasses.replace(
        adapter, energy={}, metadata=dataclasses.replace(adapter.metadata, provenance=json.dumps(record))
    )


def _settle(adapter: Adapter, conversion: Conversion) -> tuple[list[Piece] | None, list[Piece] | None]:
    """What to take a tree apart into, and what to put a tree together from; None for what is not to be done."""
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
        table = known.get("", known.get(str(conversion.format)))
        if table is None:
            raise ValueError(
                f"layout {conversion.layout} has no table for {conversion.format}, only for {', '.join(known)}"
            )
        into = _put_together(features, table, fixed, conversion, problems)
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return out_of, into


def _table_of(adapter: Adapter, known: Mapping[str, Table], problems: list[str]) -> Sequence[Row]:
    """The table that knows all of a tree's modules."""
    # A table that depends on the number of layers scans all but the last few of them.
    scanned = max((kind.batch[0] for _, kind in adapter.metadata.layouts if kind.batch), default=0)
    tried = [table(6 * scanned + 5) if callable(table) else table for table in known.values()]
    strangers = [
        [path for path in adapter.modules if all(match(row.tree, path) is None for row in rows)] for rows in tried
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
        row, values = next((row, found) for row in rows if (found := match(row.tree, path)) is not None)
        layout: TreeLayout = layouts[path]
        batch, inputs, outputs = _sides(row)
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
            group = groups.setdefault((row, fill(row.tree, values)), {})
            group[tuple(values[name] for name in row.unrolled)] = path
    chosen: dict[tuple[Row, str], dict[tuple[int, ...], str]] = {}
    for path, fits in found.items():
        keys = [(row, fill(row.tree, values)) for row, values in fits]
        # Of several parameters that a module may be part of, the first whose other parts are there and of its shape.
        key = next((key for key in keys if _is_whole(key[0], groups[key], features)), keys[-1] if keys else None)
        if key is not None:
            index = next(index for index, source in groups[key].items() if source == path)
            chosen.setdefault(key, {})[index] = path
    stacks = [row for row, _ in chosen if (number := layer_number(row.peft)) and number[0] in row.unrolled]
    if stacks or callable(table):
        problems += _layer_problems(features, layers, conversion)
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


def _is_whole(row: Row, group: Mapping[tuple[int, ...], str], features: Mapping[str, tuple[int, int]]) -> bool:
    enumerated = any(placeholders(row.peft)[name] for name in row.unrolled)
    return not enumerated or (len(group) > 1 and len({features[path] for path in group.values()}) == 1)


def _layer(path: str) -> int:
    """The layer that a module of PEFT's is in; -1 for none."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", path)
    return int(found[1]) if found else -1


def _layer_problems(paths: Iterable[str], layers: int, conversion: Conversion) -> list[str]:
    """Whether it is known how many layers there are, where they become an axis."""
    present = {_layer(path) for path in paths} - {-1}
    if conversion.layers is not None:
        beyond = max(present, default=0)
        return [f"there is a layer {beyond}, which a model of {layers} layers has not"] if beyond >= layers else []
    if present != set(range(layers)):
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
        return None
    return _uncut(path, out, ("head_dim",), fixed)


def _uncut(path: str, size: int, names: Sequence[str], fixed: Mapping[str, int]) -> str:
    if "head_dim" not in names:
        return f"module {path}: its {size} features cannot be {' × '.join(names)}"
    if "head_dim" not in fixed:
        return "the format keeps attention heads apart, or their rows in another order: give head_dim, the size of one"
    return f"module {path}: its {size} features are no whole number of heads of {fixed['head_dim']}"


def _sides(row: Row) -> tuple[list[str], list[str], list[str]]:
    """The axes of a parameter that are in both factors, in A alone, in B alone."""
    batch = [name for name in row.a_axes if name in row.b_axes]
    return batch, [n for n in row.a_axes if n not in batch], [n for n in row.b_axes if n not in batch]


def _features(piece: Piece) -> dict[str, tuple[int, int]]:
    out, in_ = (math.prod(piece.sizes[name] for name in side.split()) for side in (piece.row.outputs, piece.row.inputs))
    return dict.fromkeys(piece.sources.values(), (out, in_))


def _to_peft(adapter: Adapter, pieces: Sequence[Piece]) -> Adapter:
    modules = {}
    for piece in pieces:
        row, sizes, lora = piece.row, piece.sizes, adapter.modules[piece.module]
        batch, inputs, outputs = _sides(row)
        a, b = np.asarray(lora.a), np.asarray(lora.b)
        whole = Factors(
            a.reshape(*a.shape[:-1], *[sizes[name] for name in inputs]),
            (*batch, RANK, *inputs),
            b.swapaxes(-1, -2).reshape(*a.shape[:-1], *[sizes[name] for name in outputs]),
            (*batch, RANK, *outputs),
        )
        for index, path in piece.sources.items():
            part = whole
            for name, i in zip(row.unrolled, index, strict=True):
                shared = name not in part.a_axes or name not in part.b_axes
                part = part.at(name, i)
                part = part.without_idle() if shared else part
            if not part.b.any() and whole.b.any() and row.unrolled:  # PEFT need not adapt what nothing is added to.
                continue
            part = _cut(part, row.inputs.split(), row.outputs.split())
            part = part.ordered((RANK, *row.inputs.split()), (*row.outputs.split(), RANK))
            b = _heads_to_peft(part.b, row, sizes.get("head_dim", 0))
            modules[path] = LoRA(part.a.reshape(part.rank, -1), b.reshape(-1, part.rank), lora.scale)
    modules = dict(sorted(modules.items(), key=lambda item: natural_order(item[0])))
    metadata = Metadata(
        format="peft",
        name=adapter.metadata.name,
        base_model=adapter.metadata.base_model,
        layouts=tuple((path, Layout()) for path in modules),
        config=json.dumps(
            {"bias": "none", "inference_mode": True, "init_lora_weights": True, "task_type": "CAUSAL_LM"}
        ),
        provenance=adapter.metadata.provenance,
    )
    return Adapter(modules=modules, metadata=metadata)


def _cut(factors: Factors, inputs: Sequence[str], outputs: Sequence[str]) -> Factors:
    """The factors with these axes in A, and those in B; an axis in both has factors of its own."""
    for name in dict.fromkeys((*inputs, *outputs)):
        factors = factors.moved(name, name in inputs, name in outputs)
    return factors


def _from_peft(adapter: Adapter, pieces: Sequence[Piece], target: Target) -> Adapter:
    modules, layouts, leaves = {}, [], {}
    for piece in pieces:
        row, sizes = piece.row, piece.sizes
        parts = {index: _part(adapter.modules[path], row, sizes) for index, path in piece.sources.items()}
        whole = stacked(parts, row.unrolled, [sizes[name] for name in row.unrolled])
        whole = _cut(whole, row.a_axes, row.b_axes).without_zeros()
        batch, inputs, outputs = _sides(row)
        whole = whole.ordered((*batch, RANK, *inputs), (*batch, *outputs, RANK))
        shape = [sizes[name] for name in batch]
        a, b = whole.a.reshape(*shape, whole.rank, -1), whole.b.reshape(*shape, -1, whole.rank)
        modules[piece.module] = LoRA(*_within_capacity(a, b))
        rule, module = _rule(target, piece)
        kept = [tuple(sizes[name] for name in names) for names in (batch, inputs, outputs)]
        layouts.append((piece.module, layout_of(rule, kept[0], kept[1], kept[2], row.scan_axis)))
        for factor in ("a", "b"):
            keys = [*target.wrappers, *rule.path(module, row.parameter, factor).split("/"), *["value"] * target.value]
            _put(leaves, keys, (factor, piece.module))
    roles, structure = jax.tree.flatten(leaves, is_leaf=lambda leaf: isinstance(leaf, tuple))
    metadata = Metadata(
        format=target.tree,
        name=adapter.metadata.name,
        base_model=adapter.metadata.base_model,
        layouts=tuple(layouts),
        provenance=adapter.metadata.provenance,
        tree=Tree(structure, tuple(roles)),
        place=target.place,
        config=target.config,
    )
    return Adapter(modules=modules, metadata=metadata)


def _part(lora: LoRA, row: Row, sizes: Mapping[str, int]) -> Factors:
    """One module of PEFT's with its scale folded into B."""
    inputs, outputs = row.inputs.split(), row.outputs.split()
    a, b = np.asarray(lora.a), np.asarray(lora.b)
    scaled = _wide(b) * np.asarray(lora.scale, _wide(b).dtype)
    b = _heads_from_peft(scaled, row, sizes.get("head_dim", 0)).astype(b.dtype)
    return Factors(
        a.reshape(lora.rank, *[sizes[name] for name in inputs]),
        (RANK, *inputs),
        b.reshape(*[sizes[name] for name in outputs], lora.rank),
        (*outputs, RANK),
    )


def _within_capacity(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of no larger rank than the weight can have: past that, one of them is the identity."""
    rank, in_, out = a.shape[-2], a.shape[-1], b.shape[-2]
    if rank <= min(in_, out):
        return a, b
    product = np.matmul(b.astype(np.float64), a.astype(np.float64))
    size = min(in_, out)
    one = np.broadcast_to(np.eye(size), (*a.shape[:-2], size, size))
    return (
        (one.astype(a.dtype), product.astype(b.dtype)) if in_ <= out else (product.astype(a.dtype), one.astype(b.dtype))
    )


def _rule(target: Target, piece: Piece) -> tuple[Rule, str]:
    """The rule by which a parameter's factors are called, and its module without the parameter."""
    parameter = piece.row.parameter
    module = piece.module.removesuffix(f".{parameter}")
    rules = TREE_FORMATS[target.tree].rules
    fits = (rule for rule in rules if rule.knows(module, parameter))
    return next(fits, rules[0]), module


def _put(tree: dict[str, Any], keys: Sequence[str], leaf: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = leaf


def _heads_from_peft(b: np.ndarray, row: Row, head_dim: int) -> np.ndarray:
    """A B ``[..., r]`` whose rows are those of the tree's weight: PEFT's halves of each rotary pair interleaved."""
    if row.rotary:
        heads = b.reshape(-1, 2, head_dim // 2, b.shape[-1])
        b = heads.swapaxes(1, 2).reshape(b.shape)
    return b / np.sqrt(b.dtype.type(head_dim)) if row.head_scale else b


def _heads_to_peft(b: np.ndarray, row: Row, head_dim: int) -> np.ndarray:
    """The inverse of `_heads_from_peft`."""
    if row.rotary:
        heads = b.reshape(-1, head_dim // 2, 2, b.shape[-1])
        b = heads.swapaxes(1, 2).reshape(b.shape)
    return (_wide(b) * np.sqrt(_wide(b).dtype.type(head_dim))).astype(b.dtype) if row.head_scale else b


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(promote(x.dtype, np.float32))
