"""Flax LoRA trees in memory: ``nnx.State``, pure dicts, Linen params.

`TREE_FORMATS` says what the leaves are called, which of their axes are what, and what the scale is: a new format is a
row. In memory a module's factors are ``a [*batch, r, in]`` and ``b [*batch, out, r]``, whatever the leaves look like;
`TreeLayout` is what it takes to make the leaves again.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxmerge.base import Adapter, AnyArray, LoRA, Metadata, precision, promote
from jaxmerge.sharding import gathered, laid_out, placement

# A is [*in, r] and B [r, *out]: heads, windows of a convolution, experts that share a B are axes of one side.
_FLAT = ("*in rank", "rank *out")
_OUT = ("in batch in rank", "rank batch out"), ("in batch in rank", "out batch rank")
_EACH = ("*batch in rank", "*batch rank out")

# "some": there is a scan, at whatever axis the shapes leave open.
ScanAxis = int | Literal["none", "some"] | None
# "rank": each module's alpha is its rank, as in what jaxmerge writes. A mapping gives them by the ends of the
# modules' paths.
Alpha = float | Literal["rank"] | Mapping[str, float] | None


@dataclass(frozen=True)
class Rule:
    """What the factors of some modules are called, and what their axes are.

    The axes are names of what they do. ``in`` and ``out`` are the sides of the weight; ``rank`` is r; the layers or
    heads of ``batch`` have factors of their own; a B is summed along ``sum`` before it is used. A starred name stands
    for any number of axes.

    Attributes:
        leaf: The path of a factor, its keys joined by ``/``. ``{factor}`` is a or b; ``{module}`` and, where a module
            may have several adapted parameters, ``{parameter}`` stand for any path and any name, or for what the
            regular expression after a colon matches.
        axes: Of A and of B. Of several such pairs the first that fits the shapes.
        scale: ``"one"`` where the forward pass has no scale, ``"alpha"`` where it is alpha / r and alpha is not in
            the tree.
    """

    leaf: str
    axes: tuple[tuple[str, str], ...] = (_FLAT,)
    scale: Literal["one", "alpha"] = "alpha"

    def pattern(self, factor: Literal["a", "b"]) -> str:
        """The regular expression that the paths of all A, or of all B, match."""
        parts = re.split(r"\{(\w+)(?::([^}]*))?\}", self.leaf)
        made = re.escape(parts[0])
        for name, given, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            default = {"module": ".+", "parameter": r"\w+", "factor": factor}[name]
            made += (default if name == "factor" else f"(?P<{name}>{given or default})") + re.escape(after)
        return made

    def path(self, module: str, parameter: str, factor: Literal["a", "b"]) -> str:
        """The path of a factor of a module, whose own path is joined by dots."""
        values = {"module": module.replace(".", "/"), "parameter": parameter, "factor": factor}
        return re.sub(r"\{(\w+)(:[^}]*)?\}", lambda match: values[match[1]], self.leaf)

    def knows(self, module: str, parameter: str) -> bool:
        """Whether the rule itself would recognise the factors of a module."""
        return re.fullmatch(self.pattern("a"), self.path(module, parameter, "a")) is not None


@dataclass(frozen=True)
class PatternRule(Rule):
    """A rule whose names are regular expressions of the user's, with the groups module and, perhaps, parameter."""

    patterns: tuple[str, str] = ("", "")

    def pattern(self, factor: Literal["a", "b"]) -> str:
        """The user's own."""
        return self.patterns[factor == "b"]


@dataclass(frozen=True)
class TreeFormat:
    """A row of `TREE_FORMATS`.

    Attributes:
        rules: Of the rules that match a leaf, the first holds.
        one_rank: Whether all modules must be of one rank; smaller ones are filled up with zeros.
    """

    rules: tuple[Rule, ...]
    one_rank: bool = False


