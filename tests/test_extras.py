"""Tensors that are not pairs of factors: passed on, averaged, taken from one, or refused by name."""

import warnings

import jax
import ml_dtypes
import numpy as np
import peft
import pytest
import torch

import jaxmerge as jm
from tests.cohort import Linears


def adapter(name="", modules=("m",), **extras):
    rng = np.random.default_rng(0)
    factors = {
        path: jm.LoRA(rng.normal(size=(2, 6)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32))
        for path in modules
    }
    arrays = {key.replace("__", "."): np.asarray(value) for key, value in extras.items()}
    return jm.Adapter(factors, arrays, metadata=jm.Metadata(name=name))


def floats(*values, dtype=np.float32):
    return np.array(values, dtype)


X, Y, Z = floats(1, 2, -0.0), floats(3, -2, 0.5), floats(0, 1e-3, 7)


def test_what_is_identical_passes():
    merged = jm.merge([adapter(head__weight=X, norm=Y), adapter(head__weight=X.copy(), norm=Y.copy())], [5, -3])
    assert merged.extras.keys() == {"head.weight", "norm"}
    assert np.asarray(merged.extras["head.weight"]).tobytes() == X.tobytes()
    np.testing.assert_array_equal(merged.extras["norm"], Y)


@pytest.mark.parametrize("extras", ["same", "average", 0, 1])
def test_nan_that_is_identical_is_identical(extras):
    x = floats(np.nan, 1)
    merged = jm.merge([adapter(head=x), adapter(head=x.copy())], extras=extras)
    np.testing.assert_array_equal(merged.extras["head"], x)


@pytest.mark.parametrize("other", [Y, -X, X.astype(np.float16), X[:2], X[None], X.astype(ml_dtypes.bfloat16)])
def test_what_differs_in_any_bit_dtype_or_shape_is_refused(other):
    with pytest.raises(ValueError, match=r"extras='same' does not settle .*: head\.weight;.*average"):
        jm.merge([adapter(head__weight=X), adapter(head__weight=other)])


def test_all_names_are_listed():
    names = ["a.weight", "a.bias", "b.weight", "c"]
    one = adapter(**{name.replace(".", "__"): X for name in names}, same=Z)
    two = adapter(**{name.replace(".", "__"): Y for name in names}, same=Z)
    with pytest.raises(ValueError, match="same") as error:
        jm.merge([one, two])
    assert all(name in str(error.value) for name in names)
    assert "same," not in str(error.value)


def test_many_names_are_counted():
    one, two = (adapter(**{f"layer{i}__bias": x for i in range(30)}) for x in (X, Y))
    with pytest.raises(ValueError, match=r"layer0\.bias, .* and 22 more"):
        jm.merge([one, two])


def test_the_average_is_the_plain_mean_whatever_the_weights():
    merged = jm.merge([adapter(head=X), adapter(head=Y), adapter(head=Z)], [5, -3, 0], extras="average")
    np.testing.assert_allclose(merged.extras["head"], (X + Y + Z) / 3, rtol=1e-6)


def test_the_average_is_over_those_that_have_it():
    merged = jm.merge([adapter(head=X), adapter(), adapter(head=Z)], extras="average")
    np.testing.assert_allclose(merged.extras["head"], (X + Z) / 2, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_averaged_in_float32(dtype):
    x, y = floats(1, 3e-3, 60000, dtype=dtype), floats(1.5, 1, 60000, dtype=dtype)
    merged = jm.merge([adapter(head=x), adapter(head=y)], extras="average")
    assert merged.extras["head"].dtype == dtype
    expected = ((x.astype(np.float64) + y.astype(np.float64)) / 2).astype(dtype)
    np.testing.assert_array_equal(np.asarray(merged.extras["head"]), expected)


def test_float64_is_averaged_in_float64():
    x, y = floats(1, 1e-9, dtype=np.float64), floats(1 + 1e-12, 3, dtype=np.float64)
    merged = jm.merge([adapter(head=x), adapter(head=y)], extras="average")
    assert merged.extras["head"].dtype == np.float64
    np.testing.assert_allclose(merged.extras["head"], (x + y) / 2, rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.bool_])
def test_counters_and_masks_that_differ_have_no_mean(dtype):
    one, two = (adapter(norm__counter=np.array(value).astype(dtype)) for value in ([0, 1], [1, 1]))
    with pytest.raises(ValueError, match=r"extras='average' does not settle .*norm\.counter"):
        jm.merge([one, two], extras="average")
    np.testing.assert_array_equal(jm.merge([one, two], extras=1).extras["norm.counter"], two.extras["norm.counter"])


def test_shapes_that_differ_have_no_mean():
    with pytest.raises(ValueError, match=r"extras='average' does not settle .*: head;"):
        jm.merge([adapter(head=X, fine=Y), adapter(head=X[:2], fine=Z)], extras="average")


