"""Methods that go entry by entry, against float64 NumPy written from the papers' formulas, and against mergekit."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.methods.breadcrumbs import breadcrumbs, breadcrumbs_ties
from jaxmerge.methods.competition import pcb
from jaxmerge.methods.della import della, della_linear
from jaxmerge.methods.masks import consensus
from jaxmerge.methods.nearswap import nearswap
from jaxmerge.methods.sce import sce
from jaxmerge.methods.sign_consensus import agree
from jaxmerge.sparsify import ByRank
from tests.helpers import compilations, delta64, relative_error

KEY = jax.random.key(5)
# Each pair of a shape and a number of tasks is a compile: most tests have MATRIX, and two tasks or three.
MATRIX = (20, 16)
SHAPES = [(2, shape) for shape in [(), (1,), (23,), (9, 1), MATRIX, (3, 5, 7)]] + [(n, MATRIX) for n in (1, 3)]
DENSITIES = [0.1, 0.37, 0.8, 1.0]
CHOICES = list(itertools.product(["total", "frequency"], ["unweighted", "weighted"], ["count", "weight", "none"]))
# Each two of them together, for functions that hand them on.
HANDED_ON = [
    ("total", "unweighted", "count"), ("frequency", "unweighted", "weight"), ("total", "unweighted", "none"),
    ("frequency", "weighted", "count"), ("total", "weighted", "weight"), ("frequency", "weighted", "none"),
]  # fmt: skip
MERGEKIT = Path(__file__).parent / "goldens" / "mergekit"

shapes = pytest.mark.parametrize(
    ("n", "shape"), SHAPES, ids=[f"{n} of " + ("×".join(map(str, shape)) or "scalars") for n, shape in SHAPES]
)
kinds = pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])


def made(kind, n, shape, seed=0):
    """Tasks, and weights of both signs."""
    rng = np.random.default_rng(seed)
    tasks, weights = rng.normal(size=(n, *shape)) * 0.1, [0.7, -0.4, 1.3]
    if kind == "ties":  # Multiples of 3/16, so that the means of up to four tasks are exact; so are weighted votes.
        tasks, weights = rng.integers(-4, 5, size=(n, *shape)) * 3 / 16, [0.75, -0.5, 1.25]
    if kind == "zeros":
        tasks[-1] = 0
    return tasks.astype(np.float32), np.float32(weights)[:n]


# The references: one task after another, in float64.


def over(weights, tasks):
    return weights.reshape(-1, *(1,) * (tasks.ndim - 1))


def greatest(x, count, skip=0):
    """The mask of the ``count`` greatest behind the first ``skip``; of equal ones the first."""
    order = np.argsort(-x.reshape(-1), kind="stable")
    mask = np.zeros(x.size, bool)
    mask[order[skip : skip + count]] = True
    return mask.reshape(x.shape)


def largest(x, count, skip=0):
    return greatest(np.abs(x), count, skip)


def mean_of_agreeing(tasks, weights, method="total", election="unweighted", divisor="count"):
    tasks = np.asarray(tasks, np.float64)
    weights = np.asarray(weights, np.float64)
    merged = np.zeros(tasks.shape[1:])
    for entry in np.ndindex(*tasks.shape[1:]):
        own = tasks[(slice(None), *entry)]
        voting = own * weights if election == "weighted" else own
        elected = 1 if (voting if method == "total" else np.sign(voting)).sum() >= 0 else -1
        agrees = np.sign(voting) == elected
        by = {"count": agrees.sum(), "weight": weights[agrees].sum(), "none": 1}[divisor]
        merged[entry] = (weights * own)[agrees].sum() / (by if abs(by) > 1e-8 else 1)
    return merged


def reference_ties(tasks, weights, density, *choices):
    count = int(density * tasks[0].size)
    return mean_of_agreeing([np.where(largest(x, count), x, 0) for x in tasks], weights, *choices)


def crumbs(tasks, density, gamma):
    count = int(density * tasks[0].size)
    outliers = min(int(gamma * tasks[0].size), tasks[0].size - count)
    return np.stack([np.where(largest(x, count, outliers), x, 0) for x in np.float64(tasks)])


def reference_breadcrumbs(tasks, weights, density, gamma=0.01):
    return (over(np.float64(weights), tasks) * crumbs(tasks, density, gamma)).sum(0)


def reference_breadcrumbs_ties(tasks, weights, density, gamma=0.01, *choices):
    return mean_of_agreeing(crumbs(tasks, density, gamma), weights, *choices)


def chances(x, density, epsilon):
    """MagPrune: linear in the rank within a row, which are 0 to m − 1."""
    half = min(epsilon / 2, density, 1 - density)
    chance = np.full(x.shape, density)
    for row in np.ndindex(*x.shape[:-1]) if x.ndim else ():
        order = np.argsort(np.abs(x[row]), kind="stable")
        if order.size > 1:
            for rank, place in enumerate(order):
                chance[(*row, place)] = density + half * (2 * rank / (order.size - 1) - 1)
    return chance


def magpruned(tasks, density, epsilon, key=KEY):
    kept = []
    for i, x in enumerate(np.float64(tasks)):
        uniform = np.asarray(jax.random.uniform(jax.random.fold_in(key, i), x.shape, np.float32))
        chance = chances(x, density, epsilon)
        kept.append(np.where(uniform < chance, x / np.where(chance > 0, chance, 1), 0))
    return np.stack(kept)


def reference_della(tasks, weights, density, epsilon=0.14, *choices):
    return mean_of_agreeing(magpruned(tasks, density, epsilon), weights, *choices)


def reference_della_linear(tasks, weights, density, epsilon=0.14):
    return (over(np.float64(weights), tasks) * magpruned(tasks, density, epsilon)).sum(0)


def reference_dare_ties(tasks, weights, density, *choices):
    """What is drawn is PEFT's affair and tested with its array functions; here it is what becomes of it."""
    keys = [jax.random.fold_in(KEY, i) for i in range(len(tasks))]
    kept = [jm.prune(x, density, "random", rescale=True, key=key) for x, key in zip(tasks, keys, strict=True)]
    return mean_of_agreeing(kept, weights, *choices)