TREE_FORMATS: Mapping[str, TreeFormat] = {
    # nnx.LoRALinear has its factors in its attribute `lora`, nnx.LoRA in the module itself.
    "nnx": TreeFormat(
        (Rule("{module}/lora/lora_{factor}", scale="one"), Rule("{module}/lora_{factor}", scale="one")),
    ),
    # Also Tunix and MaxText, whose adapters qwix makes.
    "qwix": TreeFormat((Rule("{module}/{parameter}_lora_{factor}"),)),
    "gemma": TreeFormat(
        (
            Rule("{module}/_LoRAEinsum_{parameter}/lora/{factor}", scale="one"),
            Rule("{module}/lora/{factor}", scale="one"),
        ),
        one_rank=True,
    ),
    # Its einsums give every head factors of its own, but the output's sums over the heads between A and B. Its MLP
    # leaves the scale out.
    "openpi": TreeFormat(
        (
            Rule(
                r"{module:.*attn_vec_einsum(?:_\d+)?}/lora_{factor}", (("*batch in in rank", "*batch sum rank out"),)
            ),
            Rule(r"{module:.*_einsum(?:_\d+)?}/lora_{factor}", (_EACH,)),
            Rule("{module}/{parameter:gating_einsum|linear}_lora_{factor}", (_EACH,), "one"),
        ),
    ),
    # MaxText before it took qwix; its layers are scanned at axis 1, also where heads come before them. Its own
    # converter wrote the output's B the other way round.
    "maxtext-legacy": TreeFormat(
        (
            Rule("{module:.*out}/lora_{factor}.kernel", (*_OUT, _FLAT)),
            Rule("{module}/lora_{factor}.kernel", (("in batch rank", "rank batch *out"), _FLAT)),
        ),
        one_rank=True,
    ),
    "keras": TreeFormat(
        (Rule("{module}/lora_{parameter:kernel|embeddings}_{factor}"),),
    ),
}  # fmt: skip

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


@dataclass(frozen=True)
class TreeLayout:
    """How a module's factors lie in a tree.

    Attributes:
        a: What each axis of A is, as in `Rule`, without stars.
        b: The same for B.
        batch: The sizes of the axes that are ``batch``.
        inputs: Of those of A that are ``in``.
        outputs: Of those of B that are ``out``.
        summed: Of that of B that is ``sum``, if there is one.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    summed: int = 1


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
    with_paths, structure = jax.tree_util.tree_flatten_with_path(state)
    names = [path_of(path) for path, _ in with_paths]
    leaves = [leaf for _, leaf in with_paths]
    name, row = _format(names, layout, pattern)
    rules, roles = _roles(names, row)
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
            found = _layout(path, pair["a"].shape, pair["b"].shape, rules[path], scan_axis)
            if isinstance(found, str):
                problems.append(found)
            else:
                layouts[path] = found
    if problems:
        raise ValueError("\n".join(problems))
    scaled = [path for path in factors if rules[path].scale == "alpha"]
    if scaled and (
        alpha is None or (isinstance(alpha, Mapping) and any(longest_tail(p, alpha) is None for p in scaled))
    ):
        raise MissingAlphaError(f"format {name} does not store alpha, and its scale is alpha / rank: give alpha")
    modules = {}
    for path, pair in factors.items():
        lora = _lora(pair["a"], pair["b"], layouts[path])
        modules[path] = LoRA(lora.a, lora.b, _scale(path, lora.rank, alpha) if path in scaled else 1.0)
    placements = tuple(placement(leaf) for leaf in leaves)
    tree = Tree(structure, tuple(roles), placements if any(placements) else ())
    metadata = Metadata(format=name, layouts=tuple(layouts.items()), tree=tree, provenance="{}")
    return Adapter(modules=modules, extras=extras, metadata=metadata)


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
            leaves.append(_leaf_a(lora, layout) if role == "a" else _leaf_b(lora, layout))
    if tree.placements:
        leaves = [laid_out(leaf, place) for leaf, place in zip(leaves, tree.placements, strict=True)]
    return jax.tree.unflatten(tree.structure, leaves)


def padded(adapter: Adapter) -> Adapter:
    """The adapter with all modules of its largest rank: smaller ones are filled up with zeros."""
    rank = max((lora.rank for lora in adapter.modules.values()), default=0)

    def pad(x: AnyArray, axis: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, rank - x.shape[axis])
        with precision(x.dtype):
            return jnp.pad(jnp.asarray(x), widths)

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
            f"the tree has LoRA factors of several formats ({', '.join(found)}): name one with layout=, "
            "or give pattern=(regex of A, regex of B)"
        )
    return found[0], TREE_FORMATS[found[0]]


def _match(leaf: str, row: TreeFormat) -> tuple[str, re.Match[str], Rule] | None:
    """A factor's role, its module and parameter, and the rule that knows it; None for a leaf that is no factor."""
    for rule in row.rules:
        for role in ("a", "b"):
            if match := re.fullmatch(rule.pattern(role), leaf):
                return role, match, rule
    return None


