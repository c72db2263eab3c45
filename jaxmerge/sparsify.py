"""Which entries of a tensor survive: exact top-k by magnitude, and random dropping.

A pruning knows what happens to an entry from its value and its flat index, so that a tensor can be pruned in parts.
"""

import functools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxmerge.base import Array, has_values, promote
from jaxmerge.selection import Cut, cut_largest, flat_index, rank_order

PruneMethod = Literal["magnitude", "random"]

_WIDTHS = (2, 4, 8)  # Bytes of the floats that can be pruned.


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value", "count", "cut"), meta_fields=())
@dataclass(frozen=True, eq=False)
class Density:
    """A density bound to a tensor of known size.

    Attributes:
        value: Scalar float, the fraction of entries to keep; or ``[n]``, that of each of n tensors.
        count: As the value, int32: how many entries that is.
        cut: ``[k, n]``, where the largest of n tasks end for each of the k cuts of a pruning, if that has been found
            already.
    """

    value: Array
    count: Array
    cut: Cut | None = None


def bind_density(
    density: "ArrayLike | Sequence[float] | Density",
    size: int | np.ndarray,
    name: str = "Density",
    tasks: int | None = None,
) -> Density:
    """Turns a density into the number of survivors among ``size`` entries.

    Args:
        density: Fraction to keep. A Python or NumPy number gives ``int(density * size)`` in float64, as PEFT
            does; a JAX array gives the same in its own precision, normally float32, where
            ``0.29 * 100`` is 29 and not 28. 1 and above keep everything.
        size: Number of entries, below 2**31; or an array of such numbers, each with a count of its own.
        name: What errors call it.
        tasks: For how many tensors there may be a density each, ``[tasks]``; None where there is to be one number.

    Returns:
        The density and its count, ``[*tasks, *size]``; one that is bound already is returned as it is.

    Raises:
        ValueError: If the density is not one number, nor one for each task, or is known to be negative or NaN.
    """
    if isinstance(density, Density):
        return density
    if np.max(size) >= 2**31:
        raise ValueError(f"a tensor of {np.max(size)} entries is too large to prune: the limit is 2**31 - 1")
    _check_density(density, name, tasks)
    sizes = np.asarray(size)
    if isinstance(density, jax.Array):
        value = jnp.asarray(density, promote(density.dtype, jnp.float32))
        each = value.reshape(value.shape + (1,) * sizes.ndim)
        count = jnp.floor(jnp.clip(each, 0, 1) * jnp.asarray(sizes, value.dtype))
        return Density(value, jnp.minimum(count.astype(jnp.int32), sizes.astype(np.int32)))
    value = np.asarray(density, np.float64)
    count = np.floor(np.minimum(value.reshape(value.shape + (1,) * sizes.ndim), 1) * sizes)
    return Density(jnp.asarray(value, float), jnp.asarray(count.astype(np.int32)))


def _check_density(density: Any, name: str, tasks: int | None) -> None:
    kinds = numbers.Real | np.generic | np.ndarray | jax.Array | (list | tuple if tasks is not None else numbers.Real)
    array = np.empty(0, object)
    if isinstance(density, kinds):
        array = density if isinstance(density, jax.Array) else np.asarray(density)
    if np.shape(array) not in ((), (tasks,)) or array.dtype.kind in "OUSc":
        each = "" if tasks is None else f", or {tasks}: one per adapter"
        raise ValueError(f"{name} should be a number{each}, got {density!r}")
    if not has_values(density):
        return
    for number in np.asarray(density, np.float64).ravel().tolist():
        if not number >= 0:
            raise ValueError(f"{name} should be >= 0, got {number:g}")


def each_over(values: Array, axes: int) -> Array:
    """One number, or one for each tensor ``[*batch]``, to go with tensors of so many axes more."""
    return values.reshape(values.shape + (1,) * axes) if values.ndim else values


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
        return _prune(tensor, Largest(cut_largest(tensor, bound.count)))
    if method == "random":
        key = need_key(key, "random pruning")
        return _prune(tensor, AtRandom(bound.value, jnp.asarray(rescale, bool), key))
    raise ValueError(f"Unknown method {method!r}: prune knows 'magnitude' and 'random'")