@pytest.mark.parametrize("index", [0, 1])
def test_one_adapters_are_taken(index):
    adapters = [adapter(head=X, norm=Y), adapter(head=Y, norm=X)]
    merged = jm.merge(adapters, extras=index)
    for key, tensor in adapters[index].extras.items():
        assert np.asarray(merged.extras[key]).tobytes() == tensor.tobytes()


def test_one_adapters_are_taken_whatever_their_shape():
    merged = jm.merge([adapter(head=X), adapter(head=X[:2])], extras=1)
    np.testing.assert_array_equal(merged.extras["head"], X[:2])


@pytest.mark.parametrize("extras", ["same", "average", 1])
def test_what_only_one_adapter_has_passes(extras):
    merged = jm.merge([adapter(head=X), adapter(norm=Y), adapter()], extras=extras)
    assert list(merged.extras) == ["head", "norm"]
    np.testing.assert_array_equal(merged.extras["head"], X)
    np.testing.assert_array_equal(merged.extras["norm"], Y)


def test_what_the_chosen_adapter_lacks_must_be_the_same_in_the_others():
    with pytest.raises(ValueError, match=r"extras=2 does not settle .*: head;"):
        jm.merge([adapter(head=X), adapter(head=Y), adapter(norm=Z)], extras=2)
    merged = jm.merge([adapter(head=X), adapter(head=X), adapter(norm=Z)], extras=2)
    np.testing.assert_array_equal(merged.extras["head"], X)


@pytest.mark.parametrize("extras", ["first", None, True, -1, 2, 1.0, ["same"]])
def test_an_unknown_choice_is_refused(extras):
    with pytest.raises(ValueError, match="extras"):
        jm.merge([adapter(head=X), adapter(head=X)], extras=extras)


def test_the_dtype_that_is_asked_for_is_that_of_floats_alone():
    one = adapter(head=X, counter=np.array([3], np.int64), mask=np.array([True]))
    merged = jm.merge([one, one], dtype="bfloat16")
    assert {key: str(tensor.dtype) for key, tensor in merged.extras.items()} == {
        "head": "bfloat16",
        "counter": "int64",
        "mask": "bool",
    }


def test_sources_are_left_as_they_are():
    one, two = adapter(head=X.copy()), adapter(head=Y.copy())
    jm.merge([one, two], extras="average")
    np.testing.assert_array_equal(one.extras["head"], X)
    np.testing.assert_array_equal(two.extras["head"], Y)


def test_inside_jit_what_is_averaged_is_the_mean():
    adapters = [adapter(head=X), adapter(head=Y)]
    merged = jax.jit(lambda adapters: jm.merge(adapters, [1.0, 2.0], extras="average"))(adapters)
    np.testing.assert_allclose(merged.extras["head"], (X + Y) / 2, rtol=1e-6)


# --- PEFT's own --------------------------------------------------------------------------------------------


class Tokens(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 12)


def save(folder, seed, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            Tokens(), peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False, **config)
        )
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        model.save_pretrained(str(folder))
    return jm.load(folder)


@pytest.mark.parametrize("extras", ["same", "average", 0])
def test_trained_tokens_of_different_indices_are_refused(tmp_path, extras):
    adapters = [
        save(tmp_path / name, 0, trainable_token_indices={"embed": rows})
        for name, rows in (("a", [1, 2]), ("b", [1, 3]))
    ]
    with pytest.raises(ValueError, match=r"trainable_token_indices differs between .*a and .*b"):
        jm.merge(adapters, extras=extras)


def test_trained_tokens_of_one_set_of_indices_are_extras(tmp_path):
    adapters = [save(tmp_path / str(i), i, trainable_token_indices={"embed": [1, 4]}) for i in range(2)]
    key = "embed.token_adapter.trainable_tokens_delta"
    with pytest.raises(ValueError, match=key):
        jm.merge(adapters)
    mean = np.mean([adapter.extras[key] for adapter in adapters], axis=0)
    np.testing.assert_allclose(jm.merge(adapters, extras="average").extras[key], mean, rtol=1e-6)
    np.testing.assert_array_equal(jm.merge(adapters, extras=1).extras[key], adapters[1].extras[key])


def test_saved_modules_that_differ_are_named_and_settled(tmp_path):
    adapters = [save(tmp_path / str(i), i, modules_to_save=["third"]) for i in range(2)]
    with pytest.raises(ValueError, match=r"third\.bias, third\.weight"):
        jm.merge(adapters)
    merged = jm.merge(adapters, extras="average")
    mean = np.mean([adapter.extras["third.weight"] for adapter in adapters], axis=0)
    np.testing.assert_allclose(merged.extras["third.weight"], mean, rtol=1e-6)
