"""The exact merge against Σ wᵢ sᵢ Bᵢ Aᵢ in float64 NumPy, and truncation against a dense SVD."""

from typing import TYPE_CHECKING

import jax
import numpy as np
import pytest

import jaxmerge as jm
from tests.helpers import delta64, relative_error

if TYPE_CHECKING:
    from tests.cohort import Cohort

WEIGHTS = [1.0, 0.5, -0.3, 0.0]


def dense_sum(adapters, weights):
    paths = {path for adapter in adapters for path in adapter.modules}
    return {
        path: sum(
            w * delta64(adapter.modules[path])
            for w, adapter in zip(weights, adapters, strict=True)
            if path in adapter.modules
        )
        for path in paths
    }


def test_scales_are_those_of_the_live_model(mixed: "Cohort"):
    for name, adapter in zip(mixed.names, mixed.load(), strict=True):
        deltas = mixed.deltas(name)
        assert deltas.keys() == adapter.modules.keys()
        for path, lora in adapter.modules.items():
            assert relative_error(jm.delta(lora), deltas[path]) < 1e-6


@pytest.mark.parametrize("weights", [WEIGHTS, [-1, -2, -3, -4], [0, 0, 1e-6, 1]])
def test_everything_that_may_differ(mixed: "Cohort", weights):
    adapters = mixed.load()
    merged = jm.merge(adapters, weights)
    for path, expected in dense_sum(adapters, weights).items():
        assert relative_error(jm.delta(merged.modules[path]), expected) < 1e-6
        assert merged.modules[path].scale == 1
    assert jm.energy_kept(merged) == 1
    assert {path: lora.rank for path, lora in merged.modules.items()} == {
        "first": 9,
        "second": 10,
        "third": 9,
    }


def test_no_weights_means_the_mean(mixed: "Cohort"):
    adapters = mixed.load()
    merged = jm.merge(adapters)
    for path, expected in dense_sum(adapters, [0.25] * 4).items():
        assert relative_error(jm.delta(merged.modules[path]), expected) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 8, 10])
def test_truncation_is_optimal_and_reported(mixed: "Cohort", rank):
    adapters = mixed.load()
    merged = jm.merge(adapters, WEIGHTS, rank=rank)
    total = lost = 0.0
    for path, dense in dense_sum(adapters, WEIGHTS).items():
        u, s, vt = np.linalg.svd(dense)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert relative_error(jm.delta(merged.modules[path]), best) < 1e-5  # the gap in the spectrum enters
        kept = (s[:rank] ** 2).sum() / (s**2).sum()
        assert merged.energy[path].kept == pytest.approx(kept, abs=1e-6)
        total, lost = total + (s**2).sum(), lost + (s[rank:] ** 2).sum()
    assert jm.energy_kept(merged) == pytest.approx(1 - lost / total, abs=1e-6)


def test_modules_get_what_they_can_hold(mixed: "Cohort"):
    merged = jm.merge(mixed.load(), WEIGHTS, rank=10)
    assert {path: lora.rank for path, lora in merged.modules.items()} == {
        "first": 9,
        "second": 10,
        "third": 9,
    }


def test_more_rank_than_the_matrix_has(make_cohort):
    cohort = make_cohort([{"r": 10, "lora_alpha": 5, "target_modules": ["first", "third"]}] * 3)
    adapters = cohort.load()
    merged = jm.merge(adapters, [1, -1, 2])
    assert {path: lora.rank for path, lora in merged.modules.items()} == {"first": 12, "third": 16}
    for path, expected in dense_sum(adapters, [1, -1, 2]).items():
        assert relative_error(jm.delta(merged.modules[path]), expected) < 2e-6


def test_adapters_that_share_their_initialisation():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(8, 64)).astype(np.float32)
    adapters = [
        jm.Adapter({"m": jm.LoRA(shared + 1e-4 * rng.normal(size=shared.shape).astype(np.float32),
                                 rng.normal(size=(48, 8)).astype(np.float32), 0.5)})
        for _ in range(4)
    ]  # fmt: skip
    expected = dense_sum(adapters, [1, 1, 1, 1])["m"]
    assert relative_error(jm.delta(jm.merge(adapters, [1] * 4, rank=31).modules["m"]), expected) < 1e-5


def test_identical_adapters_and_cancellation(mixed: "Cohort"):
    adapter = mixed.load()[0]
    merged = jm.merge([adapter, adapter], [0.5, 0.5])
    for path, lora in adapter.modules.items():
        assert relative_error(jm.delta(merged.modules[path]), delta64(lora)) < 1e-6
    nothing = jm.merge([adapter, adapter], [1, -1], rank=2)
    for path, lora in nothing.modules.items():
        assert np.abs(jm.delta(lora)).max() < 1e-5 * np.abs(delta64(adapter.modules[path])).max()


