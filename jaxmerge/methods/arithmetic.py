"""Weighted sums of tasks, plain or after pruning (arXiv:2212.04089, arXiv:2311.03099)."""

import jax

from jaxmerge.base import Array
from jaxmerge.consensus import sum_tasks
from jaxmerge.methods.pruning import Densities, combine_pruned, drop_random, keep_largest
from jaxmerge.methods.tasks import Tasks, Weights, as_weights, stack_tasks, weigh


def task_arithmetic(task_tensors: Tasks, weights: Weights) -> Array:
    """``Σ wᵢ tᵢ`` (task arithmetic, arXiv:2212.04089; same name in PEFT).

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.

    Returns:
        ``[...]``, in the wider dtype of tensors and weights.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    tasks = stack_tasks(task_tensors)
    return _sum_weighted(tasks, as_weights(weights, tasks))


def magnitude_prune(task_tensors: Tasks, weights: Weights, density: Densities) -> Array:
    """The weighted sum of the tasks' largest entries (same name in PEFT).

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Fraction of each task's entries to keep, for all or one for each; see `jaxmerge.prune`.

    Returns:
        ``[...]``, in the wider dtype of tensors and weights.

    Raises:
        ValueError: If shapes or counts do not match, or the density is negative.
    """
    tasks = stack_tasks(task_tensors)
    return combine_pruned(tasks, as_weights(weights, tasks), keep_largest(tasks, density), sum_weighted)


def dare_linear(task_tensors: Tasks, weights: Weights, density: Densities, *, key: Array | None = None) -> Array:
    """The weighted sum of randomly dropped and rescaled tasks (DARE, arXiv:2311.03099; same name in PEFT).

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Probability that an entry is kept, for all tasks or one for each; survivors are divided by it.
        key: A `jax.random.key`, folded with the position of each task; or ``[n]`` keys, one per task.

    Returns:
        ``[...]``, in the wider dtype of tensors and weights. Its expectation is `task_arithmetic`.

    Raises:
        ValueError: If shapes or counts do not match, the density is negative, or the key missing.
    """
    tasks = stack_tasks(task_tensors)
    return combine_pruned(tasks, as_weights(weights, tasks), drop_random(tasks, density, key), sum_weighted)


def sum_weighted(tasks: Array, weights: Array) -> Array:
    """``Σ wᵢ tᵢ``, entry by entry.

    Args:
        tasks: ``[n, ...]``.
        weights: ``[n]``.

    Returns:
        ``[...]``.
    """
    return sum_tasks(weigh(tasks, weights))


_sum_weighted = jax.jit(sum_weighted)
