"""Spaces: where a method's task matrices live, and how a merged one becomes factors again.

``merge = lift ∘ method ∘ project``. A space says how the factors of one module, from n adapters, become task
matrices, and how the merged matrices become one pair of factors. Everything here is for one unbatched module
in float32 or wider.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxmerge.base import Array, Energy
from jaxmerge.lowrank import thin_qr
from jaxmerge.svd import matmul


class Factors(NamedTuple):
    """One module in n adapters.

    Attributes:
        a: n of ``[rᵢ, in]``.
        b: n of ``[out, rᵢ]``.
        scales: ``[n]``.
    """

    a: Sequence[Array]
    b: Sequence[Array]
    scales: Array

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each adapter."""
        return tuple(a.shape[0] for a in self.a)

    @property
    def features(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.b[0].shape[0], self.a[0].shape[1]


class Lifted(NamedTuple):
    """One pair of factors, ``[rank, in]`` and ``[out, rank]``, and what their truncation lost."""

    a: Array
    b: Array
    energy: Energy


@dataclass(frozen=True)
class Space:
    """A pair of pure functions, and what they can hold.

    Attributes:
        project: ``(factors, rank of the result, **options) -> (task sets, frame)``: arrays ``[n, p, q]``; a method is
            applied to each of them.
        weigh: ``(scales [n], weights [n]) ->`` the weights ``[n]`` for each task set.
        lift: ``(merged matrices, frame, rank) -> Lifted``.
        numbers: ``(ranks, out, in) ->`` how many numbers are held at once for a module, about.
        capacity: ``(ranks, out, in) ->`` the largest rank that a result can have.
        full_rank: Whether results have, in general, the full rank min(out, in), so that factors of the
            sources' rank hold only a part.
        equal_ranks: Whether the adapters must have one rank.
        dense: Whether the tasks are the deltas themselves, which can be formed and merged a few rows at a time.
        as_stored: Whether the task sets are all A and all B as they are, so that they can be looked at before.
        task_ranks: ``(ranks, rank of the result) ->`` the ranks of the task matrices.
        filled: ``frame ->`` how many of the p rows, or of the p rows and the q columns, of the task matrices hold
            anything, where that hangs on values. Densities are of the entries in these.
        filled_axes: 1 for rows, 2 for both.
    """

    project: Callable[..., tuple[Sequence[Array], Any]]
    weigh: Callable[[Array, Array], Sequence[Array]]
    lift: Callable[[Sequence[Array], Any, int], Lifted]
    numbers: Callable[[Sequence[int], int, int], int]
    capacity: Callable[[Sequence[int], int, int], int]
    full_rank: bool = False
    equal_ranks: bool = False
    dense: bool = False
    as_stored: bool = False
    task_ranks: Callable[[Sequence[int], int], Sequence[int]] = lambda ranks, rank: ranks
    filled: Callable[[Any], tuple[Array, ...]] | None = None
    filled_axes: int = 0


class Frame(NamedTuple):
    """All factors of a module in orthonormal bases: ``scaleᵢ Bᵢ Aᵢ = q_b @ (left[i] @ right[i]) @ q_a.T``.

    Attributes:
        q_b: ``[out, p]``, p = min(out, R).
        q_a: ``[in, q]``, q = min(in, R).
        left: n of ``[p, rᵢ]``, without the scales.
        right: n of ``[rᵢ, q]``, without the scales.
    """

    q_b: Array
    q_a: Array
    left: Sequence[Array]
    right: Sequence[Array]


def side_by_side(sizes: Sequence[int]) -> list[slice]:
    """Where blocks of these sizes lie in their concatenation."""
    ends = itertools.accumulate(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def rotated(factors: Factors) -> Frame:
    """The factors in the orthonormal bases of all B and of all A."""
    q_b, r_b = thin_qr(jnp.concatenate(factors.b, axis=1))
    q_a, r_a = thin_qr(jnp.concatenate(factors.a, axis=0).T)
    blocks = side_by_side(factors.ranks)
    return Frame(q_b, q_a, [r_b[:, block] for block in blocks], [r_a[:, block].T for block in blocks])


def cores(frame: Frame, scales: Array) -> Array:
    """The tasks in a frame, ``[n, p, q]``."""
    return jnp.stack([scale * matmul(b, a) for b, a, scale in zip(frame.left, frame.right, scales, strict=True)])


def upright(columns: Array) -> Array:
    """The signs ``[w]`` that make the largest entry of each column ``[k, w]`` positive.

    A basis has its vectors with either sign, as the routine and the device have it. Where as many tasks have one sign
    as the other, what TIES elects by number would hang on that.
    """
    largest = jnp.take_along_axis(columns, jnp.argmax(jnp.abs(columns), axis=0)[None], axis=0)[0]
    return jnp.where(largest < 0, -1, 1).astype(columns.dtype)


def as_given(scales: Array, weights: Array) -> Sequence[Array]:
    """The weights of a space whose tasks have their scales in them."""
    del scales
    return (weights,)


def factor_numbers(ranks: Sequence[int], out: int, in_: int) -> int:
    """The factors, their bases, and the result."""
    return 3 * sum(ranks) * (out + in_)


def all_ranks(ranks: Sequence[int], out: int, in_: int) -> int:
    """The largest rank that a sum of the tasks can have."""
    return min(out, in_, sum(ranks))


def nothing_lost(total: Array) -> Energy:
    """The energy of a result that is as it should be."""
    return Energy(total, jnp.zeros_like(total), jnp.zeros_like(total))
