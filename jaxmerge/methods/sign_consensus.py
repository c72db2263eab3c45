"""Means over the tasks that agree in sign: TIES (arXiv:2306.01708) and DARE-TIES (arXiv:2311.03099)."""

from typing import Literal

import jax.numpy as jnp

from jaxmerge.base import Array, promote
from jaxmerge.consensus import SignMethod, check_sign_method, majority_sign_mask, mean_of_marked, sum_tasks
from jaxmerge.methods.pruning import Densities, combine_pruned, drop_random, keep_largest
from jaxmerge.methods.tasks import Tasks, Weights, as_weights, stack_tasks, weigh

Election = Literal["unweighted", "weighted"]
Divisor = Literal["count", "weight", "none"]
_CHOICES = {"election": ("unweighted", "weighted"), "divisor": ("count", "weight", "none")}
# Sums of weights below this divide nothing.
_NO_WEIGHT = 1e-8


def ties(
    task_tensors: Tasks,
    weights: Weights,
    density: Densities,
    majority_sign_method: SignMethod = "total",
    *,
    election: Election = "unweighted",
    divisor: Divisor = "count",
) -> Array:
    """TIES: trim each task, elect a sign per entry, average those that carry it (same name in PEFT).

    As in PEFT, and unlike the paper, trimming is per tensor; and unless it is chosen otherwise the election does
    not see the weights, and the divisor is the number of agreeing tasks, not the sum of their weights. mergekit's
    ``ties`` is ``election="weighted", divisor="weight"``.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Fraction of each task's entries to keep, for all or one for each; see `jaxmerge.prune`.
        majority_sign_method: ``"total"`` or ``"frequency"``; see `jaxmerge.calculate_majority_sign_mask`.
        election: Of what the sign is elected; see `agree`.
        divisor: Of the sum over the agreeing tasks; see `agree`.

    Returns:
        ``[...]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match, the density is negative, or a choice unknown.
    """
    choices = checked_choices(majority_sign_method, election, divisor)
    tasks = stack_tasks(task_tensors)
    pruning = keep_largest(tasks, density)
    return combine_pruned(tasks, as_weights(weights, tasks), pruning, agree, choices)


def dare_ties(
    task_tensors: Tasks,
    weights: Weights,
    density: Densities,
    majority_sign_method: SignMethod = "total",
    *,
    election: Election = "unweighted",
    divisor: Divisor = "count",
    key: Array | None = None,
) -> Array:
    """TIES after random dropping and rescaling in place of trimming (same name in PEFT).

    mergekit's method of this name adds up the tasks that agree: ``election="weighted", divisor="none"``.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Probability that an entry is kept, for all tasks or one for each; survivors are divided by it.
        majority_sign_method: ``"total"`` or ``"frequency"``; see `jaxmerge.calculate_majority_sign_mask`.
        election: Of what the sign is elected; see `agree`.
        divisor: Of the sum over the agreeing tasks; see `agree`.
        key: A `jax.random.key`, folded with the position of each task; or ``[n]`` keys, one per task.

    Returns:
        ``[...]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match, the density is negative, a choice unknown, or the key missing.
    """
    choices = checked_choices(majority_sign_method, election, divisor)
    tasks = stack_tasks(task_tensors)
    pruning = drop_random(tasks, density, key)
    return combine_pruned(tasks, as_weights(weights, tasks), pruning, agree, choices)


def checked_choices(
    majority_sign_method: SignMethod, election: Election, divisor: Divisor = "count"
) -> tuple[tuple[str, str], ...]:
    """The choices of `agree` as `combine_pruned` takes them; a ValueError if one does not exist."""
    check_sign_method(majority_sign_method)
    given = {"election": election, "divisor": divisor}
    for name, known in _CHOICES.items():
        if given[name] not in known:
            raise ValueError(f"Unknown {name} {given[name]!r}: there are {', '.join(map(repr, known))}")
    return (("majority_sign_method", majority_sign_method), *given.items())


def elect(tasks: Array, weighed: Array, majority_sign_method: SignMethod, election: Election) -> Array:
    """Which tasks ``[n, ...]`` carry the sign that is elected among them, as they are or as they are weighed."""
    return majority_sign_mask(tasks if election == "unweighted" else weighed, majority_sign_method)


def agree(
    tasks: Array,
    weights: Array,
    majority_sign_method: SignMethod,
    election: Election = "unweighted",
    divisor: Divisor = "count",
) -> Array:
    """The weighted mean, or sum, over the tasks that carry the elected sign, entry by entry.

    Args:
        tasks: ``[n, ...]``.
        weights: ``[n]``.
        majority_sign_method: See `jaxmerge.calculate_majority_sign_mask`.
        election: ``"unweighted"`` elects among the tasks as they are, ``"weighted"`` among the weighted tasks: one of
            weight 0 has no vote, and one of negative weight votes against its own sign.
        divisor: ``"count"`` divides by the number of tasks that carry the sign, ``"weight"`` by the sum of their
            weights, or by 1 where that is 0 within 1e-8, and ``"none"`` leaves their sum.

    Returns:
        ``[...]``, float32 or wider.
    """
    weighed = weigh(tasks, weights)
    mask = elect(tasks, weighed, majority_sign_method, election)
    if divisor == "count":
        return mean_of_marked(weighed, mask)
    wide = promote(weighed.dtype, jnp.float32)
    total = sum_tasks(jnp.where(mask, weighed, jnp.zeros_like(weighed))).astype(wide)
    if divisor == "none":
        return total
    each = weights.astype(wide).reshape(weights.shape + (1,) * (tasks.ndim - 1))
    weight = sum_tasks(jnp.where(mask, each, jnp.zeros_like(each)))
    return total / jnp.where(jnp.abs(weight) < _NO_WEIGHT, jnp.ones_like(weight), weight)
