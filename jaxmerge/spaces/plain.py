"""The spaces that take adapters as they are: the weight change itself, and its factors each on their own."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxmerge.base import Array
from jaxmerge.lowrank import Matrix, balanced, lift_core, squared_norm, truncate, truncated_svd
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
)
from jaxmerge.svd import matmul


def _project_dense(factors: Factors, rank: int) -> tuple[Sequence[Array], None]:
    del rank
    deltas = [s * matmul(b, a) for a, b, s in zip(factors.a, factors.b, factors.scales, strict=True)]
    return (jnp.stack(deltas),), None


def _lift_dense(merged: Sequence[Array], frame: None, rank: int) -> Lifted:
    del frame
    u, s, vt, energy = truncated_svd(Matrix(merged[0]), rank)
    return Lifted(*balanced(u, s, vt), energy)


def _project_rotated(factors: Factors, rank: int) -> tuple[Sequence[Array], Frame]:
    del rank
    frame = rotated(factors)
    return (cores(frame, factors.scales),), frame


def _lift_rotated(merged: Sequence[Array], frame: Frame, rank: int) -> Lifted:
    return Lifted(*lift_core(frame.q_b, merged[0], frame.q_a, rank))


def _project_factors(factors: Factors, rank: int) -> tuple[Sequence[Array], None]:
    del rank
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
    return Lifted(a, b, nothing_lost(squared_norm(a, b)))


def _project_units(factors: Factors, rank: int) -> tuple[Sequence[Array], int]:
    del rank
    root = jnp.sqrt(factors.scales)
    units = [jnp.concatenate([r * a, r * b.T], axis=1) for a, b, r in zip(factors.a, factors.b, root, strict=True)]
    return (jnp.stack(units),), factors.features[1]


def _root_of_each(scales: Array, weights: Array) -> Sequence[Array]:
    """For A and B alike: a unit's product weighs the square."""
    del scales
    return (jnp.sqrt(jnp.abs(weights)),)


def _lift_units(merged: Sequence[Array], frame: int, rank: int) -> Lifted:
    del rank
    a, b = merged[0][:, :frame], merged[0][:, frame:].T
    return Lifted(a, b, nothing_lost(squared_norm(a, b)))


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
    return Lifted(a, b, nothing_lost(squared_norm(a, b)))


FULL = Space(
    _project_dense,
    as_given,
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
    as_given,
    _lift_rotated,
    numbers=factor_numbers,
    capacity=all_ranks,
)

FACTORS = Space(
    _project_factors,
    _share_out,
    _lift_factors,
    numbers=factor_numbers,
    capacity=lambda ranks, out, in_: ranks[0],
    equal_ranks=True,
    as_stored=True,
)

UNITS = Space(
    # The same space, A and B taken together: row j of A and column j of B make a unit of rank one.
    _project_units,
    _root_of_each,
    _lift_units,
    numbers=factor_numbers,
    capacity=lambda ranks, out, in_: sum(ranks),
    full_rank=True,
    equal_ranks=True,
)
