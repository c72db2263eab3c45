"""PEFT's folder: what the installed PEFT saves is read right, and what is written it loads and runs right."""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import jaxmerge as jm
from jaxmerge.memory import release
from tests.cohort import KINDS, Cohort, Kinds, Linears
from tests.helpers import delta64, relative_error

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "jaxmerge.json"]


class Net(torch.nn.Module):
    """A model that runs, with the same weights every time it is made."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.embed = torch.nn.Embedding(11, 8)
            self.up = torch.nn.Linear(8, 12)
            self.mix = Conv1D(8, 12)
            self.norm = torch.nn.BatchNorm1d(8)
            self.last = torch.nn.Linear(8, 8)
            self.head = torch.nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.mix(torch.tanh(self.up(x))))
        return self.head(torch.tanh(self.last(x)))


def llama(tied: bool) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=64,
                tie_word_embeddings=tied,
                bos_token_id=None,
                eos_token_id=None,
            )
        ).eval()


IDS = torch.arange(11)


def train(
    folder: Path,
    config: Mapping[str, Any],
    model: Callable[[], torch.nn.Module] = Net,
    seed: int = 0,
    name: str = "default",
    **save: Any,
) -> peft.PeftModel:
    """An adapter saved by PEFT: LoRA's tensors random by the seed, all else that it trains the same for every seed."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(model(), peft.LoraConfig(**{"init_lora_weights": False, **config}), name)
        with torch.no_grad():
            for key, parameter in live.named_parameters():
                if parameter.requires_grad:
                    plain = key.replace(f".{name}", "").replace(".base_layer", "")
                    torch.manual_seed(zlib.crc32(plain.encode()) + (seed if "lora_" in key else 0))
                    parameter.normal_(std=0.3)
        live.save_pretrained(str(folder), **save)
    return live.eval()


def train_all(folder: Path, configs: Sequence[Mapping[str, Any]], model: Callable[[], torch.nn.Module] = Net):
    """Adapters of one model: the live ones, and what jaxmerge reads."""
    lives = [train(folder / f"a{i}", config, model, seed=i) for i, config in enumerate(configs)]
    return lives, [jm.load(folder / f"a{i}") for i in range(len(configs))]


def lora_layers(live: peft.PeftModel, name: str = "default") -> dict[str, Any]:
    return {
        path: module
        for path, module in live.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A)
    }


def live_deltas(live: peft.PeftModel, name: str = "default") -> dict[str, np.ndarray]:
    """PEFT's own deltas, in PEFT's own shapes."""
    return {
        path: layer.get_delta_weight(name).detach().double().numpy() for path, layer in lora_layers(live, name).items()
    }


def as_peft(lora: jm.LoRA, like: np.ndarray, layer: Any) -> np.ndarray:
    """jaxmerge's delta in PEFT's shape, which is [in, out] for an embedding and where fan_in_fan_out says so."""
    ours = delta64(lora)
    turned = isinstance(layer, peft.tuners.lora.Embedding) or getattr(layer, "fan_in_fan_out", False)
    return ours.T if turned else ours.reshape(like.shape)


