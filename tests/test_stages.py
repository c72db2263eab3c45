"""Stages on top of a merge, against dense float64 NumPy; and the paths of LiNeS."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import catalog, stages
from jaxmerge.spaces import Factors
from tests.helpers import relative_error

OUT, IN = 40, 30
RANKS = (3, 2, 4)


def make(seed=0, ranks=RANKS, out=OUT, in_=IN, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return Factors(
        [jnp.asarray(rng.normal(size=(r, in_)), dtype) for r in ranks],
        [jnp.asarray(rng.normal(size=(out, r)), dtype) for r in ranks],
        jnp.asarray([0.5 + i for i in range(len(ranks))], dtype),
    )


def dense(sources):
    return [
        float(scale) * np.asarray(b, np.float64) @ np.asarray(a, np.float64)
        for a, b, scale in zip(sources.a, sources.b, sources.scales, strict=True)
    ]


def stacked(sources, weights):
    """The plain weighted sum, as factors side by side."""
    scaled = [w * s * b for w, s, b in zip(weights, sources.scales, sources.b, strict=True)]
    return jnp.concatenate(sources.a), jnp.concatenate(scaled, axis=1)


def product(pair):
    a, b = (np.asarray(factor, np.float64) for factor in pair)
    return b @ a


def svd(matrix):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = int(np.sum(s > 1e-5 * s[0]))
    return u[:, :rank], s[:rank], vt[:rank]


def calibrate_reference(merged, tasks, floor=0.1):
    """Algorithm 1 of the paper, over the directions that there are."""
    u, s, vt = svd(merged)
    counts = [
        [max(floor, (u[:, r] @ merged) @ (u[:, r] @ t) / np.sum((u[:, r] @ t) ** 2)) for t in tasks]
        for r in range(len(s))
    ]
    return u @ np.diag(s / np.mean(counts, axis=1)) @ vt


@pytest.fixture(scope="module")
def sources():
    return make()


WEIGHTS = np.float32([1.0, 0.5, -2.0])


def test_isotropize(sources):
    merged = stacked(sources, WEIGHTS)
    u, s, vt = svd(product(merged))
    assert len(s) == 9
    assert relative_error(product(stages.isotropize(merged)), s.mean() * u @ vt) < 1e-5
    iso_c = jm.METHODS["iso_c"].load()(np.float32(dense(sources)), list(WEIGHTS))
    assert relative_error(product(stages.isotropize(merged)), iso_c) < 1e-5


def test_isotropize_leaves_null_directions_alone(sources):
    """A merge of rank 3 in factors of rank 6."""
    a, b = sources.a[0], sources.b[0]
    twice = jnp.concatenate([a, 2 * a]), jnp.concatenate([b, b], axis=1)
    u, s, vt = svd(product(twice))
    assert len(s) == 3
    assert relative_error(product(stages.isotropize(twice)), s.mean() * u @ vt) < 1e-5


@pytest.mark.parametrize("floor", [0.1, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, 0.3, 0.3], WEIGHTS])
def test_calibrate(floor, weights, sources):
    merged = stacked(sources, weights)
    expected = calibrate_reference(product(merged), dense(sources), floor)
    assert relative_error(product(stages.calibrate(merged, sources, floor)), expected) < 1e-5


def test_calibrate_takes_out_how_often_a_task_was_added(sources):
    thrice = Factors([sources.a[0]] * 3, [sources.b[0]] * 3, jnp.ones(3))
    once = sources.b[0] @ sources.a[0]
    for weights in ([1.0] * 3, [1 / 3] * 3):  # The scale of the sum does not matter.
        assert relative_error(product(stages.calibrate(stacked(thrice, weights), thrice)), once) < 1e-5


def test_calibrate_keeps_what_only_one_task_has():
    """Tasks that write in directions of their own are not over-counted, and have no say about each other.

    The reference code counts a task that has nothing in a direction with the floor, and makes this 1/0.55 as large.
    """
    eye = jnp.eye(8)
    apart = Factors([eye[:2], eye[2:4]], [eye[:, :2], 3 * eye[:, 2:4]], jnp.ones(2))
    merged = stacked(apart, [1.0, 1.0])
    assert relative_error(product(stages.calibrate(merged, apart)), product(merged)) < 1e-6


def test_calibrate_does_not_see_an_adapter_of_zeros(sources):
    more = Factors([*sources.a, sources.a[0]], [*sources.b, 0 * sources.b[0]], jnp.append(sources.scales, 1.0))
    merged = stacked(sources, WEIGHTS)
    expected = product(stages.calibrate(merged, sources))
    assert relative_error(product(stages.calibrate(merged, more)), expected) < 1e-6


def truncate_reference(merged, rule, limit):
    """By the definitions, the fewest that do."""
    u, s, vt = svd(merged)
    kept = {
        "rank": lambda k: k == min(limit, len(s)),
        "energy": lambda k: (s[:k] ** 2).sum() >= limit * (s**2).sum(),
        "sv_ratio": lambda k: k == len(s) or s[k] < s[0] / limit,
        "sv_fro": lambda k: np.linalg.norm(s[:k]) >= limit * np.linalg.norm(s),
        "sv_cumulative": lambda k: s[:k].sum() >= limit * s.sum(),
    }[rule]
    k = next(k for k in range(1, len(s) + 1) if kept(k))
    return u[:, :k] @ np.diag(s[:k]) @ vt[:k]


RULES = [
    ("rank", 1), ("rank", 4), ("rank", 9), ("rank", 30), ("energy", 0.5), ("energy", 0.95), ("sv_ratio", 1.0),
    ("sv_ratio", 2.5), ("sv_ratio", 1e3), ("sv_fro", 0.9), ("sv_cumulative", 0.2), ("sv_cumulative", 0.8),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "limit"), RULES)
def test_truncate(rule, limit, sources):
    merged = stacked(sources, WEIGHTS)
    expected = truncate_reference(product(merged), rule, limit)
    jitted = jax.jit(lambda limit: stages.truncate(merged, **{rule: limit}))
    for a, b in (stages.truncate(merged, **{rule: limit}), jitted(jnp.float32(limit))):
        assert relative_error(product((a, b)), expected) < 1e-5
        # What is cut is 0, to the bit, and behind what is kept.
        kept = np.linalg.matrix_rank(expected)
        assert np.any(np.asarray(a) != 0, axis=1).tolist() == [i < kept for i in range(len(a))]
        assert np.any(np.asarray(b) != 0, axis=0).tolist() == [i < kept for i in range(len(a))]


def test_truncate_keeps_all_that_there_is(sources):
    """A fraction of 1 is the true rank, of a merge of rank 3 in factors of rank 6."""
    a, b = sources.a[0], sources.b[0]
    twice = jnp.concatenate([a, 2 * a]), jnp.concatenate([b, b], axis=1)
    for rule in ("energy", "sv_fro", "sv_cumulative"):
        found = stages.truncate(twice, **{rule: 1.0})
        assert relative_error(product(found), product(twice)) < 1e-5
        assert np.count_nonzero(np.any(np.asarray(found[0]) != 0, axis=1)) == 3


@pytest.mark.parametrize(("rules", "words"), [({}, "none was given"), ({"rank": 2, "energy": 0.5}, "rank and energy")])
def test_truncate_takes_one_rule(rules, words, sources):
    with pytest.raises(ValueError, match=f"truncate takes one of rank, energy, .*: {words}"):
        stages.truncate(stacked(sources, WEIGHTS), **rules)


def test_norm_restore(sources):
    merged = stacked(sources, WEIGHTS)
    norms = [np.linalg.norm(task) for task in dense(sources)]
    restored = product(stages.norm_restore(merged, sources, jnp.ones(3)))
    assert relative_error(restored, np.mean(norms) / np.linalg.norm(product(merged)) * product(merged)) < 1e-5
    for scaled in (WEIGHTS, 10 * WEIGHTS):
        restored = product(stages.norm_restore(merged, sources, scaled))
        assert np.linalg.norm(restored) == pytest.approx(np.average(norms, weights=np.abs(WEIGHTS)), rel=1e-5)


def test_norm_restore_of_the_whole_model():
    modules = [make(seed, out=20 + seed) for seed in range(3)]
    merged = [stacked(module, WEIGHTS) for module in modules]
    squares = [stages.squared_norms(*pair) for pair in zip(merged, modules, strict=True)]
    factor = stages.restoring_factor(sum(m for m, _ in squares), sum(s for _, s in squares), jnp.ones(3))
    wholes = [np.concatenate([dense(module)[t].ravel() for module in modules]) for t in range(3)]
    whole = np.concatenate([product(pair).ravel() for pair in merged])
    expected = np.mean([np.linalg.norm(task) for task in wholes]) / np.linalg.norm(whole)
    assert float(factor) == pytest.approx(expected, rel=1e-5)
    for (square, each), module, pair in zip(squares, modules, merged, strict=True):
        assert float(square) == pytest.approx(np.sum(product(pair) ** 2), rel=1e-5)
        np.testing.assert_allclose(each, [np.sum(task**2) for task in dense(module)], rtol=1e-5)


def test_norm_restore_counts_no_absent_adapter(sources):
    merged = stacked(sources, [1.0, 1.0, 0.0])
    expected = np.mean([np.linalg.norm(task) for task in dense(sources)[:2]])
    restored = stages.norm_restore(merged, sources, jnp.asarray([1.0, 1.0, 0.0]))
    assert np.linalg.norm(product(restored)) == pytest.approx(expected, rel=1e-5)
    zero = sources._replace(scales=sources.scales.at[2].set(0))
    restored = stages.norm_restore(merged, zero, jnp.ones(3))
    assert np.linalg.norm(product(restored)) == pytest.approx(expected, rel=1e-5)


def test_rounding_errors_are_not_restored(sources):
    cancelled = stages.scale((sources.a[0], sources.b[0]), 1e-7)
    same = stages.norm_restore(cancelled, sources, jnp.ones(3))
    np.testing.assert_allclose(product(same), product(cancelled))


@pytest.mark.parametrize("factor", [2.0, -0.3, 0.0])
def test_scale(factor, sources):
    pair = sources.a[0], sources.b[0]
    a, b = stages.scale(pair, factor)
    np.testing.assert_allclose(product((a, b)), factor * product(pair), atol=1e-6)
    np.testing.assert_allclose(b, np.sqrt(abs(factor)) * sources.b[0], rtol=1e-6)


STAGES = {
    "isotropize": lambda merged, sources, number: stages.isotropize(merged),
    "calibrate": lambda merged, sources, number: stages.calibrate(merged, sources, number),
    "norm_restore": lambda merged, sources, number: stages.norm_restore(
        merged, sources, jnp.full_like(WEIGHTS, number)
    ),
    "truncate": lambda merged, sources, number: stages.truncate(merged, energy=1 - number),
    "scale": lambda merged, sources, number: stages.scale(merged, number),
}
each_stage = pytest.mark.parametrize("name", STAGES)


@each_stage
def test_float64(name):
    with jax.enable_x64(True):
        sources = make(dtype=np.float64)
        merged = stacked(sources, np.float64(WEIGHTS))
        a, b = stages.isotropize(merged) if name == "isotropize" else STAGES[name](merged, sources, 0.2)
        assert a.dtype == b.dtype == np.float64
        if name == "calibrate":
            assert relative_error(product((a, b)), calibrate_reference(product(merged), dense(sources), 0.2)) < 1e-12
        if name == "truncate":
            assert relative_error(product((a, b)), truncate_reference(product(merged), "energy", 0.8)) < 1e-12
        if name == "isotropize":
            u, s, vt = svd(product(merged))
            assert relative_error(product((a, b)), s.mean() * u @ vt) < 1e-12


@each_stage
def test_jit_and_map(name, sources):
    number = jnp.asarray(0.3)
    merged = stacked(sources, WEIGHTS)
    expected = product(STAGES[name](merged, sources, number))
    assert relative_error(product(jax.jit(STAGES[name])(merged, sources, number)), expected) < 1e-5
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (merged, sources))
    mapped = jax.jit(lambda stack: jax.lax.map(lambda one: STAGES[name](*one, number), stack))(stack)
    assert relative_error(product(jax.tree.map(lambda x: x[0], mapped)), expected) < 1e-5


@each_stage
def test_nothing_comes_of_nothing(name, sources):
    merged = stacked(sources, [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(product(STAGES[name](merged, sources, 0.1)), np.zeros((OUT, IN)))
    nothing = sources._replace(scales=jnp.zeros(3))
    assert np.all(np.isfinite(product(STAGES[name](stacked(sources, WEIGHTS), nothing, 0.1))))


@each_stage
def test_the_same_function_in_other_factors(name, sources):
    g = np.float32(np.diag([1.0, 10.0, 100.0, 2.0, 3.0, 4.0, 0.1, 5.0, 1.0]))
    a, b = stacked(sources, WEIGHTS)
    own = [np.float32(np.diag(np.arange(1.0, r + 1))) for r in RANKS]
    turned = Factors(
        [jnp.linalg.inv(x) @ a for a, x in zip(sources.a, own, strict=True)],
        [b @ x for b, x in zip(sources.b, own, strict=True)],
        sources.scales,
    )
    expected = product(STAGES[name]((a, b), sources, 0.3))
    assert relative_error(product(STAGES[name]((np.linalg.inv(g) @ a, b @ g), turned, 0.3)), expected) < 1e-5


@each_stage
def test_a_merge_of_more_than_its_features(name):
    sources = make(out=8, in_=6)
    merged = stacked(sources, WEIGHTS)
    found = STAGES[name](merged, sources, 0.3)
    if name in ("isotropize", "calibrate", "truncate"):
        assert found[0].shape == (6, 6)
        assert found[1].shape == (8, 6)
    if name == "calibrate":
        assert relative_error(product(found), calibrate_reference(product(merged), dense(sources), 0.3)) < 1e-5


def test_jitted_stages_return():
    program = """
