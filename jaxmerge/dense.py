"""Dense weight changes that are never there as a whole: formed a few rows at a time, in each pass over them.

A block of rows of ``s·B·A`` takes less time to multiply out than to fetch from memory, so that nothing is kept between
the passes that find a threshold. Only the one merged matrix is stored, in groups of rows that can lie on different
devices of a mesh.
"""

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmerge.base import Array
from jaxmerge.selection import WORTH_GUESSING, guess, magnitude_order

# Entries of a block for each task: what a core's cache holds, and what keeps an accelerator busy.
CPU_BLOCK = 2**18
DEFAULT_BLOCK = 2**24
# Groups of rows: sums over rows are taken in each and then over them, in order, wherever they lie.
_GROUPS = 8
# The entries from which on a matrix has groups.
_LARGE = 2**22
# Entries looked at to guess a threshold.
_SAMPLE = 2**14


@dataclass(frozen=True)
class Cut:
    """How the rows of a matrix are cut, which hangs on its shape and not on the devices, so that bits do not either.

    Attributes:
        shape: ``(p, q)``.
        block: Rows that are formed at once.
        blocks: Blocks in a group.
        groups: Groups in all.
        axes: The axes of the mesh that groups are spread over; empty where one device has them all.
        shards: The number of devices along those axes.
    """

    shape: tuple[int, int]
    block: int
    blocks: int
    groups: int
    axes: tuple[str, ...] = ()
    shards: int = 1

    @property
    def rows(self) -> int:
        """The number of rows with those that fill up the last block."""
        return self.groups * self.blocks * self.block

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def sum(self, value: Array) -> Array:
        """Over the devices; of integers, which have no order."""
        return lax.psum(value, self.axes) if self.axes else value

    def local(self, rows: Array) -> Array:
        """This device's groups ``[groups/shards, p', ...]`` of all rows ``[rows, ...]``."""
        grouped = rows.reshape(self.groups, -1, *rows.shape[1:])
        if not self.axes:
            return grouped
        here = self.groups // self.shards
        return lax.dynamic_slice_in_dim(grouped, lax.axis_index(self.axes) * here, here)

    def gather(self, groups: Array) -> Array:
        """All groups ``[groups, ...]`` from each device's own; for what is thin."""
        return lax.all_gather(groups, self.axes, tiled=True) if self.axes else groups


def is_large(shape: tuple[int, int]) -> bool:
    """Whether a matrix is cut into groups, which devices can share."""
    return math.prod(shape) >= _LARGE and shape[0] >= 8 * _GROUPS