def weighted(lives: Sequence[peft.PeftModel], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """``Σ wᵢ ΔWᵢ`` of PEFT's deltas, over the adapters that have the module."""
    total: dict[str, Any] = {}
    for live, weight in zip(lives, weights, strict=True):
        for path, delta in live_deltas(live).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def reload(folder: Path, model: Callable[[], torch.nn.Module] = Net, *, tied: bool = False) -> peft.PeftModel:
    """A fresh model with the adapter, loaded by PEFT: a warning or a key too many or too few is an error.

    Where PEFT ties two modules' factors to each other, those that are loaded last count.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of PEFT's own habit, whatever wrote the folder.
        warnings.filterwarnings("ignore", category=FutureWarning)
        for harmless in ("fan_in_fan_out", "tied layers", "tie_word_embeddings", "Setting `save_embedding_layers`"):
            warnings.filterwarnings("ignore", message=f".*{harmless}.*")
        loaded = peft.PeftModel.from_pretrained(model(), str(folder))
    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not peft.set_peft_model_state_dict(loaded, stored).unexpected_keys
        again = peft.get_peft_model_state_dict(loaded)
    for key, tensor in stored.items():
        if key in again and not tied:  # Not saved again by default: biases of the base and embeddings.
            assert torch.equal(again[key], tensor.to(again[key].dtype)), key
    return loaded.eval()


@torch.no_grad()
def expected_output(lives: Sequence[peft.PeftModel], weights: Sequence[float], ids: torch.Tensor = IDS) -> torch.Tensor:
    """What the base model gives with ``Σ wᵢ ΔWᵢ`` added to its weights, and the first adapter's other tensors."""
    whole = copy.deepcopy(lives[0])
    for path, delta in weighted(lives, weights).items():
        layer = whole.base_model.model.get_submodule(path)
        base = layer.get_base_layer() if isinstance(layer, peft.tuners.lora.LoraLayer) else layer
        base.weight += torch.tensor(delta, dtype=torch.float32)
    for live, weight in zip(lives, weights, strict=True):
        for path, layer in lora_layers(live).items():
            if layer.lora_bias.get("default"):
                target = whole.base_model.model.get_submodule(path)
                base = target.get_base_layer() if isinstance(target, peft.tuners.lora.LoraLayer) else target
                base.bias += weight * layer.scaling["default"] * layer.lora_B["default"].bias
    for key, parameter in whole.named_parameters():
        if "lora_" in key:
            parameter.zero_()
    return whole.eval()(ids)


@torch.no_grad()
def assert_output(loaded: torch.nn.Module, expected: torch.Tensor) -> None:
    output = loaded(IDS)
    assert relative_error(output, expected) < 1e-5


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# --- Every feature, there and back -------------------------------------------------------------------------

LINEAR = ["up", "last", "head"]
FEATURES: dict[str, list[dict[str, Any]]] = {
    "plain": [{"r": 2, "lora_alpha": 8, "target_modules": LINEAR}, {"r": 3, "lora_alpha": 1, "target_modules": LINEAR}],
    "rslora": [
        {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "use_rslora": True},
        {"r": 3, "lora_alpha": 1, "target_modules": LINEAR},
    ],
    "patterns": [
        {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "rank_pattern": {"up": 1}, "alpha_pattern": {"l.*t": 3}},
        {"r": 2, "lora_alpha": 3, "target_modules": LINEAR, "rank_pattern": {"^last": 5}, "use_rslora": True},
    ],
    "lora_bias": [
        {"r": 2, "lora_alpha": 8, "target_modules": ["up", "head"], "lora_bias": True},
        {"r": 3, "lora_alpha": 5, "target_modules": ["up", "head"], "lora_bias": True},
    ],
    "fan_in_fan_out": [
        {"r": 2, "lora_alpha": 8, "target_modules": ["mix"], "fan_in_fan_out": True},
        {"r": 3, "lora_alpha": 1, "target_modules": ["mix"], "fan_in_fan_out": True},
    ],
    "embedding": [
        {"r": 2, "lora_alpha": 8, "target_modules": ["embed", "up"]},
        {"r": 3, "lora_alpha": 1, "target_modules": ["embed"]},
    ],
    "modules_to_save": [
        {"r": 2, "lora_alpha": 8, "target_modules": ["up"], "modules_to_save": ["head"]},
        {"r": 3, "lora_alpha": 1, "target_modules": ["up", "last"], "modules_to_save": ["head"]},
    ],
    "modules_to_save_in_one": [
        {"r": 2, "lora_alpha": 8, "target_modules": ["up"], "modules_to_save": ["head"]},
        {"r": 3, "lora_alpha": 1, "target_modules": ["up"]},
    ],
    "bias_all": [
        {"r": 2, "lora_alpha": 8, "target_modules": ["up", "last"], "bias": "all"},
        {"r": 3, "lora_alpha": 1, "target_modules": ["up", "last"], "bias": "all"},
    ],
    "bias_lora_only": [
        {"r": 2, "lora_alpha": 8, "target_modules": ["up", "last"], "bias": "lora_only"},
        {"r": 3, "lora_alpha": 1, "target_modules": ["up", "last"]},
    ],
    "trainable_token_indices": [
        {"r": 2, "lora_alpha": 8, "target_modules": ["up"], "trainable_token_indices": {"embed": [0, 3, 7]}},
        {"r": 3, "lora_alpha": 1, "target_modules": ["up"], "trainable_token_indices": {"embed": [0, 3, 7]}},
    ],
    "modules_that_differ": [
        {"r": 2, "lora_alpha": 8, "target_modules": ["up", "mix"], "fan_in_fan_out": True},
        {"r": 3, "lora_alpha": 1, "target_modules": "(last|embed)"},
        {"r": 1, "lora_alpha": 1, "target_modules": ["up", "head"], "exclude_modules": ["head"]},
    ],
}
WEIGHTS = (0.8, -0.4, 1.5)


@pytest.fixture(scope="module", params=list(FEATURES))
def trained(request, tmp_path_factory):
    return train_all(tmp_path_factory.mktemp("feature"), FEATURES[request.param])


def test_deltas_of_every_feature_are_those_of_peft(trained):
    for live, adapter in zip(*trained, strict=True):
        deltas = live_deltas(live)
        assert deltas.keys() == adapter.modules.keys()
        for path, layer in lora_layers(live).items():
            assert relative_error(as_peft(adapter.modules[path], deltas[path], layer), deltas[path]) < 1e-6
            assert relative_error(jm.delta(adapter.modules[path]), delta64(adapter.modules[path])) < 1e-6


def test_what_is_loaded_and_saved_runs_as_it_did(trained, tmp_path):
    for i, (live, adapter) in enumerate(zip(*trained, strict=True)):
        jm.save(adapter, tmp_path / str(i))
        with torch.no_grad():
            expected = live(IDS)
        loaded = reload(tmp_path / str(i))
        assert_output(loaded, expected)
        for path, delta in live_deltas(live).items():
            assert relative_error(live_deltas(loaded)[path], delta) < 1e-6
        again = jm.load(tmp_path / str(i))
        assert again.metadata.layouts == adapter.metadata.layouts
        for path, lora in adapter.modules.items():
            np.testing.assert_array_equal(again.modules[path].a, lora.a)
            np.testing.assert_array_equal(again.modules[path].b, lora.b)
            assert again.modules[path].scale == pytest.approx(lora.scale, rel=1e-12)
        assert again.extras.keys() == adapter.extras.keys()
        for key, tensor in adapter.extras.items():
            np.testing.assert_array_equal(again.extras[key], tensor)


def test_what_is_merged_runs_in_peft(trained, tmp_path):
    lives, adapters = trained
    weights = WEIGHTS[: len(lives)]
    jm.save(jm.merge(adapters, weights), tmp_path / "out")
    loaded = reload(tmp_path / "out")
    expected = weighted(lives, weights)
    deltas = live_deltas(loaded)
    assert deltas.keys() == expected.keys()
    for path, delta in expected.items():
        assert relative_error(deltas[path], delta) < 1e-5
    assert_output(loaded, expected_output(lives, weights))


def test_what_is_merged_has_scale_one_and_says_its_ranks(trained, tmp_path):
    _, adapters = trained
    merged = jm.merge(adapters, WEIGHTS[: len(adapters)])
    jm.save(merged, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == config["r"]
    loaded = jm.load(tmp_path / "out")
    live = reload(tmp_path / "out")
    for path, layer in lora_layers(live).items():
        assert layer.scaling["default"] == 1
        assert layer.r["default"] == merged.modules[path].rank == loaded.modules[path].rank
        assert loaded.modules[path].scale == 1


# --- Every kind of layer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(make_cohort) -> Cohort:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_cohort(
            [
                {"r": 3, "lora_alpha": 6, "target_modules": KINDS, "fan_in_fan_out": True},
                {"r": 2, "lora_alpha": 1, "target_modules": KINDS, "fan_in_fan_out": True, "use_rslora": True},
            ],
            Kinds,
        )


def test_every_kind_of_layer_is_read_right(kinds: Cohort):
    layers = dict(kinds.lora_modules())
    for name, adapter in zip(kinds.names, kinds.load(), strict=True):
        deltas = kinds.deltas(name)
        assert deltas.keys() == adapter.modules.keys()
        assert len(deltas) == len(KINDS) + 1  # attention is two
        for path, delta in deltas.items():
            assert relative_error(as_peft(adapter.modules[path], delta, layers[path]), delta) < 1e-6


def test_every_kind_of_layer_is_saved_right(kinds: Cohort, tmp_path):
    for name, adapter in zip(kinds.names, kinds.load(), strict=True):
        jm.save(adapter, tmp_path / name)
        assert live_deltas(reload(tmp_path / name, Kinds)).keys() == kinds.deltas(name).keys()
        for path, delta in live_deltas(reload(tmp_path / name, Kinds)).items():
            assert relative_error(delta, kinds.deltas(name)[path]) < 1e-6


@pytest.mark.parametrize("rank", [None, 2])
def test_every_kind_of_layer_is_merged_right(kinds: Cohort, tmp_path, rank):
    weights = (0.8, -0.4)
    jm.save(jm.merge(kinds.load(), weights, rank=rank), tmp_path / "out")
    deltas = live_deltas(reload(tmp_path / "out", Kinds))
    sources = [kinds.deltas(name) for name in kinds.names]
    assert deltas.keys() == sources[0].keys()
    for path, delta in deltas.items():
        dense = sum(w * source[path] for w, source in zip(weights, sources, strict=True))
        if rank is None:
            assert relative_error(delta, dense) < 1e-5
        else:
            u, s, vt = np.linalg.svd(dense.reshape(dense.shape[0], -1), full_matrices=False)
            best = (u[:, :rank] * s[:rank]) @ vt[:rank]
            assert relative_error(delta, best.reshape(delta.shape)) < 1e-4


# --- Ways of lying in the folder ---------------------------------------------------------------------------

PLAIN = {"r": 2, "lora_alpha": 8, "target_modules": ["up", "embed"], "modules_to_save": ["head"]}


@pytest.fixture
def plain(tmp_path) -> tuple[Path, peft.PeftModel]:
    return tmp_path / "plain", train(tmp_path / "plain", PLAIN)


def assert_same_adapter(one: jm.Adapter, other: jm.Adapter) -> None:
    assert one.modules.keys() == other.modules.keys()
    assert one.extras.keys() == other.extras.keys()
    assert one.metadata.layouts == other.metadata.layouts
    for path, lora in one.modules.items():
        assert lora.a.dtype == other.modules[path].a.dtype
        np.testing.assert_array_equal(lora.a, other.modules[path].a)
        np.testing.assert_array_equal(lora.b, other.modules[path].b)
        assert lora.scale == other.modules[path].scale
    for key, tensor in one.extras.items():
        np.testing.assert_array_equal(tensor, other.extras[key])


def test_an_adapter_in_a_subfolder_under_its_name(plain, tmp_path):
    live = train(tmp_path / "named", PLAIN, name="poet")
    assert not (tmp_path / "named" / "adapter_config.json").exists()
    assert_same_adapter(jm.load(tmp_path / "named"), jm.load(plain[0]))
    assert_same_adapter(jm.load(tmp_path / "named" / "poet"), jm.load(plain[0]))
    assert live_deltas(live, "poet").keys() == {"up", "embed"}


def test_several_adapters_in_subfolders_must_be_named(tmp_path):
    train(tmp_path / "both", PLAIN, name="one")
    train(tmp_path / "both", PLAIN, name="two")
    with pytest.raises(ValueError, match=r"both: holds several adapters \(one, two\)"):
        jm.load(tmp_path / "both")


def test_a_file_in_the_folder_names_the_folder(plain):
    assert_same_adapter(jm.load(plain[0] / "adapter_config.json"), jm.load(plain[0]))
    assert_same_adapter(jm.load(str(plain[0])), jm.load(plain[0]))


@pytest.mark.parametrize("spelling", ["without the prefix", "with the adapter's name", "with both"])
def test_keys_that_are_spelled_otherwise(plain, tmp_path, spelling):
    folder, _ = plain
    expected = jm.load(folder)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    if spelling != "without the prefix":
        name = re.compile(r"(lora_[AB])\.|(lora_embedding_[AB])$")
        tensors = {name.sub(lambda m: f"{m[1]}.poet." if m[1] else f"{m[2]}.poet", k): v for k, v in tensors.items()}
        head = "base_model.model.head."
        tensors = {
            k.replace(head, f"{head}modules_to_save.poet.") if k.startswith(head) else k: v for k, v in tensors.items()
        }
        assert any(".poet." in key for key in tensors)
    if spelling != "with the adapter's name":
        tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    assert_same_adapter(jm.load(folder), expected)
    jm.save(jm.load(folder), tmp_path / "out")
    reload(tmp_path / "out")


def test_two_adapters_in_one_file_are_refused(plain):
    folder, _ = plain
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    keys = [key for key in tensors if "up.lora" in key]
    two = {k.replace(".weight", f".{name}.weight"): tensors[k].clone() for k in keys for name in ("poet", "cook")}
    safetensors.torch.save_file(two, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"several adapters in one file \(cook, poet\)"):
        jm.load(folder)


def test_a_pickled_adapter(plain, tmp_path):
    live = train(tmp_path / "bin", PLAIN, safe_serialization=False)
    assert (tmp_path / "bin" / "adapter_model.bin").is_file()
    assert not (tmp_path / "bin" / "adapter_model.safetensors").exists()
    adapter = jm.load(tmp_path / "bin")
    assert_same_adapter(adapter, jm.load(plain[0]))
    jm.save(jm.merge([adapter, adapter], [1, 1]), tmp_path / "out")
    assert_output(reload(tmp_path / "out"), expected_output([live], [2]))
    record = json.loads((tmp_path / "out" / "jaxmerge.json").read_text())
    assert record["inputs"][0]["file"] == "adapter_model.bin"
    assert record["inputs"][0]["sha256"] == sha256(tmp_path / "bin" / "adapter_model.bin")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("pickled", [False, True])
def test_dtypes_are_kept(tmp_path, dtype, pickled):
    config = {"r": 2, "lora_alpha": 8, "target_modules": LINEAR, "lora_bias": True, "modules_to_save": ["embed"]}
    live = train(tmp_path / "float32", config).to(getattr(torch, dtype))
    live.save_pretrained(str(tmp_path / "source"), safe_serialization=not pickled)
    adapter = jm.load(tmp_path / "source")
    for path, delta in live_deltas(live.double()).items():
        lora = adapter.modules[path]
        assert {str(leaf.dtype) for leaf in (lora.a, lora.b, lora.bias)} == {dtype}
        assert relative_error(delta64(lora), delta) < 1e-7
    assert str(adapter.extras["embed.weight"].dtype) == dtype
    jm.save(adapter, tmp_path / "saved")
    assert_same_adapter(jm.load(tmp_path / "saved"), adapter)
    stored = safetensors.torch.load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_are_kept_by_a_merge_and_load_in_peft(tmp_path, dtype):
    for i in range(2):
        live = train(tmp_path / str(i), {"r": 2, "lora_alpha": 8, "target_modules": LINEAR}, seed=i)
        live.to(getattr(torch, dtype)).save_pretrained(str(tmp_path / str(i)))
    adapters = [jm.load(tmp_path / str(i)) for i in range(2)]
    merged = jm.merge(adapters, [1, -0.5])
    assert {str(lora.a.dtype) for lora in merged.modules.values()} == {dtype}
    jm.save(merged, tmp_path / "out")
    deltas = live_deltas(reload(tmp_path / "out"))
    for path, delta in deltas.items():
        expected = delta64(adapters[0].modules[path]) - 0.5 * delta64(adapters[1].modules[path])
        assert relative_error(delta, expected) < {"bfloat16": 2**-8, "float16": 2**-11, "float64": 1e-6}[dtype]


def test_lora_bias_of_float64_adapters(tmp_path):
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["up"], "lora_bias": True}
    for i in range(2):
        train(tmp_path / str(i), config, seed=i).double().save_pretrained(str(tmp_path / str(i)))
    adapters = [jm.load(tmp_path / str(i)) for i in range(2)]
    merged = jm.merge(adapters, [1, -0.3])
    expected = 4 * np.asarray(adapters[0].modules["up"].bias) - 1.2 * np.asarray(adapters[1].modules["up"].bias)
    assert merged.modules["up"].bias.dtype == np.float64
    np.testing.assert_allclose(merged.modules["up"].bias, expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_dtype_that_is_asked_for(tmp_path, dtype):
    lives, adapters = train_all(tmp_path, FEATURES["modules_to_save"])
    merged = jm.merge(adapters, [1, -0.5], dtype=dtype)
    assert {str(leaf.dtype) for lora in merged.modules.values() for leaf in (lora.a, lora.b)} == {dtype}
    assert {str(np.asarray(tensor).dtype) for tensor in merged.extras.values()} == {dtype}
    jm.save(merged, tmp_path / "out")
    for path, delta in weighted(lives, [1, -0.5]).items():
        assert relative_error(live_deltas(reload(tmp_path / "out"))[path], delta) < 2**-7


def test_delta_of_float64_factors_is_float64():
    rng = np.random.default_rng(0)
    lora = jm.LoRA(rng.normal(size=(2, 6)), rng.normal(size=(5, 2)), 0.3)
    delta = jm.delta(lora)
    assert delta.dtype == np.float64
    assert relative_error(delta, delta64(lora)) < 1e-14


def test_a_float16_overflow_is_refused_and_leaves_nothing(tmp_path):
    a = np.full((1, 4), 6e4, np.float16)
    adapter = jm.Adapter({"m": jm.LoRA(a, np.ones((3, 1), np.float16))})
    with pytest.raises(ValueError, match=r"module m holds numbers too large for float16"):
        jm.save(jm.merge([adapter, adapter], [2, 1]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- What the merged folder says ---------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_targets_are_kept_where_all_agree(tmp_path):
    for i, targets in enumerate([["up", "last"], "(up|la.*)"]):
        folder = tmp_path / str(i)
        _, adapters = train_all(folder, [{"r": r, "lora_alpha": 1, "target_modules": targets} for r in (1, 2)])
        jm.save(jm.merge(adapters), folder / "out")
        kept = config_of(folder / "out")["target_modules"]
        assert kept == targets if isinstance(targets, str) else sorted(kept) == sorted(targets)


def test_targets_are_written_in_full_where_they_differ(tmp_path):
    def nested():
        return torch.nn.ModuleDict({"a": Linears(), "b": Linears()})

    lives, adapters = train_all(
        tmp_path,
        [
            {"r": 1, "lora_alpha": 1, "target_modules": ["first"]},
            {"r": 2, "lora_alpha": 1, "target_modules": r"b\.(second|first)"},
        ],
        nested,
    )
    jm.save(jm.merge(adapters, [1, 2]), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert sorted(config["target_modules"]) == ["a.first", "b.first", "b.second"]
    deltas = live_deltas(reload(tmp_path / "out", nested))
    for path, expected in weighted(lives, [1, 2]).items():
        assert relative_error(deltas[path], expected) < 1e-5


@pytest.mark.parametrize(
    "limits",
    [
        {"exclude_modules": ["last"]},
        {"exclude_modules": r".*last"},
    ],
    ids=str,
)
def test_exclusions_of_the_first_do_not_drop_modules_of_the_others(tmp_path, limits):
    lives, adapters = train_all(
        tmp_path,
        [
            {"r": 1, "lora_alpha": 1, "target_modules": ["up", "last"], **limits},
            {"r": 2, "lora_alpha": 1, "target_modules": ["up", "last"]},
        ],
    )
    assert set(adapters[0].modules) == {"up"}
    jm.save(jm.merge(adapters, [1, 2]), tmp_path / "out")
    loaded = reload(tmp_path / "out")
    assert set(lora_layers(loaded)) == {"up", "last"}
    assert_output(loaded, expected_output(lives, [1, 2]))


def test_layers_of_the_first_do_not_drop_modules_of_the_others(tmp_path):
    def layered():
        return torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Linears(), Linears(), Linears()])})

    lives, adapters = train_all(
        tmp_path,
        [
            {
                "r": 1,
                "lora_alpha": 1,
                "target_modules": ["first"],
                "layers_to_transform": layers,
                "layers_pattern": "layers",
            }
            for layers in ([0, 1], [2])
        ],
        layered,
    )
    jm.save(jm.merge(adapters, [1, 2]), tmp_path / "out")
    deltas = live_deltas(reload(tmp_path / "out", layered))
    expected = weighted(lives, [1, 2])
    assert deltas.keys() == expected.keys() == {f"layers.{i}.first" for i in range(3)}
    for path, delta in expected.items():
        assert relative_error(deltas[path], delta) < 1e-5