import jax, jax.numpy as jnp
from jaxmerge import stages
from tests.test_stages import STAGES, WEIGHTS, make, stacked
modules = [make(seed, ranks=(16, 16, 16), out=512, in_=256) for seed in range(8)]
pairs = [stacked(module, WEIGHTS) for module in modules]
stack = jax.tree.map(lambda *x: jnp.stack(x), *zip(pairs, modules))
for name, stage in STAGES.items():
    jax.block_until_ready(jax.jit(lambda stack: jax.lax.map(lambda one: stage(*one, 0.5), stack))(stack))
    jax.block_until_ready(jax.jit(stage)(pairs[0], modules[0], 0.5))
    print(name)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=100, capture_output=True, text=True)
    assert done.stdout.split() == list(STAGES), done.stderr


def test_lines():
    paths = [f"model.layers.{i}.{kind}" for i in range(5) for kind in ("q_proj", "mlp.experts.7.up_proj")]
    factors = stages.lines_factors([*paths, "lm_head"], alpha=0.2, beta=0.8)
    for i in range(5):
        for kind in ("q_proj", "mlp.experts.7.up_proj"):
            assert factors[f"model.layers.{i}.{kind}"] == pytest.approx(0.2 + 0.8 * i / 4)
    assert factors["lm_head"] == 0.2
    assert list(factors) == [*paths, "lm_head"]


