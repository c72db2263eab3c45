"""Means over the tasks that agree in sign: TIES (arXiv:2306.01708) and DARE-TIES (arXiv:2311.03099)."""

from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.consensus import SignMethod, check_sign_method, majority_sign_mask, mean_of_marked
from jaxmerge.methods.pruning import combine_pruned, drop_random, keep_largest
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
    pruning = keep_largest(tasks, density)
    choices = (("majority_sign_method", majority_sign_method),)
    return combine_pruned(tasks, as_weights(weights, tasks), pruning, agree, choices)


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
    pruning = drop_random(tasks, density, key)
    choices = (("majority_sign_method", majority_sign_method),)
    return combine_pruned(tasks, as_weights(weights, tasks), pruning, agree, choices)


def agree(tasks: Array, weights: Array, majority_sign_method: SignMethod) -> Array:
    """The weighted mean over the tasks that carry the elected sign, entry by entry.

    Args:
        tasks: ``[n, ...]``.
        weights: ``[n]``; the election does not see them.
        majority_sign_method: See `jaxmerge.calculate_majority_sign_mask`.

    Returns:
        ``[...]``, float32 or wider.
    """
    return mean_of_marked(weigh(tasks, weights), majority_sign_mask(tasks, majority_sign_method))
