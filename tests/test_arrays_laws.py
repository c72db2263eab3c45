"""Laws of the array functions that PEFT leaves to accident, their errors, and how they compose with JAX."""

import functools
import itertools
import warnings

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
import tests.conftest  # noqa: F401  (sets the dtype promotion to strict)
from tests.helpers import compilations

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGN_METHODS = ["total", "frequency"]
KEY = jax.random.key(11)

# Every merge as a function of (tasks, weights, density).
MERGES = {
    "task_arithmetic": lambda tasks, weights, density: jm.task_arithmetic(tasks, weights),
    "magnitude_prune": jm.magnitude_prune,
    "ties_total": jm.ties,
    "ties_frequency": functools.partial(jm.ties, majority_sign_method="frequency"),
    "dare_linear": functools.partial(jm.dare_linear, key=KEY),
    "dare_ties": functools.partial(jm.dare_ties, key=KEY),
}
PRUNING = [name for name in MERGES if name != "task_arithmetic"]
every_merge = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
every_pruning_merge = pytest.mark.parametrize("merge", [MERGES[name] for name in PRUNING], ids=PRUNING)
PRUNES = {
    "magnitude": lambda x, density: jm.prune(x, density, "magnitude"),
    "random": lambda x, density: jm.prune(x, density, "random", key=KEY),
    "rescaled": lambda x, density: jm.prune(x, density, "random", True, key=KEY),
}
every_prune = pytest.mark.parametrize("prune", PRUNES.values(), ids=PRUNES)


def bits(array) -> np.ndarray:
    """The bits, with one NaN for all."""
    array = np.asarray(array)
    with np.errstate(invalid="ignore"):  # ml_dtypes, of a signalling NaN
        array = np.where(np.isnan(array), np.asarray(np.nan, array.dtype), array)
    return array.view(UNSIGNED[array.dtype.itemsize])


