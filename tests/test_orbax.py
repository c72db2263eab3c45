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
from jaxmerge.cli import main
from tests.helpers import delta64, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:orbax.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # Orbax's own event loops, closed while a failed read is still unwinding.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
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


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_is_written_is_verified(tmp_path, way):
    adapters = [jm.load(way(tmp_path / str(seed), lora_state(seed))) for seed in range(2)]
    jm.save(jm.merge(adapters, [1.0, -2.0]), tmp_path / "out")
    found = jm.verify(tmp_path / "out")
    assert (found.status, found.intact, found.problems) == ("same", True, ())


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


def restored(way, folder, target):
    """What the library's own reader of each way of saving gives for a target tree."""
    if way in (save_standard, save_pure, save_pytree):
        with v0.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder, target)
    if way is save_manager:
        with v0.CheckpointManager(folder) as manager:
            return manager.restore(manager.latest_step(), args=v0.args.StandardRestore(target))
    if way is save_composite:
        with v0.CheckpointManager(folder) as manager:
            return manager.restore(10, args=v0.args.Composite(state=v0.args.StandardRestore(target)))["state"]
    if way is save_v1:
        return v1.load(str(folder), target)
    with v1.training.Checkpointer(str(folder)) as checkpointer:
        return checkpointer.load_checkpointables(checkpointer.latest.step, {"model_params": target})["model_params"]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_merged_files_restore_into_the_real_model(tmp_path, way):
    """Model-level: base + Σ wᵢ·(what adapter i adds), after the library's own restore into a model of the new rank."""
    weights, states = [1.0, -0.5], [lora_state(seed) for seed in range(2)]
    adapters = [jm.load(way(tmp_path / str(i), state)) for i, state in enumerate(states)]
    jm.save(jm.merge(adapters, weights, rank=2), tmp_path / "merged")
    model = Model(nnx.Rngs(0))
    like = nnx.state(model, nnx.LoRAParam)
    target = nnx.to_pure_dict(like) if way is save_pure else like
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
    tree = restored(way, tmp_path / "merged", target)
    expected = jm.merge([jm.from_state(state) for state in states], weights, rank=2)
    x = jax.random.normal(jax.random.key(0), (3, 8))
    base = x @ model.fc.kernel[...] + (0 if model.fc.bias is None else model.fc.bias[...])
    if way is save_pure:
        nnx.replace_by_pure_dict(like, tree)
        tree = like
    nnx.update(model, tree)
    added = np.asarray(model.fc(x) - base)
    assert relative_error(added, np.asarray(x, np.float64) @ delta64(expected.modules["fc"]).T) < 1e-4


