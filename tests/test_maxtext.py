"""What MaxText, absent here, saved and computed: adapters, what they add to its kernels, what its weight hooks make.

scripts/make_maxtext_golden.py made it, and has MaxText restore what jaxmerge writes and compares logits.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import jaxmerge as jm
from tests.helpers import delta64, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:orbax.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

GOLDENS = Path(__file__).parent / "goldens" / "maxtext"


@dataclass(frozen=True)
class Model:
    """A folder of goldens, and what jaxmerge calls the model and MaxText's way with its layers."""

    folder: str
    layout: str
    format: str = "maxtext"

    def __str__(self) -> str:
        return self.folder

    @property
    def path(self) -> Path:
        return GOLDENS / self.folder

    def expected(self, prefix: str = "") -> dict[str, np.ndarray]:
        with np.load(self.path / "expected.npz") as file:
            return {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}

    def target(self) -> dict[str, str | int]:
        return {"format": self.format, "layout": self.layout, "head_dim": 6}


MODELS = [
    Model("llama3", "llama3"),
    Model("llama3-unscanned", "llama3", "maxtext-unscanned"),
    Model("qwen3", "qwen3"),
    Model("gemma2", "gemma2"),
    Model("gemma3", "gemma3-multimodal"),
]


@pytest.fixture(params=MODELS, ids=str)
def model(request):
    return request.param


def assert_adds(adapter, wanted):
    """Holds an adapter against changes of kernels, whose second axis is that of the layers if they are scanned."""
    assert adapter.modules.keys() == wanted.keys()
    for path, kernel in wanted.items():
        delta = delta64(adapter.modules[path])
        if delta.ndim == 3:
            kernel = np.moveaxis(kernel, 1, 0)
        reference = kernel.reshape(*delta.shape[:-2], delta.shape[-1], delta.shape[-2]).swapaxes(-1, -2)
        assert relative_error(delta, reference) < 1e-5, path


def custom_metadata(path):
    return json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]


def peft_adapter(modules, rank=2):
    """A random adapter of PEFT's: `{path: (out, in)}`."""
    rng = np.random.default_rng(0)
    loras = {
        path: jm.LoRA(
            rng.normal(size=(rank, in_)).astype(np.float32), rng.normal(size=(out, rank)).astype(np.float32), 0.7
        )
        for path, (out, in_) in modules.items()
    }
    return jm.Adapter(modules=loras)


def of_layers(*layers):
    return {f"model.layers.{layer}.self_attn.q_proj": (24, 8) for layer in layers}


@pytest.mark.parametrize("name", ["a", "b"])
def test_adapters_are_what_maxtext_adds(model, name):
    assert_adds(jm.load(model.path / name), model.expected(f"added/{name}/"))


@pytest.mark.parametrize("converted", [False, True])
def test_merged_and_written(tmp_path, model, converted):
    weights = [1.0, -0.5]
    assert model.expected()["weights"].tolist() == weights
    changes = [model.expected(f"added/{name}/") for name in "ab"]
    wanted = {
        path: sum(w * c[path].astype(np.float64) for w, c in zip(weights, changes, strict=True)) for path in changes[0]
    }
    merged = jm.merge([jm.load(model.path / name) for name in "ab"], weights)
    assert_adds(merged, wanted)

    jm.save(merged, tmp_path / "merged", **(model.target() if converted else {}))
    again = jm.load(tmp_path / "merged")
    assert_adds(again, wanted)
    assert {lora.rank for lora in again.modules.values()} == {5}
    custom = custom_metadata(tmp_path / "merged" / ("" if converted else "7"))
    assert custom["scan_layers"] is (model.format == "maxtext")
    assert custom["lora"]["enable_lora"] is True
    assert (custom["lora"]["lora_rank"], custom["lora"]["lora_alpha"]) == (5, 5.0)


def test_peft_becomes_what_maxtexts_hooks_make_of_its_changes(tmp_path, model):
    jm.save(jm.load(model.path / "peft"), tmp_path / "maxtext", **model.target())
    again = jm.load(tmp_path / "maxtext")
    assert_adds(again, model.expected("added/peft/"))
    assert {lora.rank for lora in again.modules.values()} == {3}
    custom = custom_metadata(tmp_path / "maxtext")
    assert custom["scan_layers"] is (model.format == "maxtext")
    assert custom["lora"] == {"enable_lora": True, "lora_rank": 3, "lora_alpha": 3.0}


def test_maxtext_becomes_what_maxtexts_hooks_make_of_its_changes(tmp_path, model):
    jm.save(jm.load(model.path / "b"), tmp_path / "peft", **{**model.target(), "format": "peft"})
    wanted = model.expected("hf/b/")
    adapter = jm.load(tmp_path / "peft")
    assert adapter.modules.keys() == wanted.keys()
    for path, lora in adapter.modules.items():
        assert relative_error(delta64(lora), wanted[path]) < 1e-5, path


def test_peft_comes_back(tmp_path, model):
    adapter = jm.load(model.path / "peft")
    jm.save(adapter, tmp_path / "maxtext", **model.target())
    jm.save(jm.load(tmp_path / "maxtext"), tmp_path / "peft", **{**model.target(), "format": "peft"})
    back = jm.load(tmp_path / "peft")
    assert back.modules.keys() == adapter.modules.keys()
    for path, lora in adapter.modules.items():
        assert relative_error(delta64(back.modules[path]), delta64(lora)) < 1e-6, path


