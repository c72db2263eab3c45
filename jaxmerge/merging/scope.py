"""Densities of the whole model: one threshold for all modules of an adapter, as the TIES paper trims.

Of outliers too, which the paper of Breadcrumbs drops layer by layer: then there are two. They are found by counting
passes over all modules, wherever they lie and in whatever space; nothing of the size of a module is kept.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import dense, spaces
from jaxmerge.base import Array, has_values
from jaxmerge.merging.stacks import Bucket, Inputs, Program, flatten_batch, in_blocks_passes
from jaxmerge.merging.stacks.binding import set_sizes
from jaxmerge.selection import Cut, magnitude_order

DensityScope = Literal["module", "model"]

# How many orders are tried in one pass: each finds four more bits.
_PROBES = 15


def scope_problems(scope: str, program: Program, numbers: Mapping[str, Any]) -> list[str]:
    """What is wrong with a scope."""
    if scope not in ("module", "model"):
        return [f"density_scope {scope!r} is not one of module, model"]
    if scope == "module":
        return []
    if program.row.pruning not in ("magnitude", "outliers"):
        return [f"method {program.method} does not cut at a magnitude, and takes no density_scope"]
    fractions = {name: numbers[name] for name in program.row.per_adapter}
    problems = [
        f"density_scope model takes one {name} for all modules"
        for name, value in fractions.items()
        if isinstance(value, Mapping)
    ]
    return problems or [
        f"density_scope model needs a {name} that is known, and is no part of a sweep"
        for name, value in fractions.items()
        if program.sweeps or not has_values(value)
    ]


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
        sets, frame = program.form.project(factors, bucket.rank, **program.space_options(numbers))
        empty = _empty(program, bucket, frame)

        def reaching(order: Array) -> Array:
            reached = [
                jnp.sum(magnitude_order(tasks) >= order[:, None, None], (1, 2), dtype=jnp.int32) for tasks in sets
            ]
            # What no task reaches are zeros, the least of all numbers.
            return sum(reached[1:], reached[0]) - jnp.where(order <= jnp.ones_like(order), empty, 0)

        return jax.lax.map(reaching, orders)

    flat = flatten_batch(inputs, bucket.batch)
    return jax.lax.map(of_module, (flat.a, flat.b, flat.scales))


def _empty(program: Program, bucket: Bucket, frame: Any) -> Array | int:
    """How many entries of each task lie in rows and columns that no task reaches, of which densities are not."""
    filled = program.form.filled
    if filled is None:
        return 0
    (held,) = set_sizes(program.space, program.method, bucket.features, bucket.ranks, bucket.rank)
    return int(np.max(held)) - jnp.asarray(held, jnp.int32)[filled(frame)]


def model_thresholds(steps: Iterable[Any], n: int, density: np.ndarray, gamma: np.ndarray | None = None) -> np.ndarray:
    """The orders at and above which so large fractions of each adapter's entries lie, over all modules.

    Args:
        steps: The stacks of a merge.
        n: How many adapters there are.
        density: The fraction to keep, of all adapters or ``[n]``.
        gamma: The fraction of outliers above these, likewise, as far as the density leaves it; None keeps them.

    Returns:
        ``[1, n]`` unsigned, or ``[2, n]``: where outliers end, and what is kept behind them. Entries that are equal at
        a threshold are all kept, as in the paper's code.
    """
    steps = list(steps)
    dtype = np.dtype(np.uint64 if any(step.bucket.wide == "float64" for step in steps) else np.uint32)

    def counted(orders: np.ndarray) -> np.ndarray:
        """How many entries reach orders ``[..., n]``."""
        total = np.zeros(orders.shape, np.int64)
        for step in steps:
            own = orders[..., list(step.present)]
            reached = np.asarray(step.count_reaching(own.reshape(-1, own.shape[-1])), np.int64).sum(axis=0)
            total[..., list(step.present)] += reached.reshape(own.shape)
        return total

    entries = counted(np.zeros((1, n), dtype))
    kept = (np.minimum(density, 1) * entries.astype(np.float64)).astype(np.int64)
    if gamma is None:
        return _reached(counted, kept, dtype)
    outliers = np.minimum((gamma * entries.astype(np.float64)).astype(np.int64), entries - kept)
    wanted = np.concatenate([outliers, outliers + kept])
    found = _reached(counted, wanted, dtype)
    # Where not all that are equal are to go, all of them stay.
    found[0] += (counted(found[:1]) > outliers)[0].astype(dtype)
    return found


def _reached(counted: Callable[[np.ndarray], np.ndarray], wanted: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The largest orders that so many entries reach, ``[k, n]``."""
    low, high = np.zeros(wanted.shape, dtype), np.full(wanted.shape, 2 ** (8 * dtype.itemsize - 1), dtype)
    while (high - low > 1).any():
        # Evenly spaced within the bracket; the largest that enough entries reach is its new end.
        share = np.arange(1, _PROBES + 1, dtype=dtype)[:, None, None]
        width = np.maximum((high - low) // dtype.type(_PROBES + 1), dtype.type(1))
        probes = np.minimum(low + share * width, high - dtype.type(1))
        enough = (counted(probes) >= wanted).sum(axis=0)  # Counts fall as orders grow.
        ladder = np.concatenate([low[None], probes, high[None]])
        low, high = (np.take_along_axis(ladder, (enough + i)[None], axis=0)[0] for i in (0, 1))
        high = np.maximum(high, low + dtype.type(1))
    return low


def as_cuts(thresholds: np.ndarray, modules: int, sets: int) -> tuple[Cut, ...]:
    """The same cuts ``[k, n]`` for every module and task set, ``[L, 1, k, n]``."""
    shape = (modules, 1, *thresholds.shape)
    everything = np.full(shape, np.iinfo(np.int32).max, np.int32)
    cut: Any = Cut(np.broadcast_to(thresholds, shape), everything)  # type: ignore[arg-type]
    return (cut,) * sets
