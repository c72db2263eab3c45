"""How factors lie in the leaves of a tree, and their way to ``a [*batch, r, in]`` and ``b [*batch, out, r]``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.base import AnyArray, LoRA, on_host, precision, promote
from jaxmerge.io.trees.formats import Rule
from jaxmerge.sharding import gathered, placement

# "some": there is a scan, at whatever axis the shapes leave open.
ScanAxis = int | Literal["none", "some"] | None


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
        parameter: What is adapted, where the format names it.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    summed: int = 1
    parameter: str = ""


def find_layout(path: str, a: tuple[int, ...], b: tuple[int, ...], rule: Rule, scan_axis: ScanAxis) -> TreeLayout | str:
    """Which axes are what.

    Args:
        path: The module, for messages.
        a: The shape of its A.
        b: The shape of its B.
        rule: What its axes may be.
        scan_axis: Where the layers of a scan lie.

    Returns:
        The layout; or what is wrong, where the shapes do not fit or leave it open and nobody says.
    """
    wrong = f"module {path} has factors of shapes {a} and {b}, which do not make a product"
    if any("batch" in axes[0] for axes in rule.axes):  # The format itself says where layers and heads lie.
        return next((found for axes in rule.axes if (found := _fitted(a, b, axes))), wrong)
    (plain,) = rule.axes
    fitting = {axis: layout for axis in range(min(len(a), len(b)) - 1) if (layout := _fitted(a, b, plain, axis))}
    unscanned = _fitted(a, b, plain)
    if isinstance(scan_axis, int) and min(len(a), len(b)) > 2:
        fixed = fitting.get(scan_axis)
        return fixed or f"module {path} is not scanned at axis {scan_axis}: its factors have shapes {a} and {b}"
    if not fitting or scan_axis == "none":
        return unscanned or wrong
    if scan_axis == "some" and len(fitting) == 1:
        return next(iter(fitting.values()))
    axes = ", ".join(map(str, fitting))
    return (
        f"module {path} with factors of shapes {a} and {b} may be layers of a scan at axis {axes}"
        f"{'' if unscanned is None else ', or not scanned'}: give scan_axis={min(fitting)}"
        f"{'' if unscanned is None else ' or scan_axis=none'}"
    )


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
) -> TreeLayout | None:
    """How a rule lays factors of these sizes, with what has factors of its own at an axis where the rule is silent.

    Returns:
        None if the rule has no place for as many axes.
    """
    a, b = rule.axes[0]
    own = len(batch) if "batch" in a else 0
    a_axes = _spelt(a, own + len(inputs) + 1)
    b_axes = _spelt(b, own + len(outputs) + 1 + b.count("sum"))
    if a_axes is None or b_axes is None or a_axes.count("batch") != own or b_axes.count("batch") != own:
        return None
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


def to_lora(a: Any, b: Any, layout: TreeLayout) -> LoRA:
    """The factors of a module, of scale 1, from its leaves: arrays of NumPy or JAX, or their shapes."""
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


def _unordered(x: AnyArray, axes: Sequence[str], order: Sequence[str]) -> AnyArray:
    """The inverse of a transposition by `_ordered`."""
    permutation = _ordered(axes, order)
    return x.transpose([permutation.index(axis) for axis in range(x.ndim)])


def leaf_a(lora: LoRA, layout: TreeLayout) -> AnyArray:
    """A as it lies in the tree."""
    a = lora.a.swapaxes(-1, -2).reshape(*lora.batch, *layout.inputs, lora.rank)
    return _unordered(a, layout.a, _A_ORDER)


def leaf_b(lora: LoRA, layout: TreeLayout) -> AnyArray:
    """B with the scale folded in: the formats keep none, and alpha equal to the rank restores it."""
    xp = np if isinstance(lora.b, np.ndarray) and on_host(lora.scale) else jnp
    wide = promote(lora.b.dtype, jnp.float32)
    with np.errstate(over="ignore"):  # What does not fit the dtype is told by name.
        b = (lora.b.astype(wide) * xp.asarray(lora.scale, wide)).astype(lora.b.dtype).swapaxes(-1, -2)
    if "sum" in layout.b:  # The first of the terms is the sum: exact in any dtype.
        rest = xp.zeros((*lora.batch, layout.summed - 1, *b.shape[-2:]), b.dtype)
        b = xp.concatenate([b[..., None, :, :], rest], axis=-3)
    sums = (layout.summed,) if "sum" in layout.b else ()
    return _unordered(b.reshape(*lora.batch, *sums, lora.rank, *layout.outputs), layout.b, _B_ORDER)
