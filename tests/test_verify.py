"""A merged adapter is what its record says, or it is told what is wrong with it."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmerge as jm
from jaxmerge import cli

ADAPTERS = Path(__file__).parent / "adapters"
NAMES = ("sms", "movie", "names")


@pytest.fixture
def sources(tmp_path):
    for name in NAMES:
        shutil.copytree(ADAPTERS / name, tmp_path / name)
    return [tmp_path / name for name in NAMES]


def merge(sources, out, **arguments):
    merged = jm.merge([jm.load(path) for path in sources], **arguments)
    jm.save(merged, out)
    return out


def gradient(adapter, start, end):
    paths = list(adapter.modules)
    return {path: start + (end - start) * i / len(paths) for i, path in enumerate(paths)}


@pytest.mark.parametrize("arguments", [
    {"weights": [1, 0.5, -0.3]},
    {"weights": [1, 0.5, -0.3], "rank": 8, "dtype": "bfloat16"},
    {"method": "ties", "density": [0.2, 0.5, 0.8], "space": "core", "stages": ["calibrate"]},
    {"method": "dare_ties", "density": 0.5, "key": 5, "space": "factors"},
    {"combination_type": "dare_linear", "density": 0.5, "key": 5},
    {"stages": [("norm_restore", {"scope": "whole"})]},
    {"method": "ties", "density": 0.3, "density_scope": "model", "space": "core"},
], ids=str)  # fmt: skip
def test_what_is_as_it_was_made_is_made_again_to_the_bit(arguments, sources, tmp_path):
    if "key" in arguments:
        arguments = {**arguments, "key": jax.random.key(arguments["key"])}
    found = jm.verify(merge(sources, tmp_path / "out", **arguments), modules=5)
    assert (found.status, found.error, found.problems, found.ok) == ("same", 0.0, (), True)
    assert found.intact
    assert len(found.sampled) == 5
    assert [one.present for one in found.adapters] == [True] * 3
    if "weights" in arguments and "rank" not in arguments:
        np.testing.assert_allclose([one.found for one in found.adapters], arguments["weights"], atol=1e-3)


def test_weights_by_module_and_a_rule_at_the_end(sources, tmp_path):
    adapters = [jm.load(path) for path in sources[:2]]
    weights = [gradient(adapters[0], 0, 1), gradient(adapters[1], 1, 0)]
    ranks = {path: 4 + i % 3 for i, path in enumerate(adapters[0].modules)}
    jm.save(jm.merge(adapters, weights, rank=ranks), tmp_path / "out")
    found = jm.verify(tmp_path / "out", modules=None)
    assert (found.status, found.problems) == ("same", ())
    assert [one.weight for one in found.adapters] == ["0 … 0.972222", "0.0277778 … 1"]
    assert len(found.sampled) == 36


def test_a_recipe_with_a_recipe_inside(sources, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "adapters:\n- {path: sms, weight: [0.5, 1]}\n- recipe: {adapters: [movie, names], method: tsv}\n  weight: 0.7\n"
        "energy: 0.9\n"
    )
    jm.save(jm.merge_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    found = jm.verify(tmp_path / "out", modules=6)
    assert (found.status, found.problems) == ("same", ())


def test_the_weights_of_another_merge(sources, tmp_path):
    out = merge(sources, tmp_path / "out", weights=[1, 0.5, 0.2])
    merge(sources, tmp_path / "other", weights=[1, 0.5, 0])
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", out)
    found = jm.verify(out, modules=3)
    assert found.status == "different"
    changed, differs, lost = found.problems
    assert changed == f"{out}: its weights are not what was written there"
    assert "differs by" in differs
    assert lost == f"{out}: {sources[2]} is not in it"
    assert [one.present for one in found.adapters] == [True, True, False]


def test_one_tensor_that_was_changed(sources, tmp_path):
    out = merge(sources, tmp_path / "out")
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layer.3.output.dense.lora_B.weight"))
    tensors[name] = tensors[name] * np.asarray(1.01, tensors[name].dtype)
    save_file(tensors, file)
    found = jm.verify(out, modules=None)
    assert found.status in ("close", "different")
    assert found.error == pytest.approx(0.01, rel=0.1)
    assert found.intact is False
    outside = jm.verify(out, modules=2)  # The first module and the last.
    assert (outside.status, outside.error) == ("same", 0.0)
    assert outside.problems == (f"{out}: its weights are not what was written there",)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_config_that_was_changed(sources, tmp_path):
    out = merge(sources, tmp_path / "out")
    edit(out / "adapter_config.json", lora_alpha=480)
    found = jm.verify(out, modules=2)
    assert found.problems[0] == f"{out}: its adapter_config.json is not what was written there"
    assert found.intact is False


RECORDS = [{"weights": [1, 1, 1]}, {"weights": "x"}, {"method": 3}, {"weights": [1]}]


@pytest.mark.parametrize("changes", RECORDS, ids=str)
def test_a_record_that_was_changed(changes, sources, tmp_path):
    (tmp_path / "recipe.yaml").write_text("adapters: [sms, movie, names]\n")
    out = tmp_path / "out"
    jm.save(jm.merge_recipe(tmp_path / "recipe.yaml"), out)
    edit(out / "jaxmerge.json", **changes)
    (problem,) = jm.verify(out, modules=2).problems
    assert problem == f"{out}: its record has other {next(iter(changes))} than its recipe"
    (out / "recipe.yaml").unlink()
    assert jm.verify(out, modules=2).problems


def test_an_input_that_was_changed_or_is_gone(sources, tmp_path):
    out = merge(sources, tmp_path / "out")
    tensors = load_file(sources[0] / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, sources[0] / "adapter_model.safetensors")
    found = jm.verify(out)
    assert (found.status, found.ok) == ("unknown", False)
    assert "is another file than the recipe says" in found.problems[0]
    shutil.rmtree(sources[0])
    found = jm.verify(out)
    assert found.problems == (f"{sources[0]}: there is no such folder",)


def test_what_cannot_be_verified(sources, tmp_path):
    with pytest.raises(ValueError, match="has no record of a merge"):
        jm.verify(sources[0])
    with pytest.raises(ValueError, match="there is no such folder"):
        jm.verify(tmp_path / "nothing")
    adapters = [jm.load(path) for path in sources[:2]]
    bare = dataclasses.replace(adapters[0], metadata=dataclasses.replace(adapters[0].metadata, provenance="{}"))
    jm.save(jm.merge([bare, adapters[1]]), tmp_path / "out")
    found = jm.verify(tmp_path / "out")
    assert found.problems == ("an adapter that was merged was in memory, and is in no file that can be read again",)


def test_the_command(sources, tmp_path, capsys):
    out = merge(sources, tmp_path / "out", weights=[1, 0.5, 0.2])
    assert cli.main(["verify", str(out), "--modules", "3"]) == 0
    told = capsys.readouterr().out
    assert "made again to the bit, 3 of 36 modules" in told
    assert cli.main(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"][1]["found"] == pytest.approx(0.5, abs=1e-3)
    shutil.rmtree(sources[1])
    assert cli.main(["verify", str(out)]) == 1
    assert "there is no such folder" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err == f"jaxmerge: {tmp_path / 'nothing'}: there is no such folder\n"


def test_an_adapter_too_small_to_be_seen(sources, tmp_path):
    tensors = {key: (x.astype(np.float32) * np.float32(1e-25)) for key, x in load_file(_weights(sources[1])).items()}
    save_file(tensors, _weights(sources[1]))
    found = jm.verify(merge(sources, tmp_path / "out"), modules=3)
    assert found.ok
    assert [one.found is None for one in found.adapters] == [False, True, False]
    assert [row[-1] for row in found.table().rows] == ["yes", "too small to be seen", "yes"]


def _weights(folder):
    return folder / "adapter_model.safetensors"
