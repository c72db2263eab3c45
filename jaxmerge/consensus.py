"""Where tasks agree: sign election, and the mean over those that agree (TIES, arXiv:2306.01708)."""

import functools
import operator
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge.base import Array, promote
from jaxmerge.sparsify import as_floating, round_to

SignMethod = Literal["total", "frequency"]
SIGN_METHODS = ("total", "frequency")


def sum_tasks(tasks: Array) -> Array:
    """Sums over axis 0, one task after another.

    A fixed order gives the same bits however the array is sharded; a sum of zeros is +0, since the collectives
    of a sharded sum lose its sign. Half types are summed in float32 and rounded once.

    Args:
        tasks: ``[n, ...]``.

    Returns:
        ``[...]``, of the tasks' dtype.
    """
    wide = tasks.astype(promote(tasks.dtype, jnp.float32))
    total = functools.reduce(operator.add, [wide[i] for i in range(wide.shape[0])])
    # -0 + 0 is +0, and x + -0 is x; a plain `+ 0` is folded away, a plain choice of 0 has no gradient.
    total += jnp.where(total == 0, jnp.zeros((), wide.dtype), -jnp.zeros((), wide.dtype))
    return round_to(total, tasks.dtype)


def check_sign_method(method: str) -> None:
    """Raises a ValueError for a sign election that does not exist."""
    if method not in SIGN_METHODS:
        known = " and ".join(map(repr, SIGN_METHODS))
        raise ValueError(f"Unknown majority_sign_method {method!r}: there are {known}")


def calculate_majority_sign_mask(tensor: ArrayLike, method: SignMethod = "total") -> Array:
    """Elects a sign for every entry and marks the tasks that carry it (same name in PEFT).

    Args:
        tensor: ``[n, ...]``, the tasks stacked on axis 0.
        method: ``"total"`` elects the sign of the sum, ``"frequency"`` the sign that more tasks have.
            Where the vote is even, + is elected.

    Returns:
        Boolean ``[n, ...]``. Zeros agree with no sign.

    Raises:
        ValueError: If the method is unknown.
    """
    check_sign_method(method)
    return majority_sign_mask(stacked(tensor), method)


@functools.partial(jax.jit, static_argnames="method")
def majority_sign_mask(tasks: Array, method: str) -> Array:
    """The kernel of `calculate_majority_sign_mask`, for arguments that are known to be right."""
    signs = jnp.sign(tasks)
    votes = sum_tasks(tasks if method == "total" else signs)
    one = jnp.ones((), tasks.dtype)
    return signs == jnp.where(votes >= 0, one, -one)[None]


def disjoint_merge(task_tensors: ArrayLike, majority_sign_mask: ArrayLike) -> Array:
    """The mean over the tasks that the mask marks, entry by entry (same name in PEFT).

    Args:
        task_tensors: ``[n, ...]``, the tasks stacked on axis 0.
        majority_sign_mask: Boolean ``[n, ...]``.

    Returns:
        ``[...]``, float32 or wider: the sum of the marked entries over their count, 0 where none is marked.
        What is not marked does not matter, even if it is inf or NaN.

    Raises:
        ValueError: If the shapes differ.
    """
    tasks, mask = stacked(task_tensors), jnp.asarray(majority_sign_mask, bool)
    if tasks.shape != mask.shape:
        raise ValueError(f"tasks of shape {tasks.shape} do not go with a mask of shape {mask.shape}")
    return mean_of_marked(tasks, mask)


@jax.jit
def mean_of_marked(tasks: Array, mask: Array) -> Array:
    """The kernel of `disjoint_merge`."""
    wide = promote(tasks.dtype, jnp.float32)
    total = sum_tasks(jnp.where(mask, tasks, jnp.zeros_like(tasks))).astype(wide)
    count = jnp.maximum(jnp.sum(mask, axis=0, dtype=jnp.int32), 1)
    return total / count.astype(wide)


def stacked(tensor: ArrayLike) -> Array:
    """Tasks stacked on axis 0 as a floating-point array; a ValueError if it is not one."""
    tasks = as_floating(tensor)
    if tasks.ndim == 0 or tasks.shape[0] == 0:
        raise ValueError(f"expected tasks stacked on axis 0, got an array of shape {tasks.shape}")
    return tasks
