"""Methods that go by lengths and angles: against their formulas in float64, and against mergekit."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
import tests.conftest  # noqa: F401  (sets the dtype promotion to strict)
from jaxmerge.methods import gram
from tests.helpers import compilations, delta64, relative_error

MERGEKIT = Path(__file__).parent / "goldens" / "mergekit"


# The formulas, for dense tasks [n, ...] in float64.


def shares(weights):
    return np.abs(weights) / np.abs(weights).sum()


def turned(tasks, weights):
    return np.array([task if weight >= 0 else -task for task, weight in zip(tasks, weights, strict=True)])


def unit(task):
    return task / np.linalg.norm(task) if task.any() else task


def norm_equalized(tasks, weights):
    mean = np.mean([np.linalg.norm(task) for task in tasks if task.any()])
    return sum(weight * mean * unit(task) for weight, task in zip(weights, tasks, strict=True))


def slerp(tasks, weights, threshold=0.9995):
    if len(tasks) == 1:
        return np.sign(weights[0]) * tasks[0]
    (a, b), t = turned(tasks, weights), shares(weights)[1]
    cosine = np.vdot(unit(a), unit(b))
    if abs(cosine) > threshold:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def multislerp(tasks, weights):
    """All of mergekit's steps, also the one along the tangent, which is zero."""
    tasks, weights = turned(tasks, weights), shares(weights)
    units = [unit(task) for task in tasks]
    mean = unit(sum(w * u for w, u in zip(weights, units, strict=True)))
    tangent = sum(w * (u - np.vdot(u, mean) * mean) for w, u in zip(weights, units, strict=True))
    length = np.linalg.norm(tangent)
    moved = mean * np.cos(length) + tangent * np.sinc(length / np.pi)
    return moved * sum(w * np.linalg.norm(task) for w, task in zip(weights, tasks, strict=True))


def karcher(tasks, weights, max_iter=10, tol=1e-5):
    tasks, weights = turned(tasks, weights), shares(weights)
    length = sum(w * np.linalg.norm(task) for w, task in zip(weights, tasks, strict=True))
    pulls = [(w, unit(task)) for w, task in zip(weights, tasks, strict=True) if task.any()]
    total = sum(w for w, _ in pulls)
    mean = unit(sum(w * u for w, u in pulls))
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for w, u in pulls:
            dot = np.clip(np.vdot(u, mean), -1, 1)
            if dot < 1:
                tangent += w / total * np.arccos(dot) * unit(u - dot * mean)
        size = np.linalg.norm(tangent)
        if size < tol:
            break
        mean = unit(np.cos(size) * mean + np.sin(size) * unit(tangent))
    return length * mean


def model_stock(tasks, weights):
    """For equal weights the paper's: the mean cosine of all pairs, and the number of tasks."""
    tasks, weights = turned(tasks, weights), shares(weights)
    mean = sum(w * task for w, task in zip(weights, tasks, strict=True))
    pairs = [(i, j) for i in range(len(tasks)) for j in range(i)]
    among = sum(weights[i] * weights[j] for i, j in pairs)
    if among == 0:
        return mean
    cosine = sum(weights[i] * weights[j] * np.vdot(unit(tasks[i]), unit(tasks[j])) for i, j in pairs) / among
    count = 1 / np.sum(weights**2)
    return count * cosine / (1 + (count - 1) * cosine) * mean


REFERENCES = {
    "norm_equalized": norm_equalized,
    "slerp": slerp,
    "nuslerp": functools.partial(slerp, threshold=1),
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
}
TWO_AT_MOST = ("slerp", "nuslerp")
every_method = pytest.mark.parametrize("method", REFERENCES)


