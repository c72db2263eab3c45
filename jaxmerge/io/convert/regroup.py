"""Low-rank factors with named axes, and what it takes to draw the line between their sides elsewhere.

A weight change with axes such as (embed, heads, head_dim) is low-rank with respect to one way of cutting its axes into
inputs and outputs, and formats cut differently: PEFT all heads against the embedding, Keras the head dimension against
everything else, OpenPI each head for itself. Moving an axis over the cut is exact, but multiplies the rank by its size,
unless all its entries share the factor that they would have to be told apart by.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RANK = "rank"


@dataclass(frozen=True, eq=False)
class Factors:
    """A weight change ``Σ_rank a·b``, over named axes.

    Attributes:
        a: One axis per name in `a_axes`.
        a_axes: Names; one of them is ``rank``.
        b: One axis per name in `b_axes`.
        b_axes: Names; one of them is ``rank``. A name in both is an axis whose entries have factors of their own.
    """

    a: np.ndarray
    a_axes: tuple[str, ...]
    b: np.ndarray
    b_axes: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The number of terms."""
        return self.a.shape[self.a_axes.index(RANK)]

    def ordered(self, a_axes: Sequence[str], b_axes: Sequence[str]) -> "Factors":
        """The same with the axes in another order."""
        a = self.a.transpose([self.a_axes.index(name) for name in a_axes])
        b = self.b.transpose([self.b_axes.index(name) for name in b_axes])
        return Factors(a, tuple(a_axes), b, tuple(b_axes))

    def at(self, name: str, index: int) -> "Factors":
        """One entry along an axis."""
        a, a_axes = _taken(self.a, self.a_axes, name, index)
        b, b_axes = _taken(self.b, self.b_axes, name, index)
        return Factors(a, a_axes, b, b_axes)

    def moved(self, name: str, in_a: bool, in_b: bool) -> "Factors":
        """The same weight change with an axis on other sides of the cut.

        Args:
            name: The axis.
            in_a: Whether it is one of A's after that.
            in_b: Whether it is one of B's. In both, each of its entries has factors of its own.

        Returns:
            The factors, of a larger rank where the cut demands it.
        """
        had_a, had_b = name in self.a_axes, name in self.b_axes
        if (in_a, in_b) == (had_a, had_b):
            return self
        size = (self.a if had_a else self.b).shape[(self.a_axes if had_a else self.b_axes).index(name)]
        if in_a and in_b:
            a, a_axes = (self.a, self.a_axes) if had_a else _repeated(self.a, self.a_axes, name, size)
            b, b_axes = (self.b, self.b_axes) if had_b else _repeated(self.b, self.b_axes, name, size)
            return Factors(a, a_axes, b, b_axes)
        if in_a:  # The mirror image.
            return self._swapped().moved(name, in_b, in_a)._swapped()
        if had_b and _constant(self.a, self.a_axes.index(name)):  # Only A's entries would need telling apart.
            a, a_axes = _taken(self.a, self.a_axes, name, 0)
            return dataclasses.replace(self, a=a, a_axes=a_axes)
        a, a_axes = _joined(self.a, self.a_axes, name)
        b, b_axes = _blocks(self.b, self.b_axes, name, size)
        return Factors(a, a_axes, b, b_axes)

    def without_zeros(self) -> "Factors":
        """The same without terms that are zero in both factors; at least one remains."""
        used_a, used_b = self._used()
        kept = np.flatnonzero(used_a | used_b)
        return self._with(kept if kept.size else np.array([0]))

    def without_idle(self) -> "Factors":
        """The same without terms that are zero in one factor or the other, unless all are."""
        used_a, used_b = self._used()
        kept = np.flatnonzero(used_a & used_b)
        return self._with(kept) if kept.size else self

    def _used(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each term, whether it is more than zeros in A, and in B."""

        def used(x: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
            return (x != 0).any(axis=tuple(i for i, axis in enumerate(axes) if axis != RANK))

        return used(self.a, self.a_axes), used(self.b, self.b_axes)

    def _with(self, terms: np.ndarray) -> "Factors":
        a, b = self.a.take(terms, self.a_axes.index(RANK)), self.b.take(terms, self.b_axes.index(RANK))
        return dataclasses.replace(self, a=a, b=b)

    def _swapped(self) -> "Factors":
        return Factors(self.b, self.b_axes, self.a, self.a_axes)


def stacked(parts: Mapping[tuple[int, ...], Factors], names: Sequence[str], sizes: Sequence[int]) -> Factors:
    """Factors of their own for the entries of new axes.

    Args:
        parts: By the entries' indices; what is missing is zero. All with the same axes, ranks may differ.
        names: Of the new axes.
        sizes: Of the new axes.

    Returns:
        The factors, of the largest rank, with the new axes first on both sides.
    """
    one = next(iter(parts.values()))
    rank = max(part.rank for part in parts.values())

    def stack(a: bool) -> np.ndarray:
        first, axes = (one.a, one.a_axes) if a else (one.b, one.b_axes)
        at = axes.index(RANK)
        shape = list(first.shape)
        shape[at] = rank
        out = np.zeros((*sizes, *shape), np.result_type(*[(part.a if a else part.b).dtype for part in parts.values()]))
        for index, part in parts.items():
            x = part.a if a else part.b
            window = [slice(None)] * x.ndim
            window[at] = slice(part.rank)
            out[(*index, *window)] = x
        return out

    if not names:
        return one
    return Factors(stack(True), (*names, *one.a_axes), stack(False), (*names, *one.b_axes))


def missing_size(total: int, axes: Sequence[str], sizes: Mapping[str, int]) -> dict[str, int] | None:
    """The size of the one axis whose size is not known, so that all of them make the total; None if none does."""
    unknown = [name for name in axes if name not in sizes]
    known = math.prod(sizes[name] for name in axes if name in sizes)
    if len(unknown) > 1 or total % known or (not unknown and total != known):
        return None
    return dict.fromkeys(unknown, total // known)


def _taken(x: np.ndarray, axes: tuple[str, ...], name: str, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
    if name not in axes:
        return x, axes
    return x.take(index, axes.index(name)), tuple(axis for axis in axes if axis != name)


def _repeated(x: np.ndarray, axes: tuple[str, ...], name: str, size: int) -> tuple[np.ndarray, tuple[str, ...]]:
    return np.broadcast_to(x, (size, *x.shape)), (name, *axes)


def _constant(x: np.ndarray, axis: int) -> bool:
    """Whether all entries along an axis are the same."""
    return bool((x == x.take([0], axis)).all())


def _joined(x: np.ndarray, axes: tuple[str, ...], name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """An axis made part of the rank."""
    rest = tuple(axis for axis in axes if axis not in (name, RANK))
    ordered = x.transpose([axes.index(axis) for axis in (*rest, name, RANK)])
    return ordered.reshape(*ordered.shape[:-2], -1), (*rest, RANK)


def _blocks(x: np.ndarray, axes: tuple[str, ...], name: str, size: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The counterpart of `_joined`: entry i of the axis sees the terms that came from entry i, and no others."""
    rest = tuple(axis for axis in axes if axis not in (name, RANK))
    if name not in axes:
        x, axes = _repeated(x, axes, name, size)
    entries = x.transpose([axes.index(axis) for axis in (name, *rest, RANK)])
    out = np.zeros((size, *entries.shape[1:-1], size, entries.shape[-1]), x.dtype)
    for i, entry in enumerate(entries):
        out[i, ..., i, :] = entry
    return out.reshape(*out.shape[:-2], -1), (name, *rest, RANK)