def test_a_full_path_that_ends_another_does_not_adapt_the_other(tmp_path):
    """To PEFT a name in a list stands for every module whose path ends with it."""

    def nested():
        model = Linears()
        model.block = Linears()
        return model

    _, adapters = train_all(
        tmp_path,
        [
            {"r": 1, "lora_alpha": 1, "target_modules": "first"},  # One module: a string is a whole pattern.
            {"r": 2, "lora_alpha": 1, "target_modules": "second"},
        ],
        nested,
    )
    assert set(adapters[0].modules) == {"first"}
    jm.save(jm.merge(adapters, [1, 2]), tmp_path / "out")
    assert live_deltas(reload(tmp_path / "out", nested)).keys() == {"first", "second"}


def test_ranks_that_differ_between_modules_are_in_the_pattern(tmp_path):
    cohort = Cohort(
        Linears,
        [
            {"r": 2, "lora_alpha": 8, "target_modules": ["first", "second"]},
            {"r": 3, "lora_alpha": 1, "target_modules": ["second", "third"]},
        ],
        tmp_path,
    )
    jm.save(jm.merge(cohort.load(), [1, -2]), tmp_path / "out")
    config = config_of(tmp_path / "out")
    live = cohort.reload(tmp_path / "out")
    ranks = {path: layer.r["default"] for path, layer in lora_layers(live).items()}
    assert ranks == {"first": 2, "second": 5, "third": 3}
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    assert config["lora_alpha"] == config["r"]
    assert list(config["rank_pattern"].values()) == list(config["alpha_pattern"].values())
    assert len(config["rank_pattern"]) == 2
    sources = [cohort.deltas(name) for name in cohort.names]
    for path, delta in live_deltas(live).items():
        expected = sum(w * s[path] for w, s in zip((1, -2), sources, strict=True) if path in s)
        assert relative_error(delta, expected) < 1e-5


