"""Every number of a comparison is what dense float64 NumPy says."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg

import jaxmerge as jm
from jaxmerge import metrics
from tests.helpers import delta64

ADAPTERS = Path(__file__).parent / "adapters"
# Small enough to look at all entries, and not.
SHAPES = {"small": (24, 32), "tall": (300, 40), "large": (150, 160)}


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def adapter(seed, rank=4, paths=tuple(SHAPES), scale=0.5, batch=(), shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jm.Adapter(
        {
            path: jm.LoRA(normal(rng, *batch, rank, shapes[path][1]), normal(rng, *batch, shapes[path][0], rank), scale)
            for path in paths
        }
    )


def related(n=3, rank=3):
    """Adapters that share a part of their factors, so that no number is 0."""
    common = adapter(99, rank)

    def mixed(one, other):
        return jm.LoRA(one.a + 0.8 * other.a, one.b + 0.8 * other.b, one.scale)

    return [
        jm.Adapter({path: mixed(lora, common.modules[path]) for path, lora in adapter(seed, rank).modules.items()})
        for seed in range(n)
    ]


def zero(like):
    return jm.Adapter({path: dataclasses.replace(lora, b=np.zeros_like(lora.b)) for path, lora in like.modules.items()})


CASES = {
    "related": related,
    "unrelated": lambda: [adapter(seed) for seed in range(4)],
    "mixed ranks and scales": lambda: [adapter(0, 2, scale=2.0), adapter(1, 7, scale=-0.3), adapter(2, 4)],
    "some modules in some": lambda: [adapter(0), adapter(1, paths=("small",)), adapter(2, 5, paths=("large", "small"))],
    "layers of a scan": lambda: [adapter(seed, 3, batch=(2, 3)) for seed in range(2)],
    "ranks above the features": lambda: [adapter(seed, 20, paths=("small",)) for seed in range(2)],
    "one and its double": lambda: [adapter(0), adapter(0, scale=1.0), adapter(1)],
}
WEIGHTS = [1.0, -0.5, 0.7, 2.0]


def dense(adapters):
    """Per module, one matrix after another: the changes and factors of the adapters that have it, by position."""
    modules = {}
    for path in dict.fromkeys(path for a in adapters for path in a.modules):
        have = {i: a.modules[path] for i, a in enumerate(adapters) if path in a.modules}
        batch = next(iter(have.values())).batch
        modules[path] = [
            {i: (delta64(x)[at], np.float64(x.a)[at], np.float64(x.b)[at]) for i, x in have.items()}
            for at in np.ndindex(batch)
        ]
    return modules


def angles(x, y):
    """Principal cosines of two column spaces."""
    return np.cos(scipy.linalg.subspace_angles(x, y))


def participation(matrix):
    s = np.linalg.svd(matrix, compute_uv=False)
    return (s**2).sum() ** 2 / (s**4).sum()


def close(value, reference, atol=1e-6):
    assert value == pytest.approx(reference, rel=1e-6, abs=atol)


def check_record(record, matrices, weights):
    """A record against matrices: position -> change, a, b."""
    assert record.count == len(matrices)
    norms = {i: math.sqrt(sum((m[i][0] ** 2).sum() for m in matrices if i in m)) for i in record.sources}
    close(record.norms, tuple(norms.values()))
    close(record.norm_ratio, max(norms.values()) / min(norms.values()))
    for i, value in zip(record.sources, record.effective_ranks, strict=True):
        close(value, np.mean([participation(m[i][0]) for m in matrices if i in m]))
    summed = [sum(weights[i] * m[i][0] for i in m) for m in matrices]
    close(record.sum_norm, math.sqrt(sum((s**2).sum() for s in summed)))
    close(record.sum_effective_rank, np.mean([participation(s) for s in summed]))
    close(record.sum_energy_ratio, record.sum_norm**2 / sum((weights[i] * norms[i]) ** 2 for i in norms))
    values = [np.linalg.svd(s, compute_uv=False) ** 2 for s in summed]
    total = sum(v.sum() for v in values)
    for rank, kept in enumerate(record.energy_by_rank, 1):
        close(kept, sum(v[:rank].sum() for v in values) / total)
    assert record.energy_by_rank[-1] == 1
    assert [pair.adapters for pair in record.pairs] == list(itertools.combinations(record.sources, 2))
    for pair in record.pairs:
        check_pair(pair, matrices, norms)
    compared = [m for m in matrices if len(m) > 1]
    if compared:
        signs = [np.sign([change for change, _, _ in m.values()]) for m in compared]
        differ = [(s > 0).any(axis=0) & (s < 0).any(axis=0) for s in signs]
        check_rate(record.sign_conflict, record.sign_error, differ)


def check_pair(pair, matrices, norms):
    i, j = pair.adapters
    both = [m for m in matrices if i in m and j in m]
    close(pair.cosine, sum((m[i][0] * m[j][0]).sum() for m in both) / norms[i] / norms[j])
    if not both:
        assert pair.left_overlap is pair.right_overlap is pair.shared_a is pair.audit is pair.sign_conflict is None
        return
    left = [angles(m[i][2], m[j][2]) for m in both]
    right = [angles(m[i][1].T, m[j][1].T) for m in both]
    close(pair.left_overlap, np.mean([np.mean(c**2) for c in left]))
    close(pair.right_overlap, np.mean([np.mean(c**2) for c in right]))
    close(pair.shared_a, np.median(np.concatenate(right)))
    dims = [[min(x.shape) for x in (m[i][2], m[j][2])] for m in both]
    close(pair.left_chance, np.mean([max(d) / len(m[i][2]) for d, m in zip(dims, both, strict=True)]))
    check_rate(pair.sign_conflict, pair.sign_error, [m[i][0] * m[j][0] < 0 for m in both])


@pytest.fixture(autouse=True)
def few_entries(monkeypatch):
    """Samples, where there are more entries than in most of these modules."""
    monkeypatch.setattr(metrics, "EXACT", metrics.SAMPLE)


def test_signs_of_modules_up_to_a_million_are_counted(monkeypatch):
    monkeypatch.undo()
    rng = np.random.default_rng(6)
    a, b = normal(rng, 2, 3, 1024), normal(rng, 2, 1024, 3)
    found = metrics.sign_conflicts(metrics.stack(list(a), list(b), [1.0, 1.0]), seed=0)
    assert found.drawn == 0
    assert found.pairs[0] == np.mean((b[0] @ a[0]) * (b[1] @ a[1]) < 0)


def check_rate(rate, error, differ):
    exact = np.concatenate([d.ravel() for d in differ]).mean()
    if all(d.size <= metrics.EXACT for d in differ):
        assert error == 0
        close(rate, exact)
    else:
        assert 0 <= error < 0.5 / math.sqrt(metrics.SAMPLE)
        assert abs(rate - exact) < 4 * error + 1e-6


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_dense_changes(case):
    adapters = CASES[case]()
    weights = WEIGHTS[: len(adapters)]
    found = jm.compare(adapters, weights)
    modules = dense(adapters)
    assert list(found.modules) == list(modules)
    for path, matrices in modules.items():
        record = found.modules[path]
        assert record.features == SHAPES[path]
        assert record.sources == tuple(matrices[0])
        assert record.ranks == tuple(adapters[i].modules[path].rank for i in record.sources)
        check_record(record, matrices, weights)
        batch = next(adapters[i].modules[path].batch for i in record.sources)
        assert len(record.layers) == (batch[0] if batch else 0)
        each = len(matrices) // max(len(record.layers), 1)
        for i, layer in enumerate(record.layers):
            assert layer.sources == record.sources
            check_record(layer, matrices[i * each : (i + 1) * each], weights)
    assert found.total.features is None
    assert found.total.sources == tuple(range(len(adapters)))
    check_record(found.total, [m for matrices in modules.values() for m in matrices], weights)


def test_weights_of_each_module():
    adapters = [adapter(0), adapter(1, paths=("small", "tall"))]
    weights = [0.5, {"small": -2.0, "tall": 3.0}]
    found = jm.compare(adapters, weights)
    assert found.weights == tuple(weights)
    assert found.to_json()["weights"] == weights
    modules = dense(adapters)
    sums = [m[0][0][0] * 0.5 + (weights[1][path] * m[0][1][0] if 1 in m[0] else 0) for path, m in modules.items()]
    close(found.total.sum_norm, math.sqrt(sum((s**2).sum() for s in sums)))
    apart = [m[0][0][0] * 0.5 for m in modules.values()] + [x * modules[p][0][1][0] for p, x in weights[1].items()]
    close(found.total.sum_energy_ratio, found.total.sum_norm**2 / sum((s**2).sum() for s in apart))
    for path, numbers in (("small", [0.5, -2.0]), ("large", [0.5, 0.0])):
        check_record(found.modules[path], modules[path], numbers)
    with pytest.raises(ValueError, match="says nothing of small"):
        jm.compare(adapters, [0.5, {"tall": 3.0}])


def test_the_gram_matrix_of_real_adapters():
    adapters = [jm.load(ADAPTERS / name) for name in ("sms", "movie", "amazon", "names")]
    found = jm.compare(adapters)
    assert found.weights == (0.25,) * 4
    assert found.adapters[0].endswith("sms")
    flat = np.stack([np.concatenate([delta64(a.modules[path]).ravel() for path in found.modules]) for a in adapters])
    gram = flat @ flat.T
    norms = np.sqrt(gram.diagonal())
    close(found.total.norms, tuple(norms))
    for pair in found.total.pairs:
        i, j = pair.adapters
        close(pair.cosine, gram[i, j] / norms[i] / norms[j])
        assert pair.audit == "separate"
        exact = np.mean(flat[i] * flat[j] < 0)
        assert pair.sign_conflict == pytest.approx(exact, abs=4 * pair.sign_error)
    merged = {
        path: jm.LoRA(
            np.concatenate([x.modules[path].a for x in adapters]),
            np.concatenate([x.modules[path].b for x in adapters], axis=1),
        )
        for path in found.modules
    }
    kept = metrics.energy_at_rank(metrics.spectra(jm.Adapter(merged)), 16)
    assert found.total.energy_by_rank[15] == pytest.approx(kept, rel=1e-5)


def test_sign_errors_are_what_they_say():
    """Over many draws, estimates lie around the truth as far as their standard errors tell."""
    rng = np.random.default_rng(5)
    a, b = normal(rng, 2, 3, 200), normal(rng, 2, 180, 3)
    b[1] += 0.7 * b[0]
    a[1] += 0.7 * a[0]
    stacked = metrics.stack(list(a), list(b), [1.0, 1.0])
    exact = np.mean((b[0] @ a[0]) * (b[1] @ a[1]) < 0)
    rates = np.array([metrics.sign_conflicts(stacked, seed).pairs[0] for seed in range(200)])
    error = math.sqrt(exact * (1 - exact) / metrics.SAMPLE)
    assert abs(rates.mean() - exact) < 4 * error / math.sqrt(200)
    assert rates.std() == pytest.approx(error, rel=0.2)


def test_unrelated_adapters_differ_in_half_of_the_signs():
    found = jm.compare([adapter(seed, 16, ("wide",), shapes={"wide": (800, 900)}) for seed in range(4)])
    for pair in found.total.pairs:
        assert pair.sign_conflict == pytest.approx(0.5, abs=0.03)
        assert pair.left_overlap == pytest.approx(pair.left_chance, rel=0.25)
        assert pair.right_overlap == pytest.approx(pair.right_chance, rel=0.25)
    assert found.total.sign_conflict == pytest.approx(1 - 2**-3, abs=0.03)


def numbers(value):
    """All numbers of a record, in order."""
    plain = value.to_json() if isinstance(value, jm.Comparison) else value
    if isinstance(plain, dict):
        return [x for item in plain.values() for x in numbers(item)]
    if isinstance(plain, list):
        return [x for item in plain for x in numbers(item)]
    return [plain] if isinstance(plain, float) else []


def test_how_a_change_is_split_between_its_factors_does_not_matter():
    rng = np.random.default_rng(1)

    def turned(lora):
        g = rng.normal(size=(lora.rank, lora.rank)) * np.geomspace(1e-3, 1e3, lora.rank)
        return jm.LoRA(np.linalg.solve(g, np.float64(lora.a)), np.float64(lora.b) @ g, lora.scale)

    plain = related()
    other = [jm.Adapter({path: turned(lora) for path, lora in a.modules.items()}) for a in plain]
    np.testing.assert_allclose(numbers(jm.compare(other)), numbers(jm.compare(plain)), rtol=1e-6, atol=1e-7)


def test_the_order_of_adapters_permutes_the_numbers():
    adapters, weights = CASES["some modules in some"](), [1.0, -0.5, 0.7]
    order = [2, 0, 1]
    found = jm.compare(adapters, weights)
    permuted = jm.compare([adapters[i] for i in order], [weights[i] for i in order])
    records = [(found.total, permuted.total)]
    records += [(record, permuted.modules[path]) for path, record in found.modules.items()]
    for one, other in records:
        close(one.sum_norm, other.sum_norm)
        close(one.energy_by_rank, other.energy_by_rank)
        assert one.sign_conflict == other.sign_conflict
        assert dict(zip(one.sources, one.ranks, strict=True)) == {
            order[i]: rank for i, rank in zip(other.sources, other.ranks, strict=True)
        }
        pairs = {frozenset(order[i] for i in pair.adapters): pair for pair in other.pairs}
        for pair in one.pairs:
            twin = pairs[frozenset(pair.adapters)]
            for name in ("cosine", "left_overlap", "right_overlap", "shared_a", "sign_conflict"):
                close(getattr(pair, name), getattr(twin, name))


def test_the_order_of_modules_does_not_matter():
    adapters = related()
    backwards = [jm.Adapter(dict(reversed(a.modules.items()))) for a in adapters]
    assert dict(jm.compare(adapters).modules) == dict(jm.compare(backwards).modules)


def test_zeros_have_no_direction():
    first = adapter(0)
    found = jm.compare([first, zero(first)])
    total = found.total
    assert total.norms[1] == total.effective_ranks[1] == 0
    assert total.norm_ratio is None
    (pair,) = total.pairs
    assert pair.cosine is pair.left_overlap is pair.left_chance is None
    # A is there all the same.
    close(pair.right_overlap, 1.0)
    assert pair.audit == "collapsed"
    assert pair.sign_conflict == 0
    assert total.sum_energy_ratio == pytest.approx(1)
    nothing = jm.compare([zero(first), zero(first)]).total
    assert nothing.sum_norm == nothing.sum_effective_rank == 0
    assert nothing.sum_energy_ratio is None
    assert set(nothing.energy_by_rank) == {1.0}
    no_a = jm.Adapter({path: jm.LoRA(np.zeros_like(x.a), np.zeros_like(x.b)) for path, x in first.modules.items()})
    (pair,) = jm.compare([first, no_a]).total.pairs
    assert pair.audit is pair.right_overlap is None
    text = json.dumps(
        [jm.compare(pair_).to_json() for pair_ in ([first, zero(first)], [zero(first)] * 2, [first, no_a])]
    )
    assert "NaN" not in text
    assert "Infinity" not in text


def test_changes_that_cancel_are_no_energy():
    total = jm.compare([adapter(0), adapter(0)], [1.0, -1.0]).total
    assert total.sum_norm == total.sum_effective_rank == total.sum_energy_ratio == 0
    close(total.pairs[0].cosine, 1.0)


def test_columns_that_depend_on_each_other_are_no_directions():
    rng = np.random.default_rng(0)
    a, b = normal(rng, 4, 30), normal(rng, 40, 4)
    a[3], b[:, 2] = a[0], 0
    other = adapter(1, 4, ("x",), shapes={"x": (40, 30)})
    (pair,) = jm.compare([jm.Adapter({"x": jm.LoRA(a, b)}), other]).total.pairs
    lora = other.modules["x"]
    close(pair.right_overlap, np.mean(angles(np.float64(a[:3]).T, np.float64(lora.a).T) ** 2))
    close(pair.left_overlap, np.mean(angles(np.float64(b[:, [0, 1, 3]]), np.float64(lora.b)) ** 2))


@pytest.mark.parametrize("moved", [0.0, 0.3, 0.8, 5.0])
def test_the_audit_of_a_shared_start(moved):
    rng = np.random.default_rng(0)
    start = normal(rng, 8, 500)
    adapters = [jm.Adapter({"x": jm.LoRA(start + moved * normal(rng, 8, 500), normal(rng, 500, 8))}) for _ in range(2)]
    (pair,) = jm.compare(adapters).total.pairs
    cosines = angles(*(np.float64(a.modules["x"].a).T for a in adapters))
    close(pair.shared_a, np.median(cosines))
    assert pair.audit == {0.0: "collapsed", 0.3: "collapsed", 0.8: "between", 5.0: "separate"}[moved]


def test_what_is_in_few_is_compared_between_those():
    found = jm.compare([adapter(0, paths=("small",)), adapter(1, paths=("large",))])
    assert found.modules["small"].pairs == ()
    assert found.modules["small"].sign_conflict is None
    (pair,) = found.total.pairs
    assert pair.cosine == 0
    assert pair.left_overlap is pair.sign_conflict is None
    assert found.total.sum_energy_ratio == pytest.approx(1)


def test_arrays_of_every_kind():
    plain = related(2)
    kinds = [jnp.asarray, lambda x: x.astype(np.float64), lambda x: x]
    expected = jm.compare(plain)
    for kind in kinds:
        given = [
            jm.Adapter({p: jm.LoRA(kind(x.a), kind(x.b), jnp.float32(x.scale)) for p, x in a.modules.items()})
            for a in plain
        ]
        assert jm.compare(given) == expected
    half = [
        jm.Adapter({p: jm.LoRA(*(y.astype(ml_dtypes.bfloat16) for y in (x.a, x.b))) for p, x in a.modules.items()})
        for a in plain
    ]
    wide = [
        jm.Adapter({p: jm.LoRA(*(y.astype(np.float32) for y in (x.a, x.b))) for p, x in a.modules.items()})
        for a in half
    ]
    assert jm.compare(half) == jm.compare(wide)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_large_and_small_numbers(size):
    scaled = [
        jm.Adapter({p: jm.LoRA(np.float32(size) * x.a, x.b, x.scale) for p, x in a.modules.items()}) for a in related(2)
    ]
    (pair,), (expected,) = (jm.compare(adapters).total.pairs for adapters in (scaled, related(2)))
    for name in ("cosine", "left_overlap", "right_overlap", "sign_conflict"):
        close(getattr(pair, name), getattr(expected, name))
    total = jm.compare(scaled).total
    close(total.effective_ranks, jm.compare(related(2)).total.effective_ranks)


def test_json_holds_everything_and_counts_from_1():
    found = jm.compare(CASES["some modules in some"](), [1, 2, 3])
    plain = found.to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["weights"] == [1, 2, 3]
    assert plain["adapters"] == ["adapter 1", "adapter 2", "adapter 3"]
    assert plain["modules"].keys() == found.modules.keys()
    assert plain["modules"]["large"]["sources"] == [1, 3]
    assert plain["modules"]["large"]["pairs"][0]["adapters"] == [1, 3]
    fields = {field.name for field in dataclasses.fields(found.total)}
    assert plain["total"].keys() == fields
    assert plain["total"]["pairs"][0].keys() == {field.name for field in dataclasses.fields(found.total.pairs[0])}
    assert plain["total"]["energy_by_rank"] == list(found.total.energy_by_rank)


@pytest.mark.parametrize(
    ("adapters", "weights", "words"),
    [
        ([], None, "at least two adapters are compared, got 0"),
        ([adapter(0)], None, "at least two adapters are compared, got 1"),
        ([adapter(0), adapter(1)], [1.0], "1 weights for 2 adapters"),
        ([adapter(0), adapter(1)], [1.0, math.nan], "not a finite number"),
        ([adapter(0), jm.Adapter({})], None, "adapter 2: holds no modules"),
        ([adapter(0), adapter(1, shapes={**SHAPES, "tall": (40, 300)})], None, "module tall has different shapes"),
        ([adapter(0), adapter(1, batch=(2,))], None, "module small has different shapes"),
        ([adapter(0), adapter(1, scale=math.inf)], None, "adapter 2: NaN or inf in small"),
    ],
)
def test_refusals_name_what_is_wrong(adapters, weights, words):
    with pytest.raises(ValueError, match=words):
        jm.compare(adapters, weights)


def test_bases_and_formats_that_differ():
    one, other = (
        jm.Adapter(adapter(seed).modules, metadata=jm.Metadata(base_model=name, name=name))
        for seed, name in enumerate(("llama", "mistral"))
    )
    with pytest.raises(ValueError, match="different base models: llama"):
        jm.compare([one, other])
    assert jm.compare([one, other], allow_different_bases=True).adapters == ("llama", "mistral")
    tree = jm.Adapter(other.modules, metadata=jm.Metadata(format="qwix", name="tree"))
    with pytest.raises(ValueError, match="of different formats: llama is peft, tree is qwix"):
        jm.compare([one, tree])
