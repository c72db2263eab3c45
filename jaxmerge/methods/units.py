"""Merges of rank-one units: LoRA-LEGO (arXiv:2409.16167)."""

import functools

import jax
import jax.numpy as jnp

from jaxmerge.base import Array
from jaxmerge.methods.tasks import Tasks, Weights
from jaxmerge.methods.weighted import weighted_tasks
from jaxmerge.svd import cutoff, matmul


def lego(task_tensors: Tasks, weights: Weights, *, rank: int, iterations: int = 20) -> Array:
    """LoRA-LEGO: the rank-one units of all adapters in clusters, of which each makes a unit of the result.

    A unit is a row of A with the column of B that belongs to it, laid end to end; ``Σ bᵢ aᵢ`` over its units is an
    adapter. They are clustered by k-means; a cluster's centroid is scaled to the mean of its units' largest
    magnitudes, and all of them so that their product grows by ``√(units / rank)``.

    The clusters depend on which units an adapter is written in: their order does not matter, but a change of basis
    ``(B G, G⁻¹ A)`` does. k-means is deterministic: centers start at the units that one after another lower the sum
    of squared distances most, where scikit-learn's, which the reference code uses, are drawn. Units of zeros, which
    adapters of lower rank can be filled up with, are left out and not counted.

    Args:
        task_tensors: n arrays ``[r, in + out]``, or one array ``[n, r, in + out]``; a row is a unit.
        weights: ``[n]``; they scale the units, both halves alike: an adapter weighs their square, and the sign
            of its weight belongs on one half of its units before.
        rank: Of the result, static under jit, from 1 to ``n · r``.
        iterations: Of k-means, static under jit.

    Returns:
        ``[rank, in + out]``, float32 or wider. Clusters that stay empty, where fewer units differ, are units of zeros.

    Raises:
        ValueError: If shapes or counts do not match, or there are fewer units than the rank.
    """
    tasks = weighted_tasks(task_tensors, weights)
    units = tasks.reshape(-1, tasks.shape[2])
    if not 1 <= rank <= units.shape[0]:
        raise ValueError(f"expected a rank from 1 to {units.shape[0]}, the number of units, got {rank}")
    return _lego(units, rank, iterations)


@functools.partial(jax.jit, static_argnames=("rank", "iterations"))
def _lego(units: Array, rank: int, iterations: int) -> Array:
    there = jnp.any(units != 0, axis=1)
    members = _k_means(matmul(units, units.T), there, rank, iterations)
    sizes = jnp.sum(members, axis=1)
    means = members / jnp.maximum(sizes, 1)[:, None]
    centroids = matmul(means, units)
    wanted, found = matmul(means, _largest(units)), _largest(centroids)
    scale = jnp.where(found > 0, wanted / jnp.where(found > 0, found, 1), 0)
    # The root of what the product grows by, on both halves.
    growth = (jnp.sum(sizes) / rank) ** 0.25
    return growth * scale[:, None] * centroids


def _k_means(gram: Array, there: Array, clusters: int, iterations: int) -> Array:
    """Which units belong to which cluster, from their inner products: centroids are never formed.

    Args:
        gram: ``[N, N]``.
        there: ``[N]`` booleans; other units belong to no cluster.
        clusters: How many.
        iterations: How often centroids are moved to the mean of their units.

    Returns:
        ``[clusters, N]`` of ones and zeros.
    """
    dtype, squares = gram.dtype, jnp.diagonal(gram)
    counted = there.astype(dtype)

    def distances(means: Array) -> Array:
        """Squared, ``[k, N]``, of the units from centroids that are means ``[k, N]`` of them."""
        inner = matmul(means, gram)
        return jnp.sum(inner * means, axis=1)[:, None] - 2 * inner + squares

    def members(means: Array) -> Array:
        nearest = jnp.argmin(distances(means), axis=0)
        return (nearest == jnp.arange(clusters)[:, None]).astype(dtype) * counted

    def moved(means: Array) -> Array:
        inside = members(means)
        sizes = jnp.sum(inside, axis=1, keepdims=True)
        return jnp.where(sizes > 0, inside / jnp.maximum(sizes, 1), means)

    apart = distances(jnp.eye(squares.size, dtype=dtype))
    # Equal units are not apart by rounding errors, so that none of them is a second center.
    apart = jnp.where(apart > cutoff(gram) * (squares[:, None] + squares), apart, 0)

    def one_more(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        means, near = state
        left = matmul(jnp.minimum(near, apart), counted)
        chosen = jnp.argmin(jnp.where(there, left, jnp.inf))
        return means.at[i, chosen].set(1), jnp.minimum(near, apart[chosen])

    means = jnp.zeros((clusters, squares.size), dtype)
    means, _ = jax.lax.fori_loop(0, clusters, one_more, (means, jnp.full_like(squares, jnp.inf)))
    return members(jax.lax.fori_loop(0, iterations, lambda _, means: moved(means), means))


def _largest(rows: Array) -> Array:
    """The largest magnitude of each row."""
    return jnp.max(jnp.abs(rows), axis=1)
