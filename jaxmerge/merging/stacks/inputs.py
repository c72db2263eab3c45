"""What goes into the merge of a stack of modules: their common shape, their arrays, and what they draw from."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.base import Array
from jaxmerge.selection import Cut


class Bucket(NamedTuple):
    """What modules must share to be stacked; static under jit.

    Attributes:
        features: ``(out, in)``.
        ranks: Of the n adapters that have the module.
        batch: The module's own leading axes.
        dtypes: Of those adapters' factors, a and b by turns.
        rank: Of the result.
        dtype: Of the result.
    """

    features: tuple[int, int]
    ranks: tuple[int, ...]
    batch: tuple[int, ...]
    dtypes: tuple[str, ...]
    rank: int
    dtype: str

    @property
    def wide(self) -> str:
        """The dtype of the arithmetic: float32, or float64 where a source is."""
        return "float64" if "float64" in (*self.dtypes, self.dtype) else "float32"


class Draws(NamedTuple):
    """What modules draw from.

    Attributes:
        key: ``[S]``, of each merge.
        modules: ``[L]`` uint32, a stable hash of each module's path.
        tasks: ``[n]`` uint32, the adapters' positions.
    """

    key: Array
    modules: Array
    tasks: Array

    def keys(self) -> Array:
        """``[L, S, n]`` keys, that hang on nothing else."""
        fold = jax.random.fold_in

        def module(hashed: Array) -> Array:
            return jax.vmap(lambda key: jax.vmap(lambda i: fold(fold(key, hashed), i))(self.tasks))(self.key)

        return jax.vmap(module)(self.modules)


class Inputs(NamedTuple):
    """The arrays of L modules of one bucket in n adapters, and S settings to merge them with.

    Attributes:
        a: n of ``[L, *batch, rᵢ, in]``.
        b: n of ``[L, *batch, out, rᵢ]``.
        scales: ``[L, n]``.
        weights: ``[L, S, n]``.
        keys: ``[L, S, n]`` keys, or what they are folded from; None for a method that draws nothing.
        cuts: Of each task set ``[L * batch, S, k, n]``, where the largest entries of each task end, for each of the k
            cuts of a pruning; None if that is to be found.
        stages: Of each stage, name -> ``[L]``.
    """

    a: tuple[Any, ...]
    b: tuple[Any, ...]
    scales: Array
    weights: Array
    keys: Any = None
    cuts: tuple[Cut, ...] | None = None
    stages: tuple[Mapping[str, Array], ...] = ()


def flatten_batch(inputs: Inputs, batch: tuple[int, ...]) -> Inputs:
    """Makes every layer of a batched module a module of its own, with keys of its own."""
    if not batch:
        return inputs
    layers = math.prod(batch)

    def flatten(x: Array) -> Array:
        return x.reshape(-1, *x.shape[1 + len(batch) :])

    def repeat(x: Array) -> Array:
        return jnp.repeat(x, layers, axis=0)

    keys = inputs.keys
    if keys is not None:
        index = jnp.tile(jnp.arange(layers, dtype=jnp.uint32), keys.shape[0])
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
        keys = jax.vmap(fold)(repeat(keys), index)
    return Inputs(
        tuple(map(flatten, inputs.a)),
        tuple(map(flatten, inputs.b)),
        repeat(inputs.scales),
        repeat(inputs.weights),
        keys,
        inputs.cuts,
        jax.tree.map(repeat, inputs.stages),
    )