def test_a_pattern_for_one_module_does_not_touch_a_longer_path(tmp_path):
    def nested():
        model = Linears()
        model.block = Linears()
        return model

    both = {"lora_alpha": 1, "target_modules": ["first"]}
    lives, adapters = train_all(tmp_path, [{"r": 1, **both, "rank_pattern": {"^first": 4}}, {"r": 2, **both}], nested)
    jm.save(jm.merge(adapters, [1, 2]), tmp_path / "out")
    live = reload(tmp_path / "out", nested)
    assert {path: layer.r["default"] for path, layer in lora_layers(live).items()} == {"first": 6, "block.first": 3}
    for path, expected in weighted(lives, [1, 2]).items():
        assert relative_error(live_deltas(live)[path], expected) < 1e-5


def test_lora_bias_in_some_adapters_only(tmp_path):
    lives, adapters = train_all(
        tmp_path,
        [
            {"r": 1, "lora_alpha": 3, "target_modules": ["up"], "lora_bias": True},
            {"r": 2, "lora_alpha": 1, "target_modules": ["up", "last"]},
        ],
    )
    jm.save(jm.merge(adapters, [0.5, 2]), tmp_path / "out")
    assert_output(reload(tmp_path / "out"), expected_output(lives, [0.5, 2]))


def tensors_besides(live: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """Every parameter but LoRA's factors, by its name without LoRA's wrapper."""
    return {k.replace(".base_layer", ""): p for k, p in live.named_parameters() if "lora_" not in k}


UP = {"r": 1, "lora_alpha": 3, "target_modules": ["up"]}
BOTH = {"r": 2, "lora_alpha": 1, "target_modules": ["up", "last"]}
LAST = {"r": 2, "lora_alpha": 1, "target_modules": ["last"]}


@pytest.mark.parametrize(
    "configs",
    [
        ({**UP, "bias": "all"}, BOTH),
        (BOTH, {**UP, "bias": "all"}),
        ({**UP, "bias": "all"}, {**LAST, "bias": "all"}),
        ({**UP, "bias": "lora_only"}, {**LAST, "bias": "all"}),
        ({**UP, "bias": "lora_only"}, {**LAST, "bias": "lora_only"}),
        (UP, {**UP, "modules_to_save": ["head"]}),
        ({**UP, "modules_to_save": ["last"]}, {**UP, "modules_to_save": ["head"]}),
        (UP, {**UP, "trainable_token_indices": {"embed": [1, 2]}}),
    ],
    ids=[
        "all_beside_more_targets",
        "more_targets_beside_all",
        "all_and_all_elsewhere",
        "lora_only_and_all_elsewhere",
        "lora_only_and_lora_only_elsewhere",
        "module_saved_by_the_second",
        "modules_saved_by_each",
        "tokens_trained_by_the_second",
    ],
)
def test_what_each_adapter_trained_besides_is_there_in_peft(tmp_path, configs):
    """Where a bias lies depends on whether its layer is adapted: ``last.bias``, or ``last.base_layer.bias``."""
    lives, adapters = train_all(tmp_path, configs)
    jm.save(jm.merge(adapters, [0.5, 2]), tmp_path / "out")
    loaded = reload(tmp_path / "out")
    found = tensors_besides(loaded)
    trained = {k: p for live in lives for k, p in tensors_besides(live).items() if p.requires_grad}
    assert trained
    for key, parameter in trained.items():
        assert torch.equal(found[key], parameter), key
    for path, delta in weighted(lives, [0.5, 2]).items():
        assert relative_error(live_deltas(loaded)[path], delta) < 1e-5


@pytest.mark.parametrize(
    ("configs", "name"),
    [
        (({**UP, "modules_to_save": ["last"]}, BOTH), "last"),
        (({**UP, "trainable_token_indices": {"embed": [1]}}, {**UP, "target_modules": ["embed"]}), "embed"),
        (({**UP, "trainable_token_indices": {"embed": [1]}}, {**UP, "modules_to_save": ["embed"]}), "embed"),
        (({**UP, "lora_bias": True}, {**UP, "target_modules": ["embed"]}), "lora_bias"),
    ],
    ids=["saved_and_adapted", "tokens_and_adapted", "tokens_and_saved", "lora_bias_and_embedding"],
)
def test_what_no_configuration_of_peft_can_say_is_refused_by_name(tmp_path, configs, name):
    """PEFT drops the factors of a module that it saves whole, with a warning, and stops at the others."""
    _, adapters = train_all(tmp_path, configs)
    with pytest.raises(ValueError, match=name):
        jm.save(jm.merge(adapters, [0.5, 2]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_counter_is_saved_as_it_is(tmp_path):
    """BatchNorm's num_batches_tracked: 64 bits, no axis."""
    _, adapters = train_all(tmp_path, [{**UP, "modules_to_save": ["norm"]}] * 2)
    jm.save(jm.merge(adapters), tmp_path / "out")
    source = safetensors.torch.load_file(tmp_path / "a0" / "adapter_model.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = "base_model.model.norm.num_batches_tracked"
    assert stored[key].dtype == source[key].dtype == torch.int64
    assert stored[key].shape == source[key].shape == ()


def test_fields_of_how_the_first_was_made_are_reset(tmp_path):
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["up"], "use_rslora": True, "lora_dropout": 0.1}
    _, adapters = train_all(tmp_path, [{**config, "init_lora_weights": "gaussian"}] * 2)
    jm.save(jm.merge(adapters), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["init_lora_weights"] is True
    assert config["use_rslora"] is False
    assert config["inference_mode"] is True
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (4, 4)


def test_the_record(tmp_path):
    for i in range(2):
        train(tmp_path / f"a{i}", {"r": 2, "lora_alpha": 8, "target_modules": ["up", "last"]}, seed=i)
    adapters = [jm.load(tmp_path / f"a{i}") for i in range(2)]
    merged = jm.merge(
        adapters, [0.5, -2], method="dare_ties", density=0.3, majority_sign_method="frequency", key=jax.random.key(9)
    )
    jm.save(merged, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "jaxmerge.json").read_text())
    assert record["inputs"] == [
        {
            "path": str(tmp_path / f"a{i}"),
            "file": "adapter_model.safetensors",
            "sha256": sha256(tmp_path / f"a{i}" / "adapter_model.safetensors"),
            "config_sha256": sha256(tmp_path / f"a{i}" / "adapter_config.json"),
        }
        for i in range(2)
    ]
    assert record["weights"] == [0.5, -2]
    assert (record["method"], record["space"], record["combination_type"]) == ("dare_ties", "full", None)
    defaults = {"election": "unweighted", "divisor": "count"}
    assert record["hyperparameters"] == {"density": 0.3, "majority_sign_method": "frequency", **defaults}
    assert record["key"] == np.asarray(jax.random.key_data(jax.random.key(9))).tolist()
    assert record["versions"]["jax"] == jax.__version__
    assert record["versions"].keys() >= {"jaxmerge", "jax", "jaxlib"}
    assert record["energy_kept"] == pytest.approx(float(jm.energy_kept(merged)))
    assert 0 < record["energy_kept"] < 1
    assert record["modules"].keys() == {"up", "last"}
    for path, module in record["modules"].items():
        assert module == {"rank": 2, "energy_kept": pytest.approx(float(merged.energy[path].kept))}
    jm.save(jm.merge(adapters, combination_type="cat"), tmp_path / "cat")
    record = json.loads((tmp_path / "cat" / "jaxmerge.json").read_text())
    assert (record["method"], record["space"], record["combination_type"]) == ("linear", "full", "cat")
    assert (record["key"], record["energy_kept"], record["weights"]) == (None, 1, [0.5, 0.5])


@pytest.mark.parametrize(
    "base", [None, "org/model", "./my models/é: \"quoted\" # no comment", "- [x]: {y}\\", "yes", "1.0"]
)  # fmt: skip
def test_the_front_matter_of_the_card_is_yaml(tmp_path, base):
    train(tmp_path / "source", PLAIN)
    edit_config(tmp_path / "source", base_model_name_or_path=base)
    adapter = jm.load(tmp_path / "source")
    for name, result in (("merged", jm.merge([adapter, adapter])), ("loaded", adapter)):
        jm.save(result, tmp_path / name)
        text = (tmp_path / name / "README.md").read_text()
        empty, front, body = text.split("---\n", 2)
        assert empty == ""
        matter = yaml.safe_load(front)
        assert matter["library_name"] == "peft"
        assert {"lora", "merge", "jaxmerge"} <= set(matter["tags"])
        assert all(isinstance(tag, str) for tag in matter["tags"])
        assert matter.get("base_model") == base
        assert body.strip().startswith("#")
        assert config_of(tmp_path / name)["base_model_name_or_path"] == base
    assert str(tmp_path / "source") in (tmp_path / "merged" / "README.md").read_text()


def test_the_same_merge_writes_the_same_bytes(tmp_path):
    script = (
        "import sys, jax, jaxmerge as jm;"
        "a = [jm.load(p) for p in sys.argv[2:]];"
        "m = jm.merge(a, [1, -0.5], method='dare_linear', density=0.5, key=jax.random.key(3), extras='average');"
        "jm.save(m, sys.argv[1])"
    )
    for i in range(2):
        train(tmp_path / f"a{i}", FEATURES["modules_to_save"][i], seed=i)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, *(str(tmp_path / name) for name in (f"run{seed}", "a0", "a1"))],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )
        for seed in (1, 2)
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert contents(tmp_path / "run1") == contents(tmp_path / "run2")
    assert sorted(contents(tmp_path / "run1")) == FILES


# --- Writing where something is already --------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path) -> jm.Adapter:
    train(tmp_path / "source", PLAIN)
    return jm.load(tmp_path / "source")


def test_an_existing_target_is_refused_and_left_alone(adapter, tmp_path):
    before = contents(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("source", "empty", "file"):
        with pytest.raises(ValueError, match=f"{name}: already exists"):
            jm.save(adapter, tmp_path / name)
    assert contents(tmp_path / "source") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "source"]


def test_force_replaces_an_adapter_and_leaves_what_is_foreign(adapter, tmp_path):
    out = tmp_path / "out"
    train(out, PLAIN, seed=5, safe_serialization=False)
    train(out, PLAIN, seed=6, name="other")
    (out / "notes.txt").write_text("mine")
    (out / "runs" / "deep").mkdir(parents=True)
    (out / "runs" / "deep" / "log").write_text("log")
    other = contents(out / "other")
    jm.save(adapter, out, force=True)
    assert_same_adapter(jm.load(out), adapter)
    assert not (out / "adapter_model.bin").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "runs" / "deep" / "log").read_text() == "log"
    assert contents(out / "other") == other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    reload(out)


