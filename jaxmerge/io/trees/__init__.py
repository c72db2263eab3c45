"""Flax LoRA trees in memory: ``nnx.State``, pure dicts, Linen params.

In memory a module's factors are ``a [*batch, r, in]`` and ``b [*batch, out, r]``, whatever the leaves look like;
`TreeLayout` is what it takes to make the leaves again.
"""

import dataclasses
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxmerge.base import Adapter, AnyArray, LoRA, Metadata, is_finite, on_host, precision
from jaxmerge.io.trees.axes import ScanAxis, TreeLayout, find_layout, layout_of, leaf_a, leaf_b, to_lora
from jaxmerge.io.trees.formats import TREE_FORMATS, PatternRule, Rule, TreeFormat
from jaxmerge.layouts import PLAIN_PARAMETERS
from jaxmerge.sharding import gathered, laid_out, placement

__all__ = [
    "TREE_FORMATS",
    "Alpha",
    "MissingAlphaError",
    "Rule",
    "ScanAxis",
    "Tree",
    "TreeLayout",
    "digest",
    "from_file",
    "from_state",
    "layout_of",
    "longest_tail",
    "lost_in_scaling",
    "padded",
    "path_of",
    "scan_axis",
    "to_state",
    "widest",
]

# "rank": each module's alpha is its rank, as in what jaxmerge writes. A mapping gives them by the ends of the
# modules' paths.
Alpha = float | Literal["rank"] | Mapping[str, float] | None

# Keys around the tree that say nothing of the module.
_WRAPPERS = ("params", "trainable_variables")
_LEAF_WRAPPERS = ("value",)


@dataclass(frozen=True)
class Tree:
    """How an adapter goes back to its tree.

    Attributes:
        structure: The tree's own, with whatever containers it is made of.
        leaves: For each leaf its role, ``"a"``, ``"b"`` or ``"extra"``, and its module or its own name.
        placements: For each leaf how it was spread over devices; empty if none was.
    """

    structure: Any
    leaves: tuple[tuple[str, str], ...]
    placements: tuple[NamedSharding | None, ...] = ()


class MissingAlphaError(ValueError):
    """The scale depends on alpha, the format does not hold it, and nobody gave it."""


def from_state(
    state: Any,
    *,
    alpha: Alpha = None,
    scan_axis: ScanAxis = None,
    layout: str | None = None,
    pattern: tuple[str, str] | None = None,
) -> Adapter:
    """See `jaxmerge.from_state`."""
    if isinstance(alpha, int | float) and not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha}")
    with_paths, structure = jax.tree_util.tree_flatten_with_path(state)
    names = [path_of(path) for path, _ in with_paths]
    leaves = [leaf for _, leaf in with_paths]
    name, row = _format(names, layout, pattern)
    rules, roles, parameters = _roles(names, row)
    factors: dict[str, dict[str, AnyArray]] = {}
    extras = {}
    for (role, path), leaf in zip(roles, leaves, strict=True):
        if role == "extra":
            extras[path] = leaf
        elif role in factors.setdefault(path, {}):
            raise ValueError(f"module {path} has two factors {role.upper()}: give pattern=(regex of A, regex of B)")
        else:
            factors[path][role] = leaf
    problems = [
        f"module {path} lacks its factor {'AB'['a' in pair]}" for path, pair in factors.items() if len(pair) < 2
    ]
    layouts: dict[str, TreeLayout] = {}
    for path, pair in factors.items():
        if len(pair) == 2:
            found = find_layout(path, pair["a"].shape, pair["b"].shape, rules[path], scan_axis)
            if wrong := [leaf.dtype for leaf in pair.values() if not jnp.issubdtype(leaf.dtype, jnp.floating)]:
                problems.append(f"module {path} is of dtype {wrong[0]}; LoRA factors are floating-point numbers")
            elif isinstance(found, str):
                problems.append(found)
            else:
                layouts[path] = dataclasses.replace(found, parameter=parameters.get(path, ""))
    if problems:
        raise ValueError("\n".join(problems))
    scaled = [path for path in factors if rules[path].scale == "alpha"]
    if scaled and (
        alpha is None or (isinstance(alpha, Mapping) and any(longest_tail(p, alpha) is None for p in scaled))
    ):
        raise MissingAlphaError(f"format {name} does not store alpha, and its scale is alpha / rank: give alpha")
    modules = {}
    for path, pair in factors.items():
        lora = to_lora(pair["a"], pair["b"], layouts[path])
        modules[path] = LoRA(lora.a, lora.b, _scale(path, lora.rank, alpha) if path in scaled else 1.0)
    placements = tuple(placement(leaf) for leaf in leaves)
    tree = Tree(structure, tuple(roles), placements if any(placements) else ())
    metadata = Metadata(format=name, layouts=tuple(layouts.items()), tree=tree, provenance="{}")
    return Adapter(modules=modules, extras=extras, metadata=metadata)


