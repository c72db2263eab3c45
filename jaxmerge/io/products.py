"""LoHa and LoKr as LoRA: weight changes that are products of small matrices have exact factors of a known rank.

LoHa (FedPara, arXiv:2108.06098) is the entrywise product ``(B₁A₁) ∘ (B₂A₂)``. Its factors are the products of every
column of B₁ with every one of B₂, and of the rows of A₁ and A₂: rank r². LoKr (arXiv:2309.14859) is the Kronecker
product ``W₁ ⊗ W₂``, whose factors are the Kronecker products of the factors of W₁ and W₂: their ranks multiply.

Ranks are settled from shapes, so that headers tell what will be read. The scale ``alpha / r`` stays beside the factors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxmerge.base import promote

NAMES: Mapping[str, str] = {"LOHA": "LoHa", "LOKR": "LoKr"}
# What a module's tensors are called at the end of their keys.
ROLES: Mapping[str, Sequence[str]] = {
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
_SIDES: Mapping[str, tuple[str, str]] = {"LOHA": ("hada_w1", "hada_w2"), "LOKR": ("lokr_w1", "lokr_w2")}


@dataclass(frozen=True)
class Product:
    """What one module's tensors make, by their shapes.

    Attributes:
        features: ``(out, in)``; a convolution's kernel is part of ``in``.
        rank: Of the exact factors; never more than ``min(out, in)``.
        kernel: The kernel's size where the shapes tell it; empty for a linear layer.
        inner: The ranks r that are visible in the shapes; the configuration must name them.
    """

    features: tuple[int, int]
    rank: int
    kernel: tuple[int, ...]
    inner: frozenset[int]


class _Side(NamedTuple):
    """One of the two matrices of a product, ``[rows, columns]``, of a rank if it is stored as factors."""

    rows: int
    columns: int
    rank: int | None
    kernel: tuple[int, ...]

    @property
    def exact(self) -> int:
        """The rank of its factors here: no more than the matrix can have."""
        return min(self.rows, self.columns, self.rows if self.rank is None else self.rank)


def lacking(kind: str, roles: Mapping[str, object]) -> list[str]:
    """The names of tensors without which a module is not whole.

    Args:
        kind: ``"LOHA"`` or ``"LOKR"``.
        roles: The module's tensors by their names.

    Returns:
        Names; empty if it is whole.
    """
    missing = []
    for name in _SIDES[kind]:
        if name not in roles:
            missing += [factor for factor in (f"{name}_a", f"{name}_b") if factor not in roles]
    if kind == "LOHA" and len(roles.keys() & {"hada_t1", "hada_t2"}) == 1:
        missing += {"hada_t1", "hada_t2"} - roles.keys()
    return missing


def of_shapes(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> Product | None:
    """What a module's tensors make.

    Args:
        kind: ``"LOHA"`` or ``"LOKR"``.
        shapes: Of the module's tensors by their names; none is lacking.

    Returns:
        The product, or None where no layer has tensors of such shapes.
    """
    if any(0 in shape for shape in shapes.values()):
        return None
    one, two = (_side(shapes, name) for name in _SIDES[kind])
    if one is None or two is None:
        return None
    inner = frozenset(side.rank for side in (one, two) if side.rank is not None)
    if kind == "LOHA":
        if one != two:
            return None
        return Product((one.rows, one.columns), min(one.rows, one.columns, one.exact * two.exact), one.kernel, inner)
    if one.kernel:
        return None
    features = one.rows * two.rows, one.columns * two.columns
    return Product(features, one.exact * two.exact, two.kernel, inner)


def _side(shapes: Mapping[str, tuple[int, ...]], name: str) -> _Side | None:
    whole, a, b = (shapes.get(key) for key in (name, f"{name}_a", f"{name}_b"))
    core = shapes.get(_core_of(name))
    if whole is not None:
        if a is not None or b is not None or core is not None or not 2 <= len(whole) <= 4:
            return None
        return _Side(whole[0], math.prod(whole[1:]), None, whole[2:])
    if a is None or b is None or not len(a) == len(b) == 2:
        return None
    if core is None:
        return _Side(a[0], b[1], b[0], ()) if a[1] == b[0] else None
    if len(core) != 4 or core[:2] != (a[0], b[0]) or a[0] != b[0]:
        return None
    # PEFT gives the core of a Conv1d a last axis of 1.
    kernel = core[2:3] if core[3] == 1 else core[2:]
    return _Side(a[1], b[1] * math.prod(core[2:]), b[0], kernel)


def _core_of(name: str) -> str:
    """The name of the small tensor between a side's factors, for convolutions (Tucker, ``use_effective_conv2d``)."""
    return name.replace("_w", "_t")


def factors(kind: str, tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The exact LoRA factors of a module, without its scale.

    Args:
        kind: ``"LOHA"`` or ``"LOKR"``.
        tensors: By their names, of shapes that `of_shapes` knows.

    Returns:
        ``a [rank, in]`` and ``b [out, rank]``, float32 or wider: half types cannot hold products of their own numbers.
    """
    wide = promote(np.float32, *(tensor.dtype for tensor in tensors.values()))
    tensors = {name: np.asarray(tensor, wide) for name, tensor in tensors.items()}
    with np.errstate(all="ignore"):  # NaN and inf are found, and their modules named, by those who read the factors.
        one, two = (_factored(tensors, name) for name in _SIDES[kind])
        return _entrywise(one, two) if kind == "LOHA" else _kronecker(one, two, tensors.get("lokr_w2"))


def _factored(tensors: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A side as ``a [r, columns]`` and ``b [rows, r]``, r no more than rows or columns."""
    if name in tensors:
        return _split(tensors[name].reshape(tensors[name].shape[0], -1))
    b, a, core = tensors[f"{name}_a"], tensors[f"{name}_b"], tensors.get(_core_of(name))
    if core is not None:
        b, a = b.T, np.einsum("ijkl,jn->inkl", core, a).reshape(core.shape[0], -1)
    return (a, b) if b.shape[1] <= min(b.shape[0], a.shape[1]) else _split(b @ a)


def _split(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as the product of itself and the smaller identity: exact, and nothing is rounded."""
    rows, columns = matrix.shape
    if rows <= columns:
        return matrix, np.eye(rows, dtype=matrix.dtype)
    return np.eye(columns, dtype=matrix.dtype), matrix


def _entrywise(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    (a1, b1), (a2, b2) = one, two
    rows, columns = b1.shape[0], a1.shape[1]
    if len(a1) * len(a2) > min(rows, columns):
        return _split((b1 @ a1) * (b2 @ a2))
    a = np.einsum("in,jn->ijn", a1, a2).reshape(-1, columns)
    return a, np.einsum("mi,mj->mij", b1, b2).reshape(rows, -1)


def _kronecker(
    one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray], whole: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    (a1, b1), (a2, b2) = one, two
    if whole is None or whole.ndim != 3:
        return np.kron(a1, a2), np.kron(b1, b2)
    # A Conv1d's whole W₂, [k, n, kernel], meets a W₁ of two axes in torch.kron, which lines axes up from the last: what
    # PEFT then reshapes has W₂'s index before that of W₁, on both sides.
    a2 = a2.reshape(-1, *whole.shape[1:])
    a = np.einsum("jnx,im->jinmx", a2, a1)
    return a.reshape(len(a1) * len(a2), -1), np.kron(b2, b1)