def test_lines_counts_each_stack_by_itself():
    paths = ["encoder.block.0.q", "encoder.block.2.q", "decoder.block.0.q", "decoder.block.1.q", "decoder.block.4.q"]
    factors = stages.lines_factors(paths, alpha=1, beta=1)
    assert list(factors.values()) == [1, 2, 1, 1.25, 2]


def test_lines_reads_numbers_after_an_underscore():
    paths = ["decoder.layers_0.mlp.wi_0", "decoder.layers_3.mlp.wi_1", "decoder.layers_6.mlp.wo"]
    assert list(stages.lines_factors(paths).values()) == [1, 1.5, 2]
    assert list(stages.lines_factors(["w1", "fc2", "conv10.q"]).values()) == [1, 1, 1]


def test_lines_of_one_layer_or_none():
    assert stages.lines_factors(["blocks.0"], alpha=3) == {"blocks.0": 3}
    assert stages.lines_factors([]) == {}


@pytest.mark.parametrize("name", catalog.STAGES)
def test_a_row_agrees_with_its_function(name):
    row = catalog.STAGES[name]
    parameters = inspect.signature(row.load()).parameters
    inputs = {"merged", "sources", "weights", "paths"}
    own = {p: parameter.default for p, parameter in parameters.items() if p not in inputs}
    told = {h.name: h.default for h in row.hyperparameters if h.name != "scope"}
    assert list(own) == list(told)
    for parameter, default in own.items():
        assert told[parameter] == (None if default is inspect.Parameter.empty else default)
    assert row.summary
    assert any(source in row.paper for source in ("arXiv", "https://"))
    assert inspect.getdoc(row.load())


def test_the_scope_of_norm_restore_is_a_choice():
    (scope,) = catalog.STAGES["norm_restore"].hyperparameters
    assert scope.kind == "choice"
    assert scope.choices == ("module", "whole")