def cut_rows(shape: tuple[int, int], entries: int, axes: tuple[str, ...] = (), shards: int = 1) -> Cut:
    """Cuts a matrix ``(p, q)`` into blocks of about so many entries, and into groups that ``shards`` devices share."""
    p, q = shape
    groups = (shards if _GROUPS % shards else _GROUPS) if shards > 1 or is_large(shape) else 1
    block = min(-(-p // groups), max(8, entries // q // 8 * 8))
    return Cut(shape, block, -(-p // (block * groups)), groups, axes, shards)


@dataclass(frozen=True, eq=False)
class DeltaPasses:
    """Passes over the deltas ``sᵢ·Bᵢ·Aᵢ`` of n tasks; see `jaxmerge.selection.Passes`.

    Orders and counts are ``[S, n]``: several of each task are looked at in one pass.

    Attributes:
        a: ``[n, r, q]``.
        b: ``[blocks, n, block, r]``, of this device's blocks.
        scales: ``[n]``.
        first: Scalar, the first row of this device.
        cut: How rows are cut.
    """

    a: Array
    b: Array
    scales: Array
    first: Array
    cut: Cut

    @property
    def size(self) -> int:
        """The number of entries of one task."""
        return self.cut.size

    @property
    def dtype(self) -> Any:
        """Of the orders."""
        return jax.eval_shape(magnitude_order, self.scales).dtype

    def block(self, i: Array) -> Array:
        """Rows of all tasks, ``[n, block, q]``."""
        block = lax.dynamic_index_in_dim(self.b, i, keepdims=False)
        return self.scales[:, None, None] * jnp.matmul(block, self.a, precision="highest")

    def index(self, i: Array) -> Array:
        """The flat indices of those entries, ``[block, q]``."""
        q, shape = self.cut.shape[1], (self.cut.block, self.cut.shape[1])
        row = self.first + i * self.cut.block + lax.broadcasted_iota(jnp.int32, shape, 0)
        return row * q + lax.broadcasted_iota(jnp.int32, shape, 1)

    def _accumulate(self, of_block: Callable[[Array], Any], start: Any, add: Callable[[Any, Any], Any]) -> Any:
        return lax.fori_loop(0, self.b.shape[0], lambda i, total: add(total, of_block(i)), start)

    def count(self, order: Array) -> Array:
        """See `Passes`."""

        def of_block(i: Array) -> Array:
            reaches = magnitude_order(self.block(i)) >= order[..., None, None]
            # Over rows first, which goes on along whole vectors.
            return jnp.sum(jnp.sum(reaches, -2, dtype=jnp.int32), -1, dtype=jnp.int32)

        reached = self.cut.sum(self._accumulate(of_block, jnp.zeros(order.shape, jnp.int32), operator.add))
        # The rows that fill up the last block are zeros, the least of all numbers.
        filling = (self.cut.rows - self.cut.shape[0]) * self.cut.shape[1]
        return reached - jnp.where(order <= jnp.ones_like(order), filling, 0)

    def neighbours(self, order: Array) -> tuple[Array, Array, Array]:
        """See `Passes`. That the zeros of the filling may be among them does no harm: nothing lies in between."""
        top = jnp.full(order.shape, jnp.iinfo(order.dtype).max, order.dtype)

        def of_block(i: Array) -> tuple[Array, Array]:
            entries = magnitude_order(self.block(i))
            reaches = entries >= order[..., None, None]
            below = jnp.max(jnp.where(reaches, jnp.zeros_like(entries), entries), (-2, -1))
            return below, jnp.min(jnp.where(reaches, entries, top[..., None, None]), (-2, -1))

        def add(total: tuple[Array, Array], more: tuple[Array, Array]) -> tuple[Array, Array]:
            return jnp.maximum(total[0], more[0]), jnp.minimum(total[1], more[1])

        below, above = self._accumulate(of_block, (jnp.zeros_like(top), top), add)
        if self.cut.axes:
            below, above = lax.pmax(below, self.cut.axes), lax.pmin(above, self.cut.axes)
        return self.count(order), below, above

    def end_of_ties(self, order: Array, ties: Array, wanted: Array) -> Array:
        """See `Passes`. One pass counts the ties of every block; then each task's own block is looked into."""
        blocks, q = self.b.shape[0], self.cut.shape[1]
        first = self.first // self.cut.block

        def of_block(i: Array) -> Array:
            return jnp.sum(magnitude_order(self.block(i)) == order[..., None, None], (-2, -1), dtype=jnp.int32)

        def end_in_block(lane: tuple[Array, ...]) -> Array:
            own, task, block, rest = lane
            here = jnp.clip(block - first, 0, blocks - 1)
            tied = (magnitude_order(self.block(here))[task] == own).ravel()
            end = block * (self.cut.block * q) + jnp.argmax(jnp.cumsum(tied, dtype=jnp.int32) == rest).astype(jnp.int32)
            return self.cut.sum(jnp.where(here == block - first, end + 1, 0))

        def look() -> Array:
            counts = self.cut.gather(lax.map(of_block, jnp.arange(blocks, dtype=jnp.int32)))
            through = jnp.cumsum(counts, 0, dtype=jnp.int32)
            block = jnp.minimum(jnp.sum(through < wanted, 0, dtype=jnp.int32), counts.shape[0] - 1)
            own = jnp.take_along_axis(jnp.stack([through, counts]), block[None, None], axis=1)[:, 0]
            rest = wanted - (own[0] - own[1])
            task = jnp.broadcast_to(jnp.arange(order.shape[-1], dtype=jnp.int32), order.shape)
            return lax.map(end_in_block, tuple(x.ravel() for x in (order, task, block, rest))).reshape(order.shape)

        all_of_them = jnp.full_like(wanted, self.size)
        ends = lax.cond(jnp.any(ties != wanted), look, lambda: all_of_them)
        return jnp.where(ties == wanted, all_of_them, ends)

    def guess(self, count: Array) -> Array | None:
        """A bracket for the k-th greatest of each task, see `jaxmerge.selection.guess`; None where it gains nothing."""
        p, q = self.cut.shape
        if self.size < WORTH_GUESSING:
            return None
        k = jnp.arange(_SAMPLE, dtype=jnp.float32)
        # A sequence that covers the matrix evenly (its ratios are powers of the plastic number's reciprocal).
        rows, columns = ((k * ratio % 1 * size).astype(jnp.int32) for ratio, size in ((0.7548777, p), (0.5698403, q)))
        b = self._all_rows()[:, jnp.clip(rows, 0, p - 1)]
        a = self.a[:, :, jnp.clip(columns, 0, q - 1)]
        sampled = self.scales[:, None] * jnp.einsum("nkr,nrk->nk", b, a, precision="highest")
        return guess(magnitude_order(sampled), self.size, count)

    def _all_rows(self) -> Array:
        groups = self.cut.gather(self.b)
        return groups.swapaxes(0, 1).reshape(self.a.shape[0], -1, self.a.shape[1])


def delta_passes(a: Array, b: Array, scales: Array, cut: Cut) -> DeltaPasses:
    """Passes over deltas.

    Args:
        a: ``[n, r, q]``.
        b: ``[n, p, r]``.
        scales: ``[n]``.
        cut: How rows are cut.

    Returns:
        The passes over this device's rows.
    """
    n, p, r = b.shape
    filled = jnp.pad(b, ((0, 0), (0, cut.rows - p), (0, 0)))
    blocks = cut.local(filled.reshape(n, -1, cut.block, r).swapaxes(0, 1))
    here = cut.groups // cut.shards * cut.blocks * cut.block
    first = lax.axis_index(cut.axes) * here if cut.axes else jnp.zeros((), jnp.int32)
    return DeltaPasses(a, blocks.reshape(-1, n, cut.block, r), scales, first, cut)


class Dense(NamedTuple):
    """A matrix in groups of rows, a linear operator for `jaxmerge.lowrank.leading_svd`.

    Attributes:
        groups: ``[groups/shards, p', q]``, this device's.
        cut: How rows are cut.
    """

    groups: Array
    cut: Cut

    @property
    def shape(self) -> tuple[int, int]:
        """With the rows that fill up the last block; they are zeros."""
        return self.cut.rows, self.cut.shape[1]

    @property
    def dtype(self) -> Any:
        """Of the entries."""
        return self.groups.dtype

    def times(self, columns: Array) -> Array:
        """The product with ``[q, w]``."""
        local = jnp.einsum("gpq,qw->gpw", self.groups, columns, precision="highest")
        return self.cut.gather(local).reshape(-1, columns.shape[1])

    def transposed_times(self, columns: Array) -> Array:
        """The product of its transpose with ``[rows, w]``, summed over the groups in order."""
        partial = self.cut.gather(jnp.einsum("gpw,gpq->gwq", self.cut.local(columns), self.groups, precision="highest"))
        return functools.reduce(operator.add, [partial[g] for g in range(self.cut.groups)]).T

    def largest(self) -> Array:
        """The largest magnitude."""
        largest = jnp.max(jnp.abs(self.groups))
        return lax.pmax(largest, self.cut.axes) if self.cut.axes else largest

    def squared_norm(self) -> Array:
        """The sum of squares, over the groups in order."""
        sums = self.cut.gather(jnp.sum(self.groups * self.groups, (1, 2)))
        return functools.reduce(operator.add, [sums[g] for g in range(self.cut.groups)])

    def whole(self) -> Array:
        """``[p, q]``, on every device: for matrices that are small."""
        return self.cut.gather(self.groups).reshape(self.shape)[: self.cut.shape[0]]


def merge_entries(passes: DeltaPasses, weights: Array, pruning: Any, combine: Callable[[Array, Array], Array]) -> Dense:
    """Prunes and combines the deltas, in one pass.

    Args:
        passes: Over the deltas of n tasks.
        weights: ``[n]``.
        pruning: Of each task, one of `jaxmerge.sparsify`; None leaves them whole.
        combine: ``(tasks [n, ...], weights [n]) -> [...]``, entry by entry.

    Returns:
        The merged matrix.
    """
    cut = passes.cut

    def of_block(i: Array) -> Array:
        index = passes.index(i)
        tasks = passes.block(i)
        merged = combine(tasks if pruning is None else pruning.apply(tasks, index), weights)
        return jnp.where(index < cut.size, merged, jnp.zeros_like(merged))

    blocks = lax.map(of_block, jnp.arange(passes.b.shape[0], dtype=jnp.int32))
    return Dense(blocks.reshape(cut.groups // cut.shards, -1, cut.shape[1]), cut)
