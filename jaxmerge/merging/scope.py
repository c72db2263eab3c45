"""Densities of the whole model: one threshold for all modules of an adapter, as the TIES paper trims.

The threshold is found by counting passes over all modules, wherever they lie and in whatever space; nothing of the size
of a module is kept.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import dense, spaces
from jaxmerge.base import Array, has_values
from jaxmerge.merging.stacks import Bucket, Inputs, Program, flatten_batch, in_blocks_passes
from jaxmerge.selection import Cut, magnitude_order

DensityScope = Literal["module", "model"]

# How many orders are tried in one pass: each finds four more bits.
_PROBES = 15


def scope_problems(scope: str, program: Program, density: Any) -> list[str]:
    """What is wrong with a scope."""
    if scope not in ("module", "model"):
        return [f"density_scope {scope!r} is not one of module, model"]
    if scope == "module":
        return []
    if program.row.pruning != "magnitude":
        return [f"method {program.method} does not cut at a magnitude, and takes no density_scope"]
    if isinstance(density, Mapping):
        return ["density_scope model takes one density for all modules"]
    if program.sweeps or not has_values(density):
        return ["density_scope model needs a density that is known, and is no part of a sweep"]
    return []


@functools.partial(jax.jit, static_argnames=("program", "bucket"))
def count_reaching(
    program: Program, bucket: Bucket, inputs: Inputs, numbers: Mapping[str, Any], orders: Array
) -> Array:
    """How many entries of each module and task are at or above orders.

    Args:
        program: The method and its space.
        bucket: The modules' shape.
        inputs: L modules.
        numbers: The numeric hyperparameters.
        orders: ``[probes, n]``, of `magnitude_order`.

    Returns:
        ``[L * batch, probes, n]`` int32.
    """

    def of_module(one: tuple[Any, ...]) -> Array:
        a, b, scales = one
        factors = spaces.Factors([x.astype(bucket.wide) for x in a], [x.astype(bucket.wide) for x in b], scales)
        if program.in_blocks:
            return in_blocks_passes(program, bucket, factors, dense.CPU_BLOCK).count(orders)
        sets, _ = program.form.project(factors, bucket.rank, **program.space_options(numbers))

        def reaching(order: Array) -> Array:
            reached = [
                jnp.sum(magnitude_order(tasks) >= order[:, None, None], (1, 2), dtype=jnp.int32) for tasks in sets
            ]
            return sum(reached[1:], reached[0])

        return jax.lax.map(reaching, orders)

    flat = flatten_batch(inputs, bucket.batch)
    return jax.lax.map(of_module, (flat.a, flat.b, flat.scales))


def model_thresholds(steps: Iterable[Any], n: int, density: np.ndarray) -> np.ndarray:
    """The order at and above which so large a fraction of each adapter's entries lies, over all modules.

    Args:
        steps: The stacks of a merge.
        n: How many adapters there are.
        density: The fraction, of all adapters or ``[n]``.

    Returns:
        ``[n]`` unsigned. Entries that are equal at the threshold are all kept, as in the paper's code.
    """
    steps = list(steps)
    dtype = np.dtype(np.uint64 if any(step.bucket.wide == "float64" for step in steps) else np.uint32)
    low, high = np.zeros(n, dtype), np.full(n, 2 ** (8 * dtype.itemsize - 1), dtype)

    def counted(orders: np.ndarray) -> np.ndarray:
        total = np.zeros(orders.shape, np.int64)
        for step in steps:
            reached = np.asarray(step.count_reaching(orders[:, list(step.present)]), np.int64)
            total[:, list(step.present)] += reached.sum(axis=0)
        return total

    wanted = (density * counted(low[None])[0].astype(np.float64)).astype(np.int64)
    while (high - low > 1).any():
        # Evenly spaced within the bracket; the largest that enough entries reach is its new end.
        share = np.arange(1, _PROBES + 1, dtype=dtype)[:, None]
        width = np.maximum((high - low) // dtype.type(_PROBES + 1), dtype.type(1))
        probes = np.minimum(low + share * width, high - dtype.type(1))
        enough = (counted(probes) >= wanted).sum(axis=0)  # Counts fall as orders grow.
        ladder = np.concatenate([low[None], probes, high[None]])
        low, high = (np.take_along_axis(ladder, (enough + i)[None], axis=0)[0] for i in (0, 1))
        high = np.maximum(high, low + dtype.type(1))
    return low


def as_cuts(thresholds: np.ndarray, modules: int, sets: int) -> tuple[Cut, ...]:
    """The same cut for every module and task set, ``[L, 1, n]``."""
    shape = (modules, 1, thresholds.size)
    everything = np.full(shape, np.iinfo(np.int32).max, np.int32)
    cut: Any = Cut(np.broadcast_to(thresholds, shape), everything)  # type: ignore[arg-type]
    return (cut,) * sets