def from_file(path: Any, state: Any, **options: Any) -> Adapter:
    """`from_state` of a tree that was read from a path, which its errors name."""
    try:
        return from_state(state, **options)
    except ValueError as error:
        raise type(error)("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def _scale(path: str, rank: int, alpha: Alpha) -> float:
    if isinstance(alpha, Mapping):
        return alpha[str(longest_tail(path, alpha))] / rank
    return 1.0 if alpha is None or alpha == "rank" else float(alpha) / rank


def longest_tail(path: str, names: Iterable[str]) -> str | None:
    """The longest of the names that a dotted path ends with, or that end with it; None if there is none."""
    fits = [name for name in names if f".{path}".endswith(f".{name}") or f".{name}".endswith(f".{path}")]
    return max(fits, key=len, default=None)


def to_state(adapter: Adapter) -> Any:
    """See `jaxmerge.to_state`."""
    tree, layouts = adapter.metadata.tree, dict(adapter.metadata.layouts)
    if not isinstance(tree, Tree):
        raise ValueError("the adapter does not come from a tree: there is no structure to give it back in")
    held = {path for role, path in tree.leaves if role != "extra"}
    if missing := [path for path in adapter.modules if path not in held]:
        raise ValueError(f"no adapter's tree has a place for {', '.join(missing)}")
    row = TREE_FORMATS.get(adapter.metadata.format)
    modules = padded(adapter).modules if row is not None and row.one_rank else adapter.modules
    leaves = []
    for role, path in tree.leaves:
        if role == "extra":
            leaves.append(adapter.extras[path])
            continue
        lora, layout = modules[path], layouts[path]
        with precision(lora.a.dtype, lora.b.dtype):
            leaves.append(leaf_a(lora, layout) if role == "a" else leaf_b(lora, layout))
        if role == "b" and (problem := lost_in_scaling(lora, leaves[-1])):
            raise ValueError(f"module {path} {problem}")
    if tree.placements:
        leaves = [laid_out(leaf, place) for leaf, place in zip(leaves, tree.placements, strict=True)]
    return jax.tree.unflatten(tree.structure, leaves)


def digest(tree: Any) -> str:
    """A hash of names and numbers, which a checkpoint's own bytes hang on and how many processes wrote them besides.

    Args:
        tree: Of arrays; where they are spread over processes, all of them call this.

    Returns:
        A SHA-256, in hexadecimal digits.
    """
    found = hashlib.sha256()
    for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        found.update(f"{jax.tree_util.keystr(key)} {leaf.dtype} {leaf.shape}".encode())
        if (spread := placement(leaf)) is not None:
            leaf = gathered(leaf, spread.mesh).addressable_data(0)
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def lost_in_scaling(lora: LoRA, scaled: Any) -> str:
    """What went wrong, if anything, when the scale of factors was folded into their B; nothing for traced ones."""
    if not (on_host(lora.b) and on_host(lora.scale) and on_host(scaled)):
        return ""
    before, after = np.asarray(lora.b), np.asarray(scaled)
    if not is_finite(after) and is_finite(before):
        return f"times its scale holds numbers too large for {after.dtype}"
    if before.any() and not after.any() and float(np.asarray(lora.scale)) != 0:
        return f"times its scale is too small for {after.dtype}: it became 0"
    return ""


def padded(adapter: Adapter) -> Adapter:
    """The adapter with all modules of its largest rank: smaller ones are filled up with zeros."""
    rank = max((lora.rank for lora in adapter.modules.values()), default=0)

    def pad(x: AnyArray, axis: int) -> AnyArray:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, rank - x.shape[axis])
        with precision(x.dtype):
            return np.pad(x, widths) if isinstance(x, np.ndarray) else jnp.pad(x, widths)

    modules = {
        path: lora if lora.rank == rank else dataclasses.replace(lora, a=pad(lora.a, -2), b=pad(lora.b, -1))
        for path, lora in adapter.modules.items()
    }
    return dataclasses.replace(adapter, modules=modules)


