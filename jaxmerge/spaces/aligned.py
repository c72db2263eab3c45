"""Spaces that lay the tasks along bases they share, exact from the factors: KnOTS and Core Space.

Both are lossless: ``linear`` gives in them what it gives in the space ``full``. Entrywise methods do not, and that is
the point: entries mean the same for all tasks.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

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
    matmul,
    nothing_lost,
    rotated,
)

Basis = Literal["reference", "balanced", "hosvd"]


class _Knots(NamedTuple):
    """The left basis that all tasks share.

    Attributes:
        u: ``[out, p]``, orthonormal.
        held: Scalar int32; how many of its columns the tasks reach.
    """

    u: Array
    held: Array


def _project_knots(factors: Factors, rank: int) -> tuple[Sequence[Array], _Knots]:
    """KnOTS (arXiv:2410.19735): ``[ΔW₁ | … | ΔWₙ] = U S [V₁ | … | Vₙ]``, of which task i is ``S Vᵢ``, ``[p, in]``.

    By the QR of each A the singular value decomposition of ``out × n·in`` is one of ``R × R``.
    """
    del rank
    q_b, r_b = thin_qr(jnp.concatenate(factors.b, axis=1))
    bases, rights = zip(*[thin_qr(a.T) for a in factors.a], strict=True)
    ends = [sum(factors.ranks[: i + 1]) for i in range(len(factors.ranks))]
    blocks = [slice(end - rank, end) for end, rank in zip(ends, factors.ranks, strict=True)]
    # Where an A has more rows than columns its Q is smaller.
    coupled = [
        scale * matmul(r_b[:, block], right.T)
        for block, right, scale in zip(blocks, rights, factors.scales, strict=True)
    ]
    u, s, vt = jnp.linalg.svd(jnp.concatenate(coupled, axis=1), full_matrices=False)
    # Relative, so that it does not hang on how large the adapters are: the reference's cut is absolute.
    held = s > s[0] * jnp.finfo(s.dtype).eps * max(q_b.shape[0], sum(a.shape[1] for a in factors.a))
    aligned = jnp.where(held, s, jnp.zeros_like(s))[:, None] * vt
    widths = [right.shape[0] for right in rights]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    tasks = [
        matmul(aligned[:, start : start + width], q.T) for start, width, q in zip(starts, widths, bases, strict=True)
    ]
    return (jnp.stack(tasks),), _Knots(matmul(q_b, u), jnp.sum(held, dtype=jnp.int32))


def _lift_knots(merged: Sequence[Array], frame: _Knots, rank: int) -> Lifted:
    (matrix,) = merged
    if rank == min(matrix.shape) == matrix.shape[0]:
        return Lifted(matrix, frame.u, nothing_lost(jnp.sum(matrix * matrix)))
    q_a, r_a = thin_qr(matrix.T)
    return Lifted(*lift_core(frame.u, r_a.T, q_a, rank))


def _project_core(factors: Factors, rank: int, *, basis: Basis = "reference") -> tuple[Sequence[Array], Frame]:
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
    u, _, _ = jnp.linalg.svd(jnp.concatenate(left, axis=1), full_matrices=False)
    _, _, vt = jnp.linalg.svd(jnp.concatenate(right, axis=0), full_matrices=False)
    turned = Frame(
        matmul(frame.q_b, u),
        matmul(frame.q_a, vt.T),
        [matmul(u.T, b) for b in frame.left],
        [matmul(a, vt.T) for a in frame.right],
    )
    return (cores(turned, factors.scales),), turned


def _split(b: Array, a: Array, scale: Array, power: float) -> tuple[Array, Array]:
    """``U Sᵖ`` and ``Sᵖ Vᵀ`` of ``scale · b @ a = U S Vᵀ``."""
    q_b, r_b = thin_qr(b)
    q_a, r_a = thin_qr(a.T)
    u, s, vt = jnp.linalg.svd(scale * matmul(r_b, r_a.T), full_matrices=False)
    weight = s**power
    return matmul(q_b, u) * weight, weight[:, None] * matmul(vt, q_a.T)


def _lift_core(merged: Sequence[Array], frame: Frame, rank: int) -> Lifted:
    return Lifted(*lift_core(frame.q_b, merged[0], frame.q_a, rank))


KNOTS = Space(
    _project_knots,
    as_given,
    _lift_knots,
    # The tasks [n, R, in], what a method makes of them, and the factors.
    numbers=lambda ranks, out, in_: (2 * len(ranks) + 4) * sum(ranks) * in_ + factor_numbers(ranks, out, in_),
    capacity=all_ranks,
    filled=lambda frame: frame.held,
)

CORE = Space(
    _project_core,
    as_given,
    _lift_core,
    numbers=factor_numbers,
    capacity=all_ranks,
)
