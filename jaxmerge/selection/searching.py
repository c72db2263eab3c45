"""The k-th greatest entry by counting passes: a bracket from a sample, narrowed until nothing lies in between."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxmerge.base import Array
from jaxmerge.selection.bracket import Bracket
from jaxmerge.selection.cut import Cut
from jaxmerge.selection.passes import ArrayPasses, Passes

# Entries up to which bisection alone is quick enough, and a smaller program to compile.
WORTH_GUESSING = 2**15
# Entries of a sample.
_SAMPLE = 4096
# The sample's bracket, in standard deviations of its counts.
_MARGIN = 1.5
# Passes that count alone. Those after them also look for the entries nearest to the probe, at about twice the cost:
# few are needed where magnitudes repeat, as those of bfloat16 do.
_COUNTING_PASSES = 12


def sample(order: Array, batch: int) -> Array:
    """Some of the entries of each tensor, at even distances along every axis: ``[*batch, m]``."""
    shape = order.shape[batch:]
    share = (math.prod(shape) / _SAMPLE) ** (1 / max(1, sum(size > 1 for size in shape)))
    strides = [1] * batch + [max(1, min(size, round(share))) for size in shape]
    return lax.slice(order, [0] * order.ndim, order.shape, strides).reshape(*order.shape[:batch], -1)


def guess(sampled: Array, size: int, count: Array) -> Array:
    """A bracket for the k-th greatest of ``size`` entries, from a sample of them.

    Args:
        sampled: ``[*batch, m]``.
        size: The number of entries that were sampled.
        count: ``[..., *batch]``, k.

    Returns:
        ``[2, ..., *batch]``: orders that are probably reached by more and by fewer than k of the entries.
    """
    m = sampled.shape[-1]
    share = count.astype(jnp.float32) / size
    margin = _MARGIN * jnp.sqrt(m * share * (1 - share)) + 1
    near = jnp.clip(jnp.stack([m * share + margin, m * share - margin]), 0, m).astype(jnp.int32)
    index = jnp.arange(m, dtype=jnp.int32)
    return _bracket(ArrayPasses(jnp.broadcast_to(sampled, (*near.shape, m)), index), near).low


def search(passes: Passes, count: Array, guesses: Array | None = None) -> Cut:
    """Finds the cut after the k greatest entries of every tensor.

    Args:
        passes: Over the entries.
        count: ``[*batch]``, k.
        guesses: ``[g, *batch]``, where to look first.

    Returns:
        The cut, ``[*batch]``.
    """
    bracket = _bracket(passes, count, guesses)
    # Of a count of 0 the threshold lies above every entry; none is at it.
    ties, wanted = bracket.at_low - bracket.at_high, count - bracket.at_high
    return Cut(bracket.low, passes.end_of_ties(bracket.low, ties, wanted))


def _bracket(passes: Passes, count: Array, guesses: Array | None = None) -> Bracket:
    """Narrows a bracket of orders around the k-th greatest entry, until nothing more is wanted below its low end.

    It counts the entries that reach an order: at least k reach the low end, and fewer the high one.
    """
    dtype, size = passes.dtype, jnp.asarray(passes.size, jnp.int32)
    one = jnp.ones((), dtype)
    # Built from the counts, so that they vary over the same axes of a mesh.
    zero = jnp.zeros_like(count)
    top = zero.astype(dtype) + jnp.asarray(2 ** (8 * dtype.itemsize - 1), dtype)
    start = Bracket(zero.astype(dtype), top, zero + size, zero, jnp.zeros((), jnp.int32))

    def found(bracket: Bracket) -> Array:
        return (bracket.at_low == count) | (bracket.high - bracket.low <= one)

    def narrowed(bracket: Bracket, reach: Array, low: Array, high: Array) -> Bracket:
        return bracket.narrowed(found(bracket), reach >= count, reach, low, high)

    def count_only(at: Callable[[Bracket], Array]) -> Callable[[Bracket], Bracket]:
        def step(bracket: Bracket) -> Bracket:
            order = at(bracket)
            return narrowed(bracket, passes.count(order), order, order)

        return step

    def with_neighbours(bracket: Bracket) -> Bracket:
        reach, below, above = passes.neighbours(bracket.probe(count))
        return narrowed(bracket, reach, above, below + one)

    if passes.size < WORTH_GUESSING:
        return lax.while_loop(lambda b: jnp.any(~found(b)), count_only(Bracket.halfway), start)
    if guesses is not None:  # All in one pass.
        guesses = start.within(guesses)
        for order, reach in zip(guesses, passes.count(guesses), strict=True):
            # One that lies outside of what the others have left tells nothing new.
            new = (order > start.low) & (order < start.high)
            start = jax.tree.map(
                lambda x, y, new=new: jnp.where(new, x, y), narrowed(start, reach, order, order), start
            )
        start = start._replace(passes=jnp.zeros((), jnp.int32))
    interpolate = count_only(lambda b: b.probe(count))
    bracket = lax.while_loop(lambda b: jnp.any(~found(b)) & (b.passes < _COUNTING_PASSES), interpolate, start)
    return lax.while_loop(lambda b: jnp.any(~found(b)), with_neighbours, bracket)
