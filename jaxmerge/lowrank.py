"""Exact linear algebra on products of thin factors, without forming them.

``Σ sᵢ Bᵢ Aᵢ = Q_B · core · Q_Aᵀ`` with Householder QRs of the stacked factors; whatever commutes with
rotations of both sides is done on the small core and mapped back. Truncation there is the optimal one
(Eckart-Young).
"""

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxmerge.base import Array, Energy
from jaxmerge.svd import matmul, root, svd


def thin_qr(columns: Array) -> tuple[Array, Array]:
    """Householder QR of ``[rows, R]`` into ``[rows, k]`` and ``[k, R]``, k = min(rows, R).

    Never a Cholesky QR: adapters that share their initialisation make nearly dependent columns, and it
    loses as much as the square of their condition number.
    """
    q, r = jnp.linalg.qr(columns, mode="reduced")
    return q, r


# Block Krylov: columns beyond the wanted rank, blocks per cycle, and cycles at most. One or two do for merged deltas.
_OVERSAMPLING = 16
_DEPTH = 8
_CYCLES = 16
# The bound on the energy that is missed at which it stops, relative to the energy captured, by bytes of a number:
# about what rounding leaves to be gained.
_TOLERANCE = {4: 1e-5, 8: 1e-10}


class Operator(Protocol):
    """A matrix as what its products with a few columns are."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(p, q)``."""
        ...

    @property
    def dtype(self) -> Any:
        """Of the entries."""
        ...

    def times(self, columns: Array) -> Array:
        """``[p, w]``, the product with ``[q, w]``."""
        ...

    def transposed_times(self, columns: Array) -> Array:
        """``[q, w]``, the product of its transpose with ``[p, w]``."""
        ...

    def largest(self) -> Array:
        """The largest magnitude."""
        ...

    def squared_norm(self) -> Array:
        """The sum of squares."""
        ...

    def whole(self) -> Array:
        """The matrix, where it is small."""
        ...


class Matrix(NamedTuple):
    """An array ``[p, q]`` as an operator."""

    array: Array

    @property
    def shape(self) -> tuple[int, int]:
        """See `Operator`."""
        p, q = self.array.shape
        return p, q

    @property
    def dtype(self) -> Any:
        """See `Operator`."""
        return self.array.dtype

    def times(self, columns: Array) -> Array:
        """See `Operator`."""
        return matmul(self.array, columns)

    def transposed_times(self, columns: Array) -> Array:
        """See `Operator`; a thin matrix times a large one, four times faster on a CPU than the other way round."""
        return matmul(columns.T, self.array).T

    def largest(self) -> Array:
        """See `Operator`."""
        return jnp.max(jnp.abs(self.array))

    def squared_norm(self) -> Array:
        """See `Operator`."""
        return jnp.sum(self.array * self.array)

    def whole(self) -> Array:
        """See `Operator`."""
        return self.array


