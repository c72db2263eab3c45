"""Spaces: where a method's task matrices live, and how a merged one becomes factors again.

``merge = lift ∘ method ∘ project``. A space says how the factors of one module, from n adapters, become task
matrices, and how the merged matrices become one pair of factors. Everything here is for one unbatched module
in float32 or wider.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxmerge.base import Array, Energy
from jaxmerge.lowrank import Matrix, balanced, lift_core, squared_norm, thin_qr, truncate, truncated_svd


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
        project: ``factors -> (task sets, frame)``: arrays ``[n, p, q]``; a method is applied to each of them.
        weigh: ``(scales [n], weights [n]) ->`` the weights ``[n]`` for each task set.
        lift: ``(merged matrices, frame, rank) -> Lifted``.
        numbers: ``(ranks, out, in) ->`` how many numbers are held at once for a module, about.
        capacity: ``(ranks, out, in) ->`` the largest rank that a result can have.
        full_rank: Whether results have, in general, the full rank min(out, in), so that factors of the
            sources' rank hold only a part.
        equal_ranks: Whether the adapters must have one rank.
        dense: Whether the tasks are the deltas themselves, which can be formed and merged a few rows at a time.
        as_stored: Whether the task sets are all A and all B as they are, so that they can be looked at before.
    """

    project: Callable[[Factors], tuple[Sequence[Array], Any]]
    weigh: Callable[[Array, Array], Sequence[Array]]
    lift: Callable[[Sequence[Array], Any, int], Lifted]
    numbers: Callable[[Sequence[int], int, int], int]
    capacity: Callable[[Sequence[int], int, int], int]
    full_rank: bool = False
    equal_ranks: bool = False
    dense: bool = False
    as_stored: bool = False


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision="highest")


def _as_given(scales: Array, weights: Array) -> Sequence[Array]:
    del scales
    return (weights,)


def _project_dense(factors: Factors) -> tuple[Sequence[Array], None]:
    deltas = [s * _matmul(b, a) for a, b, s in zip(factors.a, factors.b, factors.scales, strict=True)]
    return (jnp.stack(deltas),), None


def _lift_dense(merged: Sequence[Array], frame: None, rank: int) -> Lifted:
    del frame
    u, s, vt, energy = truncated_svd(Matrix(merged[0]), rank)
    return Lifted(*balanced(u, s, vt), energy)


def _project_rotated(factors: Factors) -> tuple[Sequence[Array], tuple[Array, Array]]:
    q_b, r_b = thin_qr(jnp.concatenate(factors.b, axis=1))
    q_a, r_a = thin_qr(jnp.concatenate(factors.a, axis=0).T)
    cores, start = [], 0
    for rank, scale in zip(factors.ranks, factors.scales, strict=True):
        block = slice(start, start + rank)
        cores.append(scale * _matmul(r_b[:, block], r_a[:, block].T))
        start += rank
    return (jnp.stack(cores),), (q_b, q_a)


def _lift_rotated(merged: Sequence[Array], frame: tuple[Array, Array], rank: int) -> Lifted:
    q_b, q_a = frame
    return Lifted(*lift_core(q_b, merged[0], q_a, rank))


def _project_factors(factors: Factors) -> tuple[Sequence[Array], None]:
    return (jnp.stack(factors.a), jnp.stack(factors.b)), None


def _share_out(scales: Array, weights: Array) -> Sequence[Array]:
    """The root of weight and scale, on A and on B."""
    coefficients = weights * scales
    # The inner where keeps the gradient finite at a weight of 0.
    zero = coefficients == 0
    root = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, jnp.abs(coefficients))))
    # The sign goes on A alone: on both it would cancel in the product.
    return jnp.where(coefficients >= 0, root, -root), root


def _lift_factors(merged: Sequence[Array], frame: None, rank: int) -> Lifted:
    del frame
    a, b = merged
    if rank < a.shape[0]:
        return Lifted(*truncate(a, b, min(rank, a.shape[1], b.shape[0])))
    return Lifted(a, b, _nothing_lost(squared_norm(a, b)))


def _nothing_lost(total: Array) -> Energy:
    return Energy(total, jnp.zeros_like(total), jnp.zeros_like(total))


def stack(factors: Factors, weights: Array) -> Lifted:
    """``Σ wᵢ sᵢ Bᵢ Aᵢ`` as it stands: the factors side by side, of rank R, with nothing to compute.

    Weight and scale are shared out: a power of two, which costs no bit, goes on B, and the rest on A. So neither
    runs out of a half type's range where the other has room.

    Args:
        factors: One module in n adapters.
        weights: ``[n]``.

    Returns:
        Factors ``[R, in]`` and ``[out, R]``; nothing is lost.
    """
    coefficients = weights * factors.scales
    zero = coefficients == 0
    power = jnp.exp2(jnp.round(jnp.log2(jnp.where(zero, 1, jnp.abs(coefficients))) / 2))
    rest = coefficients / power
    a = jnp.concatenate([c * a for c, a in zip(rest, factors.a, strict=True)], axis=0)
    b = jnp.concatenate([c * b for c, b in zip(power, factors.b, strict=True)], axis=1)
    return Lifted(a, b, _nothing_lost(squared_norm(a, b)))


def _factor_numbers(ranks: Sequence[int], out: int, in_: int) -> int:
    """The factors, their bases, and the result."""
    return 3 * sum(ranks) * (out + in_)


FULL = Space(
    _project_dense,
    _as_given,
    _lift_dense,
    # The dense deltas, and what a method makes of them.
    numbers=lambda ranks, out, in_: (len(ranks) + 3) * out * in_,
    capacity=lambda ranks, out, in_: min(out, in_),
    full_rank=True,
    dense=True,
)

FULL_ROTATED = Space(
    # The same space seen in the orthonormal bases of all factors: R×R instead of out×in. Exact for methods
    # that commute with rotations of both sides.
    _project_rotated,
    _as_given,
    _lift_rotated,
    numbers=_factor_numbers,
    capacity=lambda ranks, out, in_: min(out, in_, sum(ranks)),
)

FACTORS = Space(
    _project_factors,
    _share_out,
    _lift_factors,
    numbers=_factor_numbers,
    capacity=lambda ranks, out, in_: ranks[0],
    equal_ranks=True,
    as_stored=True,
)