def widest(adapters: Sequence[Adapter]) -> Tree | None:
    """The tree of the first adapter that has a place for everything; of the first at all, if there is none."""
    wanted = {path for adapter in adapters for path in (*adapter.modules, *adapter.extras)}
    trees = [adapter.metadata.tree for adapter in adapters if isinstance(adapter.metadata.tree, Tree)]
    return next((tree for tree in trees if wanted <= {path for _, path in tree.leaves}), trees[0] if trees else None)


def scan_axis(adapter: Adapter) -> int | None:
    """Where the layers of a scan lie in an adapter's leaves, if they do so everywhere in one place."""
    layouts = [kind for _, kind in adapter.metadata.layouts if isinstance(kind, TreeLayout)]
    axes = {kind.a.index("batch") for kind in layouts if kind.a.count("batch") == 1}
    return axes.pop() if len(axes) == 1 else None


def path_of(path: Sequence[Any]) -> str:
    """A leaf's keys joined by ``/``, without wrappers."""
    keys = jax.tree_util.keystr(tuple(path), simple=True, separator="/").split("/")
    while keys and keys[0] in _WRAPPERS:
        keys = keys[1:]
    if keys and keys[-1] in _LEAF_WRAPPERS:
        keys = keys[:-1]
    return "/".join(keys)


def _format(names: Sequence[str], layout: str | None, pattern: tuple[str, str] | None) -> tuple[str, TreeFormat]:
    """The row that knows all leaves that any row takes for factors; it must be one."""
    if pattern is not None:
        for expression in pattern:
            try:
                compiled = re.compile(expression)
            except re.error as error:
                raise ValueError(f"pattern {expression!r} is not a regular expression: {error}") from None
            if "module" not in compiled.groupindex:
                raise ValueError(f"pattern {expression!r} has no group (?P<module>...)")
        return "plain", TreeFormat((PatternRule("", patterns=pattern),))
    if layout is not None:
        if layout not in TREE_FORMATS:
            raise ValueError(f"unknown layout {layout!r}: there are {', '.join(TREE_FORMATS)}, or give a pattern")
        return layout, TREE_FORMATS[layout]
    known = {name: {leaf for leaf in names if _match(leaf, row)} for name, row in TREE_FORMATS.items()}
    factors = set().union(*known.values())
    if not factors:
        raise ValueError(
            f"the tree has no LoRA factors that jaxmerge knows ({', '.join(TREE_FORMATS)}): "
            "give pattern=(regex of A, regex of B)"
        )
    found = [name for name, leaves in known.items() if leaves == factors]
    if len(found) != 1:
        found = found or [name for name, leaves in known.items() if leaves]
        raise ValueError(
            f"the tree has LoRA factors of several formats ({', '.join(found)}): name one with layout= "
            "(--tree), or give pattern=(regex of A, regex of B)"
        )
    return found[0], TREE_FORMATS[found[0]]


def _match(leaf: str, row: TreeFormat) -> tuple[str, re.Match[str], Rule] | None:
    """A factor's role, its module and parameter, and the rule that knows it; None for a leaf that is no factor."""
    for rule in row.rules:
        for role in ("a", "b"):
            if match := re.fullmatch(rule.pattern(role), leaf):
                return role, match, rule
    return None


def _roles(names: Sequence[str], row: TreeFormat) -> tuple[dict[str, Rule], list[tuple[str, str]], dict[str, str]]:
    """Each module's rule; each leaf's role, and its module's dotted path or its own name; each module's parameter."""
    matches = [_match(name, row) for name in names]
    parameters = Counter(match["module"] for found in matches if found for role, match, _ in [found] if role == "a")
    rules, roles, adapted = {}, [], {}
    for name, found in zip(names, matches, strict=True):
        if found is None:
            roles.append(("extra", name.replace("/", ".")))
            continue
        role, match, rule = found
        path, parameter = match["module"], match.groupdict().get("parameter")
        if parameter is not None and (parameters[path] > 1 or parameter not in PLAIN_PARAMETERS):
            path += f"/{parameter}"
        path = path.replace("/", ".")
        rules[path], adapted[path] = rule, parameter or ""
        roles.append((role, path))
    return rules, roles, adapted
