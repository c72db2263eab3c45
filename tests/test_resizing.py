"""Ranks chosen by a rule, and the best approximation of each: against NumPy's SVD of the dense change in float64."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import peft
import pytest
import torch

import jaxmerge as jm
from jaxmerge.cli import main
from jaxmerge.resizing import Rule, rule_of
from tests.cohort import KINDS, Kinds, Linears
from tests.helpers import compilations, delta64, relative_error

SMS = str(Path(__file__).parent / "adapters" / "sms")
RULES = [
    {"rank": 3},
    {"energy": 0.9},
    {"energy": 0.999},
    {"energy": 1},
    {"sv_ratio": 3},
    {"sv_ratio": 50.0},
    {"sv_fro": 0.9},
    {"sv_fro": 0.99},
    {"sv_cumulative": 0.7},
    {"sv_cumulative": 0.99},
    {"energy": 0.999, "max_rank": 4},
]


def factors(seed: int, out: int, in_: int, rank: int, decay: float = 0.6, batch: tuple[int, ...] = ()) -> jm.LoRA:
    """Of a decaying spectrum, mixed so that no factor shows it."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(*batch, rank, rank))
    sizes = decay ** np.arange(rank) * np.exp(rng.normal(size=(*batch, 1)) / 2)
    b = rng.normal(size=(*batch, out, rank)) * sizes[..., None, :] @ np.linalg.inv(mix)
    a = mix @ rng.normal(size=(*batch, rank, in_))
    return jm.LoRA(a.astype(np.float32), b.astype(np.float32), scale=-1.5 * (seed + 1))


def adapter(**more) -> jm.Adapter:
    modules = {
        "square": factors(0, 20, 20, 8),
        "tall": factors(1, 60, 12, 8, decay=0.8),
        "long": factors(2, 12, 60, 8, decay=0.4),
        "full": factors(3, 5, 30, 8, decay=0.9),  # r is more than out
        "one": factors(4, 9, 7, 1),
    }
    return jm.Adapter(modules, **more)


def wanted(values: np.ndarray, rule: dict) -> int:
    """The rule in its own words, over singular values in float64."""
    (name, limit), most = next(iter(rule.items())), rule.get("max_rank", len(values))
    found = {
        "rank": lambda: [k for k in range(1, len(values) + 1) if k >= min(limit, len(values))],
        "energy": lambda: first(values**2, limit * (values**2).sum()),
        "sv_ratio": lambda: [np.count_nonzero(values >= values[0] / limit)],
        "sv_fro": lambda: first(values**2, limit**2 * (values**2).sum()),
        "sv_cumulative": lambda: first(values, limit * values.sum()),
    }[name]()
    return min(found[0], most)


def first(terms: np.ndarray, threshold: float) -> list[int]:
    enough = [k for k in range(1, len(terms) + 1) if terms[:k].sum() >= threshold * (1 - 1e-12)]
    return enough or [len(terms)]