def reference_sce(tasks, weights, density=0.1, method="total", election="unweighted"):
    tasks = np.float64(tasks)
    ranked = tasks.var(0) if len(tasks) > 1 else tasks[0]
    tasks = np.where(largest(np.float32(ranked), int(density * ranked.size)), tasks, 0)
    energy = (tasks**2).reshape(len(tasks), -1).mean(1)
    coefficients = energy / energy.sum() if energy.sum() else energy
    voting = tasks * over(np.float64(weights), tasks) if election == "weighted" else tasks
    votes = (voting if method == "total" else np.sign(voting)).sum(0)
    agrees = np.sign(voting) == np.where(votes >= 0, 1, -1)
    shares = np.where(agrees, over(coefficients, tasks), 0)
    total = shares.sum(0)
    return (shares * over(np.float64(weights), tasks) * tasks).sum(0) / np.where(total > 0, total, 1)


def stretched(x):
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else np.zeros_like(x)


def pcb_shares(tasks, density):
    shares = []
    for x in tasks:
        score = np.exp(len(tasks) * stretched(np.abs(x)) ** 2) * np.tanh(x * tasks.sum(0))
        # What is equal in exact arithmetic is.
        kept = greatest(np.float32(score * np.exp(-len(tasks) / 2)), int(density * x.size))
        shares.append(np.zeros(x.shape))
        if kept.any():
            shares[-1][kept] = np.maximum(stretched(score[kept]), 2.0**-23)
    return np.stack(shares)


def reference_pcb(tasks, weights, density=0.2):
    tasks = np.float64(tasks)
    shares = pcb_shares(tasks, density)
    total = shares.sum(0)
    return (shares * over(np.float64(weights), tasks) * tasks).sum(0) / np.where(total > 0, total, 1)