def test_the_exact_rank_and_the_provenance_are_written(tmp_path):
    states = [lora_state(seed) for seed in range(3)]
    adapters = [jm.load(save_composite(tmp_path / str(i), state)) for i, state in enumerate(states)]
    jm.save(jm.merge(adapters, [1, 2, 3]), tmp_path / "merged")
    assert (tmp_path / "merged" / "10" / "state").is_dir()
    again = jm.load(tmp_path / "merged")
    for path, lora in jm.merge(adapters, [1, 2, 3]).modules.items():
        assert again.modules[path].rank == 6
        np.testing.assert_array_equal(again.modules[path].a, lora.a)
    record = json.loads((tmp_path / "merged" / "10" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert record["jaxmerge"]["weights"] == [1, 2, 3]
    assert len(record["jaxmerge"]["inputs"]) == 3


def test_what_exists_is_not_overwritten(tmp_path):
    adapter = jm.load(save_v1(tmp_path / "saved", lora_state()))
    with pytest.raises(ValueError, match="already exists"):
        jm.save(adapter, tmp_path / "saved")
    jm.save(jm.merge([adapter], [2.0]), tmp_path / "saved", force=True)
    np.testing.assert_array_equal(jm.load(tmp_path / "saved").modules["fc"].a, 2 * np.asarray(adapter.modules["fc"].a))
    root = save_manager(tmp_path / "root", lora_state())
    with pytest.raises(ValueError, match="neither one checkpoint"):
        jm.save(adapter, root, force=True)
    assert sorted(step.name for step in root.iterdir() if step.name.isdigit()) == ["20", "3"]
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_on_the_command_line(tmp_path, capsys):
    for i in range(2):
        save_training(tmp_path / str(i), qwix_like(i))
    inputs = [str(tmp_path / "0"), str(tmp_path / "1")]
    assert main(["merge", *inputs, "-o", str(tmp_path / "out")]) == 1
    assert "does not store alpha" in capsys.readouterr().err
    assert main(["inspect", inputs[0]]) == 0
    assert "alpha / rank" in capsys.readouterr().out
    assert main(["merge", *inputs, "-o", str(tmp_path / "out"), "--alpha", "4", "8", "--weights", "1", "0.5"]) == 0
    assert "rank 4 = 2×2, exact" in capsys.readouterr().out
    merged = jm.load(tmp_path / "out", alpha=4.0).modules["layers.0.q_proj"]
    sources = [jm.from_state(qwix_like(i), alpha=alpha).modules["layers.0.q_proj"] for i, alpha in ((0, 4.0), (1, 8.0))]
    expected = delta64(sources[0]) + 0.5 * delta64(sources[1])
    assert relative_error(delta64(merged), expected) < 1e-5


def qwix_like(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(8, 2)).astype(np.float32), rng.normal(size=(2, 3, 4)).astype(np.float32)
    return {"layers": {"0": {"q_proj": {"w_lora_a": {"value": a}, "w_lora_b": {"value": b}}}}}


@pytest.mark.parametrize("scanned", [False, True])
def test_maxtext_keeps_alpha_and_rank_in_custom_metadata(tmp_path, scanned):
    """The layout of MaxText's NNX trainer, written by Orbax: names, nesting, and what its custom metadata holds."""

    def tree(seed):
        rng = np.random.default_rng(seed)
        layers = (3,) if scanned else ()
        a = rng.normal(size=(8, *layers, 2)).astype(np.float32)
        b = rng.normal(size=(2, *layers, 3, 4) if not scanned else (2, 3, 12)).astype(np.float32)
        query = {"kernel_lora_a": {"value": a}, "kernel_lora_b": {"value": b}}
        return {"params": {"params": {"decoder": {"layers": {"self_attention": {"query": query}}}}}}

    custom = {"lora": {"lora_rank": 2, "lora_alpha": 6.0, "module_path": ".*"}, "scan_layers": scanned}
    for i in range(2):
        with v0.CheckpointManager(tmp_path / str(i)) as manager:
            manager.save(7, args=v0.args.Composite(items=v0.args.StandardSave(tree(i))), custom_metadata=custom)
    adapters = [
        jm.load(tmp_path / str(i)) for i in range(2)
    ]  # Where the layers lie is told by the metadata and shapes.
    (path,) = adapters[0].modules
    assert path == "decoder.layers.self_attention.query"
    assert adapters[0].modules[path].scale == 3
    assert adapters[0].modules[path].batch == ((3,) if scanned else ())
    jm.save(jm.merge(adapters, [1, -1]), tmp_path / "out")
    again = jm.load(tmp_path / "out")
    assert again.modules[path].scale == 1
    expected = np.asarray(jm.delta(adapters[0].modules[path]) - jm.delta(adapters[1].modules[path]))
    assert relative_error(jm.delta(again.modules[path]), expected) < 1e-5
    written = json.loads((tmp_path / "out" / "7" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert written["lora"] == {"lora_rank": 4, "lora_alpha": 4.0, "module_path": ".*"}


def test_scanned_layers_whose_sizes_leave_it_open_are_not_guessed(tmp_path):
    query = {"kernel_lora_a": np.ones((2, 2, 2), np.float32), "kernel_lora_b": np.ones((2, 2, 4), np.float32)}
    custom = {"lora": {"lora_rank": 2, "lora_alpha": 6.0}, "scan_layers": True}
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", {"decoder": {"layers": {"query": query}}}, custom_metadata=custom)
    with pytest.raises(ValueError, match="axis 0, 1"):
        jm.load(tmp_path / "a")
    assert jm.load(tmp_path / "a", scan_axis=1).modules["decoder.layers.query"].batch == (2,)


def test_a_tree_in_memory_is_written_as_the_format_that_is_named(tmp_path):
    jm.save(jm.from_state(lora_state()), tmp_path / "nnx", format="nnx")
    tree = v1.load(str(tmp_path / "nnx"), checkpointable_name="state")
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(lora_state()), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jm.load(tmp_path / "nnx").modules.keys() == jm.from_state(lora_state()).modules.keys()
    jm.save(jm.from_state(qwix_like(0), alpha=8.0), tmp_path / "tunix", format="tunix")
    assert (tmp_path / "tunix" / "0" / "model_params").is_dir()
    again, source = jm.load(tmp_path / "tunix"), jm.from_state(qwix_like(0), alpha=8.0)
    for path, lora in source.modules.items():
        np.testing.assert_array_equal(jm.delta(again.modules[path]), jm.delta(lora))
    with pytest.raises(ValueError, match="to_state gives it back"):
        jm.save(source, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="give a layout"):
        jm.save(source, tmp_path / "nowhere", format="nnx")


def test_what_jaxmerge_wrote_knows_where_its_layers_lie(tmp_path):
    query = {"kernel_lora_a": np.ones((2, 2, 2), np.float32), "kernel_lora_b": np.ones((2, 2, 4), np.float32)}
    save_standard(tmp_path / "a", {"decoder": {"layers": {"query": query}}})
    jm.save(jm.load(tmp_path / "a", alpha=2.0, scan_axis=1), tmp_path / "b")
    lora = jm.load(tmp_path / "b").modules["decoder.layers.query"]
    assert lora.batch == (2,)
    assert lora.scale == 1


def test_the_state_of_a_training_run_is_left_out(tmp_path, capsys):
    """What MaxText's trainer saves: optimizer moments under the names of the factors, and a step."""

    def tree(seed):
        rng = np.random.default_rng(seed)
        q = {"kernel_lora_a": rng.normal(size=(8, 2)), "kernel_lora_b": rng.normal(size=(2, 6))}
        params = {"params": {"decoder": {"layers_0": {"self_attention": {"query": q}}}}}
        return {"params": params, "opt_state": {"mu": params, "count": np.int32(seed)}, "step": np.int32(seed)}

    custom = {"lora": {"lora_rank": 2, "lora_alpha": 4.0}, "scan_layers": False}
    for i in range(2):
        with v0.CheckpointManager(tmp_path / str(i)) as manager:
            manager.save(7, args=v0.args.Composite(items=v0.args.StandardSave(tree(i))), custom_metadata=custom)
    assert main(["merge", str(tmp_path / "0"), str(tmp_path / "1"), "-o", str(tmp_path / "out")]) == 0
    assert "not carried over: opt_state, step" in capsys.readouterr().out
    merged = jm.load(tmp_path / "out")
    assert list(merged.modules) == ["decoder.layers_0.self_attention.query"]
    assert not merged.extras
    expected = sum(
        delta64(jm.load(tmp_path / str(i)).modules["decoder.layers_0.self_attention.query"]) for i in range(2)
    )
    assert relative_error(delta64(merged.modules["decoder.layers_0.self_attention.query"]), expected / 2) < 1e-5
    assert (tmp_path / "out" / "7" / "items").is_dir()


def test_ranks_that_differ_are_filled_up_where_the_format_has_one(tmp_path, capsys):
    def tree(seed, *layers):
        rng = np.random.default_rng(seed)
        factors = {"kernel_lora_a": rng.normal(size=(8, 2)), "kernel_lora_b": rng.normal(size=(2, 6))}
        return {"decoder": {f"layers_{i}": {"mlp": {"wo": factors}} for i in layers}}

    custom = {"lora": {"lora_rank": 2, "lora_alpha": 4.0}, "scan_layers": False}
    for i, layers in enumerate([(0,), (0, 1)]):
        with v0.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(i), tree(i, *layers), custom_metadata=custom)
    assert main(["merge", str(tmp_path / "0"), str(tmp_path / "1"), "-o", str(tmp_path / "out")]) == 0
    assert "filled up with zeros to rank 4" in capsys.readouterr().out
    again = jm.load(tmp_path / "out")
    assert {lora.rank for lora in again.modules.values()} == {4}
    for path, lora in jm.merge([jm.load(tmp_path / str(i)) for i in range(2)]).modules.items():
        np.testing.assert_allclose(jm.delta(again.modules[path]), jm.delta(lora), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("swapped", [False, True])
def test_maxtexts_older_form_with_its_adapter_config(tmp_path, swapped):
    """Keys with a dot in them, layers at axis 1 behind the heads, and rank and alpha in PEFT's configuration."""

    def save(seed):
        rng = np.random.default_rng(seed)
        out_b = rng.normal(size=(8, 3, 2) if swapped else (2, 3, 8)).astype(np.float32)
        attention = {
            "query": {
                "lora_a.kernel": rng.normal(size=(8, 3, 2)).astype(np.float32),
                "lora_b.kernel": rng.normal(size=(2, 3, 4, 5)).astype(np.float32),
                "kernel": None,
            },
            "out": {"lora_a.kernel": rng.normal(size=(4, 3, 5, 2)).astype(np.float32), "lora_b.kernel": out_b},
        }
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}))
        tree = {"params": {"params": {"decoder": {"layers": {"self_attention": attention}}}}, "step": np.int32(0)}
        with v0.CheckpointManager(folder) as manager:
            manager.save(0, args=v0.args.Composite(items=v0.args.PyTreeSave(tree)))
        return attention

    def deltas(attention):
        a, b = (attention["query"][f"lora_{factor}.kernel"] for factor in "ab")
        out_a, out_b = (attention["out"][f"lora_{factor}.kernel"] for factor in "ab")
        return (
            np.einsum("elr,rlnd->elnd", a.astype(np.float64), b),
            np.einsum("nldr,elr->nlde" if swapped else "nldr,rle->nlde", out_a.astype(np.float64), out_b),
        )

    expected = [
        3.0 * (0.5 * one + 2 * two) for one, two in zip(*[deltas(save(seed)) for seed in range(2)], strict=True)
    ]
    merged = jm.merge([jm.load(tmp_path / str(seed)) for seed in range(2)], [0.5, 2])
    jm.save(merged, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (4, 4, ["q_proj"])
    tree = v1.load(str(tmp_path / "out" / "0"), checkpointable_name="items")
    got = deltas(tree["params"]["params"]["decoder"]["layers"]["self_attention"])
    for one, wanted in zip(got, expected, strict=True):
        assert relative_error(one, wanted) < 1e-5


@pytest.fixture
def tunix_like(tmp_path):
    """Two roots of qwix trees, and the command that merges them."""
    roots = [save_training(tmp_path / name, qwix_like(seed)) for seed, name in enumerate(("a", "b"))]

    def merge(*options, inputs=roots, alpha=("4",)):
        return main(["merge", *map(str, inputs), *map(str, options), "--alpha", *alpha])

    return roots, merge


@pytest.mark.parametrize("content", ["chapter.txt", "sub/x", "5/x", ".git/config"])
def test_force_replaces_checkpoints_alone(tmp_path, tunix_like, capsys, content):
    _, merge = tunix_like
    mine = tmp_path / "thesis" / content
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    assert merge("-o", tmp_path / "thesis", "--force") == 1
    assert "so --force does not replace it" in capsys.readouterr().err
    assert mine.read_text() == "precious"


def test_force_keeps_notes_and_optimizer_states(tmp_path, tunix_like, capsys):
    _, merge = tunix_like
    flat = save_standard(tmp_path / "flat", qwix_like(0))
    (flat / "notes.txt").write_text("mine")
    assert merge("-o", flat, "--force") == 1
    assert (flat / "notes.txt").exists()
    with v0.CheckpointManager(tmp_path / "run") as manager:
        items = {name: v0.args.StandardSave(qwix_like(0)) for name in ("model_params", "optimizer_state")}
        manager.save(5, args=v0.args.Composite(**items))
    assert merge("-o", tmp_path / "run" / "5", "--force") == 1
    assert (tmp_path / "run" / "5" / "optimizer_state").is_dir()


def test_force_replaces_what_a_killed_merge_left(tmp_path, tunix_like, capsys):
    _, merge = tunix_like
    left = tmp_path / "out" / "10.orbax-checkpoint-tmp" / "model_params"
    left.mkdir(parents=True)
    assert main(["inspect", str(tmp_path / "out")]) == 1
    assert "only unfinished steps" in capsys.readouterr().err
    assert merge("-o", tmp_path / "out", "--force") == 0
    assert merge("-o", tmp_path / "out", "--force") == 0
    assert jm.load(tmp_path / "out").modules


def test_inputs_are_not_overwritten(tmp_path, tunix_like, capsys):
    roots, merge = tunix_like
    step = next(entry for entry in roots[0].iterdir() if entry.name.isdigit())
    before = sorted(entry.name for entry in step.iterdir())
    for output, inputs, told in (
        (step, roots, "lies inside"),
        (step / "model_params" / "out", roots, "lies inside"),
        (step, [step, roots[1]], "would be overwritten"),
        (roots[0], [step, roots[1]], "would be overwritten"),
    ):
        assert merge("-o", output, "--force", inputs=inputs) == 1
        assert told in capsys.readouterr().err
    convert = ["--format", "qwix", "--layout", "qwen3", "--alpha", "4", "--force"]
    assert main(["convert", str(step), str(step), *convert]) == 1
    assert "would be overwritten" in capsys.readouterr().err
    assert sorted(entry.name for entry in step.iterdir()) == before


def test_an_alpha_that_contradicts_the_checkpoints_own_is_refused(tmp_path, tunix_like, capsys):
    roots, merge = tunix_like
    assert merge("-o", tmp_path / "once", alpha=("4", "8")) == 0
    assert merge("-o", tmp_path / "twice", inputs=[tmp_path / "once", roots[0]]) == 0  # Its rank is 4.
    assert merge("-o", tmp_path / "thrice", inputs=[tmp_path / "twice", roots[0]]) == 1
    assert (
        "alpha 4.0 was given, but the checkpoint itself says that it is each module's rank" in capsys.readouterr().err
    )
    assert merge("-o", tmp_path / "thrice", inputs=[tmp_path / "twice", roots[0]], alpha=("rank", "4")) == 0


@pytest.mark.parametrize(
    "custom",
    [
        {"lora": 5},
        {"lora": {"lora_alpha": [1]}},
        {"lora": {"lora_alpha": "x"}},
        {"lora": {"lora_alpha": True}},
        {"jaxmerge": []},
        {"jaxmerge": {"format": [], "base_model": {}}},
        {"scan_layers": "yes"},
    ],
)
def test_custom_metadata_of_any_kind_is_read_or_refused_in_a_line(tmp_path, custom):
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", qwix_like(0), custom_metadata=custom)
    if isinstance(custom.get("lora"), dict):
        with pytest.raises(ValueError, match=r"lora_alpha in its custom metadata is .*, not a number"):
            jm.load(tmp_path / "a")
    else:
        assert jm.load(tmp_path / "a", alpha=4.0).modules["layers.0.q_proj"].scale == 2


@pytest.mark.parametrize("text", ["", "[1]", "nonsense", '{"lora_alpha": [2]}'])
def test_a_broken_adapter_config_beside_a_checkpoint_is_named(tmp_path, text):
    root = save_training(tmp_path / "a", qwix_like(0))
    (root / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        jm.load(root)
