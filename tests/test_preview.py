"""What a merge will be, told from headers, against what it then is."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

import jaxmerge as jm
from jaxmerge.base import Adapter, LoRA

ADAPTERS = Path(__file__).parent / "adapters"
NAMES = ("sms", "movie", "names")


def shapes(n=2, layers=4, rank=8, width=256, dtype="float32"):
    """Adapters of which only the shapes are known."""

    def lora(out, in_):
        leaf = np.dtype(dtype)
        return LoRA(jax.ShapeDtypeStruct((rank, in_), leaf), jax.ShapeDtypeStruct((out, rank), leaf))

    modules = {f"layers.{i}.{kind}": lora(width, width) for i in range(layers) for kind in ("q", "v")}
    return [Adapter(dict(modules)) for _ in range(n)]


@pytest.mark.parametrize("arguments", [
    {}, {"rank": 16}, {"method": "ties", "density": 0.5, "space": "core"}, {"method": "iso_c", "space": "ctm"},
])  # fmt: skip
def test_sizes_are_those_of_the_file(arguments, tmp_path):
    found = jm.preview([jm.peek(ADAPTERS / name) for name in NAMES], **arguments)
    merged = jm.merge([jm.load(ADAPTERS / name) for name in NAMES], **arguments)
    jm.save(merged, tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "adapter_model.safetensors", "numpy") as file:
        arrays = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - not a mapping
    assert found.bytes == sum(array.nbytes for array in arrays)
    assert found.parameters == sum(array.size for array in arrays)
    assert {path for group in found.groups for path in group.paths} == set(merged.modules)
    for group in found.groups:
        for path in group.paths:
            lora = merged.modules[path]
            assert (group.features, group.rank, group.dtype) == (lora.features, lora.rank, str(lora.a.dtype))
    assert found.seconds is not None
    assert found.seconds > 0
    assert json.loads(json.dumps(found.to_json()))["method"] == arguments.get("method", "linear")


def test_modules_that_only_some_adapters_have():
    one, other = shapes()
    del other.modules["layers.1.q"], other.modules["layers.2.q"]
    found = jm.preview([one, other])
    assert found.partial == {"layers.1.q": (0,), "layers.2.q": (0,)}
    assert found.to_json()["partial"] == {"layers.1.q": [1], "layers.2.q": [1]}
    assert "adapter 2 lacks 2 modules, which are merged from the others: layers.1.q, layers.2.q" in found.warnings
    assert "ranks differ between modules: 8 … 16" in found.warnings


@pytest.mark.parametrize(("arguments", "warning"), [
    ({"space": "factors"}, "an approximation for more than one adapter"),
    ({"space": "ctm", "method": "tsv"}, "compresses before it merges"),
    ({"method": "ties", "density": 0.5}, "the merge is of full rank, and rank 8 holds a part of it"),
    ({"weights": [1, 0]}, "of weight 0: adapter 2"),
    ({"rank": 17}, None), ({}, None),
])  # fmt: skip
def test_what_to_look_out_for(arguments, warning):
    warnings = jm.preview(shapes(), **arguments).warnings if "rank" not in arguments else ()
    assert (warning is None and not warnings) or any(warning in line for line in warnings)


def test_ranks_that_servers_refuse_by_default():
    assert "rank 32 is more than vLLM serves by default" in jm.preview(shapes(rank=16)).warnings[-1]
    assert not jm.preview(shapes(rank=16), rank=16).warnings


def test_more_work_takes_longer_and_more_memory():
    cheap = jm.preview(shapes(width=1024))
    dear = jm.preview(shapes(width=1024), method="ties", density=0.5)
    large = jm.preview(shapes(width=4096), method="ties", density=0.5)
    assert cheap.seconds < dear.seconds < large.seconds  # type: ignore[operator]
    assert dear.memory < large.memory


def test_what_is_wrong_is_told_as_by_merge():
    with pytest.raises(ValueError, match="method ties needs density"):
        jm.preview(shapes(), method="ties")
