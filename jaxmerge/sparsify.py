"""Which entries of a tensor survive: exact top-k by magnitude, and random dropping.

The k-th magnitude is found by bisecting on the bits of ``|x|``, one counting pass per bit. Counts are
integers, so the result is the same under any sharding, and on a CPU it is several times faster than a sort.
"""

import functools
import numbers
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxmerge.base import Array, has_values, promote

PruneMethod = Literal["magnitude", "random"]

_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value", "count"), meta_fields=())
@dataclass(frozen=True, eq=False)
class Density:
    """A density bound to a tensor of known size.

    Attributes:
        value: Scalar float, the fraction of entries to keep.
        count: Scalar int32, how many entries that is.
    """

    value: Array
    count: Array


def bind_density(density: "ArrayLike | Density", size: int) -> Density:
    """Turns a density into the number of survivors among ``size`` entries.

    Args:
        density: Fraction to keep. A Python or NumPy number gives ``int(density * size)`` in float64, as PEFT
            does; a JAX array gives the same in its own precision, normally float32, where
            ``0.29 * 100`` is 29 and not 28. 1 and above keep everything.
        size: Number of entries, below 2**31.

    Returns:
        The density and its count; one that is bound already is returned as it is.

    Raises:
        ValueError: If the density is not one number, or is known to be negative or NaN.
    """
    if isinstance(density, Density):
        return density
    if size >= 2**31:
        raise ValueError(f"a tensor of {size} entries is too large to prune: the limit is 2**31 - 1")
    _check_density(density)
    if isinstance(density, jax.Array):
        value = jnp.asarray(density, promote(density.dtype, jnp.float32))
        count = jnp.floor(jnp.clip(value, 0, 1) * jnp.asarray(size, value.dtype))
        return Density(value, jnp.minimum(count.astype(jnp.int32), size))
    number = float(np.asarray(density))
    count = size if number >= 1 else int(number * size)
    return Density(jnp.asarray(number, float), jnp.asarray(count, jnp.int32))


def _check_density(density: ArrayLike) -> None:
    is_number = isinstance(density, numbers.Real | np.generic | np.ndarray | jax.Array)
    if not is_number or np.ndim(density) != 0 or not np.isrealobj(density):
        raise ValueError(f"Density should be a number, got {density!r}")
    if not has_values(density):
        return
    number = float(np.asarray(density, np.float64))
    if not number >= 0:
        raise ValueError(f"Density should be >= 0, got {number:g}")


def prune(
    tensor: ArrayLike,
    density: "ArrayLike | Density",
    method: PruneMethod,
    rescale: ArrayLike = False,
    *,
    key: Array | None = None,
) -> Array:
    """Zeroes all but a fraction of the entries (``peft.utils.merge_utils.prune``).

    Args:
        tensor: Floating-point array of any shape.
        density: Fraction to keep, at least 0; 1 and above keep everything. See `bind_density` for how it is
            rounded to a number of entries.
        method: ``"magnitude"`` keeps the largest; among equal magnitudes the lowest flat index, and NaN
            last of all, so that exactly ``int(density * tensor.size)`` survive. ``"random"`` keeps each
            entry with probability ``density``.
        rescale: With ``"random"``, divides the survivors by ``density``, so that the expectation is kept.
            ``"magnitude"`` ignores it, as PEFT does.
        key: A `jax.random.key`; wanted by ``"random"``.

    Returns:
        Array of the tensor's shape and dtype. What is pruned is +0, also where it was inf or NaN; a density
        of 0 gives zeros.

    Raises:
        ValueError: If the density is negative, the method unknown, or the key missing.
    """
    tensor = as_floating(tensor)
    bound = bind_density(density, tensor.size)
    if method == "magnitude":
        return _prune_magnitude(tensor, bound.count)
    if method == "random":
        return _prune_random(tensor, bound.value, jnp.asarray(rescale, bool), need_key(key, "random pruning"))
    raise ValueError(f"Unknown method {method!r}: prune knows 'magnitude' and 'random'")


def as_floating(tensor: ArrayLike) -> Array:
    """The tensor as a JAX array; a ValueError if it is not of 16 to 64-bit floating point."""
    array = jnp.asarray(tensor)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize not in _UNSIGNED:
        raise ValueError(f"expected a tensor of 16, 32 or 64-bit floats, got dtype {array.dtype}")
    return array


