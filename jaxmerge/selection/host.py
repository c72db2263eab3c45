"""The cut of tensors in the host's memory, by NumPy: a sample says where to look, and a partition finds it there."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxmerge import threads
from jaxmerge.selection.cut import Cut
from jaxmerge.selection.order import UNSIGNED

_SIGNED = {2: np.int16, 4: np.int32, 8: np.int64}

# Entries of a sample; and how many entries are gone through at a time.
_SAMPLE = 1024
_PIECE = 2**16
# The margin of the sample's bracket: a miss costs a second pass, and every entry in the bracket a mispredicted branch.
_MARGIN = 1.75
# Entries of a row from which on the next one may as well be cut on another core.
_WORTH_THREADS = 2**20


def cut_on_host(rows: Iterable[np.ndarray], counts: np.ndarray) -> Cut:
    """Where the entries of largest magnitude end, of tensors with several counts each.

    Args:
        rows: The entries of each of R tensors, ``[size]`` of one dtype.
        counts: ``[R, S]``, how many to keep.

    Returns:
        The cuts, ``[R, S]``, of NumPy arrays.
    """
    rows = list(rows)
    unsigned = np.dtype(UNSIGNED[rows[0].dtype.itemsize]) if rows else np.dtype(np.uint32)
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
    brackets = [_bracket(np.sort(_ranked(row[:: _stride(size)])), count / size) for count in wanted]
    above: list[Any] = [0] * len(wanted)
    near: list[list[np.ndarray]] = [[] for _ in wanted]
    for start in range(0, size if wanted else 0, _PIECE):
        ranked = _ranked(row[start : start + _PIECE])
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
    return max(1, size // _SAMPLE)


def _bracket(sampled: np.ndarray, share: float) -> tuple[Any, Any]:
    """Between what the entry with that share of all at or above it most likely lies, from a sorted sample."""
    place = sampled.size * (1 - share)
    margin = _MARGIN * math.sqrt(sampled.size * share * (1 - share)) + 1
    low = sampled[math.floor(place - margin)] if place > margin else -1
    return low, sampled[min(sampled.size - 1, math.ceil(place + margin))]


def _within(ranked: np.ndarray, low: Any, high: Any) -> np.ndarray:
    return np.compress((ranked >= low) & (ranked <= high), ranked)


def _kth_greatest(ranked: np.ndarray, count: Any) -> Any:
    size = ranked.size
    if size > 2 * _SAMPLE:
        low, high = _bracket(np.sort(ranked[:: _stride(size)]), count / size)
        above = np.count_nonzero(ranked > high)
        near = _within(ranked, low, high)
        if above < count <= above + near.size and near.size < size:
            return _kth_greatest(near, count - above)
    return np.partition(ranked, size - count)[size - count]