def random_tasks(n, shape=(7, 5), seed=0, common=0.7, dtype=np.float32):
    """Tasks of different lengths with a part in common."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=shape)
    lengths = 2.0 ** rng.integers(-3, 4, n)
    return np.stack([length * (common * shared + rng.normal(size=shape)) for length in lengths]).astype(dtype)


def apply(method, tasks, weights, **hyperparameters):
    return getattr(gram, method)(tasks, weights, **hyperparameters)


def reference(method, tasks, weights, **hyperparameters):
    tasks = np.asarray(tasks, np.float64)
    return REFERENCES[method](tasks, np.asarray(weights, np.float64), **hyperparameters)


def for_counts(method, *counts):
    return [n for n in counts if n <= 2 or method not in TWO_AT_MOST]


# Against the formulas.


@every_method
@pytest.mark.parametrize(
    ("shape", "counts"), [((7, 5), (1, 2, 3, 5)), ((12,), (2,)), ((3, 2, 4), (1,)), ((64, 48), (3,))]
)
@pytest.mark.parametrize("common", [0, 0.7, 5])
def test_as_the_formula_has_it(method, shape, counts, common):
    for n in for_counts(method, *counts):
        tasks = random_tasks(n, shape, seed=n, common=common)
        for weights in ([1.0] * n, [0.3, 0.9, 0.6, 1.2, 0.1][:n], [1.0, -0.5, 2.0, -0.25, 0.75][:n], [2.0] * n):
            merged = apply(method, tasks, weights)
            assert merged.dtype == np.float32
            assert relative_error(merged, reference(method, tasks, weights)) < 1e-5


@every_method
def test_lists_and_integer_weights(method):
    tasks = random_tasks(2)
    listed = apply(method, list(tasks), (2, 1))
    np.testing.assert_array_equal(listed, apply(method, tasks, [2.0, 1.0]))
    with pytest.raises(ValueError, match="expected 2 weights"):
        apply(method, tasks, [1.0])
    with pytest.raises(ValueError, match="differ in shape"):
        apply(method, [tasks[0], tasks[1, :, :2]], [1.0, 1.0])


@pytest.mark.parametrize("method", TWO_AT_MOST)
def test_two_at_most(method):
    with pytest.raises(ValueError, match=f"{method} interpolates between two tasks, got 3"):
        apply(method, random_tasks(3), [1.0] * 3)


@pytest.mark.parametrize(("max_iter", "tol"), [(1, 0.0), (2, 1e-5), (10, 0.1), (50, 1e-6)])
def test_karcher_stops_where_it_is_told(max_iter, tol):
    tasks = random_tasks(4, common=0)
    merged = gram.karcher(tasks, [1.0, 2.0, 0.5, 1.0], max_iter=max_iter, tol=tol)
    expected = reference("karcher", tasks, [1.0, 2.0, 0.5, 1.0], max_iter=max_iter, tol=tol)
    assert relative_error(merged, expected) < 1e-5


def test_karcher_is_where_the_logarithms_cancel():
    tasks = random_tasks(5, common=0).astype(np.float64)
    weights = np.array([1.0, 2.0, 0.5, 1.0, 3.0])
    with jax.enable_x64(True):
        mean = unit(np.asarray(gram.karcher(tasks, weights, max_iter=200, tol=0.0)))
    dots = [np.vdot(unit(task), mean) for task in tasks]
    logarithms = [
        w * np.arccos(d) * unit(unit(task) - d * mean) for w, task, d in zip(weights, tasks, dots, strict=True)
    ]
    assert np.linalg.norm(sum(logarithms)) < 1e-12
    # It is another point than the normalised mean.
    assert relative_error(mean, unit(reference("multislerp", tasks, weights))) > 1e-3


@every_method
def test_in_float64(method):
    n = max(for_counts(method, 2, 5))
    tasks = random_tasks(n, dtype=np.float64)
    weights = np.array([0.3, -0.9, 0.6, 1.2, 0.1][:n])
    with jax.enable_x64(True):
        merged = apply(method, tasks, weights)
        assert merged.dtype == np.float64
    assert relative_error(merged, reference(method, tasks, weights)) < 1e-13


@every_method
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_types_are_merged_in_float32(method, dtype):
    tasks = random_tasks(2, dtype=dtype)
    merged = apply(method, tasks, [0.3, 0.9])
    assert merged.dtype == np.float32
    assert relative_error(merged, reference(method, tasks, [0.3, 0.9])) < 1e-5


@every_method
def test_any_size_of_the_tasks(method):
    tasks = random_tasks(2)
    expected = apply(method, tasks, [0.3, 0.9])
    for scale in (1e-30, 1e-12, 1e12, 1e30):
        merged = apply(method, tasks * np.float32(scale), [0.3, 0.9])
        assert relative_error(np.asarray(merged, np.float64) / np.float32(scale), expected) < 1e-5


# Degenerate cases.


@every_method
def test_zeros_give_zeros(method):
    for n in for_counts(method, 1, 2, 3):
        for weights in ([1.0] * n, [0.5, -1.0, 2.0][:n], [0.0] * n):
            np.testing.assert_array_equal(apply(method, np.zeros((n, 7, 5), np.float32), weights), np.zeros((7, 5)))
    assert apply(method, np.zeros((2, 0, 4), np.float32), [1.0, 1.0]).shape == (0, 4)


@every_method
def test_a_task_of_zeros(method):
    for n in for_counts(method, 2, 3, 5):
        for zero in (0, n - 1):
            tasks = random_tasks(n)
            tasks[zero] = 0
            weights = [0.3, -0.9, 0.6, 1.2, 0.1][:n]
            assert relative_error(apply(method, tasks, weights) + 1, reference(method, tasks, weights) + 1) < 1e-5


def test_what_a_task_of_zeros_does():
    tasks = np.stack([random_tasks(1)[0], np.zeros((7, 5), np.float32)])
    # It adds nothing, is a quarter of the way at a right angle, halves the length, and agrees with nothing.
    factors = {"norm_equalized": 1, "slerp": np.cos(np.pi / 8), "nuslerp": np.cos(np.pi / 8), "model_stock": 0}
    for method in REFERENCES:
        merged = apply(method, tasks, [1.0, 1 / 3])
        np.testing.assert_allclose(merged, factors.get(method, 0.75) * tasks[0], rtol=1e-5)


@every_method
def test_duplicates(method):
    for n in for_counts(method, 2, 3, 5):
        tasks = np.repeat(random_tasks(1), n, axis=0)
        weights = [0.3, 0.9, 0.6, 1.2, 0.1][:n]
        total = sum(weights) if method == "norm_equalized" else 1
        assert relative_error(apply(method, tasks, weights), total * tasks[0]) < 1e-5
        # Their sizes, of one direction, are averaged.
        sizes = np.arange(1, n + 1, dtype=np.float32)[:, None, None]
        mean = np.dot(shares(weights), sizes.ravel())
        expected = (total * sizes.mean() if method == "norm_equalized" else mean) * tasks[0]
        assert relative_error(apply(method, sizes * tasks, weights), expected) < 1e-5


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_opposite_tasks_give_the_weighted_mean_where_there_is_no_direction(method):
    (one,) = random_tasks(1)
    both = np.stack([one, -2 * one])
    np.testing.assert_allclose(apply(method, both, [1.0, 1.0]), -0.5 * one, rtol=1e-5)
    # A negative weight turns a task around: these are not opposite, and these are.
    np.testing.assert_allclose(apply(method, both, [1.0, -1.0]), 1.5 * one, rtol=1e-5)
    np.testing.assert_allclose(apply(method, np.stack([one, 2 * one]), [1.0, -1.0]), -0.5 * one, rtol=1e-5)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_three_directions_that_cancel(method):
    a, b = (unit(task) for task in random_tasks(2, common=0))
    b = unit(b - np.vdot(a, b) * a)
    star = np.stack([a, -a / 2 + np.sqrt(0.75) * b, -a / 2 - np.sqrt(0.75) * b]).astype(np.float32)
    lengths = np.array([1, 2, 3], np.float32)[:, None, None]
    np.testing.assert_allclose(apply(method, lengths * star, [1.0] * 3), (lengths * star).mean(0), rtol=1e-4, atol=1e-6)


def test_karcher_is_not_pulled_by_what_is_opposite():
    (one,) = random_tasks(1)
    merged = gram.karcher(np.stack([one, -one]), [3.0, 1.0])
    np.testing.assert_allclose(merged, one, rtol=1e-5)


def test_model_stock_of_what_cancels_is_zero():
    (one,) = random_tasks(1)
    np.testing.assert_array_equal(gram.model_stock(np.stack([one, -2 * one]), [1.0, 1.0]), np.zeros((7, 5)))
    a, b = random_tasks(2)
    assert np.isfinite(gram.model_stock(np.stack([a, b, -a, -b] * 8), [1.0] * 32)).all()


@every_method
@pytest.mark.parametrize("seed", range(5))
def test_nearly_parallel_and_nearly_opposite(method, seed):
    a, b = (unit(task) for task in random_tasks(2, (16, 16), seed, common=0).astype(np.float64))
    b = unit(b - np.vdot(a, b) * a)
    for angle in (1e-7, 1e-5, 1e-3, 1e-2, 0.1):
        for sign in (1, -1):
            tasks = np.stack([a, 2 * (sign * np.cos(angle) * a + np.sin(angle) * b)]).astype(np.float32)
            merged = apply(method, tasks, [0.3, 0.9])
            assert np.isfinite(merged).all()
            if method in ("multislerp", "karcher"):
                assert 0.5 < np.linalg.norm(merged) < 2
            if sign == 1:
                assert relative_error(merged, reference(method, tasks, [0.3, 0.9])) < 1e-4


@every_method
def test_weights_of_zero(method):
    a, b = random_tasks(2)
    np.testing.assert_array_equal(apply(method, np.stack([a, b]), [0.0, 0.0]), np.zeros((7, 5)))
    only = apply(method, np.stack([a, b]), [2.0, 0.0])
    expected = np.linalg.norm(b) / np.linalg.norm(a) + 1 if method == "norm_equalized" else 1
    assert relative_error(only, expected * a) < 1e-5


@every_method
def test_weights_that_sum_to_zero(method):
    tasks = random_tasks(2)
    merged = apply(method, tasks, [1.0, -1.0])
    turned_around = apply(method, np.stack([tasks[0], -tasks[1]]), [1.0, 1.0])
    np.testing.assert_allclose(merged, turned_around, rtol=1e-5)


@every_method
def test_negative_weights_negate(method):
    for n in for_counts(method, 1, 2, 3):
        weights = np.array([1.0, -0.5, 2.0][:n], np.float32)
        tasks = random_tasks(n)
        np.testing.assert_allclose(apply(method, tasks, -weights), -apply(method, tasks, weights), rtol=1e-5, atol=1e-6)


# Under JAX's transformations.


@every_method
def test_traced_weights_compile_once(method):
    tasks = random_tasks(2)
    merge = jax.jit(functools.partial(apply, method))
    for weights in (np.array([0.3, 0.9], np.float32), np.array([-1.0, 1.0], np.float32), np.zeros(2, np.float32)):
        np.testing.assert_allclose(merge(tasks, weights), apply(method, tasks, weights), rtol=1e-5, atol=1e-6)
    assert not compilations(lambda: jax.block_until_ready(merge(tasks, np.ones(2, np.float32))))


def test_traced_tolerance_compiles_once():
    tasks, weights = random_tasks(3, common=0), np.ones(3, np.float32)
    merge = jax.jit(gram.karcher, static_argnames="max_iter")
    for tol in (1e-5, 0.1, 1e-6):
        merged = merge(tasks, weights, max_iter=20, tol=np.float32(tol))
        assert relative_error(merged, reference("karcher", tasks, weights, max_iter=20, tol=tol)) < 1e-5
    assert not compilations(lambda: jax.block_until_ready(merge(tasks, weights, max_iter=20, tol=np.float32(0.3))))


@every_method
def test_mapped(method):
    stacks = np.stack([random_tasks(2, seed=seed) for seed in range(4)])
    weights = np.random.default_rng(1).normal(size=(4, 2)).astype(np.float32)
    mapped = jax.vmap(functools.partial(apply, method))(stacks, weights)
    for merged, tasks, own in zip(mapped, stacks, weights, strict=True):
        np.testing.assert_allclose(merged, apply(method, tasks, own), rtol=1e-4, atol=1e-6)


@every_method
def test_gradients_are_those_of_differences(method):
    tasks, weights = random_tasks(2, dtype=np.float64), np.array([0.3, 0.9])
    towards = np.random.default_rng(3).normal(size=(7, 5))

    @jax.jit
    def value(tasks, weights):
        return jnp.vdot(apply(method, tasks, weights), towards)

    with jax.enable_x64(True):
        slopes = jax.jit(jax.grad(value, (0, 1)))(tasks, weights)
        for argument, (slope, given) in enumerate(zip(slopes, (tasks, weights), strict=True)):
            way = np.random.default_rng(4).normal(size=given.shape)
            ends = [value(*[x + (step * way if i == argument else 0) for i, x in enumerate((tasks, weights))])
                    for step in (1e-5, -1e-5)]  # fmt: skip
            assert float(np.vdot(slope, way)) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-6)


@functools.cache
def slopes_of_squares(method):
    return jax.jit(jax.grad(lambda tasks, weights: jnp.sum(apply(method, tasks, weights) ** 2), (0, 1)))


@every_method
@pytest.mark.parametrize("kind", ["zero", "one zero", "same", "opposite"])
def test_gradients_are_finite_where_it_degenerates(method, kind):
    (one,) = random_tasks(1)
    factors = {"zero": (0, 0), "one zero": (1, 0), "same": (1, 1), "opposite": (1, -1)}[kind]
    tasks = np.stack([np.float32(factor) * one for factor in factors])
    for weights in ([1.0, 1.0], [1.0, 0.0], [0.0, 0.0]):
        slopes = slopes_of_squares(method)(tasks, np.float32(weights))
        assert all(np.isfinite(slope).all() for slope in slopes)


# Through merge.


def random_adapters(n, seed=0):
    """Ranks and scales differ, and one module is not in all."""
    rng = np.random.default_rng(seed)
    shapes = {"layers.0.q": (20, 16), "layers.1.q": (20, 16), "head": (16, 24)}

    def lora(i, out, in_):
        a, b = rng.normal(size=(2 + i, in_)), rng.normal(size=(out, 2 + i))
        return jm.LoRA(a.astype(np.float32), b.astype(np.float32), 0.5 + i)

    return [
        jm.Adapter({path: lora(i, *shape) for path, shape in shapes.items() if path != "head" or i != 1})
        for i in range(n)
    ]


# The ranks of five adapters add up to more than a module has, those of three to less.
MERGED = {"norm_equalized": 5, "slerp": 2, "nuslerp": 2, "multislerp": 3, "karcher": 5, "model_stock": 3}


@pytest.mark.parametrize(("method", "n"), MERGED.items())
def test_merged_adapters_are_the_formula_of_the_products(method, n):
    adapters = random_adapters(n)
    weights = [1.0, 0.5, -2.0, 0.25, 1.5][:n]
    merged = jm.merge(adapters, weights, method=method, space="full")
    for path, lora in merged.modules.items():
        present = [i for i in range(n) if path in adapters[i].modules]
        tasks = np.stack([delta64(adapters[i].modules[path]) for i in present])
        expected = reference(method, tasks, [weights[i] for i in present])
        assert relative_error(delta64(lora), expected) < 1e-5
        assert lora.rank == min(*lora.features, sum(2 + i for i in present))


@pytest.mark.parametrize(("method", "n"), MERGED.items())
def test_equal_weights_are_the_methods_own(method, n):
    adapters = random_adapters(n)
    weight = 1.0 if jm.METHODS[method].averages else 1 / n
    assert jm.METHODS[method].averages == (method != "norm_equalized")
    merged, expected = jm.merge(adapters, method=method), jm.merge(adapters, [weight] * n, method=method)
    for path, lora in merged.modules.items():
        np.testing.assert_array_equal(delta64(lora), delta64(expected.modules[path]))


@every_method
def test_the_laws_that_a_row_says_it_breaks(method):
    n = 1 if method in TWO_AT_MOST else 3
    tasks, weights = random_tasks(n), [1.0, 0.5, 2.0][:n]
    more = apply(method, np.concatenate([tasks, np.zeros_like(tasks[:1])]), [*weights, 3.0])
    changed = relative_error(more, apply(method, tasks, weights)) > 1e-2
    assert set(jm.METHODS[method].breaks) == ({"zeros"} if changed else set())


# Against mergekit.


def golden(method):
    with np.load(MERGEKIT / f"{method}.npz") as file:
        arrays = dict(file)
    return json.loads(str(arrays["about"])), arrays


def cases(*methods):
    return [(method, name) for method in methods for name in golden(method)[0]["cases"]]


def read(method, name):
    """Tasks, the weights that correspond to mergekit's parameters, its other parameters, and its change."""
    about, arrays = golden(method)
    parameters = dict(about["cases"][name]["parameters"])
    tasks, change = arrays[f"{name}/tasks"], arrays[f"{name}/merged"].astype(np.float64)
    change -= arrays.get(f"{name}/base", 0)
    weights = parameters.pop("weight", [1.0] * len(tasks))
    if "t" in parameters:
        t = parameters.pop("t")
        weights = [1 - t, t]
    return tasks, weights, parameters, change


