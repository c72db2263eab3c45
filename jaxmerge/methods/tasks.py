"""What every method does first: stack the tasks, check the weights, give each task its key."""

import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxmerge.base import Array, promote
from jaxmerge.consensus import stacked
from jaxmerge.sparsify import Density, as_floating, bind_density, times

Tasks = Array | Sequence[ArrayLike]
Weights = Array | Sequence[ArrayLike]


def stack_tasks(task_tensors: Tasks) -> Array:
    """Stacks task tensors on axis 0.

    Args:
        task_tensors: Sequence of arrays of one shape, or an array ``[n, ...]`` that is stacked already.

    Returns:
        ``[n, ...]``, of the widest dtype among them.

    Raises:
        ValueError: If there is none, or the shapes differ.
    """
    if isinstance(task_tensors, jax.Array | np.ndarray):
        return stacked(task_tensors)
    arrays = [as_floating(tensor) for tensor in task_tensors]
    if not arrays:
        raise ValueError("expected at least one task tensor, got none")
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(f"task tensors differ in shape: {', '.join(str(a.shape) for a in arrays)}")
    dtype = promote(*[array.dtype for array in arrays])
    return jnp.stack([array.astype(dtype) for array in arrays])


def stack_wide(task_tensors: Tasks) -> Array:
    """`stack_tasks`, in float32 or wider."""
    tasks = stack_tasks(task_tensors)
    return tasks.astype(promote(tasks.dtype, jnp.float32))


def with_count(task_tensors: Tasks, weights: Weights, density: ArrayLike | Density) -> tuple[Array, Array, Array]:
    """What methods begin with that select by a score of their own.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``.
        density: Fraction of a task's entries.

    Returns:
        The tasks ``[n, ...]``, float32 or wider; the weights ``[n]``; and how many entries the density comes to.

    Raises:
        ValueError: If shapes or counts do not match, or the density is negative.
    """
    tasks = stack_wide(task_tensors)
    return tasks, as_weights(weights, tasks), bind_density(density, tasks.size // tasks.shape[0]).count


def as_weights(weights: Weights, tasks: Array) -> Array:
    """The weights as an array ``[n]``.

    Args:
        weights: Array, or a sequence of numbers: integers stay integers and floats become float32, as
            ``torch.tensor`` has it, so that half tensors give the dtypes that PEFT gives.
        tasks: ``[n, ...]``.

    Returns:
        ``[n]``.

    Raises:
        ValueError: If there are not n of them.
    """
    if isinstance(weights, jax.Array | np.ndarray):
        array = jnp.asarray(weights)
    elif not isinstance(weights, Sequence):
        raise ValueError(f"expected a sequence of weights, one per task, got {weights!r}")
    elif all(isinstance(weight, numbers.Integral) for weight in weights):
        array = jnp.asarray(np.asarray(weights, np.int32))
    else:
        array = jnp.stack([jnp.asarray(weight, jnp.float32) for weight in weights])
    if array.shape != tasks.shape[:1]:
        raise ValueError(f"expected {tasks.shape[0]} weights, one per task, got shape {array.shape}")
    return array


def weigh(tasks: Array, weights: Array) -> Array:
    """``weights[i] * tasks[i]``, in the wider dtype of the two, rounded before anything is added to it.

    Args:
        tasks: ``[n, ...]``.
        weights: ``[n]``.

    Returns:
        ``[n, ...]``.
    """
    dtype = promote(tasks.dtype, weights.dtype)
    shape = weights.shape + (1,) * (tasks.ndim - 1)
    return times(tasks.astype(dtype), weights.astype(dtype).reshape(shape))


def sum_entries(tasks: Array) -> Array:
    """The sum of each task's entries, half to half along one axis after the other: in the same order in any program.

    Args:
        tasks: ``[n, ...]``.

    Returns:
        ``[n]``.
    """
    while tasks.ndim > 1:
        size = tasks.shape[1]
        if size <= 1:
            tasks = jnp.sum(tasks, axis=1)
            continue
        even = jnp.pad(tasks, [(0, size % 2 if axis == 1 else 0) for axis in range(tasks.ndim)])
        half = even.shape[1] // 2
        tasks = even[:, :half] + even[:, half:]
    return tasks


def task_keys(key: Array, n: int) -> Array:
    """One key per task: the key folded with the task's position, or the keys as given.

    Args:
        key: One `jax.random.key`, or ``[n]`` of them.
        n: Number of tasks.

    Returns:
        ``[n]`` keys.
    """
    if key.ndim == 1:
        if key.shape != (n,):
            raise ValueError(f"expected one key or {n}, one per task, got {key.shape[0]}")
        return key
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(n, dtype=jnp.uint32))
