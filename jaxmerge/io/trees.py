"""Flax LoRA trees in memory: ``nnx.State``, pure dicts, Linen params.

All of them compute ``x @ A @ B`` with A ``[*in, r]`` and B ``[r, *out]``, so that ``a = A.reshape(-1, r).T`` and
``b = B.reshape(r, -1).T``: heads, convolution windows, and the experts of an einsum whose B they share, are all axes
of A before r or of B after it. Scanned layers have one more axis, at the same place in both.

`TREE_FORMATS` says what the leaves are called and what the scale is: a new format is a row.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmerge.base import Adapter, AnyArray, LoRA, Metadata

ScanAxis = int | Literal["none"] | None


@dataclass(frozen=True)
class TreeFormat:
    """A row of `TREE_FORMATS`.

    Attributes:
        a: Matches the path of an A, its keys joined by ``/``, without wrappers; the groups ``module`` and, where a
            module has several adapted parameters, ``parameter``.
        b: The same for B.
        scale: ``"one"`` where the forward pass has no scale, ``"alpha"`` where it is alpha / r and alpha is not in
            the tree.
    """

    a: str
    b: str
    scale: Literal["one", "alpha"]


TREE_FORMATS: Mapping[str, TreeFormat] = {
    # nnx.LoRA has its factors in the module itself, nnx.LoRALinear in its attribute `lora`.
    "nnx": TreeFormat(r"(?P<module>.+?)(/lora)?/lora_a", r"(?P<module>.+?)(/lora)?/lora_b", "one"),
    # Also Tunix and MaxText, whose adapters qwix makes.
    "qwix": TreeFormat(
        r"(?P<module>.+)/(?P<parameter>\w+)_lora_a", r"(?P<module>.+)/(?P<parameter>\w+)_lora_b", "alpha"
    ),
    "gemma": TreeFormat(
        r"(?P<module>.+)/_LoRAEinsum_(?P<parameter>\w+)/lora/a",
        r"(?P<module>.+)/_LoRAEinsum_(?P<parameter>\w+)/lora/b",
        "one",
    ),
}

# Keys around the tree that say nothing of the module.
_WRAPPERS = ("params",)
_LEAF_WRAPPERS = ("value",)


@dataclass(frozen=True)
class Tree:
    """How an adapter goes back to its tree.

    Attributes:
        structure: The tree's own, with whatever containers it is made of.
        leaves: For each leaf its role, ``"a"``, ``"b"`` or ``"extra"``, and its module or its own name.
    """

    structure: Any
    leaves: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TreeLayout:
    """How a module's factors lie in a tree.

    Attributes:
        inputs: The axes of A before r, without the scanned one.
        outputs: The axes of B after r, without the scanned one.
        scan_axis: Where the layers of a scan lie, in A as in B; None for a module that is not scanned.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scan_axis: int | None = None


class MissingAlphaError(ValueError):
    """The scale depends on alpha, the format does not hold it, and nobody gave it."""


def from_state(
    state: Any,
    *,
    alpha: float | None = None,
    scan_axis: ScanAxis = None,
    layout: str | None = None,
    pattern: tuple[str, str] | None = None,
) -> Adapter:
    """See `jaxmerge.from_state`."""
    with_paths, structure = jax.tree_util.tree_flatten_with_path(state)
    names = [_path(path) for path, _ in with_paths]
    leaves = [leaf for _, leaf in with_paths]
    name, row = _format(names, layout, pattern)
    roles = _roles(names, row)
    factors: dict[str, dict[str, AnyArray]] = {}
    extras = {}
    for (role, path), leaf in zip(roles, leaves, strict=True):
        if role == "extra":
            extras[path] = leaf
        else:
            factors.setdefault(path, {})[role] = leaf
    problems = [
        f"module {path} lacks its factor {'AB'['a' in pair]}" for path, pair in factors.items() if len(pair) < 2
    ]
    layouts: dict[str, TreeLayout] = {}
    for path, pair in factors.items():
        if len(pair) == 2:
            found = _layout(path, pair["a"].shape, pair["b"].shape, scan_axis)
            if isinstance(found, str):
                problems.append(found)
            else:
                layouts[path] = found
    if problems:
        raise ValueError("\n".join(problems))
    if row.scale == "alpha" and alpha is None:
        raise MissingAlphaError(f"format {name} does not store alpha, and its scale is alpha / rank: give alpha")
    modules = {path: _lora(pair["a"], pair["b"], layouts[path]) for path, pair in factors.items()}
    if row.scale == "alpha" and alpha is not None:
        modules = {path: LoRA(lora.a, lora.b, alpha / lora.rank) for path, lora in modules.items()}
    metadata = Metadata(
        format=name, layouts=tuple(layouts.items()), tree=Tree(structure, tuple(roles)), provenance="{}"
    )
    return Adapter(modules=modules, extras=extras, metadata=metadata)