def reference_consensus(tasks, weights, threshold=0.4, agreeing=2):
    tasks, weights = np.float64(tasks), np.float64(weights)
    users = np.zeros(tasks.shape[1:], int)
    for x in tasks:
        users += np.abs(x) > threshold * np.abs(tasks.sum(0) - x)
    return np.where(users >= min(agreeing, len(tasks)), (over(weights, tasks) * tasks).sum(0), 0)


def reference_nearswap(tasks, weights, t):
    a, b = np.float64(tasks[0]) * weights[0], np.float64(tasks[-1]) * weights[-1]
    apart = np.abs(a - b)
    share = np.where(apart > t, t / np.where(apart > 0, apart, 1), 1)
    return share * b + (1 - share) * a


def assert_near(got, wanted, tolerance=1e-5):
    assert got.dtype == np.float32
    assert got.shape == wanted.shape
    assert np.isfinite(np.asarray(got)).all()
    error = np.linalg.norm(np.asarray(got, np.float64) - wanted)
    assert error <= tolerance * np.linalg.norm(wanted)


# Name -> (function, reference, settings).
DENSE = [{"density": density} for density in DENSITIES]
METHODS = {
    "ties": (jm.ties, reference_ties, DENSE),
    "breadcrumbs": (
        breadcrumbs, reference_breadcrumbs, [*DENSE, {"density": 0.5, "gamma": 0.3}, {"density": 0.8, "gamma": 0.3}],
    ),
    "breadcrumbs_ties": (breadcrumbs_ties, reference_breadcrumbs_ties, [*DENSE, {"density": 0.5, "gamma": 0.0}]),
    "della": (
        functools.partial(della, key=KEY), reference_della, [*DENSE, {"density": 0.5, "epsilon": 0.9}],
    ),
    "della_linear": (
        functools.partial(della_linear, key=KEY), reference_della_linear, [*DENSE, {"density": 0.3, "epsilon": 0.0}],
    ),
    "sce": (sce, reference_sce, [{}, *DENSE]),
    "pcb": (pcb, reference_pcb, [{}, *DENSE]),
    "consensus": (
        consensus, reference_consensus, [{}, {"threshold": 1.0, "agreeing": 1}, {"threshold": 0.0, "agreeing": 3}],
    ),
    "nearswap": (nearswap, reference_nearswap, [{"t": 1e-4}, {"t": 0.05}, {"t": 0.0}]),
}  # fmt: skip
every = pytest.mark.parametrize("name", METHODS)


@every
@kinds
@shapes
def test_as_the_formula_has_it(name, kind, n, shape):
    function, reference, settings = METHODS[name]
    tasks, weights = made(kind, n, shape)
    if name == "nearswap" and n > 2:
        with pytest.raises(ValueError, match="two"):
            function(tasks, weights, **settings[0])
        return
    for setting in settings:
        assert_near(function(tasks, weights, **setting), reference(tasks, weights, **setting))


@pytest.mark.parametrize("choices", CHOICES, ids="-".join)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_elections_and_divisors(choices, kind):
    tasks, weights = made(kind, 3, MATRIX)
    names = ("majority_sign_method", "election", "divisor")
    given = dict(zip(names, choices, strict=True))
    assert_near(jm.ties(tasks, weights, 0.6, **given), reference_ties(tasks, weights, 0.6, *choices))
    if choices not in HANDED_ON:
        return
    crumbs = breadcrumbs_ties(tasks, weights, 0.6, **given)
    assert_near(crumbs, reference_breadcrumbs_ties(tasks, weights, 0.6, 0.01, *choices))
    drawn = della(tasks, weights, 0.6, **given, key=KEY)
    assert_near(drawn, reference_della(tasks, weights, 0.6, 0.14, *choices))
    dropped = jm.dare_ties(tasks, weights, 0.6, **given, key=KEY)
    assert_near(dropped, reference_dare_ties(tasks, weights, 0.6, *choices))
    del given["divisor"]  # SCE has one of its own.
    assert_near(sce(tasks, weights, 0.6, **given), reference_sce(tasks, weights, 0.6, *choices[:2]))


