"""Tensors that are not a pair of factors: saved heads, embeddings, biases, trained tokens.

They are whole weights and not changes to one, so there is no sum to take. Where the adapters agree they pass
through; where they do not, the user says what is to happen.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.base import Adapter, AnyArray, Array, has_values, precision, promote
from jaxmerge.sparsify import round_to

Extras = Literal["same", "average"] | int


def merge_extras(adapters: Sequence[Adapter], extras: Extras) -> tuple[dict[str, AnyArray], list[str]]:
    """Merges the extras of all adapters.

    Args:
        adapters: In the user's order.
        extras: ``"same"`` passes on what is identical, bit for bit, in all adapters that have it.
            ``"average"`` takes the plain mean over those. A number takes the adapter at that position where
            it has the tensor.

    Returns:
        The tensors, and the keys of those that differ so that this choice does not settle them.

    Raises:
        ValueError: If the choice is unknown.
    """
    if isinstance(extras, bool) or (extras not in ("same", "average") and not isinstance(extras, int)):
        raise ValueError(f"extras must be 'same', 'average' or the position of an adapter, got {extras!r}")
    if isinstance(extras, int) and not 0 <= extras < len(adapters):
        raise ValueError(f"extras={extras} names no adapter: there are {len(adapters)}, counted from 0")
    merged, unsettled = {}, []
    for key in dict.fromkeys(key for adapter in adapters for key in adapter.extras):
        tensors = [adapter.extras[key] for adapter in adapters if key in adapter.extras]
        if isinstance(extras, int) and key in adapters[extras].extras:
            merged[key] = adapters[extras].extras[key]
        elif all(_identical(tensors[0], tensor) for tensor in tensors[1:]):
            merged[key] = tensors[0]
        elif extras == "average" and _have_a_mean(tensors):
            # From headers alone there is no mean to take, only the knowledge that there will be one.
            merged[key] = tensors[0] if isinstance(tensors[0], jax.ShapeDtypeStruct) else _mean(tensors)
        else:
            unsettled.append(key)
    return merged, unsettled


def _identical(x: AnyArray, y: AnyArray) -> bool:
    if x is y:
        return True
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if isinstance(x, jax.ShapeDtypeStruct):  # Headers alone: nothing speaks against it yet.
        return True
    return has_values(x) and has_values(y) and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _have_a_mean(tensors: Sequence[AnyArray]) -> bool:
    floating = all(jnp.issubdtype(tensor.dtype, jnp.floating) for tensor in tensors)
    return floating and len({tensor.shape for tensor in tensors}) == 1


def _mean(tensors: Sequence[AnyArray]) -> Array:
    dtype = promote(*[tensor.dtype for tensor in tensors])
    wide = promote(dtype, jnp.float32)
    with precision(dtype):
        total = functools.reduce(operator.add, [jnp.asarray(tensor).astype(wide) for tensor in tensors])
        return round_to(total / len(tensors), dtype)
