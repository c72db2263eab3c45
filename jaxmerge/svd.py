"""Products, roots and singular values in full precision, with derivatives also where the plain ones have none."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.base import Array


def matmul(x: Array, y: Array) -> Array:
    """``x @ y`` in full precision on every device."""
    return jnp.matmul(x, y, precision="highest")


def root(square: Array) -> Array:
    """The root; 0 with a slope of 0 where there is nothing, or less by rounding."""
    nothing = square <= 0
    return jnp.where(nothing, 0, jnp.sqrt(jnp.where(nothing, 1, square)))


def cutoff(matrix: Array) -> float:
    """What size of a singular value is no more than rounding, relative to the largest: NumPy's rule for the rank."""
    return float(jnp.finfo(matrix.dtype).eps) * max(matrix.shape[-2:])


@jax.custom_jvp
def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """The reduced decomposition of a matrix, with derivatives where singular values are equal, or 0.

    JAX's own are NaN there: of equal singular values each direction alone has none. What is made of all of them
    together has, as long as they stay equal; so the part that would tell them apart is left out, and the other kept.

    Args:
        matrix: ``[p, q]``.

    Returns:
        ``u [p, k]``, ``s [k]`` descending and ``vt [k, q]``, for ``k = min(p, q)``.
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


@svd.defjvp
def _svd_jvp(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    (matrix,), (change,) = primals, tangents
    u, s, vt = svd(matrix)
    largest = jnp.where(s[0] > 0, s[0], 1)
    relative, change = s / largest, change / largest
    right, left = matmul(change, vt.T), matmul(u.T, change)
    inside = matmul(u.T, right)
    # Half the sum and half the difference of how u and how v turn within themselves.
    both = (inside + inside.T) / 2 * _inverse(relative - relative[:, None], 8 * cutoff(matrix))
    apart = (inside - inside.T) / 2 * _inverse(relative + relative[:, None], 0.0)
    outside = _inverse(relative, 0.0)
    du = matmul(u, both + apart) + (right - matmul(u, inside)) * outside
    dvt = matmul(apart - both, vt) + outside[:, None] * (left - matmul(inside, vt))
    return (u, s, vt), (du, largest * jnp.diagonal(inside), dvt)


def _inverse(array: Array, least: float) -> Array:
    """The inverse; 0 of what is no larger than some magnitude."""
    large = jnp.abs(array) > least
    return jnp.where(large, 1 / jnp.where(large, array, 1), 0)