def test_what_the_elections_are_for():
    tasks = np.float32([[1.0, 1.0], [-2.0, -2.0], [0.5, 0.0]])
    # Unweighted, the second task wins the first entry; weighted, the others do, and it votes against its sign.
    assert_near(jm.ties(tasks, [1, 0.1, 1], 1.0), np.array([-0.2, -0.2]))
    assert_near(jm.ties(tasks, [1, 0.1, 1], 1.0, election="weighted"), np.array([0.75, 1.0]))
    assert_near(jm.ties(tasks, [1, -1, 2], 1.0, election="weighted"), np.array([4 / 3, 1.5]))
    # Weights that cancel divide nothing.
    got = jm.ties(tasks, [1, -1, 2], 1.0, election="weighted", divisor="weight")
    assert_near(got, np.array([4 / 2, 3]))


def test_positions_and_defaults_of_ties_are_those_of_peft():
    tasks, weights = made("normal", 3, MATRIX)
    for function in (jm.ties, functools.partial(jm.dare_ties, key=KEY)):
        given = function(tasks, weights, 0.5, "total", election="unweighted", divisor="count")
        np.testing.assert_array_equal(function(tasks, weights, 0.5), given)
        with pytest.raises(TypeError):
            function(tasks, weights, 0.5, "total", "weighted")


# What is drawn


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.4), (0.2, 0.14), (0.93, 0.14)])
def test_della_keeps_expectations(density, epsilon):
    draws, (tasks, weights) = 4000, made("normal", 2, (4, 6))

    @jax.jit
    def mean(keys):
        merge = functools.partial(della_linear, tasks, weights, density, epsilon)
        return jnp.mean(jax.vmap(lambda key: merge(key=key))(keys), 0)

    got = np.asarray(mean(jax.random.split(KEY, draws)))
    chance = np.stack([chances(x, density, epsilon) for x in np.float64(tasks)])
    scaled = over(np.float64(weights), tasks) * tasks
    deviation = np.sqrt((scaled**2 * (1 / chance - 1)).sum(0) / draws)
    assert (np.abs(got - scaled.sum(0)) < 5 * deviation + 1e-6).all()


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.14), (0.02, 0.5), (0.97, 0.5), (1.0, 1.0), (0.0, 0.1)])
def test_della_drops_the_small_more_often(density, epsilon):
    tasks, _ = made("normal", 1, (5, 11))
    chance = np.asarray(ByRank(jnp.float32(density), jnp.float32(epsilon), KEY).probabilities(jnp.asarray(tasks[0])))
    np.testing.assert_allclose(chance, chances(tasks[0], density, epsilon), atol=1e-6)
    assert ((chance >= 0) & (chance <= 1)).all()
    np.testing.assert_allclose(chance.mean(1), density, atol=1e-6)
    order = np.argsort(np.abs(tasks[0]), axis=1)
    assert (np.diff(np.take_along_axis(chance, order, 1), axis=1) >= 0).all()


def test_della_draws_for_each_task_and_by_position():
    tasks, weights = made("normal", 3, MATRIX)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(3, dtype=jnp.uint32))
    for function in (della, della_linear):
        one = function(tasks, weights, 0.5, key=KEY)
        np.testing.assert_array_equal(one, function(tasks, weights, 0.5, key=keys))
        assert (np.asarray(one) != np.asarray(function(tasks, weights, 0.5, key=jax.random.key(6)))).any()
        with pytest.raises(ValueError, match="DELLA draws random numbers"):
            function(tasks, weights, 0.5)
    # Rows stay whole, so that a part of the rows can be drawn on its own.
    whole = ByRank(jnp.float32(0.5), jnp.float32(0.14), keys)
    index = jnp.arange(320, dtype=jnp.int32).reshape(MATRIX)
    pruned = whole.apply(jnp.asarray(tasks), index)
    np.testing.assert_array_equal(whole.apply(jnp.asarray(tasks[:, 4:]), index[4:]), pruned[:, 4:])


# JAX


def setting_of(name):
    """A number of the method that may be traced, and values for it."""
    if name == "consensus":
        return "threshold", [0.2, 0.5, 1.1]
    return ("t", [0.0, 0.05, 0.3]) if name == "nearswap" else ("density", [0.1, 0.45, 1.0])


