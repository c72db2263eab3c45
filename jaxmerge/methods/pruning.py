"""What methods that prune share: each task is pruned on its own, then all are combined entry by entry.

Pruning and combining are one fused pass. Since neither looks beyond an entry, tasks can be merged in parts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.methods.tasks import task_keys
from jaxmerge.selection import cut_largest, flat_index
from jaxmerge.sparsify import AtRandom, Between, ByRank, Density, Largest, bind_density, need_key

Pruning = Largest | Between | AtRandom | ByRank


def keep_largest(tasks: Array, density: ArrayLike | Density) -> Largest:
    """Pruning of each task ``[n, ...]`` by magnitude, on its own."""
    bound = bind_density(density, tasks.size // tasks.shape[0])
    return Largest(cut_largest(tasks, bound.count, batch=1) if bound.cut is None else bound.cut)


def drop_random(tasks: Array, density: ArrayLike | Density, key: Array | None) -> AtRandom:
    """Dropping of each task's ``[n, ...]`` entries at random and rescaling of the rest, each task by its own key."""
    bound = bind_density(density, tasks.size // tasks.shape[0])
    return AtRandom(bound.value, jnp.asarray(True), task_keys(need_key(key, "DARE"), tasks.shape[0]))


def keep_between(tasks: Array, density: ArrayLike | Density, gamma: ArrayLike) -> Between:
    """Pruning of each task ``[n, ...]`` to what is largest behind its outliers: the fraction gamma, or what is left."""
    size = tasks.size // tasks.shape[0]
    count = bind_density(density, size).count
    outliers = jnp.minimum(bind_density(gamma, size, "gamma").count, size - count)
    return Between(cut_largest(tasks, outliers, batch=1), cut_largest(tasks, outliers + count, batch=1))


def drop_by_rank(tasks: Array, density: ArrayLike | Density, epsilon: ArrayLike, key: Array | None) -> ByRank:
    """Dropping of each task's ``[n, ...]`` entries at random by their rank in their row, each task by its own key."""
    bound = bind_density(density, tasks.size // tasks.shape[0])
    return ByRank(bound.value, jnp.asarray(epsilon), task_keys(need_key(key, "DELLA"), tasks.shape[0]))


@functools.partial(jax.jit, static_argnames=("combine", "choices"))
def combine_pruned(
    tasks: Array,
    weights: Array,
    pruning: Pruning,
    combine: Callable[..., Array],
    choices: tuple[tuple[str, Any], ...] = (),
) -> Array:
    """Prunes and combines.

    Args:
        tasks: ``[n, ...]``.
        weights: ``[n]``.
        pruning: Of each task.
        combine: ``(tasks [n, ...], weights [n], **choices) -> [...]``, entry by entry.
        choices: Those keyword arguments.

    Returns:
        ``[...]``.
    """
    return combine(pruning.apply(tasks, flat_index(tasks.shape[1:])), weights, **dict(choices))