def test_force_replaces_the_very_adapter_that_was_read(adapter, tmp_path):
    jm.save(jm.merge([adapter], [2]), tmp_path / "source", force=True)
    assert (
        relative_error(jm.delta(jm.load(tmp_path / "source").modules["up"]), 2 * delta64(adapter.modules["up"])) < 1e-6
    )


def test_force_replaces_nothing_but_an_adapter(adapter, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="photos: is not an adapter"):
        jm.save(adapter, tmp_path / "photos", force=True)
    with pytest.raises(ValueError, match="file: is a file"):
        jm.save(adapter, tmp_path / "file", force=True)
    assert contents(tmp_path / "photos") == {"cat.jpg": b"x"}
    assert (tmp_path / "file").read_text() == "x"


def test_missing_parents_are_made(adapter, tmp_path):
    jm.save(adapter, tmp_path / "a" / "b" / "c")
    assert sorted(contents(tmp_path / "a" / "b" / "c")) == FILES
    with pytest.raises(ValueError, match="not a writable folder"):
        jm.save(adapter, tmp_path / "source" / "README.md" / "x")


def test_an_unknown_format_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match="unknown format 'gguf'"):
        jm.save(adapter, tmp_path / "out", "gguf")
    jm.save(adapter, tmp_path / "out", "peft")


