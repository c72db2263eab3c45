"""Hyperparameters bound to the tasks that a space makes of a module: densities become counts of entries, and cuts."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import spaces
from jaxmerge.base import Array, on_host
from jaxmerge.catalog import METHODS, SPACES
from jaxmerge.merging.stacks.inputs import Bucket, Inputs
from jaxmerge.merging.stacks.program import Program
from jaxmerge.selection import Cut, cut_on_host
from jaxmerge.sparsify import bind_density


@functools.cache
def set_sizes(
    space: str, method: str, features: tuple[int, int], ranks: tuple[int, ...], rank: int
) -> tuple[int | np.ndarray, ...]:
    """How many entries each task has, in each task set that a space makes of a module.

    Where it hangs on values how many rows, or rows and columns, hold anything: for any number of them, ``[p + 1]`` or
    ``[p + 1, q + 1]``.
    """
    form = SPACES[space].load(METHODS[method])
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out, in_ = features

    def project(a: list[Array], b: list[Array], scales: Array) -> Sequence[Array]:
        return form.project(spaces.Factors(a, b, scales), rank)[0]

    sets = jax.eval_shape(
        project, [shape((r, in_)) for r in ranks], [shape((out, r)) for r in ranks], shape((len(ranks),))
    )
    if form.filled is None:
        return tuple(math.prod(tasks.shape[1:]) for tasks in sets)
    held = form.filled_axes
    return tuple(
        functools.reduce(np.multiply.outer, [np.arange(size + 1) for size in tasks.shape[1 : 1 + held]])
        * math.prod(tasks.shape[1 + held :])
        for tasks in sets
    )


# The numeric hyperparameters of S settings, bound to the size of each task set: name -> ``[S]``, or ``[S, n]`` where
# every adapter has its own.
Numbers = Sequence[Mapping[str, Any]]


def bind_numbers(program: Program, bucket: Bucket, settings: Sequence[Mapping[str, Any]]) -> Numbers:
    """Binds the numeric hyperparameters of each setting to the size of each task set that the space makes."""
    n = len(bucket.ranks)

    def along_settings(*leaves: Any) -> Any:
        return np.stack(leaves) if all(map(on_host, leaves)) else jnp.stack(leaves)

    densities = {h.name for h in program.hyperparameters if h.kind == "density"}
    several = {name for numbers in settings for name, value in numbers.items() if np.ndim(value)}

    def bind_one(name: str, value: Any, size: int | np.ndarray) -> Any:
        if name in several:
            value = jnp.broadcast_to(value, n) if isinstance(value, jax.Array) else np.broadcast_to(value, n)
        if name in densities:
            return bind_density(value, size, tasks=n)
        return value.astype(bucket.wide) if isinstance(value, jax.Array) else np.asarray(value, bucket.wide)

    def bind(size: int | np.ndarray) -> Mapping[str, Any]:
        bound = [{name: bind_one(name, value, size) for name, value in numbers.items()} for numbers in settings]
        return jax.tree.map(along_settings, *bound)

    sizes = set_sizes(program.space, program.method, bucket.features, bucket.ranks, bucket.rank)
    return [bind(size) for size in sizes]


def find_cuts(program: Program, bucket: Bucket, inputs: Inputs, numbers: Numbers) -> tuple[Cut, ...] | None:
    """The cuts of tasks that lie in the host's memory as they are, where NumPy finds them sooner than a program."""
    if not (program.form.as_stored and program.row.pruning == "magnitude"):
        return None
    counts = [one["density"].count for one in numbers]
    if not all(map(on_host, (*counts, *inputs.a, *inputs.b))):
        return None

    def cuts_of(arrays: Sequence[Any], count: Any) -> Cut:
        tasks = [np.asarray(x).reshape(-1, math.prod(x.shape[-2:])) for x in arrays]
        modules, n = tasks[0].shape[0], len(tasks)
        rows = [task[i].astype(bucket.wide, copy=False) for i in range(modules) for task in tasks]
        of_tasks = np.asarray(count).reshape(len(count), -1).T
        cut = cut_on_host(rows, np.broadcast_to(of_tasks, (modules, n, len(count))).reshape(-1, len(count)))
        return jax.tree.map(lambda x: x.reshape(modules, n, -1).swapaxes(1, 2)[:, :, None], cut)

    return tuple(map(cuts_of, (inputs.a, inputs.b), counts))