@every
def test_numbers_are_traced_and_mapped(name):
    function, reference, _ = METHODS[name]
    tasks, weights = made("normal", 2, MATRIX)
    number, values = setting_of(name)
    merge = jax.jit(lambda tasks, weights, value: function(tasks, weights, **{number: value}))
    merge(tasks, weights, jnp.float32(values[0]))
    assert not compilations(lambda: merge(tasks, weights, jnp.float32(values[1])))
    mapped = jax.vmap(lambda value: function(tasks, weights, **{number: value}))(jnp.float32(values))
    for value, got in zip(values, mapped, strict=True):
        assert_near(got, reference(tasks, weights, **{number: value}))
        assert_near(merge(tasks, weights, jnp.float32(value)), np.asarray(got, np.float64), 1e-6)


@pytest.mark.parametrize(("name", "number", "values"), [
    ("breadcrumbs", "gamma", [0.0, 0.01, 0.3]), ("breadcrumbs_ties", "gamma", [0.0, 0.01, 0.3]),
    ("della", "epsilon", [0.0, 0.3]), ("della_linear", "epsilon", [0.0, 0.3]),
])  # fmt: skip
def test_the_second_number_is_traced_too(name, number, values):
    function, reference, _ = METHODS[name]
    tasks, weights = made("normal", 2, MATRIX)
    mapped = jax.jit(jax.vmap(lambda value: function(tasks, weights, density=0.5, **{number: value})))
    for value, got in zip(values, mapped(jnp.float32(values)), strict=True):
        assert_near(got, reference(tasks, weights, 0.5, value))


@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_are_merged_in_float32(name, dtype):
    function, _, _ = METHODS[name]
    tasks, weights = made("normal", 2, MATRIX)
    half = tasks.astype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype])
    number, values = setting_of(name)
    setting = {number: values[1]}
    if name == "ties":  # Rounds its terms to the half type, as PEFT does.
        assert function(half, weights, **setting).dtype == np.float32
        return
    got = function(half, weights, **setting)
    np.testing.assert_array_equal(got, function(half.astype(np.float32), weights, **setting))
    assert got.dtype == np.float32


@every
def test_float64_stays_float64(name):
    function, reference, settings = METHODS[name]
    tasks, weights = made("normal", 2, MATRIX)
    tasks = tasks.astype(np.float64) * (1 + 1e-9)
    with jax.enable_x64(True):
        for setting in settings:
            got = function(tasks, weights.astype(np.float64), **setting)
            assert got.dtype == np.float64
            # The probabilities that DELLA divides by are of float32, as what is drawn.
            tolerance = 1e-6 if name.startswith("della") else 1e-12
            assert relative_error(got, reference(tasks, weights.astype(np.float64), **setting)) < tolerance


@every
def test_weights_may_be_whole_numbers_or_a_list(name):
    function, reference, _ = METHODS[name]
    tasks, _ = made("normal", 2, MATRIX)
    number, values = setting_of(name)
    got = function(list(tasks), [2, -1], **{number: values[1]})
    assert_near(got, reference(tasks, np.array([2, -1]), **{number: values[1]}))


@every
def test_nothing_but_zeros(name):
    function, _, settings = METHODS[name]
    for n, setting in itertools.product(
        [1, 2], [*settings, *([{"density": 0.0}] if "density" in settings[-1] else [])]
    ):
        got = function(np.zeros((n, *MATRIX), np.float32), np.ones(n, np.float32), **setting)
        np.testing.assert_array_equal(got, np.zeros(MATRIX, np.float32))


@every
def test_gradients_are_finite(name):
    function, _, settings = METHODS[name]
    tasks, weights = made("zeros", 2, (4, 3))

    def total(tasks, weights):
        return jnp.sum(function(tasks, weights, **settings[-1]) ** 2)

    grads = jax.grad(total, argnums=(0, 1))(jnp.asarray(tasks), jnp.asarray(weights))
    assert all(np.isfinite(np.asarray(grad)).all() for grad in grads)


# What is stated of each


