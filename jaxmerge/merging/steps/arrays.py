"""The arrays of a stack of modules, put together from each one's and taken apart again."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxmerge.base import Array, has_values, on_host
from jaxmerge.merging.stacks import Draws
from jaxmerge.sharding import gathered, seen_everywhere


def table_of(rows: Sequence[Sequence[ArrayLike]], dtype: str) -> Array:
    """``[L, n]`` from n rows of L numbers, put together on the host if they are there."""
    if any(isinstance(value, jax.Array) for row in rows for value in row):
        return jnp.stack([jnp.stack([jnp.asarray(value, dtype) for value in row]) for row in rows], axis=1)
    with np.errstate(over="ignore"):  # A weight too large for the dtype makes a result that is refused.
        return np.asarray(rows, dtype).T  # type: ignore[return-value]


def stacked(arrays: Sequence[Any], mesh: Any) -> Array:
    """Stacks on the host what lies on the host: one transfer instead of one per module.

    What is spread over a mesh is gathered on all its devices.
    """
    if all(isinstance(array, np.ndarray) for array in arrays):
        return jnp.asarray(np.stack(arrays))
    return jnp.stack([jnp.asarray(array) if mesh is None else gathered(array, mesh) for array in arrays])


def unstacked(array: Array) -> list[Array]:
    """The entries along axis 0. What lies in the host's memory is cut there, which compiles nothing."""
    if not on_host(array) or len(array.devices()) > 1:
        return list(seen_everywhere(array) if has_values(array) else array)
    return [jnp.asarray(entry) for entry in np.asarray(array)]


def draws_of(keys: Array, paths: Sequence[str], present: Sequence[int]) -> Draws:
    """What modules draw from, by their paths and the positions of the adapters that have them."""
    hashes = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
    return Draws(keys, hashes, np.array(present, np.uint32))  # type: ignore[arg-type]
