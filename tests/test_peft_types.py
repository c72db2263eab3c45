"""PEFT's eleven combination types against add_weighted_adapter of the installed PEFT: products, never factors."""

import itertools
import warnings

import jax
import numpy as np
import pytest
import torch

import jaxmerge as jm
from tests.cohort import KINDS, LINEARS, Cohort, Kinds
from tests.helpers import delta64, relative_error

SETTINGS = [
    {"combination_type": "cat"},
    {"combination_type": "svd"},
    {"combination_type": "linear"},
    *(
        {"combination_type": name, "density": density, "majority_sign_method": majority}
        for name in ("ties", "ties_svd")
        for density, majority in ((0.3, "total"), (0.7, "frequency"), (1.0, "frequency"))
    ),
    *(
        {"combination_type": name, "density": density}
        for name in ("magnitude_prune", "magnitude_prune_svd")
        for density in (0.29, 0.8)
    ),
]
DARE = ["dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"]
FACTOR_TYPES = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
NEEDS_DENSITY = {"ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd", *DARE}


def setting_id(setting):
    return "-".join(map(str, setting.values()))


def density_of(name):
    return {"density": 0.5} if name in NEEDS_DENSITY else {}


def assert_same_products(cohort: Cohort, adapters, weights, *, rank=None, bound=1e-5, **setting):
    theirs = cohort.merged_products(weights, **setting, **({"svd_rank": rank} if rank else {}))
    ours = jm.merge(adapters, weights, rank=rank, **setting)
    assert ours.modules.keys() == theirs.keys()
    for path, expected in theirs.items():
        assert relative_error(jm.delta(ours.modules[path]), expected) < bound, path


@pytest.fixture(scope="module")
def equal_adapters(equal_ranks: Cohort):
    return equal_ranks.load()


@pytest.fixture(scope="module")
def mixed_adapters(mixed: Cohort):
    return mixed.load()