def test_outliers_go_as_far_as_the_density_leaves_it():
    tasks, weights = made("normal", 2, (10, 10))
    for density, outliers in [(0.5, 5), (0.97, 3), (1.0, 0)]:
        got = np.asarray(breadcrumbs(tasks, [1.0, 0.0], density, 0.05))
        np.testing.assert_array_equal(got != 0, largest(tasks[0], int(density * 100), outliers))
    np.testing.assert_array_equal(breadcrumbs(tasks, weights, 0.5, 0.0), jm.magnitude_prune(tasks, weights, 0.5))
    np.testing.assert_array_equal(breadcrumbs_ties(tasks, weights, 0.5, 0.0), jm.ties(tasks, weights, 0.5))
    with pytest.raises(ValueError, match="Gamma should be >= 0, got -1"):
        breadcrumbs(tasks, weights, 0.5, -1.0)


def test_sce_sees_small_changes():
    tasks, _ = made("normal", 2, MATRIX)
    uneven = tasks * np.float32([1, 0.25])[:, None, None]
    for scale in (1.0, 2.0**-14):  # The mean squares are then 1e-10.
        got = np.asarray(sce(uneven * np.float32(scale), [1, 1], 1.0)) / scale
        assert_near(got, reference_sce(uneven, np.ones(2), 1.0))


def test_sce_of_one_task_keeps_its_largest():
    tasks, _ = made("normal", 1, MATRIX)
    np.testing.assert_array_equal(sce(tasks, [1.0], 0.5), jm.prune(tasks[0], 0.5, "magnitude"))
    assert_near(sce(tasks, [-0.5], 1.0), -0.5 * np.float64(tasks[0]), 1e-6)


def test_pcb_of_one_task_is_that_task():
    tasks, _ = made("normal", 1, MATRIX)
    assert_near(pcb(tasks, [-0.5], 1.0), -0.5 * np.float64(tasks[0]), 1e-6)
    kept = np.asarray(pcb(tasks, [1.0], 0.5)) != 0
    np.testing.assert_array_equal(kept, largest(tasks[0], 160))


def test_pcb_of_many_tasks_does_not_overflow():
    tasks = np.random.default_rng(0).normal(size=(120, 6, 5)).astype(np.float32)
    assert_near(pcb(tasks, np.ones(120, np.float32)), reference_pcb(tasks, np.ones(120)))


def test_pcb_scores_what_goes_with_the_others():
    # As large as the others, but against them: its score is the lowest, and it goes first.
    tasks = np.float32([[1.0, 0.8, 0.5], [0.9, -0.8, 0.6], [0.9, 0.9, 0.5]])
    got = np.asarray(pcb(tasks, [1, 1, 1], 0.67))
    assert got[1] > 0.8


def test_consensus_of_few_tasks():
    tasks, weights = made("normal", 3, MATRIX)
    # A module that one adapter has is not lost because no two of them use it.
    assert_near(consensus(tasks[:1], weights[:1]), np.float64(weights[0]) * tasks[0], 1e-6)
    for agreeing in (3, 4, 100):
        np.testing.assert_array_equal(consensus(tasks, weights, 0.4, agreeing), consensus(tasks, weights, 0.4, 3))
    # A zero threshold has every task use what is not 0 in it.
    assert_near(consensus(tasks, weights, 0.0, 3), (over(np.float64(weights), tasks) * tasks).sum(0), 1e-6)
    for wrong in (0, -1, True):
        with pytest.raises(ValueError, match="whole number from 1"):
            consensus(tasks, weights, 0.4, wrong)


def test_consensus_masks_do_not_see_weights():
    tasks, weights = made("normal", 3, MATRIX)
    got = np.asarray(consensus(tasks, weights)) == 0
    np.testing.assert_array_equal(got, np.asarray(consensus(tasks, [1.0, 1.0, 1.0])) == 0)
    assert 0 < got.mean() < 1