def svd(lora: jm.LoRA, layer: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(delta64(lora)[layer], full_matrices=False)
    k = min(lora.rank, *lora.features)
    return u[:, :k], s[:k], vt[:k]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ranks_and_products_are_those_of_the_dense_change(rule):
    source = adapter()
    resized = jm.resize(source, **rule)
    assert resized.modules.keys() == source.modules.keys()
    for path, lora in source.modules.items():
        u, s, vt = svd(lora)
        rank = wanted(s, rule)
        got = resized.modules[path]
        assert got.rank == rank, path
        assert (got.scale, got.a.dtype, got.features) == (1.0, np.float32, lora.features)
        assert relative_error(jm.delta(got), (u[:, :rank] * s[:rank]) @ vt[:rank]) < 1e-5
        # Nothing of that rank is nearer: the error is what Eckart-Young leaves.
        left = np.sqrt((s[rank:] ** 2).sum())
        assert np.linalg.norm(delta64(got) - delta64(lora)) == pytest.approx(left, rel=1e-4, abs=1e-5 * s[0])
        assert float(resized.energy[path].kept) == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), abs=1e-6)
    total = sum((svd(lora)[1] ** 2).sum() for lora in source.modules.values())
    lost = sum((svd(lora)[1][resized.modules[path].rank :] ** 2).sum() for path, lora in source.modules.items())
    assert float(jm.energy_kept(resized)) == pytest.approx(1 - lost / total, abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        ({"rank": 2}, 2),
        ({"rank": 9}, 4),
        ({"energy": 64 / 85}, 1),
        ({"energy": 0.76}, 2),
        ({"energy": 80 / 85}, 2),
        ({"energy": 84 / 85}, 3),
        ({"energy": 1.0}, 4),
        ({"energy": 1e-9}, 1),
        ({"sv_ratio": 1}, 1),
        ({"sv_ratio": 2}, 2),
        ({"sv_ratio": 3.99}, 2),
        ({"sv_ratio": 8.0}, 4),
        ({"sv_ratio": 1e30}, 4),
        ({"sv_fro": 0.86}, 1),
        ({"sv_fro": 0.87}, 2),
        ({"sv_fro": 1}, 4),
        ({"sv_cumulative": 8 / 15}, 1),
        ({"sv_cumulative": 12 / 15}, 2),
        ({"sv_cumulative": 0.81}, 3),
        ({"sv_cumulative": 1.0}, 4),
        ({"sv_ratio": 8, "max_rank": 3}, 3),
        ({"energy": 1e-9, "max_rank": 3}, 1),
    ],
    ids=str,
)
def test_the_rules_in_numbers(rule, rank):
    assert rule_of(**rule).rank(np.array([8.0, 4.0, 2.0, 1.0, 0.0])) == rank


def test_a_fraction_next_to_one_is_told_from_one():
    values = np.array([1.0, 1e-9])
    assert Rule("energy", 1.0).rank(values) == 2
    assert Rule("energy", 1 - 1e-15).rank(values) == 1


def test_the_largest_float32_has_a_square():
    values = np.array([3e38, 1e38], np.float32)
    assert [Rule("energy", limit).rank(values) for limit in (0.9, 0.91)] == [1, 2]


# --- What is no more than rounding -------------------------------------------------------------------------


def one(a, b, scale=1.0) -> jm.Adapter:
    return jm.Adapter({"m": jm.LoRA(np.asarray(a, np.float32), np.asarray(b, np.float32), scale)})


@pytest.mark.parametrize("rule", [{"rank": 32}, {"energy": 1.0}, {"sv_ratio": 1e12}, {"sv_cumulative": 1.0}], ids=str)
@pytest.mark.parametrize("true", [1, 3, 16])
def test_null_directions_are_never_kept(rule, true):
    rng = np.random.default_rng(true)
    a, b = rng.normal(size=(true, 300)), rng.normal(size=(200, true))
    twice = one(np.concatenate([a, a]), np.concatenate([b, -3 * b], axis=1))
    resized = jm.resize(twice, **rule)
    assert resized.modules["m"].rank == true
    assert relative_error(delta64(resized.modules["m"]), -2 * b @ a) < 1e-5
    assert float(resized.energy["m"].kept) == 1


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("how", ["zeros", "scale", "cancels"])
def test_a_module_that_is_nothing_keeps_rank_one(tmp_path, rule, how):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40)).astype(np.float32), rng.normal(size=(30, 2)).astype(np.float32)
    source = {
        "zeros": lambda: one(a, 0 * b),
        "scale": lambda: one(a, b, 0.0),
        "cancels": lambda: one(np.concatenate([a, a]), np.concatenate([b, -b], axis=1)),
    }[how]()
    resized = jm.resize(source, **rule)
    assert resized.modules["m"].rank == 1
    assert (np.asarray(jm.delta(resized.modules["m"])) == 0).all()
    assert float(jm.energy_kept(resized)) == 1
    jm.save(resized, tmp_path / "out")


def test_a_rank_beyond_what_there_is_adds_nothing():
    source = adapter()
    resized = jm.resize(source, rank=1000)
    for path, lora in source.modules.items():
        assert resized.modules[path].rank == min(lora.rank, *lora.features)
        assert relative_error(delta64(resized.modules[path]), delta64(lora)) < 1e-5
        assert float(resized.energy[path].lost) == 0


