"""The exact k-th magnitude without a sort: a few counting passes over the entries, wherever they are kept.

A bracket from a sample is narrowed by interpolation, with bisection on the bits of ``|x|`` as the guarantee: about
nine passes, against 31 for bisection alone. Counts are integers, so that the result is the same under any sharding
and any way of cutting the tensor to pieces. What lies in the host's memory goes to NumPy's partition instead, which
gives the same cut in less time than two such passes.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmerge import threads
from jaxmerge.base import AnyArray, Array, has_values, on_host

_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
_SIGNED = {2: np.int16, 4: np.int32, 8: np.int64}

# Entries of a sample.
_SAMPLE = 4096
# The same where NumPy looks at it; and how many entries it goes through at a time.
_HOST_SAMPLE = 1024
_HOST_PIECE = 2**16
# That bracket's margin: a miss costs a second pass, and every entry in the bracket a mispredicted branch.
_HOST_MARGIN = 1.75
# Entries of a row from which on the next one may as well be cut on another core.
_WORTH_THREADS = 2**20
# Entries up to which bisection alone is quick enough, and a smaller program to compile.
WORTH_GUESSING = 2**15
# The sample's bracket, in standard deviations of its counts.
_MARGIN = 1.5
# Passes that count alone. Those after them also look for the entries nearest to the probe, at about twice the cost:
# few are needed where magnitudes repeat, as those of bfloat16 do.
_COUNTING_PASSES = 12


@functools.partial(jax.tree_util.register_dataclass, data_fields=("threshold", "end"), meta_fields=())
@dataclass(frozen=True, eq=False)
class Cut:
    """Which entries of a tensor are its largest: those above a threshold, and the first of those at it.

    Attributes:
        threshold: ``[*batch]`` unsigned, a `magnitude_order`.
        end: ``[*batch]`` int32; of the entries at the threshold, those whose flat index is below it.
    """

    threshold: Array
    end: Array

    def keeps(self, tensor: Array, index: Array) -> Array:
        """The mask of the entries that survive.

        Args:
            tensor: ``[*batch, *shape]``, the tensors or a part of each.
            index: ``[*shape]`` int32, the flat index of each entry in its tensor.

        Returns:
            Boolean ``[*batch, *shape]``.
        """
        order = magnitude_order(lax.stop_gradient(tensor))
        threshold, end = (x.reshape(x.shape + (1,) * index.ndim) for x in (self.threshold, self.end))
        return (order > threshold) | ((order == threshold) & (index < end))


def magnitude_order(tensor: Array) -> Array:
    """Unsigned integers that rank as ``|x|`` does, with NaN at 0. The top bit is never set."""
    bits = lax.bitcast_convert_type(jnp.abs(tensor), _UNSIGNED[tensor.dtype.itemsize])
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


def cut_largest(tensors: AnyArray, count: AnyArray, batch: int = 0) -> Cut:
    """Where the entries of largest magnitude end.

    Args:
        tensors: ``[*batch, *shape]``, tensors of floats, each searched on its own.
        count: Integers that broadcast to ``[*batch]``, how many to keep of each; may be traced.
        batch: How many leading axes ``*batch`` has.

    Returns:
        The cut, ``[*batch]``. Just ``count`` entries survive it: equal magnitudes are taken in order of their flat
        index, and NaN ranks below everything.
    """
    alone = on_host(tensors) and (isinstance(tensors, np.ndarray) or len(tensors.devices()) == 1)
    if alone and has_values(count):
        lanes = tensors.shape[:batch]
        rows = np.asarray(tensors).reshape(math.prod(lanes), -1) if tensors.size else np.zeros((math.prod(lanes), 0))
        counts = np.broadcast_to(np.asarray(count, np.int32), lanes)
        cut = cut_on_host(rows.astype(tensors.dtype, copy=False), counts.reshape(-1, 1))
        return Cut(jnp.asarray(cut.threshold).reshape(lanes), jnp.asarray(cut.end).reshape(lanes))
    return _cut_in_passes(jnp.asarray(tensors), jnp.asarray(count, jnp.int32), batch)


def cut_on_host(rows: Iterable[np.ndarray], counts: np.ndarray) -> Cut:
    """The same for tensors in the host's memory, each with several counts.

    Args:
        rows: The entries of each of R tensors, ``[size]`` of one dtype.
        counts: ``[R, S]``, how many to keep.

    Returns:
        The cuts, ``[R, S]``, of NumPy arrays.
    """
    rows = list(rows)
    unsigned = np.dtype(_UNSIGNED[rows[0].dtype.itemsize]) if rows else np.dtype(np.uint32)
    # NumPy's steps on small rows are too short for threads, which then wait for the interpreter more than they work.
    large = any(row.size >= _WORTH_THREADS for row in rows)
    each = threads.each if large else map
    cuts = list(each(lambda pair: _cut_row(np.ascontiguousarray(pair[0]), pair[1]), zip(rows, counts, strict=True)))
    thresholds, ends = np.array(cuts, np.int64).reshape(*counts.shape, 2).transpose(2, 0, 1)
    return Cut(thresholds.astype(unsigned), ends.astype(np.int32))  # type: ignore[arg-type]


def _cut_row(row: np.ndarray, counts: np.ndarray) -> list[tuple[int, int]]:
    """One pass takes out what a sample says is near each k-th entry, a piece at a time that stays in the cache.

    The rest goes on in what was taken out. NumPy's partition of the whole would do, but on some processors that is
    fifteen times slower than on others.
    """
    size = row.size
    wanted = [int(count) for count in counts if 0 < count <= size]
    brackets = [_host_bracket(np.sort(_ranked(row[:: _stride(size)])), count / size) for count in wanted]
    above: list[Any] = [0] * len(wanted)
    near: list[list[np.ndarray]] = [[] for _ in wanted]
    for start in range(0, size if wanted else 0, _HOST_PIECE):
        ranked = _ranked(row[start : start + _HOST_PIECE])
        for i, (low, high) in enumerate(brackets):
            above[i] += np.count_nonzero(ranked > high)
            near[i].append(_within(ranked, low, high))
    found = {}
    for count, over, parts in zip(wanted, above, near, strict=True):
        inside = np.concatenate(parts)
        if not over < count <= over + inside.size:  # The sample has misled.
            over, inside = 0, _ranked(row)
        threshold = _kth_greatest(inside, count - over)
        over += np.count_nonzero(inside > threshold)
        ties, end = np.count_nonzero(inside == threshold), size
        if over + ties > count:
            end = np.flatnonzero(_ranked(row) == threshold)[count - over]
        found[count] = int(threshold) + 1, int(end)
    # Of a count of 0 the threshold is above all.
    nothing = int(np.iinfo(_SIGNED[row.dtype.itemsize]).max), 0
    return [found.get(int(count), nothing) for count in counts]


def _ranked(row: np.ndarray) -> np.ndarray:
    """Signed integers that rank as the magnitudes of floats do, with NaN below all."""
    bits = row.view(_SIGNED[row.dtype.itemsize])
    ranked = bits & np.iinfo(bits.dtype).max
    infinite = np.asarray(np.inf, row.dtype).view(bits.dtype)
    if ranked.size and ranked.max() > infinite:
        ranked[ranked > infinite] = -1
    return ranked


def _stride(size: int) -> int:
    return max(1, size // _HOST_SAMPLE)


def _host_bracket(sampled: np.ndarray, share: float) -> tuple[Any, Any]:
    """Between what the entry with that share of all at or above it most likely lies, from a sorted sample."""
    place = sampled.size * (1 - share)
    margin = _HOST_MARGIN * math.sqrt(sampled.size * share * (1 - share)) + 1
    low = sampled[math.floor(place - margin)] if place > margin else -1
    return low, sampled[min(sampled.size - 1, math.ceil(place + margin))]


def _within(ranked: np.ndarray, low: Any, high: Any) -> np.ndarray:
    return np.compress((ranked >= low) & (ranked <= high), ranked)


def _kth_greatest(ranked: np.ndarray, count: Any) -> Any:
    size = ranked.size
    if size > 2 * _HOST_SAMPLE:
        low, high = _host_bracket(np.sort(ranked[:: _stride(size)]), count / size)
        above = np.count_nonzero(ranked > high)
        near = _within(ranked, low, high)
        if above < count <= above + near.size and near.size < size:
            return _kth_greatest(near, count - above)
    return np.partition(ranked, size - count)[size - count]


@functools.partial(jax.jit, static_argnames="batch")
def _cut_in_passes(tensors: Array, count: Array, batch: int) -> Cut:
    tensors = lax.stop_gradient(tensors)
    shape = tensors.shape[batch:]
    count = jnp.broadcast_to(count, tensors.shape[:batch])
    order = magnitude_order(tensors)
    guesses = None
    if math.prod(shape) >= WORTH_GUESSING:
        guesses = guess(sample(order, batch), math.prod(shape), count)
    return search(ArrayPasses(order, flat_index(shape)), count, guesses)


class _Ends(NamedTuple):
    """Indices ``low < high`` and how many ties lie before them: fewer than wanted the one, enough the other."""

    low: Array
    high: Array
    before_low: Array
    before_high: Array
    passes: Array


class Passes(Protocol):
    """How the entries of tensors are gone through. Each call is one pass; orders and counts are ``[*batch]``."""

    @property
    def size(self) -> int:
        """The number of entries of one tensor."""
        ...

    @property
    def dtype(self) -> Any:
        """Of the `magnitude_order` of the entries."""
        ...

    def count(self, order: Array) -> Array:
        """How many entries are at or above orders ``[..., *batch]``."""
        ...

    def neighbours(self, order: Array) -> tuple[Array, Array, Array]:
        """That count; the greatest entry below, 0 if there is none; the least at or above, or the dtype's maximum."""
        ...

    def end_of_ties(self, order: Array, ties: Array, wanted: Array) -> Array:
        """An index before which just so many entries of an order lie; takes no pass where all of them are wanted."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayPasses:
    """Passes over tensors, or parts of them, that are there as arrays.

    Attributes:
        order: ``[*batch, *shape]``, of `magnitude_order`.
        index: ``[*shape]``, flat indices.
    """

    order: Array
    index: Array

    @property
    def size(self) -> int:
        """The number of entries of one tensor."""
        return self.index.size

    @property
    def dtype(self) -> Any:
        """Of the orders."""
        return self.order.dtype

    def _over(self, x: Array) -> Array:
        return x.reshape(x.shape + (1,) * self.index.ndim)

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-self.index.ndim, 0))

    def count(self, order: Array) -> Array:
        """See `Passes`."""
        return jnp.sum(self.order >= self._over(order), self._axes, dtype=jnp.int32)

    def neighbours(self, order: Array) -> tuple[Array, Array, Array]:
        """See `Passes`."""
        reaches = self.order >= self._over(order)
        top = jnp.full((), jnp.iinfo(self.dtype).max, self.dtype)
        below = jnp.max(jnp.where(reaches, jnp.zeros_like(top), self.order), self._axes)
        above = jnp.min(jnp.where(reaches, self.order, top), self._axes)
        return jnp.sum(reaches, self._axes, dtype=jnp.int32), below, above

    def count_ties(self, order: Array, end: Array) -> Array:
        """How many entries of an order have a flat index below ``end``."""
        ties = (self.order == self._over(order)) & (self.index < self._over(end))
        return jnp.sum(ties, self._axes, dtype=jnp.int32)

    def end_of_ties(self, order: Array, ties: Array, wanted: Array) -> Array:
        """See `Passes`. Searched as the threshold was: where ties are spread evenly, in a few passes."""
        size = jnp.full_like(wanted, self.size)

        def found(state: _Ends) -> Array:
            return state.before_high == wanted

        def narrow(state: _Ends) -> _Ends:
            apart = state.high - state.low
            between = jnp.maximum(state.before_high - state.before_low, 1).astype(jnp.float32)
            share = (wanted - state.before_low).astype(jnp.float32) / between
            interpolated = state.low + (share * apart.astype(jnp.float32)).astype(jnp.int32)
            end = jnp.where(state.passes % 3 == 2, state.low + apart // 2, interpolated)
            end = jnp.clip(end, state.low + 1, jnp.maximum(state.high - 1, state.low + 1))
            before = self.count_ties(order, end)
            enough = before >= wanted
            down, up = enough & ~found(state), ~(enough | found(state))
            return _Ends(
                jnp.where(up, end, state.low),
                jnp.where(down, end, state.high),
                jnp.where(up, before, state.before_low),
                jnp.where(down, before, state.before_high),
                state.passes + 1,
            )

        start = _Ends(jnp.zeros_like(size), size, jnp.zeros_like(size), ties, jnp.zeros((), jnp.int32))
        return lax.while_loop(lambda state: jnp.any(~found(state)), narrow, start).high


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


class _Bracket(NamedTuple):
    """Orders ``low < high`` and how many entries reach them: at least k the one, fewer than k the other."""

    low: Array
    high: Array
    reach_low: Array
    reach_high: Array
    passes: Array


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
    ties, wanted = bracket.reach_low - bracket.reach_high, count - bracket.reach_high
    return Cut(bracket.low, passes.end_of_ties(bracket.low, ties, wanted))


def _bracket(passes: Passes, count: Array, guesses: Array | None = None) -> _Bracket:
    """Narrows a bracket around the k-th greatest entry until the order below which nothing more is wanted is found."""
    dtype, size = passes.dtype, jnp.asarray(passes.size, jnp.int32)
    one = jnp.ones((), dtype)
    # Built from the counts, so that they vary over the same axes of a mesh.
    zero = jnp.zeros_like(count)
    top = zero.astype(dtype) + jnp.asarray(2 ** (8 * dtype.itemsize - 1), dtype)
    start = _Bracket(zero.astype(dtype), top, zero + size, zero, jnp.zeros((), jnp.int32))

    def found(bracket: _Bracket) -> Array:
        return (bracket.reach_low == count) | (bracket.high - bracket.low <= one)

    def halfway(bracket: _Bracket) -> Array:
        return bracket.low + (bracket.high - bracket.low) // 2

    def within(bracket: _Bracket, order: Array) -> Array:
        return jnp.clip(order, bracket.low + one, jnp.maximum(bracket.high, bracket.low + 2 * one) - one)

    def probe(bracket: _Bracket) -> Array:
        low, apart = bracket.low, bracket.high - bracket.low
        between = jnp.maximum(bracket.reach_low - bracket.reach_high, 1).astype(jnp.float32)
        share = (bracket.reach_low - count).astype(jnp.float32) / between
        interpolated = low + (share * apart.astype(jnp.float32)).astype(dtype)
        order = jnp.where(bracket.passes % 3 == 2, halfway(bracket), interpolated)
        return within(bracket, order)

    def narrowed(bracket: _Bracket, reach: Array, low: Array, high: Array) -> _Bracket:
        done, enough = found(bracket), reach >= count
        up, down = enough & ~done, ~(enough | done)
        return _Bracket(
            jnp.where(up, low, bracket.low),
            jnp.where(down, high, bracket.high),
            jnp.where(up, reach, bracket.reach_low),
            jnp.where(down, reach, bracket.reach_high),
            bracket.passes + 1,
        )

    def count_only(at: Callable[[_Bracket], Array]) -> Callable[[_Bracket], _Bracket]:
        def step(bracket: _Bracket) -> _Bracket:
            order = at(bracket)
            return narrowed(bracket, passes.count(order), order, order)

        return step

    def with_neighbours(bracket: _Bracket) -> _Bracket:
        reach, below, above = passes.neighbours(probe(bracket))
        return narrowed(bracket, reach, above, below + one)

    if passes.size < WORTH_GUESSING:
        return lax.while_loop(lambda b: jnp.any(~found(b)), count_only(halfway), start)
    if guesses is not None:  # All in one pass.
        guesses = within(start, guesses)
        for order, reach in zip(guesses, passes.count(guesses), strict=True):
            # One that lies outside of what the others have left tells nothing new.
            new = (order > start.low) & (order < start.high)
            start = jax.tree.map(
                lambda x, y, new=new: jnp.where(new, x, y), narrowed(start, reach, order, order), start
            )
        start = start._replace(passes=jnp.zeros((), jnp.int32))
    bracket = lax.while_loop(lambda b: jnp.any(~found(b)) & (b.passes < _COUNTING_PASSES), count_only(probe), start)
    return lax.while_loop(lambda b: jnp.any(~found(b)), with_neighbours, bracket)
