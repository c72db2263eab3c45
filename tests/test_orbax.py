"""Orbax checkpoints, saved in all of Orbax's ways."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as v0
import pytest
from flax import nnx
from orbax.checkpoint import v1

import jaxmerge as jm
from tests.helpers import delta64, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:orbax.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.fc = nnx.LoRALinear(8, 16, lora_rank=2, rngs=rngs)
        self.blocks = nnx.List([nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs) for _ in range(2)])


def lora_state(seed=0):
    state = nnx.state(Model(nnx.Rngs(seed)), nnx.LoRAParam)
    leaves, structure = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def save_standard(folder, state):
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, state)
    return folder


def save_pure(folder, state):
    return save_standard(folder, nnx.to_pure_dict(state))


def save_pytree(folder, state):
    v0.PyTreeCheckpointer().save(folder, state)
    return folder


def save_manager(folder, state):
    with v0.CheckpointManager(folder) as manager:
        for step in (3, 20):
            scaled = jax.tree.map(lambda x, step=step: x * (step == 20), state)
            manager.save(step, args=v0.args.StandardSave(scaled))
    return folder


def save_composite(folder, state):
    with v0.CheckpointManager(folder) as manager:
        items = {"state": v0.args.StandardSave(state), "meta": v0.args.JsonSave({"note": "mine"})}
        manager.save(10, args=v0.args.Composite(**items))
    return folder


def save_v1(folder, state):
    v1.save(str(folder), state)
    return folder


def save_training(folder, state):
    with v1.training.Checkpointer(str(folder)) as checkpointer:
        checkpointer.save_checkpointables(5, {"model_params": state, "optimizer_state": {"mu": state}})
    return folder


WAYS = [save_standard, save_pure, save_pytree, save_manager, save_composite, save_v1, save_training]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_of_saving_is_read(tmp_path, way):
    state = lora_state()
    expected = jm.from_state(state)
    adapter = jm.load(way(tmp_path / "saved", state))
    assert adapter.modules.keys() == expected.modules.keys() == {"fc", "blocks.0", "blocks.1"}
    for path, lora in expected.modules.items():
        np.testing.assert_array_equal(adapter.modules[path].a, lora.a)
        np.testing.assert_array_equal(adapter.modules[path].b, lora.b)
    assert len(json.loads(adapter.metadata.provenance)["sha256"]) == 64


def test_root_step_and_item(tmp_path):
    root = save_composite(tmp_path / "saved", lora_state())
    for path in (root, root / "10", root / "10" / "state"):
        assert jm.load(path).modules.keys() == {"fc", "blocks.0", "blocks.1"}
    assert json.loads(jm.load(root).metadata.provenance)["step"] == "10"


def test_relative_paths(tmp_path, monkeypatch):
    save_v1(tmp_path / "saved", lora_state())
    monkeypatch.chdir(tmp_path)
    assert len(jm.load("saved").modules) == 3


def test_several_items_must_be_chosen_from(tmp_path):
    with v1.training.Checkpointer(str(tmp_path / "saved")) as checkpointer:
        checkpointer.save_checkpointables(1, {"teacher": lora_state(0), "student": lora_state(1)})
    with pytest.raises(ValueError, match=r"saved: holds several items \(.*student.*\): name one with item="):
        jm.load(tmp_path / "saved")
    student = jm.load(tmp_path / "saved", item="student")
    np.testing.assert_array_equal(student.modules["fc"].a, jm.from_state(lora_state(1)).modules["fc"].a)
    with pytest.raises(ValueError, match="has no item 'nobody'"):
        jm.load(tmp_path / "saved", item="nobody")


def test_merged_and_given_back_to_the_model(tmp_path):
    states = [lora_state(seed) for seed in range(2)]
    adapters = [jm.load(save_v1(tmp_path / str(i), state)) for i, state in enumerate(states)]
    merged = jm.merge(adapters, [1.0, -2.0], rank=2)
    exact = jm.merge([jm.from_state(state) for state in states], [1.0, -2.0], rank=2)
    for path, lora in exact.modules.items():
        assert relative_error(delta64(merged.modules[path]), delta64(lora)) < 1e-6
    tree = jm.to_state(merged)
    assert tree["blocks"]["0"]["lora"]["lora_a"]["value"].shape == (8, 2)
    record = json.loads(merged.metadata.provenance)
    assert [source["path"] for source in record["inputs"]] == [str(tmp_path / "0"), str(tmp_path / "1")]


def test_what_is_broken_or_unfinished_is_one_line(tmp_path):
    saved = save_manager(tmp_path / "saved", lora_state())
    for step in ("3", "20"):
        for file in saved.glob(f"{step}/**/_METADATA"):
            file.unlink()
    (tmp_path / "unfinished" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "steps" / "7").mkdir(parents=True)
    shutil.copytree(save_v1(tmp_path / "good", lora_state()), tmp_path / "gutted")
    for file in (tmp_path / "gutted").rglob("d/*"):
        file.write_bytes(b"")
    for name in ("saved", "unfinished", "steps", "gutted"):
        with pytest.raises(ValueError, match=name) as error:
            jm.load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_options_for_orbax_alone_are_refused_elsewhere(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="alpha, item can be given"):
        jm.load(tmp_path, alpha=2.0, item="x")