def test_an_adapter_made_by_hand_loads_in_peft(tmp_path):
    rng = np.random.default_rng(0)
    lora = jm.LoRA(rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(12, 3)).astype(np.float32), 0.7)
    jm.save(jm.Adapter({"up": lora}), tmp_path / "out")
    assert relative_error(live_deltas(reload(tmp_path / "out"))["up"], delta64(lora)) < 1e-6


def test_headers_alone_tell_what_load_tells(adapter, tmp_path):
    peeked = jm.peek(tmp_path / "source")
    shapes = jax.eval_shape(lambda: {p: (lora.a, lora.b) for p, lora in adapter.modules.items()})
    assert {p: (lora.a, lora.b) for p, lora in peeked.modules.items()} == shapes
    for path, lora in adapter.modules.items():
        assert peeked.modules[path].scale == lora.scale
    assert peeked.extras.keys() == adapter.extras.keys()
    assert peeked.metadata.config == adapter.metadata.config


# --- A causal language model -------------------------------------------------------------------------------

EVERYWHERE = ["embed_tokens", "lm_head", "q_proj"]


@torch.no_grad()
def llama_output(lives: Sequence[peft.PeftModel], weights: Sequence[float], tied: bool) -> torch.Tensor:
    """The logits of the base model with ``Σ wᵢ ΔWᵢ`` added; tied weights are taken apart first."""
    base = llama(tied=False)
    base.load_state_dict(llama(tied).state_dict())
    for path, delta in weighted(lives, weights).items():
        base.get_submodule(path).weight += torch.tensor(delta, dtype=torch.float32)
    return base(IDS[None]).logits