def to_state(adapter: Adapter) -> Any:
    """See `jaxmerge.to_state`."""
    tree, layouts = adapter.metadata.tree, dict(adapter.metadata.layouts)
    if not isinstance(tree, Tree):
        raise ValueError("the adapter does not come from a tree: there is no structure to give it back in")
    held = {path for role, path in tree.leaves if role != "extra"}
    if missing := [path for path in adapter.modules if path not in held]:
        raise ValueError(f"no adapter's tree has a place for {', '.join(missing)}")
    leaves = []
    for role, path in tree.leaves:
        if role == "extra":
            leaves.append(adapter.extras[path])
            continue
        lora, layout = adapter.modules[path], layouts[path]
        leaves.append(_leaf_a(lora, layout) if role == "a" else _leaf_b(lora, layout))
    return jax.tree.unflatten(tree.structure, leaves)


def widest(adapters: Sequence[Adapter]) -> Tree | None:
    """The tree of the first adapter that has a place for everything; of the first at all, if there is none."""
    wanted = {path for adapter in adapters for path in (*adapter.modules, *adapter.extras)}
    trees = [adapter.metadata.tree for adapter in adapters if isinstance(adapter.metadata.tree, Tree)]
    return next((tree for tree in trees if wanted <= {path for _, path in tree.leaves}), trees[0] if trees else None)


def _path(path: Sequence[Any]) -> str:
    keys = jax.tree_util.keystr(tuple(path), simple=True, separator="/").split("/")
    while keys and keys[0] in _WRAPPERS:
        keys = keys[1:]
    if keys and keys[-1] in _LEAF_WRAPPERS:
        keys = keys[:-1]
    return "/".join(keys)


def _format(names: Sequence[str], layout: str | None, pattern: tuple[str, str] | None) -> tuple[str, TreeFormat]:
    """The row whose names occur in the tree; it must be one."""
    if pattern is not None:
        return "plain", TreeFormat(*pattern, scale="alpha")
    if layout is not None:
        if layout not in TREE_FORMATS:
            raise ValueError(f"unknown layout {layout!r}: there are {', '.join(TREE_FORMATS)}, or give a pattern")
        return layout, TREE_FORMATS[layout]
    found = {name: row for name, row in TREE_FORMATS.items() if any(re.fullmatch(row.a, leaf) for leaf in names)}
    if len(found) != 1:
        what = f"of several formats ({', '.join(found)})" if found else "that jaxmerge knows"
        raise ValueError(
            f"the tree has LoRA factors {what}: name one with layout=, or give pattern=(regex of A, regex of B)"
            if found
            else f"the tree has no LoRA factors {what} ({', '.join(TREE_FORMATS)}): give pattern=(regex of A, of B)"
        )
    return next(iter(found.items()))


def _roles(names: Sequence[str], row: TreeFormat) -> list[tuple[str, str]]:
    """Each leaf's role, and its module's dotted path or its own name."""
    matches = [
        ("a", match) if (match := re.fullmatch(row.a, name)) else ("b", re.fullmatch(row.b, name)) for name in names
    ]
    parameters = Counter(match["module"] for role, match in matches if role == "a" and match)
    roles = []
    for name, (role, match) in zip(names, matches, strict=True):
        if match is None:
            roles.append(("extra", name.replace("/", ".")))
            continue
        path = match["module"]
        # A module with one adapted parameter goes by its own name, as in the other formats.
        if parameters[path] > 1:
            path += f"/{match['parameter']}"
        roles.append((role, path.replace("/", ".")))
    return roles