def as_floating(tensor: ArrayLike) -> Array:
    """The tensor as a JAX array; a ValueError if it is not of 16 to 64-bit floating point."""
    array = jnp.asarray(tensor)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize not in _WIDTHS:
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


def times(x: Array, y: Array) -> Array:
    """``x * y``, of one dtype, rounded before anything is added to it."""
    product = round_to(x * y, x.dtype)
    # The choice changes no value. It keeps the compiler from fusing the product with the sum that follows, with one
    # rounding for both: it would do so or not depending on the sharding.
    return jnp.where(jnp.isnan(x), x, product)


def need_key(key: Array | None, what: str) -> Array:
    """The key, or a ValueError that says what wanted it."""
    if not isinstance(key, jax.Array):
        raise ValueError(f"{what} draws random numbers: pass key=jax.random.key(seed), not {key!r}")
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("cut",), meta_fields=())
@dataclass(frozen=True, eq=False)
class Largest:
    """Pruning by magnitude.

    Attributes:
        cut: ``[*batch]``, where the survivors of each tensor end.
    """

    cut: Cut

    def apply(self, tensors: Array, index: Array) -> Array:
        """Zeroes what does not survive.

        Args:
            tensors: ``[*batch, *shape]``, the tensors or a part of each.
            index: ``[*shape]`` int32, the flat index of each entry in its tensor.

        Returns:
            As the tensors.
        """
        return jnp.where(self.cut.keeps(tensors, index), tensors, jnp.zeros_like(tensors))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("outliers", "cut"), meta_fields=())
@dataclass(frozen=True, eq=False)
class Between:
    """Pruning by magnitude that drops the outliers too (Model Breadcrumbs, arXiv:2312.06795).

    Attributes:
        outliers: ``[*batch]``, where the outliers of each tensor end.
        cut: ``[*batch]``, where the survivors behind them end.
    """

    outliers: Cut
    cut: Cut

    def apply(self, tensors: Array, index: Array) -> Array:
        """Zeroes what does not survive, as `Largest.apply`."""
        survives = self.cut.keeps(tensors, index) & ~self.outliers.keeps(tensors, index)
        return jnp.where(survives, tensors, jnp.zeros_like(tensors))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("density", "rescale", "keys"), meta_fields=())
@dataclass(frozen=True, eq=False)
class AtRandom:
    """Random dropping.

    Attributes:
        density: Scalar, or ``[*batch]``: the probability that an entry survives.
        rescale: Scalar boolean, whether survivors are divided by it.
        keys: ``[*batch]`` keys, one for every tensor.
    """

    density: Array
    rescale: Array
    keys: Array

    def apply(self, tensors: Array, index: Array) -> Array:
        """Zeroes what does not survive, as `Largest.apply`; each entry's fate hangs on its flat index alone."""

        def drawn(lane: tuple[Array, Array]) -> Array:
            key, density = lane
            return _uniform(key, index) < density.astype(jnp.float32)

        # One task after another: the compiler would write out the drawing for each of them, and again for each use.
        lanes = self.keys, jnp.broadcast_to(self.density, self.keys.shape)
        survives = lax.map(drawn, lanes) if self.keys.ndim else drawn(lanes)
        density = each_over(self.density, index.ndim)
        # Divided in float32 at least, as torch does for half types; and entry by entry, since XLA would turn a
        # division by one scalar into a multiplication by its reciprocal.
        wide = promote(tensors.dtype, jnp.float32)
        dividing = survives & self.rescale & (density > 0) & (density < 1)
        divisor = jnp.where(dividing, density.astype(wide), jnp.ones((), wide))
        scaled = round_to(tensors.astype(wide) / divisor, tensors.dtype)
        return jnp.where(survives, scaled, jnp.zeros_like(tensors))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("density", "epsilon", "keys"), meta_fields=())