def _roles(names: Sequence[str], row: TreeFormat) -> tuple[dict[str, Rule], list[tuple[str, str]]]:
    """Each module's rule; each leaf's role, and its module's dotted path or its own name."""
    matches = [_match(name, row) for name in names]
    parameters = Counter(match["module"] for found in matches if found for role, match, _ in [found] if role == "a")
    rules, roles = {}, []
    for name, found in zip(names, matches, strict=True):
        if found is None:
            roles.append(("extra", name.replace("/", ".")))
            continue
        role, match, rule = found
        path = match["module"]
        # A module with one adapted parameter goes by its own name, as in the other formats.
        if parameters[path] > 1 and "parameter" in match.groupdict():
            path += f"/{match['parameter']}"
        path = path.replace("/", ".")
        rules[path] = rule
        roles.append((role, path))
    return rules, roles


def _layout(path: str, a: tuple[int, ...], b: tuple[int, ...], rule: Rule, scan_axis: ScanAxis) -> TreeLayout | str:
    """Which axes are what; a problem where their sizes leave it open and nobody says."""
    wrong = f"module {path} has factors of shapes {a} and {b}, which do not make a product"
    if any("batch" in axes[0] for axes in rule.axes):  # The format itself says where layers and heads lie.
        return next((found for axes in rule.axes if (found := _fitted(a, b, axes))), wrong)
    (plain,) = rule.axes
    if min(len(a), len(b)) < 2:
        return wrong

    fitting = {axis: layout for axis in range(min(len(a), len(b)) - 1) if (layout := _fitted(a, b, plain, axis))}
    if isinstance(scan_axis, int) and min(len(a), len(b)) > 2:
        fixed = fitting.get(scan_axis)
        return fixed or f"module {path} is not scanned at axis {scan_axis}: its factors have shapes {a} and {b}"
    unscanned = _fitted(a, b, plain)
    if scan_axis == "some" and min(len(a), len(b)) > 2 and len(fitting) == 1:
        return next(iter(fitting.values()))
    if unscanned is not None and (
        not fitting or scan_axis == "none" or (scan_axis == "some" and len(a) == len(b) == 2)
    ):
        return unscanned
    if fitting and scan_axis in (None, "some"):
        axes = ", ".join(map(str, fitting))
        return (
            f"module {path} with factors of shapes {a} and {b} may be layers of a scan at axis {axes}"
            f"{'' if unscanned is None else ', or not scanned'}: give scan_axis={min(fitting)}"
            f"{'' if unscanned is None else ' or scan_axis=none'}"
        )
    return wrong


def _fitted(
    a: tuple[int, ...], b: tuple[int, ...], axes: tuple[str, str], scan_axis: int | None = None
) -> TreeLayout | None:
    """The layout of factors whose axes have these names, and one more for a scan's layers; None if it cannot be."""
    scanned = scan_axis is not None
    spelt = [_spelt(names, len(shape) - scanned) for names, shape in zip(axes, (a, b), strict=True)]
    if not all(spelt):
        return None
    if scanned:
        spelt = [(*names[:scan_axis], "batch", *names[scan_axis:]) for names in spelt if names]
    a_axes, b_axes = (names for names in spelt if names)

    def sizes(shape: tuple[int, ...], axes: tuple[str, ...], name: str) -> tuple[int, ...]:
        return tuple(size for size, axis in zip(shape, axes, strict=True) if axis == name)

    if any(sizes(a, a_axes, name) != sizes(b, b_axes, name) for name in ("batch", "rank")):
        return None
    return TreeLayout(
        a_axes,
        b_axes,
        batch=sizes(a, a_axes, "batch"),
        inputs=sizes(a, a_axes, "in"),
        outputs=sizes(b, b_axes, "out"),
        summed=math.prod(sizes(b, b_axes, "sum")),
    )


