"""How much of each adapter is in a result is what dense float64 NumPy says."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.attribution import contributions
from tests.helpers import delta64

ADAPTERS = Path(__file__).parent / "adapters"
SHAPES = {"layers.0.q": (24, 32), "layers.1.q": (40, 20), "head": (16, 50)}


def adapter(seed, rank=4, paths=tuple(SHAPES), scale=0.5, batch=(), common=0.6):
    """One of several adapters that share a part of their factors."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)

    def normal(*shape):
        own = rng.normal(size=shape)
        return (own + common * shared.normal(size=(*shape[:-2], 20, 60))[..., : shape[-2], : shape[-1]]).astype("f4")

    return jm.Adapter(
        {
            path: jm.LoRA(
                normal(*batch, rank, SHAPES[path][1]),
                normal(*batch, rank, SHAPES[path][0]).swapaxes(-1, -2),
                np.float32(scale),
            )
            for path in paths
        }
    )


def sources(**given):
    return [adapter(0, 2, scale=2.0, **given), adapter(1, 7, scale=-0.3, **given), adapter(2, 4, **given)]


CASES = {
    "exact": (lambda: sources(), {"weights": [1.0, 0.5, -0.3]}),
    "cut": (lambda: sources(), {"weights": [1.0, 0.5, -0.3], "rank": 3}),
    "ties": (lambda: sources(), {"method": "ties", "density": 0.3}),
    "dare": (lambda: sources(), {"method": "dare_linear", "density": 0.5, "key": jax.random.key(0)}),
    "factors": (lambda: [adapter(seed) for seed in range(3)], {"space": "factors"}),
    "stacked": (lambda: sources(batch=(3, 2)), {"rank": 5}),
    "some modules in some": (lambda: [adapter(0), adapter(1, paths=("head",)), adapter(2, paths=("layers.0.q",))], {}),
    "alone": (lambda: [adapter(0)], {"rank": 2}),
}


def dense(adapters):
    """Per module, per matrix: the changes of the adapters that have it, by position."""
    return {
        path: [
            {i: delta64(a.modules[path])[at] for i, a in enumerate(adapters) if path in a.modules}
            for at in np.ndindex(next(a.modules[path] for a in adapters if path in a.modules).batch)
        ]
        for path in dict.fromkeys(path for a in adapters for path in a.modules)
    }


def check(part, results, tasks, total=None):
    """A part against matrices: of the result, and position -> change; with the energy before it was cut."""
    flat = np.concatenate([result.ravel() for result in results])
    own = {
        share.adapter: np.concatenate(
            [task.get(share.adapter, np.zeros_like(x)).ravel() for task, x in zip(tasks, results, strict=True)]
        )
        for share in part.shares
    }
    fit, *_ = np.linalg.lstsq(np.stack(list(own.values()), axis=1), flat, rcond=None)
    assert part.count == len(results)
    assert part.norm == pytest.approx(np.linalg.norm(flat), rel=1e-6)
    for share, x, change in zip(part.shares, fit, own.values(), strict=True):
        assert share.norm == pytest.approx(np.linalg.norm(change), rel=1e-6)
        assert share.projection == pytest.approx(flat @ change / (change @ change), rel=1e-6, abs=1e-7)
        assert share.cosine == pytest.approx(share.projection * share.norm / part.norm, rel=1e-6, abs=1e-7)
        assert share.fit == pytest.approx(x, rel=1e-6, abs=1e-7)
    rest = flat - sum(x * change for x, change in zip(fit, own.values(), strict=True))
    assert part.residual == pytest.approx((rest @ rest) / (flat @ flat), rel=1e-6, abs=1e-10)
    values = np.zeros(max(min(x.shape) for x in results))
    for result in results:
        found = np.linalg.svd(result, compute_uv=False) ** 2
        values[: len(found)] += found
    assert len(part.energy_by_rank) == part.rank
    kept = np.cumsum(np.pad(values, (0, part.rank)))[: part.rank] / (total or values.sum())
    assert part.energy_by_rank == pytest.approx(kept, rel=1e-6)
    return rest @ rest


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_dense_changes(case):
    make, arguments = CASES[case]
    adapters = make()
    merged = jm.merge(adapters, **arguments)
    found = contributions(merged, adapters)
    assert found.adapters == tuple(f"adapter {i + 1}" for i in range(len(adapters)))
    tasks, results = dense(adapters), dense([merged])
    assert set(found.modules) == set(tasks)
    left = energy = 0.0
    for path, part in found.modules.items():
        result = [matrix[0] for matrix in results[path]]
        total, lost = (float(getattr(merged.energy[path], name)) for name in ("total", "lost"))
        assert part.features == SHAPES[path]
        assert part.rank == merged.modules[path].rank
        assert tuple(share.adapter for share in part.shares) == tuple(tasks[path][0])
        assert part.energy_kept == pytest.approx(1 - lost / total)
        assert part.energy_by_rank[-1] == pytest.approx(part.energy_kept, abs=1e-5)
        left += check(part, result, tasks[path], total)
        energy += total
        batch = merged.modules[path].batch
        assert len(part.layers) == (batch[0] if batch else 0)
        each = len(result) // max(len(part.layers), 1)
        for i, layer in enumerate(part.layers):
            at = slice(i * each, (i + 1) * each)
            assert layer.energy_kept is None
            check(layer, result[at], tasks[path][at])
    every = [matrix[0] for path in found.modules for matrix in results[path]]
    check(found.total, every, [matrix for path in found.modules for matrix in tasks[path]], energy)
    assert found.modulewise_residual == pytest.approx(left / found.total.norm**2, rel=1e-6, abs=1e-10)
    assert found.total.energy_kept == pytest.approx(float(jm.energy_kept(merged)), rel=1e-6)


