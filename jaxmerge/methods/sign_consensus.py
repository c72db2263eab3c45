"""Means over the tasks that agree in sign: TIES (arXiv:2306.01708) and DARE-TIES (arXiv:2311.03099)."""

import functools

import jax
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.consensus import SignMethod, check_sign_method, majority_sign_mask, mean_of_marked
from jaxmerge.methods.arithmetic import drop_random, keep_largest
from jaxmerge.methods.tasks import Tasks, Weights, as_weights, stack_tasks, weigh
from jaxmerge.sparsify import Density


def ties(
    task_tensors: Tasks,
    weights: Weights,
    density: ArrayLike | Density,
    majority_sign_method: SignMethod = "total",
) -> Array:
    """TIES: trim each task, elect a sign per entry, average those that carry it (same name in PEFT).

    As in PEFT, and unlike the paper, trimming is per tensor; the election does not see the weights; and the
    divisor is the number of agreeing tasks, not the sum of their weights.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Fraction of each task's entries to keep; see `jaxmerge.prune`.
        majority_sign_method: ``"total"`` or ``"frequency"``; see `jaxmerge.calculate_majority_sign_mask`.

    Returns:
        ``[...]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match, the density is negative, or the election unknown.
    """
    check_sign_method(majority_sign_method)
    tasks = stack_tasks(task_tensors)
    return _agree(keep_largest(tasks, density), as_weights(weights, tasks), majority_sign_method)


def dare_ties(
    task_tensors: Tasks,
    weights: Weights,
    density: ArrayLike | Density,
    majority_sign_method: SignMethod = "total",
    *,
    key: Array | None = None,
) -> Array:
    """TIES after random dropping and rescaling in place of trimming (same name in PEFT).

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Probability that an entry is kept; survivors are divided by it.
        majority_sign_method: ``"total"`` or ``"frequency"``; see `jaxmerge.calculate_majority_sign_mask`.
        key: A `jax.random.key`, folded with the position of each task; or ``[n]`` keys, one per task.

    Returns:
        ``[...]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match, the density is negative, the election unknown, or the
            key missing.
    """
    check_sign_method(majority_sign_method)
    tasks = stack_tasks(task_tensors)
    return _agree(drop_random(tasks, density, key), as_weights(weights, tasks), majority_sign_method)


@functools.partial(jax.jit, static_argnames="method")
def _agree(tasks: Array, weights: Array, method: str) -> Array:
    return mean_of_marked(weigh(tasks, weights), majority_sign_mask(tasks, method))