# Where jaxmerge differs on purpose; each has its test below.
DIFFERENT = [
    ("nuslerp", "signed"),
    ("nuslerp", "cancelling"),
    ("multislerp", "signed"),
    ("karcher", "opposite"),
    ("karcher", "tiny"),
    ("model_stock", "tiny"),
]
METHODS = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")


@pytest.mark.parametrize(("method", "name"), [case for case in cases(*METHODS) if case not in DIFFERENT])
def test_as_mergekit_has_it(method, name):
    tasks, weights, parameters, change = read(method, name)
    merged = apply(method, tasks, weights, **parameters)
    if np.linalg.norm(change) < 1e-6 * np.linalg.norm(tasks):
        assert np.linalg.norm(merged) < 1e-6 * np.linalg.norm(tasks)
    else:  # Between nearly opposite tasks both divide by a sine of 0.03 that float32 has to four digits.
        assert relative_error(merged, change) < (1e-3 if name == "near_opposite" else 1e-5)


def test_the_version_of_mergekit():
    assert {golden(method)[0]["versions"]["mergekit"] for method in METHODS} == {"0.1.5"}


def test_mergekits_slerp_of_whole_models_is_another_one():
    """mergekit interpolates base + change, where the base makes all models nearly parallel: a linear interpolation."""
    tasks = random_tasks(2)
    base = 100 * random_tasks(1, seed=9)[0]
    whole = slerp((base + tasks).astype(np.float64), np.array([0.5, 0.5])) - base
    assert relative_error(whole, tasks.mean(0)) < 1e-2
    assert relative_error(gram.slerp(tasks, [0.5, 0.5]), tasks.mean(0)) > 0.1


