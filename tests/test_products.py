"""LoHa and LoKr adapters of the installed PEFT are read as LoRA that makes the same change, exactly."""

import json
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

import jaxmerge as jm
from jaxmerge.cli import main
from jaxmerge.io import products
from tests.helpers import delta64, relative_error

LAYERS = ["linear", "wide", "conv2d", "oblong", "conv1d", "conv2d_1x1"]


class Net(torch.nn.Module):
    """One layer of every kind that PEFT puts LoHa and LoKr on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(24, 36)
        self.wide = torch.nn.Linear(36, 6)
        self.conv2d = torch.nn.Conv2d(6, 8, 3)
        self.oblong = torch.nn.Conv2d(8, 6, (2, 3))
        self.conv1d = torch.nn.Conv1d(6, 12, 3)
        self.conv2d_1x1 = torch.nn.Conv2d(12, 4, 1)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(torch.tanh(self.linear(x)))  # [batch, 6]
        image = x[:, :, None, None] * torch.linspace(-1, 1, 42).reshape(1, 1, 6, 7)
        x = torch.tanh(self.oblong(self.conv2d(image))).flatten(2)  # [batch, 6, 9]
        x = torch.tanh(self.conv1d(x))[..., None]
        return self.head(self.conv2d_1x1(x).mean((2, 3)))


@pytest.fixture(autouse=True)
def _core_of_a_conv1d(monkeypatch):
    """PEFT 0.21.2 fails at the Kronecker product of a Conv1d with a core: torch.kron wants a copy in plain strides."""
    multiplied = peft.tuners.lokr.layer.make_weight_cp

    def in_plain_strides(*tensors):
        weight = multiplied(*tensors)
        return torch.empty(weight.shape).copy_(weight)

    monkeypatch.setattr(peft.tuners.lokr.layer, "make_weight_cp", in_plain_strides)


def make(folder: Path, config: peft.PeftConfig, seed: int = 0) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = peft.get_peft_model(net(), config)
        model.save_pretrained(str(folder))
    return model


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Net()


def deltas(model: peft.PeftModel) -> dict[str, np.ndarray]:
    """PEFT's own weight changes, in the shapes of the weights."""
    return {
        path: layer.get_delta_weight("default").detach().double().numpy()
        for path, layer in model.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def loha(**config) -> peft.LoHaConfig:
    return peft.LoHaConfig(**{"r": 3, "alpha": 5, "target_modules": LAYERS, "init_weights": False, **config})


def lokr(**config) -> peft.LoKrConfig:
    return peft.LoKrConfig(**{"r": 2, "alpha": 5, "target_modules": LAYERS, "init_weights": False, **config})


PATTERNS = {"rank_pattern": {"linear": 4, "conv2d": 1}, "alpha_pattern": {"conv.*": 7, "^linear": 0.5}}
CONFIGS = {
    "loha": loha(),
    "loha, effective": loha(use_effective_conv2d=True),
    "loha, patterns": loha(use_effective_conv2d=True, **PATTERNS),
    "loha, r beyond the features": loha(r=16, alpha=1),
    "loha, r beyond the features, effective": loha(r=16, alpha=1, use_effective_conv2d=True),
    "lokr": lokr(),
    "lokr, r=1": lokr(r=1),
    "lokr, effective": lokr(r=1, use_effective_conv2d=True),
    "lokr, both decomposed": lokr(r=1, decompose_both=True),
    "lokr, both decomposed, effective": lokr(r=1, decompose_both=True, use_effective_conv2d=True),
    "lokr, whole": lokr(r=32),
    "lokr, factor": lokr(decompose_factor=4),
    "lokr, small factor, both": lokr(r=4, decompose_factor=2, decompose_both=True, use_effective_conv2d=True),
    "lokr, patterns": lokr(use_effective_conv2d=True, **PATTERNS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_change_is_that_of_peft(tmp_path, name):
    expected = deltas(make(tmp_path / "saved", CONFIGS[name]))
    adapter, peeked = jm.load(tmp_path / "saved"), jm.peek(tmp_path / "saved")
    assert adapter.modules.keys() == expected.keys() == set(LAYERS)
    layouts = dict(adapter.metadata.layouts)
    for path, delta in expected.items():
        lora, header = adapter.modules[path], peeked.modules[path]
        flat = delta.reshape(len(delta), -1)
        assert relative_error(jm.delta(lora), flat) < 1e-6
        assert lora.rank <= min(flat.shape)
        assert [(x.shape, x.dtype) for x in (lora.a, lora.b)] == [(x.shape, x.dtype) for x in (header.a, header.b)]
        assert layouts[path].kernel in ((), delta.shape[2:])
    assert json.loads(adapter.metadata.provenance)["converted_from"] == ("LoHa" if "loha" in name else "LoKr")


@pytest.mark.parametrize("name", ["loha", "loha, effective", "lokr", "lokr, effective"])
def test_kernels_are_told_from_shapes_where_they_can_be(tmp_path, name):
    make(tmp_path / "saved", CONFIGS[name])
    layouts = dict(jm.load(tmp_path / "saved").metadata.layouts)
    kernels = {path: layouts[path].kernel for path in LAYERS}
    whole = {"conv2d": (3, 3), "oblong": (2, 3), "conv1d": (3,)}
    assert kernels["linear"] == kernels["wide"] == ()
    # LoHa without its core has flat kernels; LoKr has them where W₂ is factored without a core.
    if "effective" in name:
        assert {path: kernels[path] for path in whole} == whole
    else:
        assert {path: kernels[path] for path in whole} == (whole if name == "lokr" else dict.fromkeys(whole, ()))


def test_ranks_are_the_products(tmp_path):
    make(tmp_path / "loha", loha(target_modules=["linear"]))
    assert jm.load(tmp_path / "loha").modules["linear"].rank == 9
    make(tmp_path / "lokr", lokr(target_modules=["linear"]))  # 24 = 4·6 and 36 = 6·6; W₁ is [6, 4], whole
    assert jm.load(tmp_path / "lokr").modules["linear"].rank == 8
    make(tmp_path / "both", lokr(target_modules=["linear"], decompose_both=True))
    assert jm.load(tmp_path / "both").modules["linear"].rank == 4


EFFECTIVE = {"use_effective_conv2d": True, "target_modules": LAYERS[:5]}


@pytest.mark.parametrize(
    "configs",
    [
        [loha(**EFFECTIVE), loha(r=2, alpha=1, **EFFECTIVE)],
        [lokr(r=1, **EFFECTIVE), lokr(r=1, decompose_both=True, alpha=2, **EFFECTIVE)],
        [loha(**EFFECTIVE), lokr(r=1, **EFFECTIVE)],
        [
            loha(target_modules=["linear", "wide"]),
            peft.LoraConfig(r=2, target_modules=["wide", "conv2d"], init_lora_weights=False),
            lokr(target_modules=["linear"]),
        ],
    ],
    ids=["loha", "lokr", "both", "with lora"],
)
def test_merged_they_run_in_peft(tmp_path, configs):
    weights = [0.7, -0.4, 1.5][: len(configs)]
    lives = [make(tmp_path / f"a{i}", config, seed=i) for i, config in enumerate(configs)]
    merged = jm.merge([jm.load(tmp_path / f"a{i}") for i in range(len(configs))], weights)
    jm.save(merged, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not config.keys() & {"alpha", "module_dropout", "decompose_both", "use_effective_conv2d", "init_weights"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.PeftModel.from_pretrained(net(), str(tmp_path / "merged"))
    summed: dict[str, np.ndarray] = {}
    for weight, live in zip(weights, lives, strict=True):
        for path, delta in deltas(live).items():
            summed[path] = summed.get(path, 0) + weight * delta
    expected = net().double()
    with torch.no_grad():
        for path, delta in summed.items():
            expected.get_submodule(path).weight += torch.from_numpy(delta)
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
        assert relative_error(loaded(x).numpy(), expected(x.double()).numpy()) < 1e-5
        assert relative_error(net()(x).numpy(), expected(x.double()).numpy()) > 1e-3


def test_saved_alone_it_is_lora_for_the_same_modules(tmp_path):
    config = loha(r=2, use_effective_conv2d=True, modules_to_save=["head"], target_modules=["linear", "conv2d"])
    live = make(tmp_path / "loha", config)
    adapter = jm.load(tmp_path / "loha")
    assert set(adapter.extras) == {"head.weight", "head.bias"}
    jm.save(adapter, tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.PeftModel.from_pretrained(net(), str(tmp_path / "lora"))
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert loaded.peft_config["default"].target_modules == {"linear", "conv2d"}
    for path, delta in deltas(live).items():
        assert relative_error(deltas(loaded)[path], delta) < 1e-6
    assert jm.load(tmp_path / "lora").modules.keys() == adapter.modules.keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_products_of_half_numbers_are_held_exactly(tmp_path, dtype):
    model = make(tmp_path / "saved", loha(target_modules=["linear"], r=1, alpha=2))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(str(tmp_path / "other"))
    lora = jm.load(tmp_path / "other").modules["linear"]
    assert lora.a.dtype == lora.b.dtype == jm.peek(tmp_path / "other").modules["linear"].a.dtype
    assert lora.a.dtype == ("float64" if dtype == "float64" else "float32")
    layer = model.base_model.model.linear
    w = {
        name: getattr(layer, f"hada_{name}")["default"].detach().double().numpy()
        for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    assert (np.asarray(lora.a) == w["w1_b"] * w["w2_b"]).all()
    assert (np.asarray(lora.b) == w["w1_a"] * w["w2_a"]).all()


@pytest.mark.parametrize("config", [loha(**EFFECTIVE), lokr(r=1, **EFFECTIVE)], ids=["loha", "lokr"])
def test_a_state_dict_in_memory(tmp_path, config):
    model = make(tmp_path / "saved", config)
    adapter = jm.from_torch(peft.get_peft_model_state_dict(model), model.peft_config["default"])
    for path, delta in deltas(model).items():
        assert relative_error(delta64(adapter.modules[path]), delta.reshape(len(delta), -1)) < 1e-6
    named = {key: x for key, x in model.state_dict().items() if "hada_" in key or "lokr_" in key}
    adapter = jm.from_torch(named, model.peft_config["default"])
    assert adapter.modules.keys() == set(LAYERS[:5])


def test_an_untrained_adapter_changes_nothing(tmp_path):
    make(tmp_path / "loha", loha(init_weights=True))
    assert all((delta64(lora) == 0).all() for lora in jm.load(tmp_path / "loha").modules.values())


# --- What is refused ---------------------------------------------------------------------------------------


def spoiled(folder: Path, config: peft.PeftConfig, change) -> Path:
    make(folder, config)
    path = folder / "adapter_model.safetensors"
    tensors = {key.removeprefix("base_model.model."): x for key, x in safetensors.numpy.load_file(path).items()}
    change(tensors)
    safetensors.numpy.save_file({f"base_model.model.{key}": x for key, x in tensors.items()}, path)
    return folder


def cut(name: str, shape: tuple[slice, ...]):
    return lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name][shape])})


ONE = {"target_modules": ["linear"]}
CORE = {"target_modules": ["conv2d"], "use_effective_conv2d": True}
SPOILED = {
    "without a factor": (loha(**ONE), lambda t: t.pop("linear.hada_w2_b"), ["linear lacks its factor hada_w2_b"]),
    "without a core": (loha(**CORE), lambda t: t.pop("conv2d.hada_t2"), ["conv2d lacks its factor hada_t2"]),
    "without a side": (lokr(**ONE), lambda t: t.pop("linear.lokr_w1"), ["linear lacks its factor lokr_w1_a"]),
    "with a side twice": (
        lokr(**ONE),
        lambda t: t.update({"linear.lokr_w2": np.ones((6, 6), np.float32)}),
        ["linear has tensors that no LoKr layer has", "lokr_w2 (6, 6)"],
    ),
    "sides of two shapes": (loha(**ONE), cut("linear.hada_w1_a", (slice(5),)), ["no LoHa layer has", "(5, 3)"]),
    "ranks that differ": (loha(**ONE), cut("linear.hada_w1_a", (slice(None), slice(2))), ["no LoHa layer has"]),
    "a core that does not fit": (loha(**CORE), cut("conv2d.hada_t1", (slice(2),)), ["no LoHa layer has"]),
    "a vector": (lokr(**ONE), lambda t: t.update({"linear.lokr_w1": np.ones(4, np.float32)}), ["no LoKr layer has"]),
    "nothing": (loha(**ONE), cut("linear.hada_w1_b", (slice(None), slice(0))), ["no LoHa layer has"]),
    "integers": (
        loha(**ONE),
        lambda t: t.update({"linear.hada_w1_b": t["linear.hada_w1_b"].astype(np.int32)}),
        ["linear is stored as I32", "F16, BF16, F32 or F64"],
    ),
    "a stranger": (
        loha(**ONE),
        lambda t: t.update({"linear.hada_w3": np.ones(2, np.float32)}),
        ["LoHa", "linear.hada_w3"],
    ),
    "factors of LoRA": (
        loha(**ONE),
        lambda t: t.update({"linear.lora_A.weight": np.ones((2, 24), np.float32)}),
        ["linear.lora_A.weight"],
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_spoiled_is_refused_in_a_line(tmp_path, what):
    config, change, words = SPOILED[what]
    folder = spoiled(tmp_path / "spoiled", config, change)
    for read in (jm.load, jm.peek):
        with pytest.raises(ValueError, match=r"spoiled: ") as error:
            read(folder)
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 4}, "module linear has rank 3, but adapter_config.json says 4"),
        ({"rank_pattern": {"linear": 2}}, "module linear has rank 3, but adapter_config.json says 2"),
        ({"alpha": "8"}, "alpha in adapter_config.json is '8', not a number"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern['(']"),
        ({"use_tensor_trains": True}, "sets use_tensor_trains in adapter_config.json, a variant of LoHa"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, changes, words):
    make(tmp_path / "saved", loha(**ONE))
    edit(tmp_path / "saved", **changes)
    with pytest.raises(ValueError, match="saved: ") as error:
        jm.load(tmp_path / "saved")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_rank_that_alpha_cannot_be_divided_by_is_refused(tmp_path):
    make(tmp_path / "saved", lokr(r=32, **ONE))  # Both sides whole: the rank is in the configuration alone.
    edit(tmp_path / "saved", r=0)
    with pytest.raises(ValueError, match="module linear has rank 0 in adapter_config"):
        jm.load(tmp_path / "saved")


def test_no_factors_at_all(tmp_path):
    make(tmp_path / "saved", loha(**ONE))
    safetensors.numpy.save_file(
        {"head.weight": np.ones(3, np.float32)}, tmp_path / "saved" / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="holds no LoHa factors"):
        jm.load(tmp_path / "saved")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_what_is_no_number_names_the_module(tmp_path, value):
    def spoil(tensors):
        for name in ("hada_w1_a", "hada_w2_a"):
            tensors[f"linear.{name}"][0, 0] = value

    folder = spoiled(tmp_path / "spoiled", loha(**ONE), spoil)
    with pytest.raises(ValueError, match="spoiled: NaN or inf in linear"):
        jm.merge([jm.load(folder)])


def test_every_kind_has_its_names():
    assert products.NAMES.keys() == products.ROLES.keys()


# --- The command line --------------------------------------------------------------------------------------


def test_the_summary_says_what_was_converted(tmp_path, capsys):
    make(tmp_path / "loha", loha(target_modules=["linear"]))
    make(tmp_path / "lokr", lokr(target_modules=["linear", "wide"]))
    loha_path, lokr_path = str(tmp_path / "loha"), str(tmp_path / "lokr")
    assert main(["merge", loha_path, lokr_path, "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert f"{loha_path}: is LoHa, read as LoRA of its exact rank, 9" in told
    assert f"{lokr_path}: is LoKr, read as LoRA of its exact rank, 4 … 8" in told
    record = json.loads((tmp_path / "out" / "jaxmerge.json").read_text())
    assert [source["converted_from"] for source in record["inputs"]] == ["LoHa", "LoKr"]
    assert main(["inspect", loha_path]) == 0
    assert "is LoHa, read as LoRA of its exact rank, 9" in capsys.readouterr().out
    assert main(["inspect", loha_path, "--json"]) == 0
    (described,) = json.loads(capsys.readouterr().out)["adapters"]
    assert described["peft_type"] == "LOHA"
    assert described["converted"] == "is LoHa, read as LoRA of its exact rank, 9"
    assert main(["convert", lokr_path, str(tmp_path / "lora"), "--format", "peft"]) == 0
    assert "lokr: is LoKr, read as LoRA of its exact rank, 4 … 8" in capsys.readouterr().out
    assert jm.load(tmp_path / "lora").modules["linear"].rank == 8
    assert main(["resize", lokr_path, str(tmp_path / "small"), "--rank", "3"]) == 0
    assert "lokr: is LoKr, read as LoRA of its exact rank, 4 … 8" in capsys.readouterr().out
    assert {lora.rank for lora in jm.load(tmp_path / "small").modules.values()} == {3}
