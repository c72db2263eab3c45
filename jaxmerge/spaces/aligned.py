"""Spaces that lay the tasks along bases they share, exact from the factors: KnOTS and Core Space.

Both are lossless: ``linear`` gives in them what it gives in the space ``full``. Entrywise methods do not, and that is
the point: entries mean the same for all tasks.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from jaxmerge.base import Array
from jaxmerge.lowrank import lift_core, thin_qr
from jaxmerge.spaces.pipe import (
    Factors,
    Frame,
    Lifted,
    Space,
    all_ranks,
    as_given,
    cores,
    factor_numbers,
    nothing_lost,
    rotated,
    side_by_side,
    upright,
)
from jaxmerge.svd import matmul, svd

Basis = Literal["reference", "balanced", "hosvd"]


class _Bases(NamedTuple):
    """What the tasks are laid along.

    Attributes:
        u: ``[out, p]``, orthonormal.
        v: ``[in, q]``, likewise; None for the axes of the input.
        held: int32 scalars; how many of the p, and of the q, the tasks reach.
    """

    u: Array
    v: Any
    held: tuple[Array, ...]


def _project_knots(factors: Factors, rank: int) -> tuple[Sequence[Array], _Bases]:
    """KnOTS (arXiv:2410.19735): ``[ΔW₁ | … | ΔWₙ] = U S [V₁ | … | Vₙ]``, of which task i is ``S Vᵢ``, ``[p, in]``.

    By the QR of each A the singular value decomposition of ``out × n·in`` is one of ``R × R``.
    """
    del rank
    q_b, r_b = thin_qr(jnp.concatenate(factors.b, axis=1))
    bases, rights = zip(*[thin_qr(a.T) for a in factors.a], strict=True)
    blocks = side_by_side(factors.ranks)
    # Where an A has more rows than columns its Q is smaller.
    coupled = [
        scale * matmul(r_b[:, block], right.T)
        for block, right, scale in zip(blocks, rights, factors.scales, strict=True)
    ]
    u, s, vt = svd(jnp.concatenate(coupled, axis=1))
    held = _held(s, max(q_b.shape[0], sum(a.shape[1] for a in factors.a)))
    u = matmul(q_b, u)
    signs = upright(u)
    aligned = (signs * jnp.where(held, s, jnp.zeros_like(s)))[:, None] * vt
    columns = side_by_side([right.shape[0] for right in rights])
    tasks = [matmul(aligned[:, own], q.T) for own, q in zip(columns, bases, strict=True)]
    return (jnp.stack(tasks),), _Bases(u * signs, None, (_count(held),))


def _held(s: Array, size: int) -> Array:
    """Which singular values are more than rounding: relative, where the reference code's cut is absolute."""
    return s > s[0] * jnp.finfo(s.dtype).eps * size


def _count(held: Array) -> Array:
    return jnp.sum(held, dtype=jnp.int32)


def _lift_knots(merged: Sequence[Array], frame: _Bases, rank: int) -> Lifted:
    (matrix,) = merged
    if rank == min(matrix.shape) == matrix.shape[0]:
        return Lifted(matrix, frame.u, nothing_lost(jnp.sum(matrix * matrix)))
    q_a, r_a = thin_qr(matrix.T)
    return Lifted(*lift_core(frame.u, r_a.T, q_a, rank))


def _project_core(factors: Factors, rank: int, *, basis: Basis = "reference") -> tuple[Sequence[Array], _Bases]:
    """Core Space (arXiv:2509.17786): ``U_Bᵀ ΔWᵢ V_A``, ``[p, q]``, in the singular bases of all B and of all A.

    Which bases those are hangs on how each change is split into B and A. ``reference`` takes both as they are stored,
    without scales, as the paper's code does; ``balanced`` splits each change evenly, by its singular value
    decomposition; ``hosvd`` takes the bases of the changes themselves. The last two do not see the split.
    """
    del rank
    frame = rotated(factors)
    if basis == "reference":
        left, right = frame.left, frame.right
    else:
        power = 0.5 if basis == "balanced" else 1.0
        left, right = zip(
            *[_split(b, a, scale, power) for b, a, scale in zip(frame.left, frame.right, factors.scales, strict=True)],
            strict=True,
        )
    u, rows, _ = svd(jnp.concatenate(left, axis=1))
    _, columns, vt = svd(jnp.concatenate(right, axis=0))
    held = _held(rows, factors.features[0]), _held(columns, factors.features[1])
    u, v = jnp.where(held[0], u, jnp.zeros_like(u)), jnp.where(held[1], vt.T, jnp.zeros_like(vt.T))
    basis_b, basis_a = matmul(frame.q_b, u), matmul(frame.q_a, v)
    sign_b, sign_a = upright(basis_b), upright(basis_a)
    u, v = u * sign_b, v * sign_a
    turned = Frame(
        basis_b * sign_b,
        basis_a * sign_a,
        [matmul(u.T, b) for b in frame.left],
        [matmul(a, v) for a in frame.right],
    )
    return (cores(turned, factors.scales),), _Bases(turned.q_b, turned.q_a, (_count(held[0]), _count(held[1])))


def _split(b: Array, a: Array, scale: Array, power: float) -> tuple[Array, Array]:
    """``U Sᵖ`` and ``Sᵖ Vᵀ`` of ``scale · b @ a = U S Vᵀ``."""
    q_b, r_b = thin_qr(b)
    q_a, r_a = thin_qr(a.T)
    u, s, vt = svd(scale * matmul(r_b, r_a.T))
    weight = s**power
    return matmul(q_b, u) * weight, weight[:, None] * matmul(vt, q_a.T)


def _lift_core(merged: Sequence[Array], frame: _Bases, rank: int) -> Lifted:
    return Lifted(*lift_core(frame.u, merged[0], frame.v, rank))


KNOTS = Space(
    _project_knots,
    as_given,
    _lift_knots,
    # The tasks [n, R, in], what a method makes of them, and the factors.
    numbers=lambda ranks, out, in_: (2 * len(ranks) + 4) * sum(ranks) * in_ + factor_numbers(ranks, out, in_),
    capacity=all_ranks,
    filled=lambda frame: frame.held,
    filled_axes=1,
)

CORE = Space(
    _project_core,
    as_given,
    _lift_core,
    numbers=factor_numbers,
    capacity=all_ranks,
    filled=lambda frame: frame.held,
    filled_axes=2,
)