def test_a_negative_weight_turns_around_and_does_not_extrapolate():
    tasks, weights, _, change = read("nuslerp", "signed")
    np.testing.assert_allclose(weights, [1.0, -0.5])
    angle = np.arccos(np.vdot(unit(tasks[0]), unit(tasks[1])))
    beyond = (np.sin(2 * angle) * tasks[0] + np.sin(-angle) * tasks[1]) / np.sin(angle)
    assert relative_error(change, beyond) < 1e-5
    merged = gram.nuslerp(tasks, weights)
    assert relative_error(merged, reference("slerp", [tasks[0], -tasks[1]], [1.0, 0.5])) < 1e-5
    assert relative_error(merged, change) > 0.1


def test_weights_that_cancel_are_not_equal_ones():
    tasks, weights, _, change = read("nuslerp", "cancelling")
    assert relative_error(change, reference("nuslerp", tasks, [1.0, 1.0])) < 1e-5
    assert relative_error(gram.nuslerp(tasks, weights), reference("nuslerp", [tasks[0], -tasks[1]], [1, 1])) < 1e-5


def test_negative_weights_of_multislerp_do_not_invert_the_direction():
    tasks, weights, _, change = read("multislerp", "signed")
    merged = np.asarray(gram.multislerp(tasks, weights))
    # The same line, but mergekit divides by the weights' sum, which is negative.
    assert np.vdot(unit(merged), unit(change)) == pytest.approx(-1, abs=1e-5)
    assert np.vdot(merged, sum(w * unit(t) for w, t in zip(weights, tasks, strict=True))) > 0


def test_no_direction_is_made_up_where_all_cancel():
    tasks, weights, _, change = read("karcher", "opposite")
    # All there is to go on is one direction, but mergekit's mean of both has another.
    assert abs(np.vdot(unit(change), unit(tasks[0]))) < 0.1
    assert relative_error(gram.karcher(tasks, weights), tasks.mean(0)) < 1e-5


@pytest.mark.parametrize("method", ["karcher", "model_stock"])
def test_small_changes_are_not_zeros(method):
    tasks, weights, _, change = read(method, "tiny")
    assert relative_error(apply(method, tasks, weights), reference(method, tasks, weights)) < 1e-5
    assert relative_error(change, reference(method, tasks, weights)) > 0.5