def assert_same_bits(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    np.testing.assert_array_equal(bits(got), bits(expected))


def assert_same(got, expected):
    """The same up to a rounding: XLA divides by a number or multiplies by its reciprocal, as it likes."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got == 0, expected == 0)
    rtol = 2 * float(jnp.finfo(got.dtype).eps)
    np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), rtol=rtol)


def reference_mask(x: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` largest by a stable sort; NaN last."""
    flat = np.asarray(x).reshape(-1)
    flat = flat if flat.dtype == np.float64 else flat.astype(np.float32)
    order = np.argsort(np.where(np.isnan(flat), 1, -np.abs(flat)), kind="stable")
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return mask.reshape(np.shape(x))


def reference_prune(x: np.ndarray, density: float) -> np.ndarray:
    count = x.size if density >= 1 else int(density * x.size)
    return np.where(reference_mask(x, count), x, np.zeros_like(x))


def dyadic(shape, seed=0, dtype=np.float32) -> np.ndarray:
    """Multiples of 1/16 in [-2, 2]: zeros, heavy ties, and exact products and sums."""
    return (np.random.default_rng(seed).integers(-32, 33, size=shape) / 16).astype(dtype)


# The k-th magnitude


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000, 4097])
def test_the_largest_are_those_of_a_stable_sort(size, dtype):
    rng = np.random.default_rng(size)
    kind = DTYPES.get(dtype, np.float64)
    info = ml_dtypes.finfo(kind)
    with np.errstate(over="ignore", under="ignore"), jax.enable_x64(dtype == "float64"):
        small, tiny, huge = info.smallest_subnormal, info.tiny, info.max
        special = np.asarray([0.0, -0.0, small, -small, 3 * small, tiny, -tiny, huge, -huge, 1, -1]).astype(kind)
        special = np.concatenate([special, np.asarray([np.inf, -np.inf, np.nan], kind)])
        arrays = [
            rng.normal(size=size).astype(kind),
            rng.integers(-2, 3, size=size).astype(kind),
            rng.choice(special, size=size),
            rng.choice(special[:6], size=size),
            (rng.normal(size=size) * 10.0 ** rng.integers(-45, 38, size=size)).astype(kind),
            rng.integers(0, np.iinfo(UNSIGNED[info.bits // 8]).max, size=size, dtype=UNSIGNED[info.bits // 8],
                         endpoint=True).view(kind),
            np.full(size, -1, kind),
            np.zeros(size, kind),
            np.full(size, np.nan, kind),
        ]  # fmt: skip
        for x in arrays:
            for density in (0.0, 0.1, 0.77, 1 - 1e-9):
                assert_same_bits(jm.prune(x, density, "magnitude"), reference_prune(x, density))


def test_every_count_of_a_small_tensor():
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = rng.choice(np.float32([0, -0.0, 1, -1, 2, -2, np.inf, -np.inf, np.nan, 1e-45]), size=(2, 3, 4))
        for count in range(25):
            # Half an entry more, so that no rounding can lower the count.
            got = jm.prune(x, (count + 0.5) / 24, "magnitude")
            assert_same_bits(got, np.where(reference_mask(x, count), x, np.float32(0)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 5), (3, 5, 7), (2, 1, 4, 3)])
def test_ties_go_to_the_lowest_flat_index(shape, dtype):
    x = np.where(np.arange(np.prod(shape)).reshape(shape) % 2, -1, 1).astype(DTYPES[dtype])
    for density in (0.0, 0.2, 0.5, 0.9):
        kept = np.asarray(jm.prune(x, density, "magnitude")).reshape(-1) != 0
        count = int(density * x.size)
        np.testing.assert_array_equal(kept, np.arange(x.size) < count)


def test_each_task_is_cut_on_its_own():
    tasks = dyadic((4, 6, 5)) * np.float32([1, 4, 16, 64])[:, None, None]
    for density in (0.29, 0.5):
        expected = sum(reference_prune(task, density) for task in tasks)
        np.testing.assert_array_equal(jm.magnitude_prune(tasks, [1.0] * 4, density), expected)


# What PEFT leaves to accident


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_pruned_is_plus_zero(dtype):
    x = np.asarray([np.nan, -1, -np.nan, np.inf, -3, -0.0, -np.inf, 2], DTYPES[dtype])
    zero = np.zeros((), DTYPES[dtype])
    for count, kept in ((0, []), (1, [3]), (2, [3, 6]), (3, [3, 6, 4]), (5, [3, 6, 4, 7, 1])):
        expected = np.full(8, zero)
        expected[kept] = x[kept]
        assert_same_bits(jm.prune(x, count / 8, "magnitude"), expected)
    for rescale in (False, True):
        pruned = np.asarray(jm.prune(x, 0, "random", rescale, key=KEY))
        assert_same_bits(pruned, np.full(8, zero))
        many = np.tile(x, 50)
        pruned = np.asarray(jm.prune(many, 0.5, "random", rescale, key=KEY))
        kept = np.asarray(jm.prune(np.ones_like(many), 0.5, "random", key=KEY)) != 0
        assert_same_bits(pruned[~kept], np.full((~kept).sum(), zero))
        expected = (many.astype(np.float32) / np.float32(0.5 if rescale else 1)).astype(many.dtype)
        np.testing.assert_array_equal(pruned[kept].astype(np.float32), expected[kept].astype(np.float32))


@pytest.mark.parametrize("density", [1, 1.0, 2.5, np.inf])
@every_prune
def test_from_1_on_nothing_is_pruned(prune, density):
    x = np.float32([np.nan, -0.0, 0.0, np.inf, -np.inf, -1, 1e-45, 3])
    got = np.asarray(prune(x, density))
    np.testing.assert_array_equal(got[[0, 3, 4, 5, 7]], x[[0, 3, 4, 5, 7]])
    if prune is PRUNES["magnitude"]:
        assert_same_bits(got, x)


@every_prune
def test_nan_is_kept_only_when_nothing_else_is_left(prune):
    x = np.float32([np.nan, 0, np.nan, 1])
    if prune is PRUNES["magnitude"]:
        np.testing.assert_array_equal(prune(x, 0.5), [0, 0, 0, 1])
        np.testing.assert_array_equal(prune(x, 0.75), [np.nan, 0, 0, 1])
    np.testing.assert_array_equal(prune(x, 1), x)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@every_pruning_merge
def test_density_0_gives_zeros(merge, dtype):
    tasks = [np.asarray([1, -2, np.inf, 0], DTYPES[dtype]), np.asarray([-1, 3, 1, np.nan], DTYPES[dtype])]
    for density in (0, 0.0, -0.0, jnp.float32(0), np.float64(0)):
        got = np.asarray(merge(tasks, [0.5, -2.0], density))
        np.testing.assert_array_equal(got, np.zeros(4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_ignores_what_is_not_marked(dtype):
    bad = np.asarray([np.nan, np.inf, -np.inf, np.nan], DTYPES[dtype])
    good = np.asarray([1, 2, -3, 0], DTYPES[dtype])
    tasks, mask = np.stack([bad, good, good]), np.asarray([[False] * 4, [True] * 4, [True, False, True, False]])
    got = jm.disjoint_merge(tasks, mask)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [1, 2, -3, 0])
    np.testing.assert_array_equal(jm.disjoint_merge(tasks, np.zeros_like(mask)), np.zeros(4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", SIGN_METHODS)
def test_even_votes_elect_plus_and_zeros_never_vote(method, dtype):
    tasks = np.asarray([[1, 0, -0.0, -1, 0, 2], [-1, 0, 0, 1, -1, -2], [0, -0.0, 0, 0, 0, 0]], DTYPES[dtype])
    mask = np.asarray(jm.calculate_majority_sign_mask(tasks, method))
    assert mask.dtype == bool
    expected = [
        [True, False, False, False, False, True],
        [False, False, False, True, True, False],
        [False] * 6,
    ]
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(jm.ties(tasks, [1, 1, 1], 1, method), [1, 0, 0, 1, -1, 2])


def test_the_election_does_not_see_the_weights_and_the_divisor_counts():
    assert jm.ties([np.float32([1]), np.float32([-0.6])], [0.1, 10.0], 1)[0] == np.float32(0.1)
    assert jm.ties([np.float32([1]), np.float32([-1])], [-1, 1], 1)[0] == -1
    assert jm.ties([np.float32([1]), np.float32([1])], [1, 0], 1)[0] == 0.5
    assert jm.ties([np.float32([1]), np.float32([1])], [2, 1], 1)[0] == 1.5


def test_pruned_infinities_and_nans_do_not_reach_the_merge():
    tasks = np.float32([[np.nan, 5, 4, 1], [np.inf, -np.inf, np.inf, 1]])
    np.testing.assert_array_equal(jm.magnitude_prune(tasks, [1.0, 2.0], 0.25), [np.inf, 5, 0, 0])
    np.testing.assert_array_equal(jm.magnitude_prune(tasks[:1], [1.0], 0.5), [0, 5, 4, 0])
    np.testing.assert_array_equal(jm.ties(tasks[:1], [1.0], 0.75), [0, 5, 4, 1])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_an_empty_tensor_stays_empty(shape):
    x = jnp.zeros(shape, jnp.float32)
    for prune in PRUNES.values():
        assert prune(x, 0.5).shape == shape
    for merge in MERGES.values():
        assert merge([x, x], [1.0, 2.0], 0.5).shape == shape


def test_a_scalar_is_a_tensor_of_one_entry():
    assert jm.prune(jnp.float32(-3), 0.99, "magnitude") == 0
    assert jm.prune(jnp.float32(-3), 1.0, "magnitude") == -3
    assert jm.ties([jnp.float32(3), jnp.float32(1)], [1, 1], 1) == 2


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("merge", [MERGES["task_arithmetic"], MERGES["ties_total"]], ids=["task_arithmetic", "ties"])
def test_eight_bit_floats_are_named(merge, dtype):
    tasks = jnp.asarray([[1, -2, 3, 4], [1, 2, 3, -4]], jnp.float32).astype(dtype)
    with pytest.raises(ValueError, match=dtype):
        merge(tasks, [1.0, 1.0], 1.0)


# Randomness


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.7, 0.999])
def test_survivors_are_divided_by_the_density(density, dtype):
    x = np.random.default_rng(0).normal(size=(50, 60)).astype(DTYPES[dtype])
    plain = np.asarray(jm.prune(x, density, "random", key=KEY))
    scaled = np.asarray(jm.prune(x, density, "random", rescale=True, key=KEY))
    kept = plain != 0
    np.testing.assert_array_equal(kept, scaled != 0)
    assert_same_bits(plain, np.where(kept, x, np.zeros_like(x)))
    quotient = (x.astype(np.float32) / np.float32(density)).astype(x.dtype)
    assert_same_bits(scaled, np.where(kept, quotient, np.zeros_like(x)))


def test_a_key_decides_everything():
    x = np.ones((20, 30), np.float32)
    first = np.asarray(jm.prune(x, 0.5, "random", key=jax.random.key(1)))
    np.testing.assert_array_equal(first, jm.prune(x, 0.5, "random", key=jax.random.key(1)))
    assert (first != np.asarray(jm.prune(x, 0.5, "random", key=jax.random.key(2)))).any()
    for dtype in DTYPES.values():
        np.testing.assert_array_equal(
            first.astype(bool), np.asarray(jm.prune(x.astype(dtype), 0.5, "random", key=jax.random.key(1)), bool)
        )


def test_what_survives_a_density_survives_a_greater_one():
    x = np.ones(500, np.float32)
    masks = [np.asarray(jm.prune(x, d, "random", key=KEY)) != 0 for d in (0, 0.1, 0.29, 0.5, 0.9, 1)]
    for less, more in itertools.pairwise(masks):
        assert (less <= more).all()
        assert less.sum() < more.sum()


def test_magnitude_pruning_ignores_the_key_and_rescale():
    x = dyadic((6, 7))
    expected = reference_prune(x, 0.4)
    assert_same_bits(jm.prune(x, 0.4, "magnitude", True, key=KEY), expected)
    assert_same_bits(jm.prune(x, 0.4, "magnitude", jnp.asarray(True)), expected)


def test_tasks_are_dropped_independently():
    tasks = np.ones((4, 10000), np.float32)
    masks = np.stack([jm.dare_linear(tasks, np.eye(4, dtype=np.float32)[i], 0.5, key=KEY) for i in range(4)]) != 0
    correlation = np.corrcoef(masks)
    assert np.abs(correlation - np.eye(4)).max() < 0.05


def test_dare_is_pruning_with_the_key_folded_by_position():
    tasks, weights = dyadic((3, 9, 8)), [1.0, -0.5, 2.0]
    keys = jnp.stack([jax.random.fold_in(KEY, i) for i in range(3)])
    pruned = np.stack([jm.prune(t, 0.5, "random", True, key=k) for t, k in zip(tasks, keys, strict=True)])
    linear = jm.task_arithmetic(pruned, weights)
    for key in (KEY, keys):
        assert_same_bits(jm.dare_linear(tasks, weights, 0.5, key=key), linear)
        for method in SIGN_METHODS:
            mask = jm.calculate_majority_sign_mask(pruned, method)
            weighted = pruned * np.float32(weights)[:, None, None]
            assert_same_bits(jm.dare_ties(tasks, weights, 0.5, method, key=key), jm.disjoint_merge(weighted, mask))


# Errors


@pytest.mark.parametrize("density", [-0.5, -1e-9, float("nan"), None, "half", "0.5", [0.5] * 3, np.float32(-1)])
@pytest.mark.parametrize("call", [*PRUNES.values(), *[
    functools.partial(lambda merge, x, density: merge([x, x], [1.0, 1.0], density), MERGES[name]) for name in PRUNING
]], ids=[*PRUNES, *PRUNING])  # fmt: skip
def test_a_density_that_is_none_is_named(call, density):
    shown = f"{density:g}" if isinstance(density, float | np.floating) else str(density)
    with pytest.raises(ValueError, match="ensity") as caught:
        call(np.ones(4, np.float32), density)
    assert shown in str(caught.value)


@pytest.mark.parametrize("density", [-0.5, float("nan"), -np.inf])
def test_a_density_on_the_device_is_checked_too(density):
    with pytest.raises(ValueError, match="ensity"):
        jm.prune(np.ones(4, np.float32), jnp.float32(density), "magnitude")


def test_a_vector_of_densities_is_refused():
    with pytest.raises(ValueError, match="ensity"):
        jm.prune(np.ones(2, np.float32), jnp.float32([0.2, 0.5]), "magnitude")


@pytest.mark.parametrize("method", ["largest", "", None, 3, "Magnitude"])
def test_an_unknown_pruning_method_is_named(method):
    for density in (0.5, 1.0, 2.0):
        with pytest.raises(ValueError, match=f"method {method!r}"):
            jm.prune(np.ones(4, np.float32), density, method, key=KEY)


@pytest.mark.parametrize("method", ["median", "", None, 3, "Total"])
def test_an_unknown_election_is_named(method):
    tasks = np.ones((2, 4), np.float32)
    for call in (
        lambda: jm.calculate_majority_sign_mask(tasks, method),
        lambda: jm.ties(tasks, [1, 1], 0.5, method),
        lambda: jm.dare_ties(tasks, [1, 1], 0.5, method, key=KEY),
    ):
        with pytest.raises(ValueError, match=f"majority_sign_method {method!r}"):
            call()


def test_a_missing_key_is_named():
    tasks = np.ones((2, 4), np.float32)
    for key in ({}, {"key": None}):
        for density in (0.5, 1.0):
            for call in (
                functools.partial(jm.prune, tasks, density, "random", **key),
                functools.partial(jm.dare_linear, tasks, [1, 1], density, **key),
                functools.partial(jm.dare_ties, tasks, [1, 1], density, **key),
            ):
                with pytest.raises(ValueError, match="key"):
                    call()


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [1, 2, 3],
        [],
        np.ones(1, np.float32),
        np.ones((2, 1), np.float32),
        jnp.ones(3, jnp.float32),
        np.array(1.0),
    ],
    ids=str,
)
@every_merge
def test_the_wrong_number_of_weights_is_named(merge, weights):
    for tasks in (np.ones((2, 4), np.float32), [np.ones(4, np.float32)] * 2):
        with pytest.raises(ValueError, match="2 weights"):
            merge(tasks, weights, 0.5)


