"""Weighted sums of tasks, plain or after pruning (arXiv:2212.04089, arXiv:2311.03099)."""

import jax
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.consensus import sum_tasks
from jaxmerge.methods.tasks import Tasks, Weights, as_weights, stack_tasks, task_keys, weigh
from jaxmerge.sparsify import Density, bind_density, need_key, prune


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
    return _weighted_sum(tasks, as_weights(weights, tasks))


def magnitude_prune(task_tensors: Tasks, weights: Weights, density: ArrayLike | Density) -> Array:
    """The weighted sum of the tasks' largest entries (same name in PEFT).

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Fraction of each task's entries to keep; see `jaxmerge.prune`.

    Returns:
        ``[...]``, in the wider dtype of tensors and weights.

    Raises:
        ValueError: If shapes or counts do not match, or the density is negative.
    """
    tasks = stack_tasks(task_tensors)
    return _weighted_sum(keep_largest(tasks, density), as_weights(weights, tasks))


def dare_linear(
    task_tensors: Tasks, weights: Weights, density: ArrayLike | Density, *, key: Array | None = None
) -> Array:
    """The weighted sum of randomly dropped and rescaled tasks (DARE, arXiv:2311.03099; same name in PEFT).

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Probability that an entry is kept; survivors are divided by it.
        key: A `jax.random.key`, folded with the position of each task; or ``[n]`` keys, one per task.

    Returns:
        ``[...]``, in the wider dtype of tensors and weights. Its expectation is `task_arithmetic`.

    Raises:
        ValueError: If shapes or counts do not match, the density is negative, or the key missing.
    """
    tasks = stack_tasks(task_tensors)
    return _weighted_sum(drop_random(tasks, density, key), as_weights(weights, tasks))


def keep_largest(tasks: Array, density: ArrayLike | Density) -> Array:
    """Prunes each task ``[n, ...]`` by magnitude, on its own."""
    bound = bind_density(density, tasks.size // tasks.shape[0])
    return jax.vmap(lambda task: prune(task, bound, "magnitude"))(tasks)


def drop_random(tasks: Array, density: ArrayLike | Density, key: Array | None) -> Array:
    """Drops entries of each task ``[n, ...]`` at random and rescales the rest, each task by its own key."""
    bound = bind_density(density, tasks.size // tasks.shape[0])
    keys = task_keys(need_key(key, "DARE"), tasks.shape[0])
    return jax.vmap(lambda task, key: prune(task, bound, "random", rescale=True, key=key))(tasks, keys)


@jax.jit
def _weighted_sum(tasks: Array, weights: Array) -> Array:
    return sum_tasks(weigh(tasks, weights))