def round_to(array: Array, dtype: DTypeLike) -> Array:
    """The array in another floating dtype, rounded for certain.

    Inside a fusion XLA may skip the rounding of an intermediate half type; PEFT's numbers have it.
    """
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(array, info.nexp, info.nmant)
    if jnp.dtype(dtype) == jnp.float16 and array.dtype != jnp.float16:
        # Below its normal range float16 has steps of one size, which reduce_precision takes for zero.
        step = jnp.asarray(info.smallest_subnormal, array.dtype)
        steps = lax.round(array / step, lax.RoundingMethod.TO_NEAREST_EVEN)
        rounded = jnp.where(jnp.abs(array) < jnp.asarray(info.tiny, array.dtype), steps * step, rounded)
    return rounded.astype(dtype)


def need_key(key: Array | None, what: str) -> Array:
    """The key, or a ValueError that says what wanted it."""
    if not isinstance(key, jax.Array):
        raise ValueError(f"{what} draws random numbers: pass key=jax.random.key(seed), not {key!r}")
    return key


@jax.jit
def _prune_magnitude(tensor: Array, count: Array) -> Array:
    return jnp.where(largest(tensor, count), tensor, jnp.zeros_like(tensor))


@jax.jit
def _prune_random(tensor: Array, density: Array, rescale: Array, key: Array) -> Array:
    survives = jax.random.uniform(key, tensor.shape, jnp.float32) < density.astype(jnp.float32)
    # Divided in float32 at least, as torch does for half types; and entry by entry, since XLA would turn a
    # division by one scalar into a multiplication by its reciprocal.
    wide = promote(tensor.dtype, jnp.float32)
    dividing = survives & rescale & (density > 0) & (density < 1)
    divisor = jnp.where(dividing, density.astype(wide), jnp.ones((), wide))
    return jnp.where(survives, round_to(tensor.astype(wide) / divisor, tensor.dtype), jnp.zeros_like(tensor))


def largest(tensor: Array, count: ArrayLike) -> Array:
    """The mask of the ``count`` entries of largest magnitude.

    Args:
        tensor: Floating-point array of any shape.
        count: Scalar integer, may be traced.

    Returns:
        Boolean array of the tensor's shape with exactly ``count`` true entries. Equal magnitudes are taken
        in order of their flat index; NaN ranks below everything.
    """
    count = jnp.asarray(count, jnp.int32)
    order = _magnitude_order(lax.stop_gradient(tensor))
    threshold = _kth_largest(order, count)
    above = order > threshold
    ties = order == threshold
    wanted = count - jnp.sum(above, dtype=jnp.int32)
    index = _flat_index(tensor.shape)
    return above | (ties & (index < _cutoff(ties, index, wanted)))


def _magnitude_order(tensor: Array) -> Array:
    """Unsigned integers that rank as ``|x|`` does, with NaN at 0. The top bit is never set."""
    bits = lax.bitcast_convert_type(jnp.abs(tensor), _UNSIGNED[tensor.dtype.itemsize])
    return jnp.where(jnp.isnan(tensor), jnp.zeros_like(bits), bits + jnp.ones_like(bits))


def _kth_largest(order: Array, count: Array) -> Array:
    """The greatest t that at least ``count`` entries reach, found from its highest bit down."""
    dtype = order.dtype
    bits = 8 * dtype.itemsize - 1

    def set_bit(i: Array, threshold: Array) -> Array:
        candidate = threshold | lax.shift_left(jnp.ones((), dtype), (bits - 1 - i).astype(dtype))
        enough = jnp.sum(order >= candidate, dtype=jnp.int32) >= count
        return jnp.where(enough, candidate, threshold)

    return lax.fori_loop(0, bits, set_bit, jnp.zeros((), dtype))


def _cutoff(ties: Array, index: Array, wanted: Array) -> Array:
    """The smallest index below which ``wanted`` ties lie; takes no pass where all of them are wanted."""
    size = jnp.asarray(ties.size, jnp.int32)
    all_wanted = jnp.sum(ties, dtype=jnp.int32) == wanted

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(ties & (index < middle), dtype=jnp.int32) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low, _ = lax.while_loop(
        lambda bounds: bounds[0] < bounds[1], halve, (jnp.where(all_wanted, size, jnp.zeros_like(size)), size)
    )
    return low


def _flat_index(shape: tuple[int, ...]) -> Array:
    """Row-major positions, from iotas: a reshape would gather a sharded array."""
    index = jnp.zeros(shape, jnp.int32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += stride * lax.broadcasted_iota(jnp.int32, shape, axis)
        stride *= shape[axis]
    return index