@dataclass(frozen=True, eq=False)
class ByRank:
    """Random dropping in which an entry's chance grows with its rank in its row (MagPrune, arXiv:2406.11617).

    Attributes:
        density: Scalar, or ``[*batch]``: the probability that an entry survives, on the average of a row.
        epsilon: As the density, by how much a row's largest entry survives with more probability than its smallest.
            Less where a probability would otherwise leave [0, 1]: nothing is dropped at a density of 1.
        keys: ``[*batch]`` keys, one for every tensor.
    """

    density: Array
    epsilon: Array
    keys: Array

    def apply(self, tensors: Array, index: Array) -> Array:
        """Zeroes what does not survive, as `Largest.apply`, and divides the rest by its probability.

        A part of a tensor has to hold whole rows, which lie along the last axis.
        """

        def pruned(task: tuple["ByRank", Array]) -> Array:
            own, tensor = task
            probability = own.probabilities(tensor)
            survives = _uniform(own.keys, index) < probability
            divisor = jnp.where(survives, probability, jnp.ones_like(probability)).astype(tensor.dtype)
            return jnp.where(survives, tensor / divisor, jnp.zeros_like(tensor))

        # One task after another: what a sort takes is wanted for one of them only.
        density, epsilon = (jnp.broadcast_to(x, self.keys.shape) for x in (self.density, self.epsilon))
        each = ByRank(density, epsilon, self.keys), tensors
        return lax.map(pruned, each) if self.keys.ndim else pruned(each)

    def probabilities(self, tensor: Array) -> Array:
        """With what probability each entry of ``[*shape]`` survives, in float32. Equal ones rank in their order."""
        length = tensor.shape[-1] if tensor.ndim else 1
        density = jnp.clip(self.density.astype(jnp.float32), 0, 1)
        half = jnp.minimum(self.epsilon.astype(jnp.float32) / 2, jnp.minimum(density, 1 - density))
        # For each rank once, and then moved to its entry.
        offsets = np.linspace(-1, 1, length) if length > 1 else np.zeros(length)
        ranked = density + times(half, jnp.asarray(offsets, jnp.float32))
        if not tensor.ndim:
            return ranked[0]
        order = rank_order(tensor)
        ranked = jnp.broadcast_to(jnp.clip(ranked, 0, 1), tensor.shape)
        return jnp.put_along_axis(jnp.zeros_like(ranked), order, ranked, axis=-1, inplace=False)


Pruning = Largest | Between | AtRandom | ByRank


def outlier_counts(count: Array, outliers: Array, size: int) -> tuple[Array, Array]:
    """How many entries lie before the cuts of `Between`: the outliers, as many as ``count`` leaves, and with those."""
    outliers = jnp.minimum(outliers, size - count)
    return outliers, outliers + count


def _uniform(keys: Array, index: Array) -> Array:
    """What ``jax.random.uniform(key, shape)`` has at flat indices: ``[*batch, *index.shape]`` in [0, 1).

    Drawn by position, so that a tensor can be drawn in parts.
    """
    words = jax.random.key_data(_as_threefry(keys)).reshape(*keys.shape, *(1,) * index.ndim, 2)
    high, low = _threefry(words[..., 0], words[..., 1], jnp.uint32(0), index.astype(jnp.uint32))
    # 23 random bits behind the exponent of 1 make a number in [1, 2).
    mantissa = lax.shift_right_logical(high ^ low, jnp.uint32(9)) | jnp.uint32(0x3F800000)
    return lax.bitcast_convert_type(mantissa, jnp.float32) - jnp.float32(1)


def _threefry(first: Array, second: Array, high: Array, low: Array) -> tuple[Array, Array]:
    """Threefry-2x32 in 20 rounds (Salmon et al., SC 2011) of a counter under a key, as `jax.random` has it.

    In plain operations, which fuse with what uses the numbers: JAX's own primitive is a loop over stored arrays on a
    CPU, and takes fifteen times as long.
    """
    schedule = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
    high, low = high + first, low + second
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            high = high + low
            low = lax.shift_left(low, jnp.uint32(turn)) | lax.shift_right_logical(low, jnp.uint32(32 - turn))
            low = low ^ high
        high, low = high + schedule[(i + 1) % 3], low + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return high, low


def _as_threefry(keys: Array) -> Array:
    """The keys, or threefry keys drawn from them where they are of another kind."""
    if jax.random.key_impl(keys) == "threefry2x32":
        return keys
    draw = functools.partial(jax.random.bits, shape=(2,), dtype=jnp.uint32)
    words = jax.vmap(draw)(keys.reshape(-1)).reshape(*keys.shape, 2)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


@jax.jit
def _prune(tensor: Array, pruning: Largest | AtRandom) -> Array:
    return pruning.apply(tensor, flat_index(tensor.shape))
