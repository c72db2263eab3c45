"""What the spectral methods share: weighted tasks, and which of them are there at all.

All of them are homogeneous, so weights come first: a method of the tasks and weights is the method of the weighted
tasks. A common weight is the papers' λ; a negative one turns its task round; and a task of weight 0 is as absent as
one of zeros, for tasks that are zero count in no number of tasks.
"""

import jax.numpy as jnp

from jaxmerge.base import Array, promote
from jaxmerge.methods.tasks import Tasks, Weights, as_weights, stack_tasks, weigh

Ranks = tuple[int, ...] | None


def weighted_tasks(task_tensors: Tasks, weights: Weights) -> Array:
    """``wᵢ tᵢ``.

    Args:
        task_tensors: n arrays ``[p, q]``, or one array ``[n, p, q]``.
        weights: ``[n]``, of any sign.

    Returns:
        ``[n, p, q]``, float32 or wider.

    Raises:
        ValueError: If the tasks are no matrices, or shapes or counts do not match.
    """
    tasks = stack_tasks(task_tensors)
    if tasks.ndim != 3:
        raise ValueError(f"expected task matrices [n, p, q], got shape {tasks.shape}")
    weights = as_weights(weights, tasks)
    dtype = promote(tasks.dtype, weights.dtype, jnp.float32)
    return weigh(tasks.astype(dtype), weights.astype(dtype))


def ranked_tasks(task_tensors: Tasks, weights: Weights, ranks: Ranks) -> tuple[Array, tuple[int, ...]]:
    """`weighted_tasks`, and the rank of each, none above what a matrix ``[p, q]`` can have.

    Args:
        task_tensors: n arrays ``[p, q]``, or one array ``[n, p, q]``.
        weights: ``[n]``, of any sign.
        ranks: n of them; None: as much as can be.

    Returns:
        ``[n, p, q]``, float32 or wider, and n ranks.

    Raises:
        ValueError: If the tasks are no matrices, or shapes or counts do not match.
    """
    tasks = weighted_tasks(task_tensors, weights)
    n, p, q = tasks.shape
    ranks = (min(p, q),) * n if ranks is None else tuple(ranks)
    if len(ranks) != n:
        raise ValueError(f"expected {n} ranks, one per task, got {len(ranks)}")
    return tasks, tuple(min(rank, p, q) for rank in ranks)


def task_norms(tasks: Array) -> Array:
    """The Frobenius norm ``[n]`` of each task ``[n, p, q]``."""
    # Squares of very small or large numbers would leave the dtype's range.
    unit = jnp.max(jnp.abs(tasks), axis=(1, 2))
    safe = jnp.where(unit > 0, unit, 1)
    return unit * jnp.sqrt(jnp.sum(jnp.square(tasks / safe[:, None, None]), axis=(1, 2)))


def tasks_present(tasks: Array) -> Array:
    """Scalar, at least 1: how many of the tasks ``[n, p, q]`` are not zero, in their dtype."""
    return jnp.maximum(jnp.sum(jnp.any(tasks != 0, axis=(1, 2))).astype(tasks.dtype), 1)
