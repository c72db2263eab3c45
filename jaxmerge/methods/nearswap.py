"""Entries of one task in another where the two are near each other: mergekit's nearswap."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.methods.tasks import Tasks, Weights, as_weights, stack_wide, weigh


def nearswap(task_tensors: Tasks, weights: Weights, t: ArrayLike) -> Array:
    """The first task, moved towards the second by no more than ``t`` at each entry (mergekit's nearswap).

    With a and b the weighted tasks this is ``(1 - s) a + s b`` for ``s = min(t / |a - b|, 1)``: b where the two are
    nearer than ``t``. mergekit divides by 1e-6 at least, and so moves by less than that where ``t`` is smaller.

    Args:
        task_tensors: Two arrays of one shape, or one array ``[2, ...]``. One alone, which is what is left of a module
            that only one adapter has, comes back weighted.
        weights: ``[2]``, of any sign.
        t: A distance between entries, not negative.

    Returns:
        ``[...]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match, or there are more than two tasks.
    """
    tasks = stack_wide(task_tensors)
    if tasks.shape[0] > 2:
        raise ValueError(f"nearswap takes two tasks, got {tasks.shape[0]}")
    return _combine(tasks, as_weights(weights, tasks), jnp.asarray(t, tasks.dtype))


def move(tasks: Array, weights: Array, t: Array) -> Array:
    """The first weighted task, moved towards the last by no more than ``t``, entry by entry.

    Args:
        tasks: ``[n, ...]``.
        weights: ``[n]``.
        t: Scalar.

    Returns:
        ``[...]``.
    """
    weighed = weigh(tasks, weights)
    first, last = weighed[0], weighed[-1]
    step = last - first
    return jnp.where(jnp.abs(step) <= t, last, first + jnp.sign(step) * t)


_combine = jax.jit(move)