def _layout(path: str, a: tuple[int, ...], b: tuple[int, ...], scan_axis: ScanAxis) -> TreeLayout | str:
    """Which axes are what; a problem where their sizes leave it open and nobody says."""
    wrong = f"module {path} has factors of shapes {a} and {b}, which do not make a product"
    if len(a) < 2 or len(b) < 2:
        return wrong
    plain = a[-1] == b[0]
    scanned = [axis for axis in range(min(len(a), len(b)) - 1) if _fits_scan(a, b, axis)]
    if isinstance(scan_axis, int) and min(len(a), len(b)) > 2:
        if scan_axis not in scanned:
            return f"module {path} is not scanned at axis {scan_axis}: its factors have shapes {a} and {b}"
        return _scanned(a, b, scan_axis)
    if plain and (not scanned or scan_axis == "none"):
        return TreeLayout(a[:-1], b[1:])
    if scanned and scan_axis is None:
        axes = ", ".join(map(str, scanned))
        return (
            f"module {path} with factors of shapes {a} and {b} may be layers of a scan at axis {axes}"
            f"{', or not scanned' if plain else ''}: give scan_axis={scanned[0]}{' or scan_axis=none' if plain else ''}"
        )
    return wrong


def _fits_scan(a: tuple[int, ...], b: tuple[int, ...], axis: int) -> bool:
    if len(a) < 3 or len(b) < 3 or a[axis] != b[axis]:
        return False
    rest = b[:axis] + b[axis + 1 :]
    return a[-1] == rest[0]


def _scanned(a: tuple[int, ...], b: tuple[int, ...], axis: int) -> TreeLayout:
    return TreeLayout((a[:axis] + a[axis + 1 :])[:-1], (b[:axis] + b[axis + 1 :])[1:], axis)


def _lora(a: Any, b: Any, layout: TreeLayout) -> LoRA:
    if isinstance(a, jax.ShapeDtypeStruct):
        a, b = jax.eval_shape(lambda a, b: _factors(a, b, layout), a, b)
        return LoRA(a, b)
    return LoRA(*_factors(a, b, layout))


def _factors(a: Any, b: Any, layout: TreeLayout) -> tuple[Any, Any]:
    # By the arrays' own methods: NumPy's stay on the host, and traced ones are traced.
    batch: tuple[int, ...] = ()
    if layout.scan_axis is not None:
        a, b = (_moved(x, layout.scan_axis, 0) for x in (a, b))
        batch = a.shape[:1]
    rank = a.shape[-1]
    a = a.reshape(*batch, math.prod(layout.inputs), rank)
    b = b.reshape(*batch, rank, math.prod(layout.outputs))
    return a.swapaxes(-1, -2), b.swapaxes(-1, -2)


def _moved(x: Any, source: int, target: int) -> Any:
    axes = [axis for axis in range(x.ndim) if axis != source]
    axes.insert(target, source)
    return x.transpose(axes)


def _leaf_a(lora: LoRA, layout: TreeLayout) -> jax.Array:
    a = jnp.asarray(lora.a).swapaxes(-1, -2).reshape(*lora.batch, *layout.inputs, lora.rank)
    return a if layout.scan_axis is None else _moved(a, 0, layout.scan_axis)


def _leaf_b(lora: LoRA, layout: TreeLayout) -> jax.Array:
    """B with the scale folded in: the formats keep none, and alpha equal to the rank restores it."""
    b = jnp.asarray(lora.b)
    scaled = (b.astype(jnp.float32) * jnp.asarray(lora.scale, jnp.float32)).astype(b.dtype)
    b = scaled.swapaxes(-1, -2).reshape(*lora.batch, lora.rank, *layout.outputs)
    return b if layout.scan_axis is None else _moved(b, 0, layout.scan_axis)
