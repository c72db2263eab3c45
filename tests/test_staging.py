"""Stages on top of merges: applied in order, before the cut, and for all modules together where they say so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from tests.helpers import delta64, relative_error

SHAPES = {"model.layers.0.q": (20, 16), "model.layers.1.q": (20, 16), "model.layers.2.o": (14, 18)}
WEIGHTS = [1.0, 0.5, -0.7]


def adapters(scale=0.5, batch=()):
    rng = np.random.default_rng(0)

    def factor(*shape):
        return rng.normal(size=(*batch, *shape)).astype(np.float32)

    return [
        jm.Adapter({name: jm.LoRA(factor(3, i), factor(o, 3), scale) for name, (o, i) in SHAPES.items()})
        for _ in range(3)
    ]


def deltas(adapter):
    return {path: delta64(lora) for path, lora in adapter.modules.items()}


def isotropic(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return s[:rank].mean() * u[:, :rank] @ vt[:rank]


def cut(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("rank", [None, 3])
def test_stages_come_before_the_cut_in_the_order_given(rank):
    sources = adapters()
    merged = jm.merge(sources, WEIGHTS, rank=rank, stages=["isotropize", ("scale", {"factor": -2.0})])
    for path, delta in deltas(jm.merge(sources, WEIGHTS)).items():
        expected = -2 * isotropic(delta, 9)
        if rank is None:
            assert relative_error(delta64(merged.modules[path]), expected) < 1e-5
            continue
        # All singular values are equal: any three directions are as good, and keep a third of the energy.
        assert float(merged.energy[path].kept) == pytest.approx(1 / 3, rel=1e-3)
        np.testing.assert_allclose(np.linalg.norm(delta64(merged.modules[path])), 2 * isotropic_norm(delta), rtol=1e-4)


def isotropic_norm(delta):
    return np.linalg.svd(delta, compute_uv=False)[:9].mean() * np.sqrt(3)


def test_norms_are_restored_module_by_module_or_for_the_whole():
    sources = adapters()
    plain, norms = deltas(jm.merge(sources, WEIGHTS)), [deltas(source) for source in sources]
    shares = np.abs(WEIGHTS) / np.abs(WEIGHTS).sum()
    by_module = deltas(jm.merge(sources, WEIGHTS, stages=["norm_restore"]))
    for path, delta in plain.items():
        wanted = shares @ [np.linalg.norm(own[path]) for own in norms]
        assert relative_error(by_module[path], delta * wanted / np.linalg.norm(delta)) < 1e-5
    whole = deltas(
        jm.merge(sources, WEIGHTS, stages=[("norm_restore", {"scope": "whole"}), ("scale", {"factor": 0.5})])
    )

    def total(adapter):
        return np.sqrt(sum(np.linalg.norm(delta) ** 2 for delta in adapter.values()))

    factor = 0.5 * (shares @ [total(own) for own in norms]) / total(plain)
    for path, delta in plain.items():
        assert relative_error(whole[path], factor * delta) < 1e-5


def test_lines_scale_by_depth():
    sources = adapters()
    plain = deltas(jm.merge(sources, WEIGHTS))
    merged = deltas(jm.merge(sources, WEIGHTS, stages=[("lines", {"alpha": 0.5, "beta": 1.0})]))
    for path, factor in zip(SHAPES, (0.5, 1.0, 1.5), strict=True):
        assert relative_error(merged[path], factor * plain[path]) < 1e-5


@pytest.mark.parametrize(
    ("method", "space", "more"),
    [("ties", "full", {"density": 0.5, "rank": 5}), ("ties", "core", {"density": 0.5}), ("tsv", "full", {}),
     ("ties", "factors", {"density": 0.5}), ("linear", "ctm", {})],
)  # fmt: skip
def test_scaling_commutes_with_every_kind_of_merge(method, space, more):
    sources = adapters()
    plain = jm.merge(sources, WEIGHTS, method=method, space=space, **more)
    merged = jm.merge(sources, WEIGHTS, method=method, space=space, stages=[("scale", {"factor": 3.0})], **more)
    for path, lora in plain.modules.items():
        assert merged.modules[path].rank == lora.rank
        assert relative_error(delta64(merged.modules[path]), 3 * delta64(lora)) < 1e-5
        np.testing.assert_allclose(float(merged.energy[path].kept), float(plain.energy[path].kept), atol=1e-5)


def test_numbers_of_stages_may_be_traced_and_layers_may_be_stacked():
    sources = adapters(batch=(2,))

    @jax.jit
    def merged(floor, factor):
        return jm.merge(sources, stages=[("calibrate", {"floor": floor}), ("scale", {"factor": factor})])

    found = merged(jnp.float32(0.1), jnp.float32(2.0))
    expected = jm.merge(sources, stages=["calibrate", ("scale", {"factor": 2.0})])
    for path, lora in expected.modules.items():
        assert lora.batch == (2,)
        np.testing.assert_allclose(jm.delta(found.modules[path]), jm.delta(lora), rtol=1e-3, atol=1e-4)
    for layer in range(2):
        alone = [
            jm.Adapter({p: jm.LoRA(x.a[layer], x.b[layer], x.scale) for p, x in source.modules.items()})
            for source in sources
        ]
        one = jm.merge(alone, stages=["calibrate", ("scale", {"factor": 2.0})])
        for path, lora in expected.modules.items():
            assert relative_error(jm.delta(lora)[layer], jm.delta(one.modules[path])) < 1e-4


def test_one_program_whatever_the_numbers():
    from tests.helpers import compilations

    sources = adapters()
    jm.merge(sources, stages=[("lines", {"alpha": 0.5}), ("scale", {"factor": 2.0})])
    assert not compilations(lambda: jm.merge(sources, stages=[("lines", {"alpha": 0.7}), ("scale", {"factor": 3.0})]))


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["nonsense"], "unknown stage 'nonsense': there are isotropize"),
        (["scale"], "stage scale needs factor"),
        ([("scale", {"factor": float("nan")})], "factor should be a number"),
        ([("calibrate", {"floor": -1.0})], "floor should be above 0"),
        ([("isotropize", {"floor": 1.0})], "stage isotropize has no floor: it takes nothing"),
        ([("norm_restore", {"scope": "half"})], "scope 'half' is not one of module, whole"),
        ([("norm_restore", {"scope": "whole"}), "isotropize"], "isotropize comes after norm_restore over the whole"),
    ],
)
def test_stages_are_checked(stages, words):
    with pytest.raises(ValueError, match=words):
        jm.merge(adapters(), stages=stages)


def test_the_depth_of_stacked_layers_is_not_guessed():
    with pytest.raises(ValueError, match=r"stage lines cannot tell the depth of .*model.layers.0.q"):
        jm.merge(adapters(batch=(2,)), stages=["lines"])


def test_units_take_no_negative_weights():
    with pytest.raises(ValueError, match=r"lego takes weights of 0 or more, not -0.7"):
        jm.merge(adapters(), WEIGHTS, method="lego")
    merged = jm.merge(adapters(), method="lego")
    assert {lora.rank for lora in merged.modules.values()} == {3}
    alone = jm.merge(adapters()[:1], method="lego")
    for path, delta in deltas(adapters()[0]).items():
        assert relative_error(delta64(alone.modules[path]), delta) < 1e-5
    assert {lora.rank for lora in jm.merge(adapters(), method="lego", rank=7).modules.values()} == {7}