def layout_of(
    rule: Rule, batch: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...], scan_axis: int
) -> TreeLayout:
    """How a rule lays factors of these sizes, with what has factors of its own at an axis where the rule is silent."""
    a, b = rule.axes[0]
    own = len(batch) if "batch" in a else 0
    a_axes = _spelt(a, own + len(inputs) + 1) or ()
    b_axes = _spelt(b, own + len(outputs) + 1 + b.count("sum")) or ()
    if not own:
        a_axes, b_axes = ((*x[:scan_axis], *("batch",) * len(batch), *x[scan_axis:]) for x in (a_axes, b_axes))
    summed = inputs[0] if "sum" in b else 1
    return TreeLayout(a_axes, b_axes, batch, inputs, outputs, summed)


def _spelt(axes: str, ndim: int) -> tuple[str, ...] | None:
    """The names of that many axes, the starred one repeated as often as it takes; None if they do not fit."""
    names = axes.split()
    starred = [name for name in names if name.startswith("*")]
    times = ndim - (len(names) - len(starred))
    # A side of the weight has at least one axis; there need not be a batch.
    if times < len(starred) - starred.count("*batch") or (times and not starred):
        return None
    return tuple(name.removeprefix("*") for given in names for name in [given] * (times if given in starred else 1))


def _lora(a: Any, b: Any, layout: TreeLayout) -> LoRA:
    if isinstance(a, jax.ShapeDtypeStruct):
        with precision(a.dtype, b.dtype):
            a, b = jax.eval_shape(lambda a, b: _factors(a, b, layout), a, b)
        return LoRA(a, b)
    # Meshes with explicit axes do not say how a reshaped array would lie on them.
    a, b = (leaf if (place := placement(leaf)) is None else gathered(leaf, place.mesh) for leaf in (a, b))
    return LoRA(*_factors(a, b, layout))


_A_ORDER = ("batch", "in", "rank")
_B_ORDER = ("batch", "sum", "rank", "out")


def _factors(a: Any, b: Any, layout: TreeLayout) -> tuple[Any, Any]:
    # By the arrays' own methods: NumPy's stay on the host, and traced ones are traced.
    a = a.transpose(_ordered(layout.a, _A_ORDER))
    b = b.transpose(_ordered(layout.b, _B_ORDER))
    rank = a.shape[-1]
    a = a.reshape(*layout.batch, math.prod(layout.inputs), rank)
    b = b.reshape(*layout.batch, layout.summed, rank, math.prod(layout.outputs))
    b = b[..., 0, :, :] if layout.summed == 1 else b.sum(axis=-3, dtype=promote(b.dtype, jnp.float32)).astype(b.dtype)
    return a.swapaxes(-1, -2), b.swapaxes(-1, -2)


def _ordered(axes: Sequence[str], order: Sequence[str]) -> list[int]:
    """The permutation that sorts axes by their names."""
    return sorted(range(len(axes)), key=lambda axis: order.index(axes[axis]))


def _unordered(x: jax.Array, axes: Sequence[str], order: Sequence[str]) -> jax.Array:
    """The inverse of a transposition by `_ordered`."""
    permutation = _ordered(axes, order)
    return x.transpose([permutation.index(axis) for axis in range(x.ndim)])


def _leaf_a(lora: LoRA, layout: TreeLayout) -> jax.Array:
    a = jnp.asarray(lora.a).swapaxes(-1, -2).reshape(*lora.batch, *layout.inputs, lora.rank)
    return _unordered(a, layout.a, _A_ORDER)


def _leaf_b(lora: LoRA, layout: TreeLayout) -> jax.Array:
    """B with the scale folded in: the formats keep none, and alpha equal to the rank restores it."""
    b = jnp.asarray(lora.b)
    wide = promote(b.dtype, jnp.float32)
    scaled = (b.astype(wide) * jnp.asarray(lora.scale, wide)).astype(b.dtype)
    b = scaled.swapaxes(-1, -2)
    if "sum" in layout.b:  # The first of the terms is the sum: exact in any dtype.
        rest = jnp.zeros((*lora.batch, layout.summed - 1, *b.shape[-2:]), b.dtype)
        b = jnp.concatenate([b[..., None, :, :], rest], axis=-3)
    sums = (layout.summed,) if "sum" in layout.b else ()
    return _unordered(b.reshape(*lora.batch, *sums, lora.rank, *layout.outputs), layout.b, _B_ORDER)
