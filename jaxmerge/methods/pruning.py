"""What methods that prune share: each task is pruned on its own, then all are combined entry by entry.

Pruning and combining are one fused pass. Since neither looks beyond an entry, tasks can be merged in parts.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.methods.tasks import task_keys
from jaxmerge.selection import Cut, cut_largest, flat_index
from jaxmerge.sparsify import (
    AtRandom,
    Between,
    ByRank,
    Density,
    Largest,
    Pruning,
    bind_density,
    need_key,
    outlier_counts,
)

# One for all tasks, or one for each.
Densities = ArrayLike | Sequence[float] | Density


def cut_counts(kind: str, bound: Mapping[str, Any], size: int) -> list[Array]:
    """How many of each task's largest entries there are before each cut, ``[S, 1 or n]``; none where nothing is cut."""
    counts = {name: x.count.reshape(x.count.shape[0], -1) for name, x in bound.items() if isinstance(x, Density)}
    if kind == "magnitude":
        return [counts["density"]]
    if kind == "outliers":
        return list(outlier_counts(counts["density"], counts["gamma"], size))
    return []


def pruning_of(kind: str, keys: Any, density: Any = None, gamma: Any = None, epsilon: Any = None) -> Pruning | None:
    """The pruning of a row's kind, once the density's cuts ``[k, n]`` have been found."""
    del gamma  # It is in the cuts.
    if kind == "magnitude":
        return _largest(density.cut)
    if kind == "outliers":
        return _between(density.cut)
    if kind == "random":
        return AtRandom(density.value, jnp.asarray(True), keys)
    return ByRank(density.value, epsilon, keys) if kind == "rank" else None


def _largest(cuts: Cut) -> Largest:
    return Largest(jax.tree.map(lambda x: x[0], cuts))


def _between(cuts: Cut) -> Between:
    return Between(*(jax.tree.map(lambda x, i=i: x[i], cuts) for i in range(2)))


def keep_largest(tasks: Array, density: Densities) -> Largest:
    """Pruning of each task ``[n, ...]`` by magnitude, on its own."""
    bound = bind_density(density, tasks.size // tasks.shape[0], tasks=tasks.shape[0])
    if bound.cut is not None:
        return _largest(bound.cut)
    return Largest(cut_largest(tasks, bound.count, batch=1))


def drop_random(tasks: Array, density: Densities, key: Array | None) -> AtRandom:
    """Dropping of each task's ``[n, ...]`` entries at random and rescaling of the rest, each task by its own key."""
    bound = bind_density(density, tasks.size // tasks.shape[0], tasks=tasks.shape[0])
    return AtRandom(bound.value, jnp.asarray(True), task_keys(need_key(key, "DARE"), tasks.shape[0]))


def keep_between(tasks: Array, density: Densities, gamma: Densities) -> Between:
    """Pruning of each task ``[n, ...]`` to what is largest behind its outliers: the fraction gamma, or what is left."""
    n, size = tasks.shape[0], tasks.size // tasks.shape[0]
    if isinstance(density, Density) and density.cut is not None:
        return _between(density.cut)
    count, outliers = bind_density(density, size, tasks=n).count, bind_density(gamma, size, "Gamma", n).count
    return Between(*(cut_largest(tasks, end, batch=1) for end in outlier_counts(count, outliers, size)))


def drop_by_rank(tasks: Array, density: Densities, epsilon: ArrayLike | Sequence[float], key: Array | None) -> ByRank:
    """Dropping of each task's ``[n, ...]`` entries at random by their rank in their row, each task by its own key."""
    bound = bind_density(density, tasks.size // tasks.shape[0], tasks=tasks.shape[0])
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