def truncated_svd(matrix: Operator, rank: int) -> tuple[Array, Array, Array, Energy]:
    """The best approximation of a given rank, as ``u @ diag(s) @ vt``.

    Small matrices are decomposed whole. Of large ones only the leading part is computed, by block Krylov iteration
    (arXiv:1504.05477) until no more than a millionth part of the energy, or so, can be missing.

    Args:
        matrix: ``[p, q]``.
        rank: At most min(p, q).

    Returns:
        ``u [p, rank]``, ``s [rank]`` descending, ``vt [rank, q]``, and the energy that was lost, with a bound on
        how much of it the best approximation would have kept.
    """
    depth = min(_DEPTH, min(matrix.shape) // (2 * (rank + _OVERSAMPLING)))
    if depth < 3:
        u, s, vt = svd(matrix.whole())
        energy = s * s
        lost = Energy(jnp.sum(energy), jnp.sum(energy[rank:]), jnp.zeros((), s.dtype))
        return u[:, :rank], s[:rank], vt[:rank], lost
    # Its repeated products would run out of float32's range for a matrix of very large or small numbers.
    largest = matrix.largest()
    unit = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    u, s, vt, missed = _leading_svd(matrix, unit, rank, depth)
    s, total = s * unit, matrix.squared_norm()
    kept = jnp.sum(s * s)
    lost = jnp.maximum(total - kept, 0)
    return u, s, vt, Energy(total, lost, jnp.minimum(missed * kept, lost))


class _Krylov(NamedTuple):
    """An orthonormal basis, ``[q, w]``, its image ``[p, w]``, the image of that ``[q, w]``, and what is known of it."""

    basis: Array
    image: Array
    back: Array
    residual: Array
    values: Array
    missed: Array
    cycle: Array


def _leading_svd(matrix: Operator, unit: Array, rank: int, depth: int) -> tuple[Array, Array, Array, Array]:
    """The leading singular triplets of a matrix over a unit, by block Lanczos iteration from a fixed start.

    Each cycle keeps the Ritz vectors and adds blocks to them, each the residual of all before it. With the residual
    R = MᵀM·V − V·Θ² of the Ritz vectors V wanted, as many eigenvalues of MᵀM lie within ``√(2k)·‖R‖`` of Θ² in sum
    (Kahan's theorem); that they are the leading ones is as good as certain from a random start.

    Returns:
        u, s, vt, and a bound on the energy missed over that captured.
    """
    q, width = matrix.shape[1], rank + _OVERSAMPLING

    def images(columns: Array) -> tuple[Array, Array]:
        image = matrix.times(columns) / unit
        return image, matrix.transposed_times(image) / unit

    def extended(state: _Krylov, blocks: int) -> _Krylov:
        basis, image, back, rest = state.basis, state.image, state.back, state.residual
        for _ in range(blocks):
            for _ in range(3):  # Where nothing is left, the first time gives rounding errors, blown up by the second.
                rest, _ = thin_qr(rest - matmul(basis, matmul(basis.T, rest)))
            once, twice = images(rest)
            basis, image, back = (
                jnp.concatenate(pair, axis=1) for pair in ((basis, rest), (image, once), (back, twice))
            )
            rest = twice
        _, s, mix = jnp.linalg.svd(thin_qr(image)[1], full_matrices=False)
        mix, s = mix[:width].T, s[:width]
        basis, image, back = (matmul(x, mix) for x in (basis, image, back))
        rest = back - basis * (s * s)
        kept = jnp.sum(s[:rank] * s[:rank])
        bound = math.sqrt(2 * rank) * jnp.linalg.norm(rest[:, :rank])
        missed = bound / jnp.where(kept > 0, kept, jnp.ones_like(kept))
        return _Krylov(basis, image, back, rest, s, missed, state.cycle + 1)

    def unfinished(state: _Krylov) -> Array:
        return (state.cycle < _CYCLES) & (state.missed > _TOLERANCE[jnp.dtype(matrix.dtype).itemsize])

    drawn = jax.random.normal(jax.random.key(0, impl="threefry2x32"), (q, width), matrix.dtype)
    start, _ = thin_qr(drawn)
    image, back = images(start)
    zero = jnp.zeros((), matrix.dtype)
    state = _Krylov(start, image, back, back, jnp.zeros(width, matrix.dtype), zero, jnp.zeros((), jnp.int32))
    state = jax.lax.while_loop(unfinished, lambda state: extended(state, depth - 1), extended(state, depth - 1))
    # The images of the Ritz vectors are orthogonal but for rounding, which matters where values are small.
    image, values = state.image[:, :rank], state.values[:rank]
    u, r = thin_qr(image)
    return u * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(u.dtype), values, state.basis[:, :rank].T, state.missed


def balanced(u: Array, s: Array, vt: Array) -> tuple[Array, Array]:
    """Factors ``a = √s·vt`` and ``b = u·√s``: of equal norm, so that half types hold both as well as can be."""
    half = root(s)
    return half[:, None] * vt, u * half


def truncate(a: Array, b: Array, rank: int) -> tuple[Array, Array, Energy]:
    """The best factors of a given rank for ``b @ a``.

    Args:
        a: ``[R, in]``.
        b: ``[out, R]``.
        rank: At most min(in, out, R).

    Returns:
        ``[rank, in]``, ``[out, rank]``, and the energy that was lost.
    """
    q_b, r_b = thin_qr(b)
    q_a, r_a = thin_qr(a.T)
    return lift_core(q_b, jnp.matmul(r_b, r_a.T, precision="highest"), q_a, rank)


def lift_core(q_b: Array, core: Array, q_a: Array, rank: int) -> tuple[Array, Array, Energy]:
    """The best factors of a given rank for ``q_b @ core @ q_a.T``, where both q are orthonormal.

    Args:
        q_b: ``[out, p]``.
        core: ``[p, q]``.
        q_a: ``[in, q]``.
        rank: At most min(p, q).

    Returns:
        ``[rank, in]``, ``[out, rank]``, and the energy that was lost.
    """
    u, s, vt, energy = truncated_svd(Matrix(core), rank)
    a, b = balanced(u, s, vt)
    return (
        jnp.matmul(a, q_a.T, precision="highest"),
        jnp.matmul(q_b, b, precision="highest"),
        energy,
    )


def squared_norm(a: Array, b: Array) -> Array:
    """``‖b @ a‖²`` in Frobenius norm, from the Gram matrices of the factors.

    Args:
        a: ``[r, in]``.
        b: ``[out, r]``.

    Returns:
        Scalar.
    """
    gram_a = jnp.matmul(a, a.T, precision="highest")
    gram_b = jnp.matmul(b.T, b, precision="highest")
    return jnp.sum(gram_a * gram_b)
