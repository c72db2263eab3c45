"""The k-th magnitude by counting passes, against a stable sort."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmerge.selection import (
    ArrayPasses,
    Cut,
    _cut_in_passes,
    cut_largest,
    cut_on_host,
    flat_index,
    guess,
    magnitude_order,
    rank_order,
    sample,
    search,
)

DTYPES = ["float32", "float16", "bfloat16"]
SIZE = 40_000  # Enough for guesses, interpolation and all.


def entries(kind, dtype):
    """``[3, SIZE]``."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, SIZE))
    x = {
        "normal": x,
        "wide": np.exp(2 * x),
        "ties": np.round(2 * x),
        "sparse": np.where(rng.random(x.shape) < 0.999, 0, x),
        "equal": np.ones_like(x),
        "zero": np.zeros_like(x),
        "bfloat16": x.astype(ml_dtypes.bfloat16).astype(np.float64),
        "special": np.where(rng.random(x.shape) < 0.1, np.nan, np.where(rng.random(x.shape) < 0.1, np.inf, x)),
        "heavy end": np.where(np.arange(SIZE) < SIZE - 100, x, 1.0),
    }[kind]
    return x.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


KINDS = ["normal", "wide", "ties", "sparse", "equal", "zero", "bfloat16", "special", "heavy end"]


def largest(row, count):
    """The mask of the ``count`` largest magnitudes, first come first, NaN last; by a stable sort."""
    magnitude = np.abs(row.astype(np.float64))
    order = np.argsort(np.where(np.isnan(magnitude), np.inf, -magnitude), kind="stable")
    mask = np.zeros(row.size, bool)
    mask[order[:count]] = True
    return mask


def kept(cut, tensors):
    return np.asarray(cut.keeps(jnp.asarray(tensors), flat_index(tensors.shape[1:])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_passes_and_partition_cut_where_a_stable_sort_does(kind, dtype):
    tensors = entries(kind, dtype)
    for counts in ([0, 1, SIZE], [SIZE // 5, SIZE // 2, SIZE - 1], [7, 17_321, 39_950]):
        expected = np.stack([largest(row, count) for row, count in zip(tensors, counts, strict=True)])
        counts = np.array(counts, np.int32)
        np.testing.assert_array_equal(kept(cut_largest(tensors, counts, batch=1), tensors), expected)
        in_passes = _cut_in_passes(jnp.asarray(tensors), jnp.asarray(counts), 1)
        np.testing.assert_array_equal(kept(in_passes, tensors), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_several_counts_at_once(kind):
    tensors = entries(kind, "float32")
    counts = np.tile(np.array([20_000, 0, 7, SIZE, 8_000, 8_000, 39_999], np.int32), (3, 1))
    cuts = cut_on_host(tensors, counts)
    for i in range(counts.shape[1]):
        expected = np.stack([largest(row, count) for row, count in zip(tensors, counts[:, i], strict=True)])
        np.testing.assert_array_equal(kept(Cut(cuts.threshold[:, i], cuts.end[:, i]), tensors), expected)


def test_float64_and_odd_shapes():
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        for shape in ((2, 1, 5), (2, 300, 150), (2, 7, 3, 11)):
            tensors = np.round(rng.normal(size=shape) * 4)
            count = np.prod(shape[1:]) // 3
            expected = np.stack([largest(row.ravel(), count).reshape(shape[1:]) for row in tensors])
            for cut in (cut_largest(tensors, count, 1), _cut_in_passes(jnp.asarray(tensors), jnp.int32(count), 1)):
                np.testing.assert_array_equal(kept(cut, tensors), expected)


class Counted(ArrayPasses):
    """Counts how often the entries are gone through."""

    taken = 0

    def count(self, order):
        Counted.taken += 1
        return super().count(order)

    def neighbours(self, order):
        Counted.taken += 2  # It costs about as much.
        return super().neighbours(order)

    def count_ties(self, order, end):
        Counted.taken += 1
        return super().count_ties(order, end)


@pytest.mark.parametrize(("kind", "most"), [("normal", 20), ("wide", 20), ("ties", 24), ("sparse", 20), ("equal", 20)])
def test_few_passes_are_enough(kind, most):
    tensors = entries(kind, "float32")
    for density in (0.1, 0.2, 0.5, 0.9):
        Counted.taken = 0
        passes = Counted(magnitude_order(jnp.asarray(tensors)), flat_index((SIZE,)))
        count = jnp.full((3,), int(density * SIZE), jnp.int32)
        with jax.disable_jit():
            cut = search(passes, count, guess(sample(passes.order, 1), SIZE, count))
        assert Counted.taken <= most, (density, Counted.taken)
        assert isinstance(cut, Cut)
        np.testing.assert_array_equal(kept(cut, tensors).sum(1), count)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 500), (2, 3, 70), (2, 2**16), (1, 2**16 + 3)])
def test_ranks_are_those_of_a_stable_sort(dtype, shape):
    rng = np.random.default_rng(0)
    # Half of them of few magnitudes, both signs; a zero and an infinity among them.
    values = np.where(rng.random(shape) < 0.5, rng.normal(size=shape), rng.integers(-2, 3, shape))
    tensor = jnp.asarray(values, dtype)
    expected = np.argsort(np.abs(np.asarray(tensor, np.float64)), axis=-1, kind="stable")
    np.testing.assert_array_equal(jax.jit(rank_order)(tensor), expected)