@pytest.fixture(scope="module")
def kinds(make_cohort) -> Cohort:
    """Every kind of layer; fan_in_fan_out for the sake of HF's Conv1D."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_cohort(
            [{"r": 3, "lora_alpha": alpha, "target_modules": KINDS, "fan_in_fan_out": True} for alpha in (6, 1)], Kinds
        )


@pytest.fixture(scope="module")
def kinds_for_svd(make_cohort) -> Cohort:
    """The kinds whose dense delta PEFT can decompose: not Conv1d and Conv3d."""
    names = [kind for kind in KINDS if kind not in ("conv1d", "conv3d")]
    return make_cohort(
        [{"r": 3, "lora_alpha": alpha, "target_modules": names, "fan_in_fan_out": True} for alpha in (6, 1)], Kinds
    )


@pytest.mark.parametrize("weights", [(1.0, 0.5, -0.3), (-2.0, 0.0, 0.7)], ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_products_are_those_of_peft(equal_ranks: Cohort, equal_adapters, setting, weights):
    assert_same_products(equal_ranks, equal_adapters, weights, **setting)


def test_every_type_of_peft_is_tested_here():
    assert {setting["combination_type"] for setting in SETTINGS} | set(DARE) == set(jm.COMBINATION_TYPES)
    assert len(jm.COMBINATION_TYPES) == 11


@pytest.mark.parametrize(
    "weights", [(1, 1, 1), (-1.0, -1.0, -1.0), (0.0, 0.0, 1.0), (1e-3, 7.0, -40.0)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("name", ["cat", "linear", "ties", "magnitude_prune"])
def test_any_weights(equal_ranks: Cohort, equal_adapters, name, weights):
    assert_same_products(equal_ranks, equal_adapters, weights, combination_type=name, **density_of(name))


@pytest.mark.parametrize(("name", "rank"), [("svd", 1), ("svd", 12), ("ties_svd", 3), ("magnitude_prune_svd", 12)])
def test_rank_is_svd_rank(equal_ranks: Cohort, equal_adapters, name, rank):
    assert_same_products(
        equal_ranks, equal_adapters, (1.0, 0.5, -0.3), rank=rank, combination_type=name, **density_of(name)
    )


@pytest.mark.parametrize("name", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("weights", [(1.0, 0.5, -0.3, 2.0), (0.0, -1.0, 1.5, 0.3)], ids=str)
def test_ranks_alphas_patterns_rslora_and_modules_that_differ(mixed: Cohort, mixed_adapters, name, weights):
    assert_same_products(mixed, mixed_adapters, weights, combination_type=name, **density_of(name))


@pytest.mark.parametrize("name", ["linear", "ties", "magnitude_prune"])
def test_modules_that_only_some_adapters_have(make_cohort, name):
    cohort = make_cohort(
        [
            {"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"]},
            {"r": 3, "lora_alpha": 2, "target_modules": ["first", "third"]},
            {"r": 3, "lora_alpha": 5, "target_modules": ["first"], "use_rslora": True},
        ]
    )
    assert_same_products(cohort, cohort.load(), (0.7, -1.2, 2), combination_type=name, **density_of(name))


@pytest.mark.parametrize("name", ["cat", "linear"])
def test_layers_of_one_shape_that_different_adapters_have(make_cohort, name):
    cohort = make_cohort([{"r": 2, "lora_alpha": 6, "target_modules": [layer]} for layer in ("first", "second")])
    assert_same_products(cohort, cohort.load(), (0.7, -1.2), combination_type=name)


def test_one_pattern_in_all_adapters(make_cohort):
    config = {"r": 4, "target_modules": LINEARS, "rank_pattern": {"second": 2}, "alpha_pattern": {"third": 12}}
    cohort = make_cohort([{"lora_alpha": 8, **config}, {"lora_alpha": 3, **config}])
    assert_same_products(cohort, cohort.load(), (1, -0.5), combination_type="linear")


@pytest.mark.parametrize("name", ["cat", "linear", "ties"])
def test_every_kind_of_layer(kinds: Cohort, name):
    assert_same_products(kinds, kinds.load(), (0.8, -0.4), combination_type=name, **density_of(name))


@pytest.mark.parametrize("name", ["svd", "ties_svd"])
def test_every_kind_of_layer_that_peft_can_decompose(kinds_for_svd: Cohort, name):
    assert_same_products(kinds_for_svd, kinds_for_svd.load(), (0.8, -0.4), combination_type=name, **density_of(name))


def test_svd_is_the_best_approximation_where_peft_cannot_decompose(kinds: Cohort):
    adapters, weights = kinds.load(), (0.8, -0.4)
    merged = jm.merge(adapters, weights, combination_type="svd")
    for path in ("conv1d", "conv3d"):
        dense = sum(w * delta64(adapter.modules[path]) for w, adapter in zip(weights, adapters, strict=True))
        u, s, vt = np.linalg.svd(dense)
        assert relative_error(jm.delta(merged.modules[path]), (u[:, :3] * s[:3]) @ vt[:3]) < 1e-5


@pytest.mark.parametrize("name", ["cat", "svd", "linear"])
def test_right_where_the_first_adapter_is_rslora_and_peft_is_off_by_the_root_of_the_rank(make_cohort, name):
    cohort = make_cohort(
        [{"r": 4, "lora_alpha": alpha, "target_modules": LINEARS, "use_rslora": True} for alpha in (8, 2)]
    )
    adapters, weights = cohort.load(), (1.0, -0.5)
    products = cohort.merged_products(weights, combination_type=name)
    merged = jm.merge(adapters, weights, combination_type=name)
    for path, module in cohort.lora_modules():
        ours = np.asarray(jm.delta(merged.modules[path]), np.float64)
        assert relative_error(ours, products[path]) < 1e-5
        # What PEFT's merged adapter then does: its scaling is √r instead of 1.
        root = np.sqrt(8 if name == "cat" else 4)
        theirs = module.get_delta_weight("merged").detach().numpy()
        assert relative_error(theirs, root * ours) < 1e-5


@pytest.mark.parametrize("name", list(jm.COMBINATION_TYPES))
@pytest.mark.parametrize("weight", [0.7, -1.5, 0.0])
def test_one_adapter_alone_is_scaled_whatever_the_type(equal_ranks: Cohort, equal_adapters, name, weight):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        equal_ranks.model.delete_adapter("merged") if "merged" in equal_ranks.model.peft_config else None
        equal_ranks.model.add_weighted_adapter(equal_ranks.names[:1], [weight], "merged", combination_type=name)
    merged = jm.merge(equal_adapters[:1], [weight], combination_type=name, **density_of(name))
    for path, module in equal_ranks.lora_modules():
        expected = weight * delta64(equal_adapters[0].modules[path])
        np.testing.assert_allclose(module.get_delta_weight("merged").detach(), expected, atol=1e-5)
        np.testing.assert_allclose(jm.delta(merged.modules[path]), expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(NEEDS_DENSITY))
def test_one_adapter_alone_needs_no_density_as_in_peft(equal_ranks: Cohort, equal_adapters, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        equal_ranks.model.delete_adapter("merged") if "merged" in equal_ranks.model.peft_config else None
        equal_ranks.model.add_weighted_adapter(equal_ranks.names[:1], [0.7], "merged", combination_type=name)
    merged = jm.merge(equal_adapters[:1], [0.7], combination_type=name)
    for path, lora in equal_adapters[0].modules.items():
        assert relative_error(jm.delta(merged.modules[path]), 0.7 * delta64(lora)) < 1e-6


@pytest.mark.parametrize("name", FACTOR_TYPES)
def test_factors_of_unequal_ranks_are_refused_with_the_exact_alternative(mixed: Cohort, mixed_adapters, name):
    with pytest.raises(ValueError, match="same r value"):
        mixed.merged_products([1] * 4, combination_type=name, **density_of(name))
    with pytest.raises(ValueError, match=r"combination_type .*the ranks differ \(4, 2, 5, 1\).*combination_type cat"):
        jm.merge(mixed_adapters, [1] * 4, combination_type=name, key=jax.random.key(0), **density_of(name))


@pytest.mark.parametrize("name", ["linear", "ties"])
def test_unequal_ranks_of_one_module_name_the_module(make_cohort, name):
    cohort = make_cohort(
        [
            {"r": 4, "lora_alpha": 4, "target_modules": LINEARS, "rank_pattern": {"second": 2}},
            {"r": 4, "lora_alpha": 4, "target_modules": LINEARS},
        ]
    )
    with pytest.raises(ValueError, match=r"module second.*the ranks differ \(2, 4\).*combination_type cat"):
        jm.merge(cohort.load(), [1, 1], combination_type=name, **density_of(name))


# --- PEFT's random types, by distribution -----------------------------------------------------------------

P = 0.4
DARE_WEIGHTS = (0.9, -1.3)


@pytest.fixture(scope="module")
def pair(make_cohort) -> Cohort:
    """Two adapters on two layers of one shape: small, and svd_rank 12 holds every delta."""
    return make_cohort([{"r": 3, "lora_alpha": a, "target_modules": ["first", "second"]} for a in (3, 2)])


def drawn_deltas(adapters, name, keys, rank=None):
    """The delta of the module `first` under many keys."""

    def one(key):
        merged = jm.merge(adapters, DARE_WEIGHTS, combination_type=name, density=P, key=key, rank=rank)
        return jm.delta(merged.modules["first"])

    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(keys), np.float64)


def tasks_of(adapters, path):
    """Tasks and weights of `dare_*_svd`: the dense deltas."""
    return [(np.stack([delta64(adapter.modules[path]) for adapter in adapters]), np.array(DARE_WEIGHTS))]


def factor_tasks_of(adapters, path):
    """Tasks and weights of `dare_*`: A with the sign, B without."""
    loras = [adapter.modules[path] for adapter in adapters]
    c = np.array([w * lora.scale for w, lora in zip(DARE_WEIGHTS, loras, strict=True)])
    root = np.sqrt(np.abs(c))
    return [(np.stack([lora.a for lora in loras]), np.sign(c) * root), (np.stack([lora.b for lora in loras]), root)]


def combine(kept, weights, name):
    """PEFT's formula for tasks that are dropped and rescaled already: ``[n, p, q] -> [p, q]``."""
    weighted = kept * weights[:, None, None]
    if name.startswith("dare_linear"):
        return weighted.sum(0)
    elected = np.where(kept.sum(0) >= 0, 1, -1)
    agrees = np.sign(kept) == elected
    return (weighted * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


def outcomes(tasks, weights, name):
    """Each combination of survivors: which, its probability, and what every entry then is."""
    for mask in itertools.product((0, 1), repeat=len(tasks)):
        chosen = np.array(mask)[:, None, None] * tasks / P
        yield mask, np.prod([P if kept else 1 - P for kept in mask]), combine(chosen, weights, name)


def assert_entries_are_outcomes(matrix, tasks, weights, name, atol):
    """Every entry is one of its four outcomes, and as often as it should be."""
    options = list(outcomes(tasks, weights, name))
    distance = np.abs(np.stack([value for *_, value in options]) - matrix)
    assert (distance.min(0) < atol).all()
    if name.startswith("dare_linear"):  # All outcomes are distinct there.
        for i, (mask, probability, _) in enumerate(options):
            count, n = (distance.argmin(0) == i).sum(), matrix.size
            assert abs(count - n * probability) < 5 * np.sqrt(n * probability * (1 - probability)), mask


@pytest.mark.parametrize("name", ["dare_linear_svd", "dare_ties_svd"])
def test_dropping_the_delta_leaves_what_peft_may_leave(pair: Cohort, name):
    adapters = pair.load()
    ours = jm.merge(adapters, DARE_WEIGHTS, combination_type=name, density=P, rank=12, key=jax.random.key(5))
    torch.manual_seed(0)
    theirs = pair.merged_products(DARE_WEIGHTS, combination_type=name, density=P, svd_rank=12)
    for path in ("first", "second"):
        ((tasks, weights),) = tasks_of(adapters, path)
        for product in (np.asarray(jm.delta(ours.modules[path])), theirs[path]):
            assert_entries_are_outcomes(product, tasks, weights, name, atol=2e-5)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dropping_the_factors_leaves_what_peft_may_leave(pair: Cohort, name):
    adapters = pair.load()
    ours = jm.merge(adapters, DARE_WEIGHTS, combination_type=name, density=P, key=jax.random.key(5))
    torch.manual_seed(0)
    pair.merged_products(DARE_WEIGHTS, combination_type=name, density=P)
    for path, module in pair.lora_modules():
        lora = ours.modules[path]
        theirs = (module.lora_A["merged"].weight, module.lora_B["merged"].weight)
        for i, (tasks, weights) in enumerate(factor_tasks_of(adapters, path)):
            for matrix in (np.asarray((lora.a, lora.b)[i]), theirs[i].detach().numpy()):
                assert_entries_are_outcomes(matrix, tasks, weights, name, atol=1e-5)


@pytest.mark.parametrize("name", ["dare_linear_svd", "dare_ties_svd"])
def test_the_mean_over_keys_of_dropped_deltas(pair: Cohort, name):
    adapters, draws = pair.load(), 300
    ((tasks, weights),) = tasks_of(adapters, "first")
    options = list(outcomes(tasks, weights, name))
    mean = sum(p * value for _, p, value in options)
    deviation = np.sqrt(sum(p * (value - mean) ** 2 for _, p, value in options) / draws)
    drawn = drawn_deltas(adapters, name, jax.random.split(jax.random.key(1), draws), rank=12)
    assert (np.abs(drawn.mean(0) - mean) < 5 * deviation + 1e-5).all()
    if name == "dare_linear_svd":
        np.testing.assert_allclose(mean, np.tensordot(weights, tasks, 1), atol=1e-9)  # PEFT's svd


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_the_mean_over_keys_of_dropped_factors(pair: Cohort, name):
    adapters, draws = pair.load(), 600
    # A and B are drawn independently, so the mean of the product is the product of the means.
    mean_a, mean_b = (
        sum(p * value for _, p, value in outcomes(tasks, weights, name))
        for tasks, weights in factor_tasks_of(adapters, "first")
    )
    drawn = drawn_deltas(adapters, name, jax.random.split(jax.random.key(2), draws))
    deviation = drawn.std(0) / np.sqrt(draws)
    assert (np.abs(drawn.mean(0) - mean_b @ mean_a) < 5 * deviation).all()
    if name == "dare_linear":
        linear = jm.merge(adapters, DARE_WEIGHTS, combination_type="linear")
        assert relative_error(mean_b @ mean_a, jm.delta(linear.modules["first"])) < 1e-5
        theirs = pair.merged_products(DARE_WEIGHTS, combination_type="linear")["first"]
        assert relative_error(mean_b @ mean_a, theirs) < 1e-5


def test_every_module_and_adapter_and_factor_draws_for_itself(pair: Cohort):
    adapter = pair.load()[0]
    twins = jm.Adapter(dict.fromkeys(("x", "y"), adapter.modules["first"]))
    merged = jm.merge([twins, twins], [1, 1], combination_type="dare_linear", density=0.5, key=jax.random.key(3))
    a = np.asarray(merged.modules["x"].a)
    assert not np.array_equal(a, merged.modules["y"].a)
    # With one mask for both twins no entry would be the survivor of one alone.
    one_alone = np.isclose(a, 2 * np.sqrt(twins.modules["x"].scale) * np.asarray(twins.modules["x"].a))
    assert one_alone.any()
    square = jm.Adapter({"x": jm.LoRA(np.ones((8, 8), np.float32), np.ones((8, 8), np.float32))})
    merged = jm.merge([square, square], [1, 0], combination_type="dare_linear", density=0.5, key=jax.random.key(3))
    assert not np.array_equal(merged.modules["x"].a, merged.modules["x"].b)


@pytest.mark.parametrize("name", DARE)
def test_the_key_decides_and_nothing_else(pair: Cohort, name):
    adapters = pair.load()

    def first(seed):
        rank = 12 if name.endswith("svd") else None
        merged = jm.merge(adapters, DARE_WEIGHTS, combination_type=name, density=P, key=jax.random.key(seed), rank=rank)
        return np.asarray(merged.modules["first"].a)

    np.testing.assert_array_equal(first(1), first(1))
    assert not np.array_equal(first(1), first(2))


def test_density_one_drops_nothing(pair: Cohort):
    adapters = pair.load()
    for name, same in (("dare_linear", "linear"), ("dare_linear_svd", "svd")):
        merged = jm.merge(adapters, DARE_WEIGHTS, combination_type=name, density=1, key=jax.random.key(0))
        expected = pair.merged_products(DARE_WEIGHTS, combination_type=same)
        for path, lora in merged.modules.items():
            assert relative_error(jm.delta(lora), expected[path]) < 1e-5