# --- Layers and experts in one module ----------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.9}, {"sv_ratio": 10}], ids=str)
def test_layers_of_one_module_share_the_largest_rank_that_any_needs(rule):
    parts = [factors(seed, 14, 10, 6, decay) for seed, decay in enumerate((0.3, 0.9, 0.5, 0.2, 0.7, 0.4))]
    stacked = jm.LoRA(*(np.stack([getattr(p, name) for p in parts]).reshape(2, 3, *shape)
                        for name, shape in (("a", (6, 10)), ("b", (14, 6)))), 0.5)  # fmt: skip
    resized = jm.resize(jm.Adapter({"scan": stacked}), **rule)
    lora = resized.modules["scan"]
    layers = list(np.ndindex(2, 3))
    rank = max(wanted(svd(stacked, layer)[1], rule) for layer in layers)
    assert (lora.batch, lora.rank) == ((2, 3), rank)
    lost = total = 0.0
    for layer in layers:
        u, s, vt = svd(stacked, layer)
        assert relative_error(delta64(lora)[layer], (u[:, :rank] * s[:rank]) @ vt[:rank]) < 1e-5
        lost, total = lost + (s[rank:] ** 2).sum(), total + (s**2).sum()
    assert float(jm.energy_kept(resized)) == pytest.approx(1 - lost / total, abs=1e-6)


# --- What PEFT makes of it ---------------------------------------------------------------------------------


def saved(folder: Path, model, *, trained: bool = True, **config) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        live = peft.get_peft_model(model(), peft.LoraConfig(init_lora_weights=False, **config))
        with torch.no_grad():
            for name, parameter in live.named_parameters():
                if trained and parameter.requires_grad:
                    # Singular values that decay, so that rules have something to choose.
                    size = 0.5 ** torch.arange(parameter.shape[0]) if "lora_A" in name or "embedding_A" in name else 1
                    parameter.copy_(
                        torch.randn_like(parameter.T).T if parameter.ndim == 2 else torch.randn_like(parameter)
                    )
                    if not isinstance(size, int):
                        parameter.mul_(size.reshape(-1, *[1] * (parameter.ndim - 1)))
        live.save_pretrained(str(folder))
    return live


def reload(folder: Path, model) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        torch.manual_seed(0)
        return peft.PeftModel.from_pretrained(model(), str(folder))


def layers_of(live: peft.PeftModel) -> dict:
    return {
        path: layer.get_delta_weight("default").detach().double().numpy()
        for path, layer in live.base_model.model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("rule", [{"energy": 0.8}, {"rank": 2}, {"sv_ratio": 4, "max_rank": 3}], ids=str)
def test_every_kind_of_layer_loads_in_peft(tmp_path, rule):
    live = saved(tmp_path / "source", Kinds, r=6, lora_alpha=5, target_modules=KINDS, fan_in_fan_out=True)
    source = jm.load(tmp_path / "source")
    resized = jm.resize(source, **rule)
    ranks = {path: lora.rank for path, lora in resized.modules.items()}
    assert (len(set(ranks.values())) > 1) == ("rank" not in rule)
    # MultiheadAttention has one rank for its two projections.
    assert ranks["attention"] == ranks["attention.base_layer.out_proj"]
    jm.save(resized, tmp_path / "out")
    loaded = layers_of(reload(tmp_path / "out", Kinds))
    before = layers_of(live)
    assert loaded.keys() == before.keys() == ranks.keys()
    for path, delta in before.items():
        u, s, vt = np.linalg.svd(delta.reshape(len(delta), -1), full_matrices=False)
        best = (u[:, : ranks[path]] * s[: ranks[path]]) @ vt[: ranks[path]]
        assert relative_error(loaded[path].reshape(best.shape), best) < 1e-5
    again = jm.load(tmp_path / "out")
    assert {path: (lora.rank, lora.scale) for path, lora in again.modules.items()} == {
        path: (rank, 1.0) for path, rank in ranks.items()
    }


class Chain(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.third(torch.tanh(self.first(x) + self.second(x))))


@pytest.mark.parametrize("lora_bias", [False, True])
def test_the_model_computes_what_the_truncated_change_says(tmp_path, lora_bias):
    config = {"r": 6, "lora_alpha": 4, "use_rslora": True, "target_modules": ["first", "second", "third"]}
    live = saved(tmp_path / "source", Chain, lora_bias=lora_bias, modules_to_save=["head"], **config)
    source = jm.load(tmp_path / "source")
    resized = jm.resize(source, energy=0.9)
    for name, tensor in source.extras.items():
        np.testing.assert_array_equal(resized.extras[name], tensor)
    jm.save(resized, tmp_path / "out")
    loaded = reload(tmp_path / "out", Chain)
    torch.manual_seed(0)
    expected = Chain().double()
    with torch.no_grad():
        for path, lora in source.modules.items():
            u, s, vt = svd(lora)
            rank = wanted(s, {"energy": 0.9})
            assert rank < 6
            layer = expected.get_submodule(path)
            layer.weight += torch.from_numpy((u[:, :rank] * s[:rank]) @ vt[:rank])
            if lora_bias:
                bias = live.base_model.model.get_submodule(path).lora_B["default"].bias.detach().double()
                assert bias.abs().max() > 0.1
                layer.bias += lora.scale * bias
        head = live.base_model.model.head.modules_to_save["default"]
        expected.head.load_state_dict({name: x.double() for name, x in head.state_dict().items()})
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
        assert relative_error(loaded(x).numpy(), expected(x.double()).numpy()) < 1e-5


# --- Numbers, places, records ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype):
    numpy_type = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    lora = factors(0, 20, 20, 8)
    stored = dataclasses.replace(lora, a=lora.a.astype(numpy_type), b=lora.b.astype(numpy_type))
    u, s, vt = svd(stored)
    best = (u[:, :3] * s[:3]) @ vt[:3]
    kept = jm.resize(jm.Adapter({"m": stored}), rank=3).modules["m"]
    assert kept.a.dtype == kept.b.dtype == dtype
    tolerance = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-6, "float64": 1e-12}[dtype]
    assert relative_error(delta64(kept), best) < tolerance
    wide = jm.resize(jm.Adapter({"m": stored}), rank=3, dtype="float32").modules["m"]
    assert wide.a.dtype == wide.b.dtype == "float32"
    assert relative_error(delta64(wide), best) < 1e-5


