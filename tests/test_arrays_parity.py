"""The array functions against the installed peft.utils.merge_utils, on tensors where PEFT is well defined.

Most data here have distinct magnitudes, so that the cut is the same whatever a top-k does with ties, and few
enough bits that every product and sum is exact in float32: what must be equal is then equal to the bit.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from peft.utils import merge_utils

import jaxmerge as jm
import tests.conftest  # noqa: F401  (sets the dtype promotion to strict)

DTYPES = ["float32", "bfloat16", "float16"]
HALVES = ["bfloat16", "float16"]
SIGN_METHODS = ["total", "frequency"]
NUMPY = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "int32": np.int32,
}

# (shape, density): truncation of a float64 product shows at 0.29, 0.58, 0.1 and 0.24.
CUTS = [
    ((3,), 0.1),
    ((2, 2), 0.24),
    ((5, 4, 3), 0.5),
    ((10, 10), 0.0),
    ((10, 10), 0.29),
    ((10, 10), 0.58),
    ((10, 10), 0.999),
    ((10, 10), 1.0),
    ((10, 10), 1.5),
]
WEIGHTS = [
    [0.5],
    [-3],
    [0.5, -1.25],
    [2, -1],
    [1.0, 0.0, -0.75],
    [1, 0, 3],
    [0.25, 0.5, -2.0, 1.0],
    [1, -1, 1, 5],
    [-0.5, -0.25, -1.0, -2.0, -0.125],
    [1, 2, 3, 0, -7],
]
# Not every list with every dtype, for each pair is a compilation; integers keep half types half.
MIXES = [
    *[(weights, "float32") for weights in ([0.5], [2, -1], [1.0, 0.0, -0.75], WEIGHTS[-2])],
    *[(weights, "bfloat16") for weights in ([-3], [0.5, -1.25], [1, -1, 1, 5])],
    *[(weights, "float16") for weights in ([2, -1], [1, 0, 3])],
]


def distinct(shape, dtype: str, seed) -> np.ndarray:
    """A shuffled set of distinct magnitudes from [2**-4, 2), with random signs."""
    rng = np.random.default_rng(seed)
    values = np.arange(0x3D80, 0x4000, dtype=np.uint16).view(ml_dtypes.bfloat16)
    if dtype != "bfloat16":
        values = np.arange(0x2C00, 0x4000, dtype=np.uint16).view(np.float16)
    chosen = rng.choice(values.astype(np.float32), size=shape, replace=False)
    return (chosen * rng.choice(np.float32([-1, 1]), size=shape)).astype(NUMPY[dtype])


def as_torch(array) -> torch.Tensor:
    array = np.array(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def assert_same(got: jax.Array, expected: torch.Tensor):
    """Same dtype, shape and numbers; the sign of a zero does not count."""
    assert str(got.dtype) == str(expected.dtype).removeprefix("torch.")
    assert got.shape == tuple(expected.shape)
    np.testing.assert_array_equal(np.asarray(got, np.float64), expected.double().numpy())


def assert_close(got: jax.Array, expected: torch.Tensor, scale: np.ndarray):
    """Same dtype and shape, and numbers equal up to a few roundings of terms that add up to ``scale``."""
    assert str(got.dtype) == str(expected.dtype).removeprefix("torch.")
    assert got.shape == tuple(expected.shape)
    error = np.abs(np.asarray(got, np.float64) - expected.double().numpy())
    assert (error <= 4 * float(jnp.finfo(got.dtype).eps) * scale).all()


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch):
    """Makes PEFT draw, task after task, the masks that jaxmerge draws from a key."""

    def start(key: jax.Array, shape, density: float, n: int | None):
        keys = [key] if n is None else [jax.random.fold_in(key, i) for i in range(n)]
        ones = jnp.ones(shape, jnp.float32)
        masks = iter([as_torch(jm.prune(ones, density, "random", key=key)) for key in keys])
        monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(masks).to(probabilities.dtype))

    return start


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "density"), CUTS)
def test_magnitude_pruning_keeps_what_peft_keeps(shape, density, dtype):
    x = distinct(shape, dtype, 0)
    for rescale in (False, True):
        got = jm.prune(x, density, "magnitude", rescale)
        assert_same(got, merge_utils.prune(as_torch(x), density, "magnitude", rescale))
    assert np.count_nonzero(got) == min(int(density * x.size), x.size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_task_arithmetic_is_that_of_peft(weights, dtype):
    tasks = [distinct((10, 10), dtype, i) for i in range(len(weights))]
    assert_same(
        jm.task_arithmetic(tasks, weights),
        merge_utils.task_arithmetic([as_torch(t) for t in tasks], torch.tensor(weights)),
    )


@pytest.mark.parametrize(("weights", "dtype"), MIXES, ids=str)
def test_pruned_merges_are_those_of_peft(weights, dtype):
    # Each shape is a compilation.
    for i, (shape, density) in enumerate(CUTS if weights == [2, -1] else CUTS[3:]):
        tasks = [distinct(shape, dtype, (i, j)) for j in range(len(weights))]
        theirs = [as_torch(t) for t in tasks]
        assert_same(
            jm.magnitude_prune(tasks, weights, density),
            merge_utils.magnitude_prune(theirs, torch.tensor(weights), density),
        )
        for method in SIGN_METHODS:
            got = jm.ties(tasks, weights, density, method)
            expected = merge_utils.ties(theirs, torch.tensor(weights), density, method)
            # The quotient by 3 or 5 is rounded once in both.
            assert_same(got, expected)


def test_the_majority_defaults_to_total():
    tasks, weights = [np.float32([3]), np.float32([-1]), np.float32([-1])], [1.0, 1.0, 1.0]
    theirs = [as_torch(t) for t in tasks]
    assert_same(jm.ties(tasks, weights, 1), merge_utils.ties(theirs, torch.tensor(weights), 1))
    assert_same(
        jm.calculate_majority_sign_mask(np.stack(tasks)),
        merge_utils.calculate_majority_sign_mask(torch.stack(theirs)),
    )
    assert jm.ties(tasks, weights, 1)[0] == 3
    assert jm.ties(tasks, weights, 1, "frequency")[0] == -1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", SIGN_METHODS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_election_and_mean_are_those_of_peft(n, method, dtype):
    # Small integers: many zeros, many even votes.
    tasks = np.random.default_rng(n).integers(-2, 3, size=(n, 9, 31)).astype(NUMPY[dtype])
    mask = jm.calculate_majority_sign_mask(tasks, method)
    expected = merge_utils.calculate_majority_sign_mask(as_torch(tasks), method)
    assert_same(mask, expected)
    assert_same(jm.disjoint_merge(tasks, mask), merge_utils.disjoint_merge(as_torch(tasks), expected))
    arbitrary = np.random.default_rng(n).random(tasks.shape) < 0.5
    assert_same(jm.disjoint_merge(tasks, arbitrary), merge_utils.disjoint_merge(as_torch(tasks), as_torch(arbitrary)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_with_many_bits_agree_to_rounding(dtype):
    rng = np.random.default_rng(0)
    weights = [0.3, -0.7, 1.1, 0.013, -2.9]
    tasks = rng.normal(size=(5, 10, 10)).astype(NUMPY[dtype])
    theirs, w = [as_torch(t) for t in tasks], torch.tensor(weights)
    scale = np.abs(np.asarray(weights)[:, None, None] * tasks.astype(np.float64)).sum(0)
    assert_close(jm.task_arithmetic(tasks, weights), merge_utils.task_arithmetic(theirs, w), scale)
    if dtype == "float32":
        assert_close(jm.magnitude_prune(tasks, weights, 0.3), merge_utils.magnitude_prune(theirs, w, 0.3), scale)
        for method in SIGN_METHODS:
            got, expected = jm.ties(tasks, weights, 0.6, method), merge_utils.ties(theirs, w, 0.6, method)
            assert_close(got, expected, scale)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_types_are_rounded_where_peft_rounds_them(dtype):
    # Products that do not fit the half type, sums that need more than it: 256 + 1 - 256 - 0.5.
    weights = [3, -7, 5]
    tasks = [distinct((512,), dtype, i) for i in range(3)]
    theirs = [as_torch(t) for t in tasks]
    products = [np.asarray(t.astype(np.float32) * w, NUMPY[dtype]) for t, w in zip(tasks, weights, strict=True)]
    assert any((p.astype(np.float32) != t.astype(np.float32) * w).any()
               for p, t, w in zip(products, tasks, weights, strict=True))  # fmt: skip
    assert_same(jm.task_arithmetic(tasks, weights), merge_utils.task_arithmetic(theirs, torch.tensor(weights)))
    for method in SIGN_METHODS:
        assert_same(jm.ties(tasks, weights, 1, method), merge_utils.ties(theirs, torch.tensor(weights), 1, method))
    cancelling = np.asarray([[256], [1], [-256], [-0.5]], NUMPY[dtype])
    assert jm.task_arithmetic(cancelling, [1, 1, 1, 1])[0] == 0.5
    assert_same(
        jm.task_arithmetic(cancelling, [1, 1, 1, 1]),
        merge_utils.task_arithmetic([as_torch(t) for t in cancelling], torch.tensor([1, 1, 1, 1])),
    )


@pytest.mark.parametrize("weights", [[1, 1, -1], [1.0, 0.5, -1.0]], ids=str)
def test_small_float16_numbers_are_not_lost(weights):
    # Below 2**-14 float16 is subnormal; the weight changes of a gentle fine-tuning are of that size.
    rng = np.random.default_rng(0)
    tasks = [
        (rng.permutation(np.arange(1, 512)) * rng.choice([-1, 1], 511)).astype(np.float32) * np.float32(2**-24)
        for _ in weights
    ]
    tasks = [t.astype(np.float16) for t in tasks]
    theirs, w = [as_torch(t) for t in tasks], torch.tensor(weights)
    assert_same(jm.prune(tasks[0], 0.5, "magnitude"), merge_utils.prune(theirs[0], 0.5, "magnitude"))
    for method in SIGN_METHODS:
        assert_same(
            jm.calculate_majority_sign_mask(np.stack(tasks), method),
            merge_utils.calculate_majority_sign_mask(torch.stack(theirs), method),
        )
        assert_same(jm.ties(tasks, weights, 0.75, method), merge_utils.ties(theirs, w, 0.75, method))
    assert_same(jm.task_arithmetic(tasks, weights), merge_utils.task_arithmetic(theirs, w))
    assert_same(jm.magnitude_prune(tasks, weights, 0.75), merge_utils.magnitude_prune(theirs, w, 0.75))


def test_small_float16_numbers_survive_rescaling(replay):
    x = (np.arange(1, 512, dtype=np.float32) * np.float32(2**-24)).astype(np.float16)
    key = jax.random.key(0)
    replay(key, x.shape, 0.5, None)
    assert_same(jm.prune(x, 0.5, "random", True, key=key), merge_utils.prune(as_torch(x), 0.5, "random", rescale=True))


def test_results_have_the_dtypes_of_peft():
    kinds = [*DTYPES, "int32"]
    for left in DTYPES:
        for right in DTYPES:
            tasks = [distinct((4,), left, 0), distinct((4,), right, 1)]
            for kind in kinds:
                weights = np.asarray([2, -1], NUMPY[kind])
                theirs = [as_torch(t) for t in tasks]
                assert_same(jm.task_arithmetic(tasks, weights), merge_utils.task_arithmetic(theirs, as_torch(weights)))
                assert_same(jm.ties(tasks, weights, 1), merge_utils.ties(theirs, as_torch(weights), 1))


@pytest.mark.parametrize("number", [int, np.int32, np.int64])
def test_integers_of_any_make_stay_integers(number):
    tasks, weights = [distinct((4,), "bfloat16", i) for i in range(2)], [number(2), number(-1)]
    expected = merge_utils.task_arithmetic([as_torch(t) for t in tasks], torch.tensor(weights))
    assert_same(jm.task_arithmetic(tasks, weights), expected)


def test_float64_is_merged_in_float64():
    rng = np.random.default_rng(0)
    weights = [0.3, -0.7, 1.1]
    tasks = rng.normal(size=(3, 100))
    theirs = [as_torch(t) for t in tasks]
    scale = np.abs(np.asarray(weights)[:, None] * tasks).sum(0)
    with jax.enable_x64(True):
        # A list of Python floats is float32, as torch.tensor has it; an array is what it is.
        for ours, w in ((weights, torch.tensor(weights)), (np.asarray(weights), as_torch(np.asarray(weights)))):
            assert_close(jm.task_arithmetic(tasks, ours), merge_utils.task_arithmetic(theirs, w), scale)
            got, expected = jm.magnitude_prune(tasks, ours, 0.29), merge_utils.magnitude_prune(theirs, w, 0.29)
            assert_close(got, expected, scale)
            for method in SIGN_METHODS:
                got, expected = jm.ties(tasks, ours, 0.58, method), merge_utils.ties(theirs, w, 0.58, method)
                assert_close(got, expected, scale)
        assert_same(jm.prune(tasks, 0.29, "magnitude"), merge_utils.prune(as_torch(tasks), 0.29, "magnitude"))
        for dtype in DTYPES:
            halves = [distinct((10, 10), dtype, i) for i in range(3)]
            ours, w = [1.0, 0.5, -2.0], torch.tensor([1.0, 0.5, -2.0])
            assert_same(jm.ties(halves, ours, 0.29), merge_utils.ties([as_torch(t) for t in halves], w, 0.29))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.3, 0.5, 0.7, 0.9, 1.0, 1.5])
def test_random_pruning_is_that_of_peft_on_the_same_mask(density, dtype, replay):
    x = np.random.default_rng(0).normal(size=(37, 29)).astype(NUMPY[dtype])
    key = jax.random.key(7)
    for rescale in (False, True):
        replay(key, x.shape, density, None)
        got = jm.prune(x, density, "random", rescale, key=key)
        assert_same(got, merge_utils.prune(as_torch(x), density, "random", rescale))


@pytest.mark.parametrize(("weights", "dtype"), [MIXES[i] for i in (1, 2, 5, 7)], ids=str)
def test_dare_is_that_of_peft_on_the_same_masks(weights, dtype, replay):
    key, n = jax.random.key(3), len(weights)
    tasks = [distinct((10, 10), dtype, i) for i in range(n)]
    theirs = [as_torch(t) for t in tasks]
    for density in (0.25, 0.5, 1.0):  # powers of two, so that rescaling is exact
        replay(key, (10, 10), density, n)
        assert_same(
            jm.dare_linear(tasks, weights, density, key=key),
            merge_utils.dare_linear(theirs, torch.tensor(weights), density),
        )
        for method in SIGN_METHODS:
            replay(key, (10, 10), density, n)
            assert_same(
                jm.dare_ties(tasks, weights, density, method, key=key),
                merge_utils.dare_ties(theirs, torch.tensor(weights), density, method),
            )


@pytest.mark.parametrize("density", [0.1, 0.5, 0.83])
def test_dare_has_the_mean_of_task_arithmetic(density):
    rng = np.random.default_rng(0)
    weights = np.float32([0.7, -1.2, 0.4])
    tasks = rng.normal(size=(3, 8, 5)).astype(np.float32)
    draws = 1000
    keys = jax.random.split(jax.random.key(0), draws)
    values = np.asarray(jax.vmap(lambda key: jm.dare_linear(tasks, weights, density, key=key))(keys), np.float64)
    expected = np.asarray(jm.task_arithmetic(tasks, weights), np.float64)
    variance = ((weights[:, None, None] * tasks.astype(np.float64)) ** 2).sum(0) * (1 - density) / density
    assert (np.abs(values.mean(0) - expected) < 5.5 * np.sqrt(variance / draws)).all()
    np.testing.assert_allclose(values.var(0), variance, rtol=0.5)


def test_dare_ties_has_the_mean_that_peft_has():
    rng = np.random.default_rng(1)
    weights, density, draws = [0.7, -1.2, 0.4], 0.5, 3000
    tasks = rng.normal(size=(3, 40)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), draws)
    ours = np.asarray(jax.vmap(lambda key: jm.dare_ties(tasks, weights, density, key=key))(keys), np.float64)
    # PEFT draws one mask per task over as many columns as there are draws.
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = merge_utils.dare_ties(
        [as_torch(t).expand(draws, -1).contiguous() for t in tasks], torch.tensor(weights), density
    )
    torch.set_rng_state(generator_state)
    theirs = theirs.double().numpy()
    error = np.sqrt((ours.var(0) + theirs.var(0)) / draws)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * error + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.29, 0.5, 0.97, 1.0, 3.0])
def test_random_pruning_keeps_the_fraction(density, dtype):
    x, size = jnp.ones((100, 400), dtype), 40000
    kept = np.count_nonzero(jm.prune(x, density, "random", key=jax.random.key(0)))
    p = min(density, 1)
    assert abs(kept - p * size) <= 5 * np.sqrt(size * p * (1 - p))
