"""Orders of entries by magnitude, and their places in a tensor."""

import jax.numpy as jnp
from jax import lax

from jaxmerge.base import Array

# The unsigned integers as wide as a float of so many bytes.
UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def magnitude_order(tensor: Array) -> Array:
    """Unsigned integers that rank as ``|x|`` does, with NaN at 0. The top bit is never set."""
    bits = lax.bitcast_convert_type(jnp.abs(tensor), UNSIGNED[tensor.dtype.itemsize])
    return jnp.where(jnp.isnan(tensor), jnp.zeros_like(bits), bits + jnp.ones_like(bits))


def rank_order(tensor: Array) -> Array:
    """Positions along the last axis in ascending order of magnitude; equal ones stay in their order, NaN is first.

    By a radix sort in two steps, each of plain numbers that hold 16 bits of a magnitude over 16 bits of its place:
    XLA's CPU sorts those several times faster than keys that carry their places along.

    Args:
        tensor: ``[*batch, length]`` of floats.

    Returns:
        ``[*batch, length]`` int32.
    """
    order, length = magnitude_order(lax.stop_gradient(tensor)), tensor.shape[-1]
    if length > 2**16 or order.dtype.itemsize > 4:
        return jnp.argsort(order, axis=-1)
    half, low = jnp.uint32(16), jnp.uint32(0xFFFF)
    place = lax.broadcasted_iota(jnp.uint32, order.shape, order.ndim - 1)

    def places(digit: Array) -> Array:
        return (lax.sort(lax.shift_left(digit, half) | place, is_stable=False) & low).astype(jnp.int32)

    wide = order.astype(jnp.uint32)
    first = places(wide & low)
    if order.dtype.itemsize == 2:
        return first
    high = lax.shift_right_logical(wide, half)
    return jnp.take_along_axis(first, places(jnp.take_along_axis(high, first, axis=-1)), axis=-1)


def flat_index(shape: tuple[int, ...]) -> Array:
    """Row-major positions, from iotas: a reshape would gather a sharded array."""
    index = jnp.zeros(shape, jnp.int32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += stride * lax.broadcasted_iota(jnp.int32, shape, axis)
        stride *= shape[axis]
    return index
