"""Singular values and directions of small matrices, in which null directions never count.

A LoRA's weight change has few directions; whatever an SVD returns beyond them is made of rounding errors and of
the routine's whims. Here such directions are zero, so that a method that gives every direction a size gives them none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.svd import cutoff, matmul, svd

# A share may be a number that float32 has not quite: 0.29 of 100 is 29.
_SLACK = 1e-3


class Spectrum(NamedTuple):
    """``u @ diag(s) @ vt``, with null directions of zero length.

    Attributes:
        u: ``[p, k]``; columns are orthonormal, or zero where `s` is.
        s: ``[k]``, descending, not negative.
        vt: ``[k, q]``; rows are orthonormal, or zero where `s` is.
    """

    u: Array
    s: Array
    vt: Array

    @property
    def rank(self) -> Array:
        """Scalar: how many directions there are, in the dtype of `s`."""
        return jnp.sum(self.s > 0).astype(self.s.dtype)

    def product(self, s: Array | None = None) -> Array:
        """``[p, q]``, with other singular values ``[k]`` if given; what they are of null directions does not matter."""
        return matmul(self.u * (self.s if s is None else s), self.vt)

    def kept(self, directions: Array) -> "Spectrum":
        """The same with all directions null for which an array ``[k]`` of booleans is False."""
        keep = directions.astype(self.s.dtype)
        return Spectrum(self.u * keep, self.s * keep, self.vt * keep[:, None])

    def leading(self, count: Array) -> "Spectrum":
        """The same with all but the first directions null, a scalar that may be traced."""
        return self.kept(jnp.arange(self.s.size, dtype=self.s.dtype) < count)


def decompose(matrix: Array, scale: Array | float = 0.0, most: int | None = None) -> Spectrum:
    """The singular value decomposition, with directions null that are no more than rounding.

    Args:
        matrix: ``[p, q]``.
        scale: How large the matrices were of which it is a sum or a difference: their rounding errors stay in it
            when they cancel. A matrix that is small next to it is all null.
        most: The most directions there can be, where that is known; None: ``min(p, q)``.

    Returns:
        ``k = min(p, q, most)`` directions.
    """
    u, s, vt = svd(matrix)
    u, s, vt = u[:, :most], s[:most], vt[:most]
    found = s > cutoff(matrix) * jnp.maximum(s[0], jnp.asarray(scale, s.dtype))
    return Spectrum(u, s, vt).kept(found)


def decompose_each(
    matrices: Array, scale: Array | float = 0.0, most: tuple[int, ...] | None = None
) -> tuple[Spectrum, ...]:
    """`decompose` for each of n matrices, one after another: batched, they can hang on a CPU beside a QR.

    Args:
        matrices: ``[n, p, q]``.
        scale: Of all.
        most: Of each.

    Returns:
        n of them.
    """
    stacked = jax.lax.map(lambda matrix: decompose(matrix, scale), matrices)
    limits = (None,) * matrices.shape[0] if most is None else most
    return tuple(
        Spectrum(u[:, :limit], s[:limit], vt[:limit]) for u, s, vt, limit in zip(*stacked, limits, strict=True)
    )


def polar(matrix: Array) -> Array:
    """The orthogonal polar factor, within the directions that there are.

    Of columns (or rows) that are orthonormal, zero or repeated, it is the nearest set that is orthonormal among
    those that are independent: zeros stay zero, and two equal columns are each divided by √2, where filling up the
    missing direction would bring in a vector that nothing asked for.

    Args:
        matrix: ``[p, q]``.

    Returns:
        ``[p, q]``; its singular values are 1 and 0.
    """
    found = decompose(matrix)
    return matmul(found.u, found.vt)


def mean_value(s: Array) -> Array:
    """The mean of the singular values ``[k]`` that are not null; 0 if all are."""
    return jnp.sum(s) / jnp.maximum(jnp.sum(s > 0).astype(s.dtype), 1)


def count_by(rule: str, limit: Any, values: Any) -> Any:
    """How many of the leading singular values a rule keeps; the rules are kohya's, and energy.

    Args:
        rule: ``"rank"`` keeps as many as the limit says; ``"energy"``, ``"sv_fro"`` and ``"sv_cumulative"`` the fewest
            that keep this fraction of Σσ², of √Σσ² and of Σσ; ``"sv_ratio"`` those of at least σ₁ / limit.
        limit: Scalar; of the values' dtype where they are an array of JAX.
        values: ``[k]`` of NumPy or JAX, largest first, 0 where they are no more than rounding.

    Returns:
        Scalar, at least 1. It may be more than there are values that are not 0 for a rank, and where all are 0.
    """
    if rule == "rank":
        return limit
    xp = values.__array_namespace__()
    relative = values / xp.where(values[0] > 0, values[0], xp.ones_like(values[0]))
    if rule == "sv_ratio":
        return xp.maximum(xp.count_nonzero(relative >= 1 / limit), 1)
    terms = relative if rule == "sv_cumulative" else relative**2
    fraction = limit**2 if rule == "sv_fro" else limit
    left = xp.cumsum(terms[::-1])[::-1]  # From the small end, so that a fraction next to 1 is told from 1.
    return 1 + xp.count_nonzero(left[1:] > left[0] - fraction * left[0])


def at_most(share: ArrayLike, count: Array) -> Array:
    """A share of a count, rounded down to a whole number."""
    return jnp.floor(jnp.asarray(share, count.dtype) * count + _SLACK)


def at_least(share: ArrayLike, count: Array) -> Array:
    """A share of a count, rounded up to a whole number."""
    return jnp.ceil(jnp.asarray(share, count.dtype) * count - _SLACK)