@every_merge
def test_no_tasks_are_an_error(merge):
    for tasks in ([], (), np.ones((0, 4), np.float32), jnp.ones((0, 4), jnp.float32)):
        with pytest.raises(ValueError, match="task"):
            merge(tasks, [], 0.5)


@every_merge
def test_shapes_that_differ_are_named(merge):
    for other in ((4,), (5, 4), (1, 4, 5), ()):
        with pytest.raises(ValueError, match="shape") as caught:
            merge([np.ones((4, 5), np.float32), np.ones(other, np.float32)], [1.0, 1.0], 0.5)
        assert "(4, 5)" in str(caught.value)
        assert str(other) in str(caught.value)


def test_a_mask_of_another_shape_is_named():
    for shape in ((4,), (1, 4), (2, 1), (4, 2)):
        with pytest.raises(ValueError, match="mask") as caught:
            jm.disjoint_merge(np.ones((2, 4), np.float32), np.ones(shape, bool))
        assert str(shape) in str(caught.value)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "int8"])
def test_tensors_that_are_not_floating_are_named(dtype):
    tasks = np.ones((2, 4), dtype)
    calls = [
        *[functools.partial(prune, tasks, 0.5) for prune in PRUNES.values()],
        *[functools.partial(merge, tasks, [1.0, 1.0], 0.5) for merge in MERGES.values()],
        *[functools.partial(merge, list(tasks), [1.0, 1.0], 0.5) for merge in MERGES.values()],
        functools.partial(MERGES["ties_total"], [np.ones(4, np.float32), tasks[0]], [1.0, 1.0], 0.5),
        functools.partial(jm.calculate_majority_sign_mask, tasks),
        functools.partial(jm.disjoint_merge, tasks, np.ones((2, 4), bool)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=dtype):
            call()


# Composition


def test_a_number_is_truncated_in_float64_and_a_jax_array_in_its_own_precision():
    x = np.arange(1, 101, dtype=np.float32)

    def kept(density):
        return np.count_nonzero(jm.prune(x, density, "magnitude"))

    assert [kept(0.29), kept(np.float64(0.29)), kept(np.asarray(0.29))] == [28, 28, 28]
    assert kept(np.float32(0.29)) == int(float(np.float32(0.29)) * 100)
    assert kept(jnp.float32(0.29)) == kept(jnp.asarray(0.29)) == 29
    assert np.count_nonzero(jax.jit(lambda d: jm.prune(x, d, "magnitude"))(0.29)) == 29
    assert np.count_nonzero(jax.jit(lambda x: jm.prune(x, 0.29, "magnitude"))(x)) == 28
    with jax.enable_x64(True):
        assert kept(0.29) == kept(jnp.float64(0.29)) == 28
        assert kept(jnp.float32(0.29)) == 29
    assert kept(1) == kept(True) == kept(jnp.int32(1)) == 100
    assert kept(0) == kept(jnp.int32(0)) == 0
    assert kept(jnp.asarray(0.5, jnp.bfloat16)) == kept(jnp.asarray(0.5, jnp.float16)) == 50


@every_merge
def test_traced_arguments_change_nothing(merge):
    traced = jax.jit(merge)
    closed = jax.jit(lambda tasks: merge(list(tasks), [1.5, -0.5, 0.0], 0.25))
    for dtype in (np.float32, ml_dtypes.bfloat16) if merge is jm.ties else (np.float32,):
        tasks, weights = dyadic((3, 8, 5), dtype=dtype), np.float32([1.5, -0.5, 0])
        for density in (0.0, 0.25, 0.5, 0.75, 1.0, 2.0):
            assert_same(traced(tasks, weights, density), merge(tasks, weights, density))
        if dtype == np.float32 and merge in (jm.ties, MERGES["dare_linear"]):
            assert_same(closed(tasks), merge(tasks, weights, 0.25))


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_traced_rescale_and_density_of_prune(method):
    x = dyadic((8, 5))
    traced = jax.jit(lambda d, r, k: jm.prune(x, d, method, r, key=k))
    for density in (0.0, 0.25, 0.5, 1.0, 1.5):
        for rescale in (False, True):
            assert_same_bits(traced(density, rescale, KEY), jm.prune(x, density, method, rescale, key=KEY))


@pytest.mark.parametrize("method", SIGN_METHODS)
def test_election_and_mean_under_jit(method):
    tasks = dyadic((3, 8, 5))
    mask = jm.calculate_majority_sign_mask(tasks, method)
    traced = jax.jit(jm.calculate_majority_sign_mask, static_argnames="method")(tasks, method=method)
    np.testing.assert_array_equal(traced, mask)
    assert_same_bits(jax.jit(jm.disjoint_merge)(tasks, mask), jm.disjoint_merge(tasks, mask))


@pytest.mark.parametrize("merge", [jm.magnitude_prune, jm.ties, MERGES["dare_linear"]])
def test_another_density_traces_nothing_anew(merge):
    chex.clear_trace_counter()
    tasks = dyadic((3, 8, 5))
    traced = jax.jit(chex.assert_max_traces(lambda t, w, d: merge(t, w, d), n=1))
    for density, weights in ((0.2, [1.0, 2.0, 3.0]), (0.7, [0.0, -1.0, 2.0]), (1.0, [1.0, 1.0, 1.0])):
        traced(tasks, np.float32(weights), density)


@every_merge
def test_another_density_compiles_nothing_anew(merge):
    tasks = dyadic((3, 8, 5))
    for density in (0.2, jnp.float32(0.2), np.float64(0.2)):
        merge(tasks, [1.0, 2.0, 3.0], density)
        merge(list(tasks), [1.0, 2.0, 3.0], density)
    for density in (0.7, np.float64(0.4), 1.5, 0.0):
        assert compilations(lambda density=density: merge(tasks, [0.5, -1.0, 0.0], density)) == []
        assert compilations(lambda density=density: merge(list(tasks), [0.5, -1.0, 0.0], density)) == []
    value = jnp.float32(0.4)
    assert compilations(lambda: merge(tasks, [0.5, -1.0, 0.0], value)) == []


def test_compilations_are_seen():
    assert compilations(lambda: jm.prune(np.ones((3, 17, 2), np.float32), 0.5, "magnitude"))


@every_prune
def test_another_density_of_prune_compiles_nothing_anew(prune):
    x = dyadic((8, 5))
    prune(x, 0.2)
    assert compilations(lambda: prune(x, 0.7)) == []
    if prune is PRUNES["rescaled"]:
        assert compilations(lambda: jm.prune(x, 0.7, "random", False, key=jax.random.key(5))) == []


@every_merge
def test_vmap_is_a_loop(merge):
    tasks = dyadic((3, 8, 5))
    densities = jnp.float32([0.0, 0.125, 0.25, 0.5, 1.0, 2.0])
    weights = dyadic((6, 3), seed=4)
    over_densities = jax.vmap(lambda d: merge(tasks, weights[0], d))(densities)
    over_weights = jax.vmap(lambda w: merge(tasks, w, 0.5))(weights)
    for i in range(6):
        assert_same(over_densities[i], merge(tasks, weights[0], densities[i]))
        assert_same(over_weights[i], merge(tasks, weights[i], 0.5))


@pytest.mark.parametrize("name", ["magnitude_prune", "ties_total", "dare_linear"])
def test_vmap_over_everything_is_a_loop(name):
    merge = MERGES[name]
    tasks, weights, densities = dyadic((4, 3, 8, 5)), dyadic((4, 3), seed=4), jnp.float32([0.0, 0.25, 0.5, 1.0])
    got = jax.vmap(merge)(tasks, weights, densities)
    for i in range(4):
        assert_same(got[i], merge(tasks[i], weights[i], densities[i]))


def test_vmap_of_prune_over_everything():
    x = dyadic((4, 40))
    densities, rescale = jnp.float32([0.0, 0.25, 0.5, 1.0]), jnp.asarray([True, False, True, True])
    keys = jax.random.split(KEY, 4)
    got = jax.vmap(lambda x, d, r, k: jm.prune(x, d, "random", r, key=k))(x, densities, rescale, keys)
    for i in range(4):
        assert_same_bits(got[i], jm.prune(x[i], densities[i], "random", rescale[i], key=keys[i]))
    got = jax.vmap(lambda x, d: jm.prune(x, d, "magnitude"))(x, densities)
    for i in range(4):
        assert_same_bits(got[i], reference_prune(x[i], float(densities[i])))


def gradients(name, tasks, weights, density, cotangent):
    """The closed form: d/dw and d/dt of ``sum(cotangent * merge)``, in float64."""
    tasks = tasks.astype(np.float64)
    if name == "task_arithmetic":
        kept = np.ones_like(tasks)
    elif name.startswith("dare"):
        ones = np.ones(tasks.shape[1:], np.float32)
        keys = [jax.random.fold_in(KEY, i) for i in range(len(tasks))]
        kept = np.stack([jm.prune(ones, density, "random", True, key=key) for key in keys]).astype(np.float64)
    else:
        count = int(density * tasks[0].size)
        kept = np.stack([reference_mask(task, count) for task in tasks]).astype(np.float64)
    share = kept
    if "ties" in name:
        pruned = tasks * kept
        votes = np.sign(pruned).sum(0) if name.endswith("frequency") else pruned.sum(0)
        marked = np.sign(pruned) == np.where(votes >= 0, 1, -1)
        share = kept * marked / np.maximum(marked.sum(0), 1)
    by_weight = (cotangent * share * tasks).sum((1, 2))
    by_task = cotangent * share * np.asarray(weights, np.float64)[:, None, None]
    return by_weight, by_task


@pytest.mark.parametrize("name", MERGES)
def test_gradients_are_those_of_the_closed_form(name):
    merge = MERGES[name]
    cotangent = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda w, t, d: jnp.sum(cotangent * merge(t, w, d)), argnums=(0, 1)))
    for tasks in (dyadic((3, 8, 5)), np.zeros((3, 8, 5), np.float32), np.ones((3, 8, 5), np.float32),
                  np.random.default_rng(2).normal(size=(3, 8, 5)).astype(np.float32)):  # fmt: skip
        for weights in (np.float32([1.5, -0.5, 0]), np.zeros(3, np.float32)):
            for density in (0.0, 0.25, 0.625, 1.0):
                by_weight, by_task = gradient(weights, tasks, density)
                expected = gradients(name, tasks, weights, density, cotangent.astype(np.float64))
                assert np.isfinite(by_weight).all()
                assert np.isfinite(by_task).all()
                np.testing.assert_allclose(by_weight, expected[0], rtol=1e-5, atol=2e-5)
                np.testing.assert_allclose(by_task, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ties_total", "dare_linear"])
def test_gradients_outside_of_jit_and_with_lists(name):
    merge = MERGES[name]
    tasks, weights = dyadic((3, 8, 5)), np.float32([1.5, -0.5, 0])
    stacked = jax.grad(lambda w, t: jnp.sum(merge(t, w, 0.25)), argnums=(0, 1))(weights, jnp.asarray(tasks))
    listed = jax.grad(lambda w, t: jnp.sum(merge(t, w, 0.25)), argnums=(0, 1))(
        [jnp.float32(w) for w in weights], [jnp.asarray(t) for t in tasks]
    )
    np.testing.assert_allclose(stacked[0], listed[0], rtol=1e-6)
    np.testing.assert_allclose(stacked[1], listed[1], rtol=1e-6)


def test_gradients_do_not_see_what_is_pruned():
    x = np.float32([np.inf, np.nan, 3, -1, -np.inf, 2])

    def total(x, method, density):
        y = jm.prune(x, density, method, True, key=KEY)
        return jnp.sum(jnp.where(jnp.isfinite(y), y, 0.0))

    got = np.asarray(jax.grad(total)(x, "magnitude", 4 / 6))
    np.testing.assert_array_equal(got, [0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(jax.grad(total)(x, "random", 0.0), np.zeros(6))


@pytest.mark.parametrize("name", ["magnitude_prune", "dare_ties"])
def test_forward_mode_agrees(name):
    merge = MERGES[name]
    tasks, weights = dyadic((3, 8, 5)), np.float32([1.5, -0.5, 0.25])
    direction = (dyadic((3, 8, 5), seed=8), np.float32([1, -2, 3]))
    _, tangent = jax.jvp(lambda t, w: merge(t, w, 0.25), (tasks, weights), direction)
    _, pull = jax.vjp(lambda t, w: merge(t, w, 0.25), tasks, weights)
    cotangent = dyadic((8, 5), seed=9)
    by_task, by_weight = pull(jnp.asarray(cotangent))
    forward = np.sum(cotangent * np.asarray(tangent))
    backward = np.sum(direction[0] * np.asarray(by_task)) + np.sum(direction[1] * np.asarray(by_weight))
    np.testing.assert_allclose(forward, backward, rtol=1e-5)


@every_merge
def test_the_container_of_the_inputs_does_not_matter(merge):
    for dtype in (np.float32, ml_dtypes.bfloat16):
        tasks, weights = dyadic((3, 8, 5), dtype=dtype), [1.5, -0.5, 0.0]
        expected = merge(tasks, weights, 0.25)
        for given in (
            jnp.asarray(tasks),
            list(tasks),
            tuple(jnp.asarray(t) for t in tasks),
            [tasks[0], jnp.asarray(tasks[1]), tasks[2]],
            np.asfortranarray(tasks),
            np.ascontiguousarray(tasks[::-1])[::-1],
        ):
            assert_same_bits(merge(given, weights, 0.25), expected)
        for given in (tuple(weights), np.float32(weights), np.float64(weights), jnp.float32(weights),
                      [jnp.float32(w) for w in weights]):  # fmt: skip
            assert_same_bits(merge(tasks, given, 0.25), expected)


@every_merge
def test_inputs_are_left_as_they_are(merge):
    for density in (0.25, 1.0):
        tasks, weights = dyadic((3, 8, 5)), np.float32([1.5, -0.5, 0])
        before = tasks.copy(), weights.copy()
        result = np.asarray(merge(tasks, weights, density)).copy()
        assert_same_bits(tasks, before[0])
        assert_same_bits(weights, before[1])
        on_device = jnp.asarray(tasks), jnp.asarray(weights)
        merge(*on_device, density)
        assert not on_device[0].is_deleted()
        assert_same_bits(on_device[0], before[0])
        # A result is not a view of what it was made from.
        kept = jax.block_until_ready(merge(tasks, weights, density))
        tasks[:] = 77
        assert_same_bits(kept, result)


@every_prune
def test_a_pruned_array_is_not_a_view(prune):
    x = dyadic((8, 5))
    for density in (0.5, 1.0):
        kept = prune(x, density)
        before = np.asarray(kept).copy()
        x += 1
        assert_same_bits(kept, before)


def test_nothing_trips_the_nan_checker():
    tasks, weights = dyadic((3, 8, 5)), np.float32([1.5, -0.5, 0])
    special = tasks.copy()
    special[:, 0, :3] = np.nan
    special[0, 1, 0] = np.inf
    special = jnp.asarray(special)  # to move a NaN to a device is to trip it
    mask = np.isfinite(special)
    with jax.debug_nans(True):
        for name, merge in MERGES.items():
            gradient = jax.grad(lambda w, t, d, merge=merge: jnp.sum(merge(t, w, d)), argnums=(0, 1))
            gradient = jax.jit(gradient) if "dare" in name else gradient
            for density in (0.0, 0.25, 1.0):
                np.asarray(merge(tasks, weights, density))
                jax.block_until_ready(gradient(weights, tasks, density))
        np.asarray(jm.prune(special, 0.5, "magnitude"))
        np.asarray(jm.magnitude_prune(special, [1.0, 2.0, 3.0], 0.5))
        np.asarray(jm.ties(special, [1.0, 2.0, 3.0], 0.5))
        np.asarray(jm.prune(special, 0.0, "random", True, key=KEY))
        np.asarray(jm.dare_linear(special, weights, 0.0, key=KEY))
        np.asarray(jm.disjoint_merge(special, mask))


@every_merge
def test_nothing_warns(merge):
    # PEFT warns of a density of 1; here it is a density like any other.
    tasks = dyadic((3, 8, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for density in (0.25, 1.0, 2.0, jnp.float32(0.25)):
            merge(tasks, [1.0, -0.5, 0.0], density)


@pytest.mark.parametrize("merge", [jm.magnitude_prune, jm.ties, MERGES["dare_ties"]])
def test_float64_where_it_is_enabled(merge):
    with jax.enable_x64(True):
        tasks, weights = dyadic((3, 8, 5), dtype=np.float64), np.float64([1.5, -0.5, 0])
        got = merge(tasks, weights, 0.25)
        assert got.dtype == jnp.float64
        narrow = merge(tasks.astype(np.float32), weights.astype(np.float32), jnp.float32(0.25))
        assert narrow.dtype == jnp.float32
        np.testing.assert_allclose(narrow, got, rtol=1e-6)