def test_goldens_are_not_trivial():
    """The hooks do what they are said to do, so that a table without them would not pass."""
    for model, factor, moved in [(MODELS[0], 6**0.5, True), (MODELS[2], 1, False), (MODELS[3], 6**0.5, False)]:
        kernels = model.expected("added/peft/")
        adapter = jm.load(model.path / "peft")
        # Of gemma2 the local attention, which is in the even layers.
        name = max(path for path in kernels if path.endswith(".query"))
        query = kernels[name].take(0, axis=1).reshape(8, 4, 6)
        hf = delta64(adapter.modules["model.layers.0.self_attn.q_proj"]).T.reshape(8, 4, 6)
        order = [0, 3, 1, 4, 2, 5] if moved else range(6)
        np.testing.assert_allclose(query * factor, hf[..., list(order)], rtol=1e-5, atol=1e-6)


def test_heads_need_their_size(tmp_path):
    adapter = jm.load(MODELS[0].path / "peft")
    with pytest.raises(ValueError, match=r"give head_dim") as caught:
        jm.save(adapter, tmp_path / "out", format="maxtext", layout="llama3")
    # A line for each module that has heads to cut, and none for the others.
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    with pytest.raises(ValueError, match="give head_dim") as caught:
        jm.save(peft_adapter(of_layers(0)), tmp_path / "out", format="maxtext", layout="gemma2", layers=2)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="no whole number of heads of 7"):
        jm.save(adapter, tmp_path / "out", format="maxtext", layout="llama3", head_dim=7)
    with pytest.raises(ValueError, match="give head_dim"):
        jm.save(jm.load(MODELS[0].path / "a"), tmp_path / "out", format="peft", layout="llama3")
    assert not (tmp_path / "out").exists()


def test_heads_need_no_size_where_nothing_depends_on_it(tmp_path):
    model = MODELS[2]
    jm.save(jm.load(model.path / "peft"), tmp_path / "out", format="maxtext", layout=model.layout)
    assert_adds(jm.load(tmp_path / "out"), model.expected("added/peft/"))


def test_layers_that_are_not_adapted_have_to_be_counted(tmp_path):
    adapter = peft_adapter(of_layers(0, 2))
    options = {"format": "maxtext", "layout": "llama3", "head_dim": 6}
    with pytest.raises(ValueError, match="give layers") as caught:
        jm.save(adapter, tmp_path / "out", **options)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="a model of 2 layers"):
        jm.save(adapter, tmp_path / "out", **options, layers=2)
    assert not (tmp_path / "out").exists()

    jm.save(adapter, tmp_path / "out", **options, layers=4)
    (path,) = (again := jm.load(tmp_path / "out")).modules
    delta = delta64(again.modules[path])
    assert delta.shape == (4, 24, 8)
    for layer in range(4):
        one = adapter.modules.get(f"model.layers.{layer}.self_attn.q_proj")
        if one is None:
            assert not delta[layer].any()
            continue
        heads = delta64(one).reshape(4, 6, 8)[:, [0, 3, 1, 4, 2, 5]].reshape(24, 8) / 6**0.5
        assert relative_error(delta[layer], heads) < 1e-6
    jm.save(again, tmp_path / "peft", format="peft", layout="llama3", head_dim=6)
    back = jm.load(tmp_path / "peft")
    for path, lora in adapter.modules.items():
        assert relative_error(delta64(back.modules[path]), delta64(lora)) < 1e-6
    assert all(not delta64(back.modules[path]).any() for path in back.modules.keys() - adapter.modules.keys())


def test_layers_are_not_counted_where_each_has_its_own(tmp_path):
    options = {"format": "maxtext-unscanned", "layout": "llama3", "head_dim": 6}
    jm.save(peft_adapter(of_layers(0, 2)), tmp_path / "out", **options)
    assert set(jm.load(tmp_path / "out").modules) == {f"decoder.layers_{n}.self_attention.query" for n in (0, 2)}


@pytest.mark.parametrize(
    ("layers", "blocks", "remainder"), [(6, 1, 0), (8, 1, 2), (13, 2, 1), (18, 3, 0), (26, 4, 2), (34, 5, 4)]
)
def test_gemma3_has_blocks_of_six_and_a_remainder(tmp_path, layers, blocks, remainder):
    adapter = peft_adapter(of_layers(*range(layers)))
    jm.save(adapter, tmp_path / "out", format="maxtext", layout="gemma3")
    found = jm.load(tmp_path / "out").modules
    scanned = {f"decoder.layers.layers_{slot}.self_attention.query": (blocks, 2, 8) for slot in range(6)}
    rest = {f"decoder.layers_remainder.layers_{slot}.self_attention.query": (2, 8) for slot in range(remainder)}
    assert {path: lora.a.shape for path, lora in found.items()} == scanned | rest
    for layer, lora in enumerate(adapter.modules.values()):
        block, slot = divmod(layer, 6)
        group = "layers" if block < blocks else "layers_remainder"
        delta = delta64(found[f"decoder.{group}.layers_{slot}.self_attention.query"])
        assert relative_error(delta[block] if block < blocks else delta, delta64(lora)) < 1e-6, layer


def test_modules_without_a_place_are_named(tmp_path):
    strangers = {"model.layers.0.self_attn.rotary_proj": (8, 8), "model.embed_tokens": (16, 8)}
    with pytest.raises(ValueError, match="would have no place") as caught:
        jm.save(peft_adapter(of_layers(0) | strangers), tmp_path / "out", format="maxtext", layout="llama3", head_dim=6)
    for path in strangers:
        assert path in str(caught.value)
    assert "q_proj" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_models_table_does_not_know_the_modules(tmp_path):
    with pytest.raises(ValueError, match=r"decoder\.layers\.mlp\.wi_0, .* and 3 more are not in the"):
        jm.save(jm.load(MODELS[0].path / "a"), tmp_path / "out", format="peft", layout="gemma2", head_dim=6)