@pytest.mark.parametrize("put", [np.asarray, jax.numpy.asarray], ids=["numpy", "jax"])
def test_the_same_shapes_compile_once(put):
    def source(seed):
        lora = factors(seed, 33, 17, 7)
        return jm.Adapter({"m": dataclasses.replace(lora, a=put(lora.a), b=put(lora.b))})

    jm.resize(source(0), energy=0.9)
    one, other = source(1), source(2)
    assert compilations(lambda: [jm.resize(one, sv_ratio=2), jm.resize(other, rank=5)]) == []


def test_what_it_was_made_of_is_recorded(tmp_path):
    source = jm.load(SMS)
    jm.save(jm.resize(source, energy=0.9, max_rank=8), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "jaxmerge.json").read_text())
    assert record["inputs"] == [json.loads(source.metadata.provenance)]
    assert record["resize"] == {"energy": 0.9, "max_rank": 8}
    assert record["versions"]["jaxmerge"]
    assert record["modules"].keys() == source.modules.keys()
    assert 0.8 < record["energy_kept"] < 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "resized with jaxmerge" in card
    assert "energy 0.9, max_rank 8" in card


def test_a_merge_can_be_resized_and_resized_adapters_merged():
    one, other = adapter(), jm.resize(adapter(), energy=0.95)
    merged = jm.resize(jm.merge([one, other], [1.0, 2.0]), rank=6)
    exact = jm.merge([one, other], [1.0, 2.0], rank=6)
    for path, lora in exact.modules.items():
        assert relative_error(delta64(merged.modules[path]), delta64(lora)) < 1e-5


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jaxmerge as jm

rng = np.random.default_rng(0)
a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 6, 32), (3, 16, 6)))
expected = jm.resize(jm.Adapter({"m": jm.LoRA(a, b)}), energy=0.9).modules["m"]
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    specs = P(None, None, "x"), P(None, "x", None)
    spread = jm.LoRA(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((a, b), specs)))
    lora = jm.resize(jm.Adapter({"m": spread}), energy=0.9).modules["m"]
    got, wanted = (np.asarray(x.b) @ np.asarray(x.a) for x in (lora, expected))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    for x, spec in zip((lora.a, lora.b), specs):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3), (kind, x.sharding)
