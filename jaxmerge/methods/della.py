"""Random dropping by the rank of magnitudes: DELLA (arXiv:2406.11617)."""

from collections.abc import Sequence

from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.consensus import SignMethod
from jaxmerge.methods.arithmetic import sum_weighted
from jaxmerge.methods.pruning import Densities, combine_pruned, drop_by_rank
from jaxmerge.methods.sign_consensus import Divisor, Election, agree, checked_choices
from jaxmerge.methods.tasks import Tasks, Weights, as_weights, stack_wide


def della(
    task_tensors: Tasks,
    weights: Weights,
    density: Densities,
    epsilon: ArrayLike | Sequence[float] = 0.14,
    majority_sign_method: SignMethod = "total",
    *,
    election: Election = "unweighted",
    divisor: Divisor = "count",
    key: Array | None = None,
) -> Array:
    """DELLA: drop at random by rank, rescale, elect a sign per entry, average those that carry it (arXiv:2406.11617).

    Within a row, which lies along the last axis, the probability that an entry is kept grows linearly with the rank of
    its magnitude, from ``density - epsilon / 2`` for the smallest to ``density + epsilon / 2`` for the largest. The
    window narrows where it would leave [0, 1], so that the mean is always the density, and all is kept at 1. Survivors
    are divided by their own probability, as in the paper: the expectation of a pruned task is the task. mergekit
    rescales to the task's L1 norm instead, and calls half the window epsilon: its 0.15 is 0.3 here.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ..., q]``.
        weights: ``[n]``, of any sign.
        density: Mean probability that an entry is kept, for all tasks or one for each.
        epsilon: The width of the window; the default is that of the authors' example.
        majority_sign_method: ``"total"`` or ``"frequency"``; see `jaxmerge.calculate_majority_sign_mask`.
        election: See `jaxmerge.methods.sign_consensus.agree`.
        divisor: See `jaxmerge.methods.sign_consensus.agree`.
        key: A `jax.random.key`, folded with the position of each task; or ``[n]`` keys, one per task.

    Returns:
        ``[..., q]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match, the density is negative, a choice unknown, or the key missing.
    """
    choices = checked_choices(majority_sign_method, election, divisor)
    tasks = stack_wide(task_tensors)
    pruning = drop_by_rank(tasks, density, epsilon, key)
    return combine_pruned(tasks, as_weights(weights, tasks), pruning, agree, choices)


def della_linear(
    task_tensors: Tasks,
    weights: Weights,
    density: Densities,
    epsilon: ArrayLike | Sequence[float] = 0.14,
    *,
    key: Array | None = None,
) -> Array:
    """The weighted sum of tasks that are dropped by rank and rescaled as in `della` (MagPrune, arXiv:2406.11617).

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ..., q]``.
        weights: ``[n]``, of any sign.
        density: Mean probability that an entry is kept, for all tasks or one for each.
        epsilon: By how much a row's largest entry is kept with more probability than its smallest.
        key: A `jax.random.key`, folded with the position of each task; or ``[n]`` keys, one per task.

    Returns:
        ``[..., q]``, float32 or wider. Its expectation is `jaxmerge.task_arithmetic`.

    Raises:
        ValueError: If shapes or counts do not match, the density is negative, or the key missing.
    """
    tasks = stack_wide(task_tensors)
    return combine_pruned(tasks, as_weights(weights, tasks), drop_by_rank(tasks, density, epsilon, key), sum_weighted)
