"""Values that differ between modules and between adapters: each module comes out as if it had been merged alone."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.base import Adapter, LoRA
from jaxmerge.catalog import METHODS
from jaxmerge.merging import plan_merge
from jaxmerge.values import at, described
from tests.helpers import compilations

PATHS = [f"layers.{i}.{kind}" for i in range(3) for kind in ("q", "v")]
KEY = jax.random.key(3)


def adapters(n=3, ranks=(3, 3, 3), missing=(), bias=False):
    rng = np.random.default_rng(5)

    def lora(rank):
        a, b = rng.normal(size=(rank, 10)), rng.normal(size=(12, rank))
        return LoRA(a.astype(np.float32), b.astype(np.float32), 0.5, np.ones(12, np.float32) if bias else None)

    made = [Adapter({path: lora(ranks[i]) for path in PATHS}) for i in range(n)]
    return [
        dataclasses.replace(one, modules={path: lora for path, lora in one.modules.items() if (i, path) not in missing})
        for i, one in enumerate(made)
    ]


def only(adapters, path):
    return [dataclasses.replace(one, modules={path: one.modules[path]}) for one in adapters if path in one.modules]


def assert_same_module(merged, alone, path):
    np.testing.assert_array_equal(merged.modules[path].a, alone.modules[path].a)
    np.testing.assert_array_equal(merged.modules[path].b, alone.modules[path].b)


def gradient(start, end):
    return {path: start + (end - start) * i / (len(PATHS) - 1) for i, path in enumerate(PATHS)}


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize(("method", "space", "own"), [
    ("linear", "full", {}),
    ("ties", "factors", {"density": gradient(0.2, 0.9)}),
    ("ties", "full", {"density": gradient(0.2, 0.9)}),
    ("dare_ties", "core", {"density": gradient(0.2, 0.9)}),
    ("karcher", "full", {"tol": gradient(1e-5, 1e-4)}),
    ("magnitude_prune", "ctm", {"density": gradient(0.2, 0.9), "own_norm": gradient(0.1, 0.9)}),
])  # fmt: skip
def test_each_module_is_merged_with_its_own_values(method, space, own, mesh):
    sources, weights = adapters(missing={(1, "layers.1.q")}), [gradient(0.1, 1), gradient(1, 1.5), 0.5]
    del weights[1]["layers.1.q"]
    key = KEY if METHODS[method].random else None
    devices = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)) if mesh else None
    merged = jm.merge(sources, weights, method=method, space=space, key=key, mesh=devices, **own)
    for path in PATHS:
        present = [i for i, one in enumerate(sources) if path in one.modules]
        if len(present) < 3 and METHODS[method].random:
            continue  # Merged alone, its adapters would have other places in the list, which they draw by.
        numbers = {name: value[path] for name, value in own.items()}
        alone = jm.merge(
            only(sources, path), [at(weights[i], path) for i in present],
            method=method, space=space, key=key, mesh=devices, **numbers,
        )  # fmt: skip
        assert_same_module(merged, alone, path)


def test_each_adapter_is_pruned_with_its_own_density():
    sources, densities = adapters(), [0.2, 0.5, 0.9]
    for space in ("full", "factors", "knots", "core"):
        rank = 3 if space == "factors" else 9
        prune = functools.partial(jm.merge, sources, [1, 1, 1], method="magnitude_prune", space=space, rank=rank)
        merged = prune(density=densities)
        for path in PATHS if space == "full" else ():
            deltas = [np.asarray(jm.delta(one.modules[path])) for one in sources]
            kept = [np.where(_largest(delta, d), delta, 0) for delta, d in zip(deltas, densities, strict=True)]
            dense = np.sum(kept, axis=0, dtype=np.float64)
            u, s, vt = np.linalg.svd(dense)
            best = (u[:, :9] * s[:9]) @ vt[:9]
            np.testing.assert_allclose(jm.delta(merged.modules[path]), best, atol=2e-5)
        same, plain = prune(density=[0.5] * 3), prune(density=0.5)
        for path in PATHS:
            assert_same_module(same, plain, path)
            assert np.abs(np.asarray(merged.modules[path].a) - np.asarray(plain.modules[path].a)).max() > 1e-3


def _largest(delta, density):
    order = np.argsort(-np.abs(delta), axis=None, kind="stable")
    mask = np.zeros(delta.size, bool)
    mask[order[: int(density * delta.size)]] = True
    return mask.reshape(delta.shape)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.per_adapter])
@pytest.mark.parametrize("space", ["full", "factors", "core"])
def test_densities_per_adapter_of_modules_that_only_some_have(method, space):
    sources = adapters(missing={(1, "layers.1.q")})
    key = KEY if METHODS[method].random else None
    own = {"density": [0.3, 0.6, 0.8]}
    if "epsilon" in METHODS[method].per_adapter:
        own["epsilon"] = [0.1, 0.2, 0.05]
    merged = jm.merge(sources, [1, 1, 1], method=method, space=space, key=key, **own)
    full = jm.merge(adapters(), [1, 1, 1], method=method, space=space, key=key, **own)
    assert_same_module(merged, full, "layers.0.q")
    rest = [sources[0], sources[2]]
    if key is None:
        alone = jm.merge(
            [only([one], "layers.1.q")[0] for one in rest], [1, 1], method=method, space=space, density=[0.3, 0.8]
        )
        assert_same_module(merged, alone, "layers.1.q")


def test_densities_of_the_whole_model_per_adapter():
    sources, densities = adapters(), [0.2, 0.5, 0.9]
    merged = jm.merge(sources, [1, 1, 1], method="magnitude_prune", density=densities, density_scope="model", rank=10)
    deltas = [{path: np.asarray(jm.delta(one.modules[path])) for path in PATHS} for one in sources]
    thresholds = [
        np.sort(np.abs(np.concatenate([x.ravel() for x in own.values()])))[::-1][int(d * 720) - 1]
        for own, d in zip(deltas, densities, strict=True)
    ]
    for path in PATHS:
        kept = [
            np.where(np.abs(own[path]) >= t * (1 - 1e-6), own[path], 0)
            for own, t in zip(deltas, thresholds, strict=True)
        ]
        dense = np.sum(kept, axis=0)
        np.testing.assert_allclose(jm.delta(merged.modules[path]), dense, atol=3e-5)


def test_ranks_stages_and_biases_differ_by_module():
    sources = adapters(bias=True)
    ranks, factors = {path: 2 + i for i, path in enumerate(PATHS)}, gradient(0.5, 2)
    weights = [gradient(0, 1), gradient(1, 0), gradient(1, 1)]
    merged = jm.merge(sources, weights, rank=ranks, stages=[("scale", {"factor": factors})])
    for path in PATHS:
        assert merged.modules[path].rank == ranks[path]
        own = [weight[path] for weight in weights]
        alone = jm.merge(only(sources, path), own, rank=ranks[path], stages=[("scale", {"factor": factors[path]})])
        np.testing.assert_allclose(jm.delta(merged.modules[path]), jm.delta(alone.modules[path]), atol=1e-5)
        np.testing.assert_allclose(merged.modules[path].bias, 0.5 * sum(own) * np.ones(12), rtol=1e-6)


def test_the_norm_of_the_whole_model_with_weights_by_module():
    sources = adapters()
    weights = [gradient(0.2, 1), gradient(1, 0.2), 0.7]
    merged = jm.merge(sources, weights, stages=[("norm_restore", {"scope": "whole"})])
    squares = np.array(
        [[np.sum(np.square(jm.delta(one.modules[p])), dtype=np.float64) for p in PATHS] for one in sources]
    )
    table = np.array([[w[p] if isinstance(w, dict) else w for p in PATHS] for w in weights])
    norms, effective = np.sqrt(squares.sum(1)), np.sqrt((table**2 * squares).sum(1) / squares.sum(1))
    wanted = (effective * norms).sum() / effective.sum()
    norm = np.sqrt(sum(np.sum(np.square(jm.delta(merged.modules[p])), dtype=np.float64) for p in PATHS))
    np.testing.assert_allclose(norm, wanted, rtol=1e-5)


def test_the_record_has_every_modules_own():
    weights = [gradient(0, 1), 1.0]
    merged = jm.merge(adapters(2), weights, method="ties", density={path: [0.2, 0.5] for path in PATHS})
    record = json.loads(merged.metadata.provenance)
    assert record["weights"] == weights
    assert record["hyperparameters"]["density"]["layers.0.q"] == [0.2, 0.5]
    assert described(record["weights"][0]) == "0 … 1"
    assert described(record["hyperparameters"]["density"]) == "0.2, 0.5"


def test_the_outline_is_what_comes_out():
    sources = adapters(bias=True, missing={(1, "layers.1.q")})
    for own in ({}, {"rank": 4}, {"method": "ties", "density": 0.5}, {"method": "iso_c", "space": "ctm"}):
        outline = plan_merge(sources, **own).outline()
        merged = jm.merge(sources, **own)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), [(m.a, m.b, m.bias) for m in merged.modules.values()])
        assert (
            jax.tree.map(lambda x: (x.shape, x.dtype), [(m.a, m.b, m.bias) for m in outline.modules.values()]) == shapes
        )
        assert list(outline.modules) == list(merged.modules)


def test_nothing_new_is_compiled_for_other_values():
    sources = adapters()
    jm.merge(sources, [1, 1, 1], method="ties", density=0.5)
    again = functools.partial(jm.merge, sources, [gradient(0, 1), 1, 1], method="ties", density=gradient(0.1, 0.9))
    assert compilations(again) == []


@pytest.mark.parametrize(("given", "problem"), [
    ({"weights": [{"layers.0.q": 1}, 1, 1]}, "the weight of adapter 1 says nothing of layers.0.v, layers.1.q"),
    ({"weights": [gradient(0, 1) | {"x": 1}, 1, 1]}, "adapter 1 is given for modules that there are none of: x"),
    ({"weights": [gradient(0, float("inf")), 1, 1]}, "is not a finite number"),
    ({"method": "ties", "density": {"layers.0.q": 1}}, "density says nothing of layers.0.v"),
    ({"method": "ties", "density": gradient(0.5, -1)}, "Density should be >= 0, got -0.1"),
    ({"method": "ties", "density": [0.5, 0.5]}, "Density should be a number, or 3: one per adapter"),
    ({"method": "pcb", "density": [0.5, 0.5, 0.5]}, "Density should be a number, got"),
    ({"method": "karcher", "tol": [1, 1, 1]}, "tol should be a number, got"),
    ({"rank": {"layers.0.q": 2}}, "rank says nothing of layers.0.v"),
    ({"rank": gradient(1, 3)}, "rank must be a whole number from 1, got"),
    ({"stages": [("scale", {"factor": {"layers.0.q": 2}})]}, "factor of stage scale says nothing of layers.0.v"),
    ({"stages": [("lines", {"alpha": gradient(0, 1)})]}, "alpha of stage lines is one number"),
    ({"method": "ties", "density": gradient(0.1, 1), "density_scope": "model"}, "takes one density for all modules"),
    ({"method": "lego", "weights": [gradient(-1, 1), 1, 1]}, "takes weights of 0 or more, not -1"),
])  # fmt: skip
def test_what_is_wrong_is_named(given, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        jm.merge(adapters(), **given)