print("as they lay")
"""


def test_what_is_spread_stays_spread():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, timeout=300, capture_output=True, text=True)
    assert done.stdout == "as they lay\n", done.stderr


# --- What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("give one of rank, energy, sv_ratio, sv_fro, sv_cumulative: none was given", {}),
        ("give one of .*: none was given", {"max_rank": 3}),
        ("give one of .*: rank and energy were given", {"rank": 3, "energy": 0.9}),
        ("rank must be a whole number from 1, got 0", {"rank": 0}),
        ("rank must be a whole number from 1, got 2.5", {"rank": 2.5}),
        ("rank must be a whole number from 1, got True", {"rank": True}),
        ("max_rank must be a whole number from 1, got 0", {"energy": 0.5, "max_rank": 0}),
        ("max_rank is for rules that find a rank", {"rank": 3, "max_rank": 2}),
        ("energy must be above 0 and at most 1, got 0", {"energy": 0}),
        ("energy must be above 0 and at most 1, got 1.5", {"energy": 1.5}),
        ("energy must be above 0 and at most 1, got nan", {"energy": float("nan")}),
        ("energy must be a number, got '0.9'", {"energy": "0.9"}),
        ("sv_fro must be above 0 and at most 1, got -1", {"sv_fro": -1}),
        ("sv_cumulative must be above 0 and at most 1, got 2", {"sv_cumulative": 2}),
        ("sv_ratio must be at least 1, got 0.5", {"sv_ratio": 0.5}),
        ("sv_ratio must be at least 1, got inf", {"sv_ratio": float("inf")}),
        ("dtype int32 is not one of", {"rank": 2, "dtype": "int32"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_that_mean_nothing_are_refused(match, arguments):
    with pytest.raises(ValueError, match=match) as error:
        jm.resize(adapter(), **arguments)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_numbers():
    resized = jm.resize(adapter(), energy=np.float32(0.9), max_rank=np.int64(3))
    assert json.loads(resized.metadata.provenance)["resize"]["max_rank"] == 3
    assert jm.resize(adapter(), rank=np.int64(2)).modules["tall"].rank == 2


def test_values_must_be_known():
    with pytest.raises(ValueError, match=r"ranks by values, which are not known here"):
        jax.jit(lambda source: jm.resize(source, energy=0.9))(adapter())
    with pytest.raises(ValueError, match=r"ranks by values, which are not known here"):
        jm.resize(jm.peek(SMS), rank=2)


def test_nan_names_the_module():
    source = adapter(metadata=jm.Metadata(name="broken"))
    source.modules["long"].a[1, 1] = np.nan
    with pytest.raises(ValueError, match="broken: NaN or inf in long"):
        jm.resize(source, rank=2)


# --- The command line --------------------------------------------------------------------------------------


def run(*arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code


def test_the_table_says_what_each_module_keeps(tmp_path, capsys):
    run("resize", SMS, tmp_path / "out", "--energy", "0.9", "--max-rank", "6")
    told = capsys.readouterr().out
    assert "energy 0.9, max_rank 6" in told
    assert "encoder.layer.*.attention.self.query" in told
    assert "rank before" in told
    run("resize", SMS, tmp_path / "out", "--energy", "0.9", "--max-rank", "6", "--force", "--json")
    summary = json.loads(capsys.readouterr().out)
    assert summary["rule"] == {"energy": 0.9, "max_rank": 6}
    assert len(summary["modules"]) == 36
    written = jm.load(tmp_path / "out")
    for path, module in summary["modules"].items():
        assert module["rank_before"] == 16
        assert module["rank"] == written.modules[path].rank <= 6
        assert module["energy_kept"] >= (0.9 if module["rank"] < 6 else 0)
    assert 0 < summary["energy_kept"] < 1
    assert f"keeps {100 * summary['energy_kept']:.1f} % of the energy" in summary["remarks"][0]
    assert summary["parameters"][1] == sum(x.a.size + x.b.size for x in written.modules.values())


def test_the_rules_of_the_command_line_are_those_of_python(tmp_path):
    for name, limit in {"rank": 4, "energy": 0.8, "sv_ratio": 3, "sv_fro": 0.9, "sv_cumulative": 0.8}.items():
        run("resize", SMS, tmp_path / name, f"--{name.replace('_', '-')}", limit, "--dtype", "float32")
        expected, got = jm.resize(jm.load(SMS), **{name: limit}, dtype="float32"), jm.load(tmp_path / name)
        for path, lora in expected.modules.items():
            np.testing.assert_array_equal(got.modules[path].a, lora.a)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--max-rank", "3"], ["--rank", "0"], ["--rank", "2", "--energy", "0.5"], ["--energy", "much"]],
    ids=str,
)
def test_wrong_usage(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(["resize", SMS, str(tmp_path / "out"), *arguments])
    assert end.value.code == 2
    assert "--rank" in capsys.readouterr().err or "--energy" in arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--energy", "1.5"], "energy must be above 0 and at most 1, got 1.5"),
        (["--sv-ratio", "0.1"], "sv_ratio must be at least 1, got 0.1"),
        (["--rank", "3", "--max-rank", "2"], "max_rank is for rules that find a rank"),
        (["--rank", "3", "--alpha", "8"], "is no Orbax checkpoint"),
    ],
)
def test_problems_are_told_in_a_line_and_nothing_is_written(tmp_path, capsys, arguments, words):
    run("resize", SMS, tmp_path / "out", *arguments, code=1)
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    shutil.copytree(SMS, tmp_path / "there")
    before = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    run("resize", SMS, tmp_path / "there", "--rank", "2", code=1)
    assert "already exists (--force replaces an adapter)" in capsys.readouterr().err
    run("resize", tmp_path / "there", tmp_path / "there", "--rank", "2", "--force", code=1)
    assert "would be overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before
    run("resize", SMS, tmp_path / "there", "--rank", "2", "--force")
    assert jm.load(tmp_path / "there").modules["encoder.layer.0.output.dense"].rank == 2


def test_two_runs_write_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        run("resize", SMS, tmp_path / name, "--sv-fro", "0.9")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning:orbax.*")
@pytest.mark.parametrize("layout", ["nnx", "gemma"])
def test_checkpoints_of_flax(tmp_path, capsys, layout):
    from orbax.checkpoint import v1

    rng = np.random.default_rng(0)
    leaf = {"nnx": "lora_{}", "gemma": "{}"}[layout]

    def module(out, in_, decay):
        sizes = decay ** np.arange(6)
        pair = rng.normal(size=(in_, 6)) * sizes, rng.normal(size=(6, out))
        return {leaf.format(name): x.astype(np.float32) for name, x in zip("ab", pair, strict=True)}

    tree = {"q": module(16, 12, 0.3), "o": module(12, 16, 0.8)}
    if layout == "gemma":
        tree = {name: {"lora": pair} for name, pair in tree.items()}
    v1.save(str(tmp_path / "saved"), tree)
    source = jm.load(tmp_path / "saved")
    assert source.metadata.format == layout
    run("resize", tmp_path / "saved", tmp_path / "out", "--energy", "0.9")
    told = capsys.readouterr().out
    resized, written = jm.resize(source, energy=0.9), jm.load(tmp_path / "out")
    ranks = {path: lora.rank for path, lora in resized.modules.items()}
    assert len(set(ranks.values())) == 2
    one_rank = {"gemma": max(ranks.values())}.get(layout)
    for path, lora in resized.modules.items():
        assert written.modules[path].rank == (one_rank or lora.rank)
        assert relative_error(delta64(written.modules[path]), delta64(lora)) < 1e-6
    assert ("filled up with zeros" in told) == (layout == "gemma")


def test_another_format_on_the_way_out(tmp_path, capsys):
    table = tmp_path / "table.json"
    rows = [
        {
            "peft": f"encoder.layer.{{layer}}.{name}",
            "tree": f"blocks.{{layer}}.{name}",
            "inputs": "in",
            "outputs": "out",
        }
        for name in (
            *(f"attention.self.{part}" for part in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        )
    ]
    table.write_text(json.dumps(rows))
    run("resize", SMS, tmp_path / "out", "--rank", "3", "--format", "nnx", "--layout", table)
    assert "written as nnx: 36 modules of rank 3" in capsys.readouterr().out
    written = jm.load(tmp_path / "out")
    assert {lora.rank for lora in written.modules.values()} == {3}
