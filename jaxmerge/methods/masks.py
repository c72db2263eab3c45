"""Masks of the entries that tasks use: Consensus merging with TALL masks (arXiv:2405.07813)."""

import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.consensus import sum_tasks
from jaxmerge.methods.arithmetic import sum_weighted
from jaxmerge.methods.tasks import Tasks, Weights, as_weights, stack_wide


def consensus(task_tensors: Tasks, weights: Weights, threshold: ArrayLike = 0.4, agreeing: int = 2) -> Array:
    """The weighted sum of the tasks where several of them use it (Consensus merging, arXiv:2405.07813).

    A task t uses an entry (its TALL mask) where ``|t| > threshold · |Σt - t|``: where the sum of the tasks, without
    weights, is nearer to the task than nothing is. Entries that fewer than ``agreeing`` tasks use become 0: none does
    ("catastrophic" weights), or one alone ("selfish" ones).

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        threshold: λ of the masks. The paper tunes it for each task, from 0.2 to 0.6; the default is the middle.
        agreeing: How many tasks must use an entry. Where there are fewer tasks than that, all of them must: a single
            task comes back as it is.

    Returns:
        ``[...]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match, or ``agreeing`` is not a whole number from 1.
    """
    if isinstance(agreeing, bool) or operator.index(agreeing) < 1:
        raise ValueError(f"agreeing should be a whole number from 1, got {agreeing!r}")
    tasks = stack_wide(task_tensors)
    return _combine(tasks, as_weights(weights, tasks), jnp.asarray(threshold, tasks.dtype), operator.index(agreeing))


def sum_used(tasks: Array, weights: Array, threshold: Array, agreeing: int) -> Array:
    """The weighted sum where enough tasks use it, entry by entry; the arguments are those of `consensus`.

    Args:
        tasks: ``[n, ...]``.
        weights: ``[n]``.
        threshold: Scalar.
        agreeing: From 1.

    Returns:
        ``[...]``.
    """
    used = jnp.abs(tasks) > threshold * jnp.abs(sum_tasks(tasks) - tasks)
    kept = jnp.sum(used, axis=0, dtype=jnp.int32) >= min(agreeing, tasks.shape[0])
    merged = sum_weighted(tasks, weights)
    return jnp.where(kept, merged, jnp.zeros_like(merged))


_combine = jax.jit(sum_used, static_argnames="agreeing")