def test_nearswap_moves_no_further_than_t():
    a, b = made("normal", 2, MATRIX)[0]
    got = np.asarray(nearswap([a, b], [1, 1], 0.05))
    assert (np.abs(got - a) <= 0.05 + 1e-7).all()
    near = np.abs(a - b) <= 0.05
    assert near.any()
    np.testing.assert_array_equal(got[near], b[near])
    np.testing.assert_array_equal(nearswap([a], [0.5], 0.05), 0.5 * a)
    with pytest.raises(ValueError, match="nearswap takes two tasks, got 3"):
        nearswap([a, b, a], [1, 1, 1], 0.05)


@pytest.mark.parametrize(
    "function",
    [jm.ties, breadcrumbs_ties, sce, functools.partial(della, key=KEY), functools.partial(jm.dare_ties, key=KEY)],
)
def test_unknown_choices_are_named(function):
    tasks, weights = made("normal", 2, (3, 2))
    for name in ("election", *(["divisor"] if function is not sce else [])):
        with pytest.raises(ValueError, match=f"Unknown {name} 'nonsense': there are"):
            function(tasks, weights, 0.5, **{name: "nonsense"})
    with pytest.raises(ValueError, match="majority_sign_method"):
        function(tasks, weights, 0.5, majority_sign_method="nonsense")


# Adapters


def adapters_of(n):
    rng = np.random.default_rng(3)

    def lora():
        a, b = rng.normal(size=(4, 16)), rng.normal(size=(20, 4))
        return jm.LoRA(a.astype(np.float32), b.astype(np.float32), 0.5)

    return [jm.Adapter({"q": lora()}) for _ in range(n)]


@every
def test_adapters_in_the_space_of_changes(name):
    _, reference, settings = METHODS[name]
    adapters, weights = adapters_of(2), [0.7, -0.4]
    tasks = np.stack([delta64(adapter.modules["q"]) for adapter in adapters])
    for setting in settings:
        key = {"key": KEY} if jm.METHODS[name].random else {}
        merged = jm.merge(adapters, weights, method=name, rank=16, **setting, **key)
        if not key:
            assert relative_error(delta64(merged.modules["q"]), reference(tasks, np.array(weights), **setting)) < 1e-5


@pytest.mark.parametrize("election", ["unweighted", "weighted"])
@pytest.mark.parametrize("divisor", ["count", "weight", "none"])
def test_choices_reach_the_dense_changes(election, divisor):
    adapters, weights = adapters_of(3), np.array([0.7, -0.4, 1.3])
    tasks = np.stack([delta64(adapter.modules["q"]) for adapter in adapters])
    given = {"election": election, "divisor": divisor}
    merged = jm.merge(adapters, weights, method="ties", density=0.4, rank=16, **given)
    wanted = reference_ties(tasks, weights, 0.4, "total", election, divisor)
    assert relative_error(delta64(merged.modules["q"]), wanted) < 1e-5


@pytest.mark.parametrize(("name", "grid"), [
    ("breadcrumbs", {"density": [0.3, 0.6], "gamma": [0.0, 0.2]}),
    ("della_linear", {"density": [0.3, 0.6], "epsilon": [0.0, 0.4]}),
    ("consensus", {"threshold": [0.2, 0.9]}),
    ("nearswap", {"t": [0.1, 0.5]}),
])  # fmt: skip
def test_settings_of_a_sweep_are_merges(name, grid):
    adapters = adapters_of(2)
    key = {"key": KEY} if jm.METHODS[name].random else {}
    options = {"weights": [0.7, -0.4], "method": name, "rank": 16, **key}
    found = jm.sweep(adapters, lambda merged: jm.delta(merged.modules["q"]), grid, **options)
    assert len(found.settings) == np.prod([len(values) for values in grid.values()])
    for setting, score in zip(found.settings, found.scores, strict=True):
        merged = jm.merge(adapters, **options, **{number: setting[number] for number in grid})
        assert relative_error(score, delta64(merged.modules["q"])) < 1e-5


# mergekit 0.1.5 (scripts/make_mergekit_golden.py)


def goldens(method):
    """Case -> (its parameters, its arrays), the tasks as mergekit saw them."""
    with np.load(MERGEKIT / f"{method}.npz") as file:
        arrays = dict(file)
    found = {}
    for name, case in json.loads(str(arrays.pop("about")))["cases"].items():
        own = {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}
        base = own.get("base", np.float32(0))
        own["tasks"] = (base + own["tasks"]) - base
        own["merged"] = own["merged"] - base
        found[name] = (case["parameters"], own)
    return found