@pytest.mark.parametrize("save_embeddings", ["auto", False])
@pytest.mark.parametrize(
    ("tied", "config"),
    [
        (False, {"target_modules": EVERYWHERE}),
        (True, {"target_modules": EVERYWHERE}),
        (True, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ],
    ids=["untied", "tied", "tied_adapters"],
)
def test_a_language_model_gives_the_logits_of_the_sum(tmp_path, tied, config, save_embeddings):
    lives = [
        train(
            tmp_path / str(i),
            {"r": r, "lora_alpha": 3, **config},
            lambda: llama(tied),
            seed=i,
            save_embedding_layers=save_embeddings,
        )
        for i, r in enumerate((2, 4))
    ]
    adapters = [jm.load(tmp_path / str(i)) for i in range(2)]
    assert adapters[0].modules.keys() == {"model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"}
    assert bool(adapters[0].extras) == (save_embeddings == "auto")
    weights = (0.7, -0.5)
    for name, rank in (("exact", None), ("cut", 6)):
        jm.save(jm.merge(adapters, weights, rank=rank), tmp_path / name)
        loaded = reload(tmp_path / name, lambda: llama(tied), tied=tied)
        with torch.no_grad():
            logits = loaded(IDS[None]).logits
        assert relative_error(logits, llama_output(lives, weights, tied)) < 1e-5


# --- Tensors in memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", list(FEATURES))
def test_there_and_back_through_torch(tmp_path, feature):
    live = train(tmp_path / "source", FEATURES[feature][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = peft.get_peft_model_state_dict(live)
    adapter = jm.from_torch(state, live.peft_config["default"])
    assert_same_adapter(adapter, jm.load(tmp_path / "source"))
    back = jm.to_torch(adapter)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor), key
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = peft.get_peft_model(Net(), peft.LoraConfig(**jm.peft_config(adapter)))
    result = peft.set_peft_model_state_dict(fresh, back)
    assert not result.unexpected_keys
    with torch.no_grad():
        assert torch.allclose(fresh.eval()(IDS), live(IDS), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_goes_through_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    state = {
        "base_model.model.m.lora_A.weight": torch.randn(2, 6, generator=generator).to(dtype),
        "base_model.model.m.lora_B.weight": torch.randn(5, 2, generator=generator).to(dtype),
    }
    adapter = jm.from_torch(state, {"r": 2, "lora_alpha": 4})
    assert str(adapter.modules["m"].a.dtype) == str(dtype).removeprefix("torch.")
    assert adapter.modules["m"].scale == 2
    for key, tensor in jm.to_torch(adapter).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, state[key])


def test_a_models_state_dict_with_adapter_names_in_its_keys(tmp_path):
    live = train(tmp_path / "source", {"r": 2, "lora_alpha": 8, "target_modules": ["up", "embed"]}, name="poet")
    state = {key: tensor for key, tensor in live.state_dict().items() if "lora_" in key}
    assert all(".poet" in key for key in state)
    adapter = jm.from_torch(state, live.peft_config["poet"])
    assert_same_adapter(adapter, jm.load(tmp_path / "source"))
    merged = jm.merge([adapter, adapter], [1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = peft.get_peft_model(Net(), peft.LoraConfig(**jm.peft_config(merged)))
    assert not peft.set_peft_model_state_dict(fresh, jm.to_torch(merged)).unexpected_keys
    for path, delta in live_deltas(fresh).items():
        assert relative_error(delta, 3 * live_deltas(live, "poet")[path]) < 1e-6


def test_a_merge_of_tensors_in_memory_is_the_merge_of_the_files(tmp_path):
    lives, adapters = train_all(tmp_path, FEATURES["patterns"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = [jm.from_torch(peft.get_peft_model_state_dict(m), m.peft_config["default"].to_dict()) for m in lives]
    ours, files = jm.merge(live, [1, -2]), jm.merge(adapters, [1, -2])
    for path, lora in files.modules.items():
        np.testing.assert_array_equal(ours.modules[path].a, lora.a)
        np.testing.assert_array_equal(ours.modules[path].b, lora.b)
    assert set(jm.peft_config(ours)["target_modules"]) == set(jm.peft_config(files)["target_modules"])


def pointer(array: Any) -> int:
    return array.unsafe_buffer_pointer() if isinstance(array, jax.Array) else array.ctypes.data


def test_memory_is_shared_with_torch():
    a, b = torch.randn(4, 64), torch.randn(32, 4)
    state = {"base_model.model.m.lora_A.weight": a, "base_model.model.m.lora_B.weight": b}
    adapter = jm.from_torch(state, {"r": 4, "lora_alpha": 4})
    assert pointer(adapter.modules["m"].a) == a.data_ptr()
    assert pointer(adapter.modules["m"].b) == b.data_ptr()


def test_memory_is_shared_by_arrays_of_a_file(plain):
    adapter = jm.load(plain[0])
    tensor = jm.to_torch(adapter)["base_model.model.up.lora_A.weight"]
    assert tensor.data_ptr() == pointer(adapter.modules["up"].a)


def test_writing_to_torchs_copy_of_a_merge_does_not_change_the_merge(adapter):
    merged = jm.merge([adapter, adapter])
    before = np.array(merged.modules["up"].b)
    jm.to_torch(merged)["base_model.model.up.lora_B.weight"].zero_()
    np.testing.assert_array_equal(merged.modules["up"].b, before)


def test_integers_go_through_torch_as_they_are():
    state = {
        "base_model.model.m.lora_A.weight": torch.ones(1, 2),
        "base_model.model.m.lora_B.weight": torch.ones(3, 1),
        "base_model.model.norm.num_batches_tracked": torch.tensor(2**40),
        "base_model.model.norm.mask": torch.tensor([True, False]),
    }
    back = jm.to_torch(jm.from_torch(state, {"r": 1, "lora_alpha": 1}))
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype, key
        assert back[key].shape == tensor.shape, key
        assert torch.equal(back[key], tensor)


def test_a_state_dict_that_is_not_lora_is_refused():
    state = {"base_model.model.m.lora_A.weight": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="the state dict module m lacks its factor B"):
        jm.from_torch(state, {"r": 1, "lora_alpha": 1})
    with pytest.raises(ValueError, match="the state dict is DoRA"):
        jm.from_torch(state, peft.LoraConfig(r=1, use_dora=True))


def test_a_result_that_overflows_is_not_written(tmp_path):
    big = jm.Adapter({"m": jm.LoRA(np.full((1, 4), 300, np.float16), np.full((3, 1), 300, np.float16))})
    merged = jm.merge([big], [1e6])
    with pytest.raises(ValueError, match="module m holds numbers too large for float16"):
        jm.save(merged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    jm.save(jm.merge([big], [1e6], dtype="float32"), tmp_path / "out")


def test_mapped_tensors_are_those_of_the_file_before_and_after_their_pages_are_given_back():
    eager, mapped = (jm.load(Path(__file__).parent / "adapters" / "sms", mapped=mapped) for mapped in (False, True))
    for _ in range(2):
        for path, lora in eager.modules.items():
            np.testing.assert_array_equal(mapped.modules[path].a, lora.a)
            np.testing.assert_array_equal(mapped.modules[path].b, lora.b)
            release(mapped.modules[path].a)
            release(mapped.modules[path].b)
            release(lora.a)  # Nothing to give back, and nothing lost.
    with pytest.raises(ValueError, match="read-only"):
        mapped.modules[path].a[...] = 0


def test_files_have_the_bytes_that_the_library_writes(tmp_path):
    jm.save(jm.load(Path(__file__).parent / "adapters" / "sms"), tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    assert file.read_bytes() == safetensors.numpy.save(tensors, metadata={"format": "pt"})
