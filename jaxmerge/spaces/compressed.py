"""Compress-then-Merge (arXiv:2606.03723): the tasks in rank-r subspaces they share, so that the merge has rank r."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.base import Array, Energy
from jaxmerge.lowrank import Matrix, balanced, truncated_svd
from jaxmerge.spaces.pipe import (
    Factors,
    Lifted,
    Space,
    all_ranks,
    as_given,
    cores,
    factor_numbers,
    rotated,
    upright,
)
from jaxmerge.svd import matmul

# The subspaces are improved until they hold less than this share more of the tasks' energy, or so many times.
_TOLERANCE = 1e-6
_ITERATIONS = 200


class _Subspaces(NamedTuple):
    """What the tasks are seen in.

    Attributes:
        u: ``[out, r]``, orthonormal.
        v: ``[in, r]``, orthonormal.
        held: Scalar; the share of the tasks' energy in them.
    """

    u: Array
    v: Array
    held: Array


def _project(factors: Factors, rank: int, *, own_norm: Array | float = 0.25) -> tuple[Sequence[Array], _Subspaces]:
    """``Uᵀ ΔWᵢ V``, ``[r, r]``, in subspaces from a Tucker-2 decomposition of all tasks, computed on their cores.

    The subspaces are those of tasks of like norms, so that large ones do not have them for themselves; what is merged
    in them are the tasks as they are.
    """
    frame = rotated(factors)
    tasks = cores(frame, factors.scales)
    u, v = _shared_subspaces(_of_like_norm(tasks, own_norm), rank)
    basis_b, basis_a = matmul(frame.q_b, u), matmul(frame.q_a, v)
    sign_b, sign_a = upright(basis_b), upright(basis_a)
    u, v = u * sign_b, v * sign_a
    compressed = jnp.stack([matmul(matmul(u.T, task), v) for task in tasks])
    total = jnp.sum(tasks * tasks)
    held = jnp.sum(compressed * compressed) / jnp.where(total > 0, total, 1)
    return (compressed,), _Subspaces(basis_b * sign_b, basis_a * sign_a, held)


def _of_like_norm(tasks: Array, own_norm: Array | float) -> Array:
    """The tasks ``[n, p, q]`` with norms between their mean, at 0, and their own, at 1; zeros count in no mean."""
    norms = jnp.sqrt(jnp.sum(tasks * tasks, axis=(1, 2)))
    mean = jnp.sum(norms) / jnp.maximum(jnp.sum(norms > 0).astype(norms.dtype), 1)
    wanted = own_norm * norms + (1 - own_norm) * mean
    return tasks * (wanted / jnp.where(norms > 0, norms, 1))[:, None, None]


def _shared_subspaces(tasks: Array, rank: int) -> tuple[Array, Array]:
    """HOSVD, improved by higher-order orthogonal iteration.

    Args:
        tasks: ``[n, p, q]``.
        rank: r, at most p and q.

    Returns:
        Orthonormal ``[p, r]`` and ``[q, r]``.
    """
    n, p, q = tasks.shape
    total = jnp.sum(tasks * tasks)
    total = jnp.where(total > 0, total, 1)

    def share(u: Array, v: Array) -> Array:
        inside = matmul(matmul(u.T, tasks), v)
        return jnp.sum(inside * inside) / total

    def left(v: Array) -> Array:
        return matmul(tasks, v).transpose(1, 0, 2).reshape(p, n * rank)

    def right(u: Array) -> Array:
        return matmul(u.T, tasks).transpose(2, 0, 1).reshape(q, n * rank)

    def improved(state: tuple[Array, ...]) -> tuple[Array, ...]:
        u, v, held, _, turn = state
        u = _leading(left(v), rank)
        v = _leading(right(u), rank)
        now = share(u, v)
        # What rounding makes worse is not taken.
        better = now > held
        u, v = jnp.where(better, u, state[0]), jnp.where(better, v, state[1])
        return u, v, jnp.maximum(now, held), now - held, turn + 1

    def unfinished(state: tuple[Array, ...]) -> Array:
        return (state[3] > _TOLERANCE) & (state[4] < _ITERATIONS)

    # By SVD, which finds small directions that squares lose in rounding: alone, one task is held whole.
    u = jnp.linalg.svd(tasks.transpose(1, 0, 2).reshape(p, n * q), full_matrices=False)[0][:, :rank]
    v = jnp.linalg.svd(tasks.reshape(n * p, q), full_matrices=False)[2][:rank].T
    held = share(u, v)
    state = (u, v, held, jnp.ones_like(held) - held, jnp.zeros((), jnp.int32))
    u, v, *_ = jax.lax.while_loop(unfinished, improved, state)
    # Once more, taken in any case: an energy does not show by how much directions are off, but for the square of it.
    u = jnp.linalg.svd(left(v), full_matrices=False)[0][:, :rank]
    v = jnp.linalg.svd(right(u), full_matrices=False)[0][:, :rank]
    return u, v


def _leading(columns: Array, rank: int) -> Array:
    """The leading left singular vectors of ``[p, w]``, from the Gram matrix."""
    return jnp.linalg.eigh(matmul(columns, columns.T))[1][:, ::-1][:, :rank]


def _lift(merged: Sequence[Array], frame: _Subspaces, rank: int) -> Lifted:
    u, s, vt, energy = truncated_svd(Matrix(merged[0]), rank)
    a, b = balanced(u, s, vt)
    # What the subspaces do not hold was lost before the merge, and is told as if the merge had lost as large a share.
    total = energy.total / jnp.where(frame.held > 0, frame.held, 1)
    lost = total - energy.total + energy.lost
    return Lifted(matmul(a, frame.v.T), matmul(frame.u, b), Energy(total, lost, energy.missed))


CTM = Space(
    _project,
    as_given,
    _lift,
    numbers=factor_numbers,
    capacity=all_ranks,
    full_rank=True,
    task_ranks=lambda ranks, rank: [min(own, rank) for own in ranks],
)