def assert_near_golden(got, own):
    # What is merged into a base was rounded beside numbers near 1.
    np.testing.assert_allclose(got, own["merged"], rtol=1e-5, atol=1e-6 if "base" in own else 1e-7)


def choices_of(parameters, normalize):
    return {"election": "weighted", "divisor": "weight" if parameters.get("normalize", normalize) else "none"}


RESCALED = "rescaled"  # mergekit can restore the L1 norm of what is trimmed, which no paper does.


def test_ties_of_mergekit():
    for name, (parameters, own) in goldens("ties").items():
        got = jm.ties(own["tasks"], parameters["weight"], parameters["density"], **choices_of(parameters, True))
        if name != RESCALED:
            assert_near_golden(got * parameters.get("lambda", 1), own)


def test_peft_elects_differently_from_mergekit():
    parameters, own = goldens("ties")["signed"]
    got = jm.ties(own["tasks"], parameters["weight"], parameters["density"])
    assert relative_error(got, own["merged"]) > 0.1


def test_breadcrumbs_of_mergekit():
    for name, (parameters, own) in goldens("breadcrumbs").items():
        got = breadcrumbs(own["tasks"], parameters["weight"], parameters["density"], parameters["gamma"])
        if parameters.get("normalize"):
            got /= sum(parameters["weight"])
        if name != RESCALED:
            assert_near_golden(got * parameters.get("lambda", 1), own)


def test_breadcrumbs_ties_of_mergekit():
    for name, (parameters, own) in goldens("breadcrumbs_ties").items():
        numbers = parameters["weight"], parameters["density"], parameters["gamma"]
        got = breadcrumbs_ties(own["tasks"], *numbers, **choices_of(parameters, False))
        if name != RESCALED:
            assert_near_golden(got * parameters.get("lambda", 1), own)


agreed = jax.jit(agree, static_argnums=2, static_argnames=("election", "divisor"))


def test_dare_ties_of_mergekit():
    """What is drawn, and the L1 norm that is restored after it, are its own; what becomes of it is not."""
    for parameters, own in goldens("dare_ties").values():
        kept = own["tasks"] * own["masks"]
        if parameters.get("rescale", True):
            kept *= np.abs(own["tasks"]).sum((1, 2), keepdims=True) / np.abs(kept).sum((1, 2), keepdims=True)
        choices = choices_of(parameters, False)
        got = agreed(kept, np.float32(parameters["weight"]), "total", **choices)
        assert_near_golden(got * parameters.get("lambda", 1), own)


def test_sce_of_mergekit():
    for name, (parameters, own) in goldens("sce").items():
        got = sce(own["tasks"], np.ones(len(own["tasks"]), np.float32), parameters.get("select_topk", 1.0))
        if name == "tiny":  # Its coefficients are equal where mean squares are small.
            assert relative_error(got, own["merged"]) > 0.1
        else:
            assert_near_golden(got, own)


def test_nearswap_of_mergekit():
    for parameters, own in goldens("nearswap").values():
        assert_near_golden(nearswap(own["tasks"], [1, 1], parameters["t"]), own)


def test_della_of_mergekit():
    for method in ("della", "della_linear"):
        for name, (parameters, own) in goldens(method).items():
            pruning = ByRank(jnp.float32(parameters["density"]), jnp.float32(2 * parameters["epsilon"]), KEY)
            for task, chance in zip(own["tasks"], own["probabilities"], strict=True):
                np.testing.assert_allclose(pruning.probabilities(jnp.asarray(task)), chance, atol=1e-6)
            if method == "della" and name == "unscaled":  # Otherwise it restores the L1 norm, and the paper does not.
                kept = jnp.asarray(own["tasks"] * own["masks"])
                got = agree(kept, jnp.float32(parameters["weight"]), "total", "weighted", "weight")
                assert_near_golden(got, own)