def test_half_types_keep_their_dtype_and_sum_in_float32():
    rng = np.random.default_rng(1)
    for dtype, unit in ((jax.numpy.bfloat16, 2**-8), (jax.numpy.float16, 2**-11)):
        adapters = [
            jm.Adapter({"m": jm.LoRA(rng.normal(size=(4, 32)).astype(dtype), rng.normal(size=(24, 4)).astype(dtype))})
            for _ in range(3)
        ]
        expected = dense_sum(adapters, [1, 0.7, -0.2])["m"]
        for rank in (None, 11):
            merged = jm.merge(adapters, [1, 0.7, -0.2], rank=rank).modules["m"]
            assert merged.a.dtype == merged.b.dtype == dtype
        # One rounding of A alone: nothing was summed in a half type.
        assert relative_error(delta64(jm.merge(adapters, [1, 0.7, -0.2]).modules["m"]), expected) < unit
        wide = jm.merge(adapters, [1, 0.7, -0.2], dtype="float32").modules["m"]
        assert wide.a.dtype == np.float32
        assert relative_error(delta64(wide), expected) < 1e-6


def test_float64_sources_are_summed_in_float64():
    rng = np.random.default_rng(2)
    adapters = [jm.Adapter({"m": jm.LoRA(rng.normal(size=(4, 32)), rng.normal(size=(24, 4)), 0.1)}) for _ in range(3)]
    expected = dense_sum(adapters, [1, 0.7, -0.2])["m"]
    for rank in (None, 11):
        merged = jm.merge(adapters, [1, 0.7, -0.2], rank=rank).modules["m"]
        assert merged.a.dtype == np.float64
    assert relative_error(delta64(jm.merge(adapters, [1, 0.7, -0.2]).modules["m"]), expected) < 1e-14


def test_batch_axes_are_modules_of_their_own():
    rng = np.random.default_rng(3)
    adapters = [
        jm.Adapter({"m": jm.LoRA(rng.normal(size=(2, 3, r, 10)).astype(np.float32),
                                 rng.normal(size=(2, 3, 8, r)).astype(np.float32), 0.5)})
        for r in (2, 3)
    ]  # fmt: skip
    expected = dense_sum(adapters, [1, -2])["m"]
    merged = jm.merge(adapters, [1, -2]).modules["m"]
    assert merged.a.shape == (2, 3, 5, 10)
    assert relative_error(jm.delta(merged), expected) < 1e-6
    cut = jm.merge(adapters, [1, -2], rank=2)
    s = np.linalg.svd(expected, compute_uv=False)
    assert cut.energy["m"].kept == pytest.approx((s[..., :2] ** 2).sum() / (s**2).sum(), abs=1e-6)


def test_bias_is_the_weighted_sum(make_cohort):
    cohort = make_cohort(
        [{"r": 2, "lora_alpha": alpha, "target_modules": ["first"], "lora_bias": True} for alpha in (2, 6)]
    )
    adapters = cohort.load()
    merged = jm.merge(adapters, [0.5, -2])
    expected = 0.5 * np.asarray(adapters[0].modules["first"].bias) - 6 * np.asarray(adapters[1].modules["first"].bias)
    np.testing.assert_allclose(merged.modules["first"].bias, expected, rtol=1e-6)


def test_inside_jit_with_traced_weights(mixed: "Cohort"):
    adapters = mixed.load()
    for rank in (None, 3):
        eager = jm.merge(adapters, WEIGHTS, rank=rank)
        traced = jax.jit(lambda adapters, weights, rank=rank: jm.merge(adapters, weights, rank=rank))(
            adapters, np.asarray(WEIGHTS, np.float32)
        )
        assert traced.metadata.layouts == eager.metadata.layouts
        for path, lora in eager.modules.items():
            np.testing.assert_allclose(jm.delta(traced.modules[path]), jm.delta(lora), atol=1e-5)


def test_a_second_merge_of_equal_shapes_compiles_nothing(mixed: "Cohort"):
    adapters = mixed.load()
    jm.merge(adapters, WEIGHTS, rank=3)
    with jax.log_compiles(), pytest.MonkeyPatch.context():
        import logging

        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        logging.getLogger("jax").addHandler(handler)
        try:
            jm.merge(adapters, [3, 2, 1, 0.5], rank=3)
        finally:
            logging.getLogger("jax").removeHandler(handler)
    assert not [record for record in records if "Finished XLA compilation" in record.getMessage()]


def test_one_program_per_bucket(mixed: "Cohort"):
    assert len(jm.lower(mixed.load(), WEIGHTS, rank=3)) == 3
    assert len(jm.lower(mixed.load()[:1], rank=3)) == 2  # first and second have one shape


def test_the_dense_delta_is_never_formed():
    adapters = [
        jm.Adapter({"m": jm.LoRA(np.ones((2, 300), np.float32), np.ones((200, 2), np.float32))}) for _ in range(3)
    ]
    for rank in (None, 2):
        for program in jm.lower(adapters, rank=rank):
            assert "200x300" not in program.as_text()
            assert "300x200" not in program.as_text()
    assert any("200x300" in program.as_text() for program in jm.lower(adapters, method="ties", density=0.5))


def test_what_adapters_look_like():
    lora = jm.LoRA(np.zeros((2, 4, 8), np.float32), np.zeros((2, 16, 4), np.float32))
    assert repr(lora) == "LoRA(2×16×8, rank 4, float32)"
    adapter = jm.Adapter({"q": lora}, {"head": np.zeros(3)}, metadata=jm.Metadata(name="mine"))
    assert repr(adapter) == "Adapter(1 modules, rank 4, 1 extras, peft, mine)"
    assert repr(jax.tree.map(lambda leaf: None, adapter)).startswith("Adapter(1 modules")