def test_the_fit_of_a_weighted_sum_is_its_weights():
    adapters = sources()
    found = contributions(jm.merge(adapters, [1.0, 0.5, -0.3]), adapters)
    for part in (found.total, *found.modules.values()):
        assert [share.fit for share in part.shares] == pytest.approx([1.0, 0.5, -0.3], abs=1e-5)
        assert part.residual == pytest.approx(0, abs=1e-9)
        assert not part.dependent
    # They overlap, so that projections are not the weights.
    assert abs(found.total.shares[1].projection - 0.5) > 0.05


def test_real_adapters_read_back(tmp_path):
    adapters = [jm.load(ADAPTERS / name) for name in ("sms", "movie", "names")]
    jm.save(jm.merge(adapters, [1.0, 0.5, -0.3]), tmp_path / "merged")
    found = contributions(jm.load(tmp_path / "merged"), adapters)
    assert found.adapters[1].endswith("movie")
    assert [share.fit for share in found.total.shares] == pytest.approx([1.0, 0.5, -0.3], abs=1e-3)
    assert found.total.residual == pytest.approx(0, abs=1e-6)
    assert found.total.energy_kept is None
    assert found.total.energy_by_rank[-1] == pytest.approx(1)


def test_one_adapter_twice_is_told_and_shared_evenly():
    one, double = adapter(0), adapter(0, scale=1.0)
    found = contributions(jm.merge([one, double, adapter(1)], [1.0, 1.0, 2.0]), [one, double, adapter(1)])
    assert found.total.dependent
    first, second, third = found.total.shares
    assert first.fit * first.norm == pytest.approx(second.fit * second.norm)
    assert first.fit + 2 * second.fit == pytest.approx(3, abs=1e-5)
    assert third.fit == pytest.approx(2, abs=1e-5)
    assert found.total.residual == pytest.approx(0, abs=1e-9)


def test_adapters_and_results_of_zeros():
    one = adapter(0)
    zero = jm.Adapter({path: dataclasses.replace(x, b=np.zeros_like(x.b)) for path, x in one.modules.items()})
    found = contributions(jm.merge([one, zero], [1.0, 1.0]), [one, zero])
    share = found.total.shares[1]
    assert (share.norm, share.projection, share.cosine, share.fit) == (0, None, None, None)
    assert not found.total.dependent
    nothing = contributions(zero, [one])
    assert nothing.total.residual is nothing.modulewise_residual is nothing.total.shares[0].cosine is None
    assert nothing.total.shares[0].fit == 0
    assert nothing.total.energy_by_rank == (1.0,) * 4
    assert "NaN" not in json.dumps([found.to_json(), nothing.to_json()])


def test_json_counts_adapters_from_1():
    adapters = sources(batch=(2,))
    plain = contributions(jm.merge(adapters), adapters).to_json()
    assert json.loads(json.dumps(plain)) == plain
    module = plain["modules"]["head"]
    assert [share["adapter"] for share in module["shares"]] == [1, 2, 3]
    assert [share["adapter"] for share in module["layers"][1]["shares"]] == [1, 2, 3]
    assert len(module["layers"]) == 2
    assert module["features"] == [16, 50]


@pytest.mark.parametrize(
    ("merged", "adapters", "told"),
    [
        (lambda: adapter(0), [], "there are no adapters"),
        (lambda: adapter(0), [adapter(1, paths=("head",))], "none of them has layers.0.q, layers.1.q"),
        (lambda: adapter(0, paths=("head",)), [adapter(1)], "it has no layers.0.q, layers.1.q"),
        (lambda: adapter(0), [adapter(1, batch=(2,))], "module layers.0.q has different shapes"),
        (lambda: adapter(0, scale=np.nan), [adapter(1)], "NaN or inf in layers.0.q"),
    ],
)
def test_what_is_no_result_of_the_adapters_is_refused(merged, adapters, told):
    with pytest.raises(ValueError, match=told):
        contributions(merged(), adapters)
