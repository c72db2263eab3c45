"""Pruning of both the outliers and the small entries: Model Breadcrumbs (arXiv:2312.06795)."""

from jaxmerge.base import Array
from jaxmerge.consensus import SignMethod
from jaxmerge.methods.arithmetic import sum_weighted
from jaxmerge.methods.pruning import Densities, combine_pruned, keep_between
from jaxmerge.methods.sign_consensus import Divisor, Election, agree, checked_choices
from jaxmerge.methods.tasks import Tasks, Weights, as_weights, stack_wide


def breadcrumbs(task_tensors: Tasks, weights: Weights, density: Densities, gamma: Densities = 0.01) -> Array:
    """The weighted sum of tasks without their outliers and their small entries (Model Breadcrumbs, arXiv:2312.06795).

    Of a task's N entries the ``int(gamma * N)`` of largest magnitude are dropped, and the next ``int(density * N)``
    kept. The density comes first: where the two exceed 1, which the paper's two fractions to drop cannot, fewer
    outliers go, and none at a density of 1.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Fraction of each task's entries to keep, for all or one for each; see `jaxmerge.prune`.
        gamma: Fraction of each task's entries that are outliers, given and rounded as the density is.

    Returns:
        ``[...]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match, or density or gamma are negative.
    """
    tasks = stack_wide(task_tensors)
    return combine_pruned(tasks, as_weights(weights, tasks), keep_between(tasks, density, gamma), sum_weighted)


def breadcrumbs_ties(
    task_tensors: Tasks,
    weights: Weights,
    density: Densities,
    gamma: Densities = 0.01,
    majority_sign_method: SignMethod = "total",
    *,
    election: Election = "unweighted",
    divisor: Divisor = "count",
) -> Array:
    """TIES with the pruning of `breadcrumbs` in place of trimming.

    Like `jaxmerge.ties` it averages the tasks that agree. mergekit's method of this name adds them up:
    ``election="weighted", divisor="none"``.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Fraction of each task's entries to keep, for all or one for each; see `jaxmerge.prune`.
        gamma: Fraction of each task's entries that are outliers, dropped first.
        majority_sign_method: ``"total"`` or ``"frequency"``; see `jaxmerge.calculate_majority_sign_mask`.
        election: See `jaxmerge.methods.sign_consensus.agree`.
        divisor: See `jaxmerge.methods.sign_consensus.agree`.

    Returns:
        ``[...]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match, density or gamma are negative, or a choice unknown.
    """
    choices = checked_choices(majority_sign_method, election, divisor)
    tasks = stack_wide(task_tensors)
    return combine_pruned(tasks, as_weights(weights, tasks), keep_between(tasks, density, gamma), agree, choices)
