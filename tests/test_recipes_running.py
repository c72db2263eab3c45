"""What recipes do: values at modules, chains, and the same bytes again."""

import dataclasses
import fnmatch
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.io.recipe_file import dump, located, moved, rebased
from jaxmerge.recipes.model import Gradient, Recipe, Rule, Rules, Source, Stage
from jaxmerge.recipes.nodes import parse
from tests.recipes import ADAPTERS, PATHS, arrays, assert_same, contents, problems, write, write_three


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("recipes")
    write_three(made)
    return made


@pytest.fixture(scope="module")
def three(folder):
    return [jm.load(folder / name) for name in "abc"]


def merged(folder, text, name="recipe.yaml"):
    (folder / name).write_text(text)
    return jm.merge_recipe(folder / name)


def layer(path):
    return 0 if path == "lm_head" else int(path.split(".")[2])


def on_gradient(points, path):
    """By hand: points at layers 0 to 3, evenly spaced."""
    at = layer(path) / 3 * (len(points) - 1)
    i = min(int(at), len(points) - 2)
    return points[i] + (points[i + 1] - points[i]) * (at - i)


def of(adapter, value):
    return {path: value(path) for path in adapter.modules}


# Values.


def test_a_gradient_is_a_mapping_by_depth(folder, three):
    got = merged(
        folder, "adapters: [{path: a, weight: [0, 1]}, {path: b, weight: [1, 0.5, -2]}, {path: c, weight: 2}]\n"
    )
    weights = [
        of(three[0], lambda path: layer(path) / 3),
        of(three[1], lambda path: on_gradient([1, 0.5, -2], path)),
        2,
    ]
    assert_same(got, jm.merge(three, weights))


def test_depth_is_of_the_whole_model_and_not_of_the_modules_that_an_adapter_has(tmp_path):
    whole, half = write(tmp_path / "whole", 1), write(tmp_path / "half", 2, paths=PATHS[:6])
    got = merged(tmp_path, "adapters: [{path: whole, weight: 1}, {path: half, weight: [0, 3]}]\n")
    assert_same(got, jm.merge([whole, half], [1, of(half, layer)]))


def test_rules_are_a_mapping_by_pattern(folder, three):
    text = """
adapters:
  - path: a
    weight: [{match: "*.self_attn.*", value: 0.3}, {match: "*.layers.[01].mlp.*", value: [1, 7]}, {value: -1}]
  - {path: b, weight: 1}
  - {path: c, weight: 1}
"""

    def weight(path):
        if fnmatch.fnmatchcase(path, "*.self_attn.*"):
            return 0.3
        return on_gradient([1, 7], path) if layer(path) < 2 else -1

    assert_same(merged(folder, text), jm.merge(three, [of(three[0], weight), 1, 1]))


def test_hyperparameters_vary_by_module_and_by_adapter(tmp_path):
    text = """
adapters:
  - {path: a, density: 0.9}
  - path: b
    density: [{match: "*.mlp.*", value: [0.2, 0.5]}, {value: 0.4}]
  - c
method: ties
density: [0.1, 0.7]
space: factors
"""
    few = [path for path in PATHS if "v_proj" not in path]
    sources = [write(tmp_path / "a", 1), write(tmp_path / "b", 2), write(tmp_path / "c", 3, paths=few)]
    by_depth = {path: on_gradient([0.1, 0.7], path) for path in PATHS}
    second = {path: on_gradient([0.2, 0.5], path) if ".mlp." in path else 0.4 for path in PATHS}
    # What stands for an adapter without the module is of no account.
    own = {path: [0.9, second[path], by_depth[path] if path in few else 1.0] for path in PATHS}
    assert_same(merged(tmp_path, text), jm.merge(sources, method="ties", space="factors", density=own))
    one_for_all = "adapters: [a, b, c]\nmethod: ties\nspace: factors\ndensity: [0.1, 0.7]\n"
    assert_same(merged(tmp_path, one_for_all), jm.merge(sources, method="ties", space="factors", density=by_depth))


def test_an_adapter_without_its_own_has_the_methods_default(folder):
    """The default of gamma is 0.01, and that of the first adapter another."""
    got = merged(folder, "adapters: [{path: a, gamma: 0.2}, b]\nmethod: breadcrumbs\ndensity: 0.5\n")
    sources = [jm.load(folder / name) for name in "ab"]
    assert_same(got, jm.merge(sources, method="breadcrumbs", density=0.5, gamma=[0.2, 0.01]))


def test_ranks_and_stages_vary(folder, three):
    text = "adapters: [a, b]\nrank: [{match: '*.q_proj', value: [1, 4]}, {value: 2}]\n"
    text += "stages: [{scale: {factor: [1, 0.4]}}]\n"
    rank = {path: round(on_gradient([1, 4], path)) if "q_proj" in path else 2 for path in PATHS}
    factor = {path: on_gradient([1, 0.4], path) for path in PATHS}
    got = merged(folder, text)
    assert {path: lora.rank for path, lora in got.modules.items()} == rank
    assert_same(got, jm.merge(three[:2], rank=rank, stages=[("scale", {"factor": factor})]))


def test_everything_else_is_an_argument_of_the_same_name(folder, three):
    text = """
adapters: [{path: a, weight: 1}, {path: b, weight: -0.5}]
method: dare_ties
space: knots
density: 0.6
majority_sign_method: frequency
seed: 11
rank: 4
dtype: bfloat16
stages: [calibrate, {norm_restore: {scope: whole}}, {lines: {alpha: 0.5}}]
"""
    expected = jm.merge(
        three[:2], [1, -0.5], method="dare_ties", space="knots", density=0.6, majority_sign_method="frequency",
        key=jax.random.key(11), rank=4, dtype="bfloat16",
        stages=["calibrate", ("norm_restore", {"scope": "whole"}), ("lines", {"alpha": 0.5})],
    )  # fmt: skip
    assert_same(merged(folder, text), expected)


def test_combination_types_and_rules_for_ranks(folder, three):
    got = merged(folder, "adapters: [a, b]\ncombination_type: ties_svd\ndensity: 0.5\nrank: 2\n")
    assert_same(got, jm.merge(three[:2], combination_type="ties_svd", density=0.5, rank=2))
    # PEFT takes one adapter as it is.
    assert_same(
        merged(folder, "adapters: [a]\ncombination_type: ties_svd\n"), jm.merge(three[:1], combination_type="svd")
    )
    got = merged(folder, "adapters: [a, b]\nenergy: 0.8\nmax_rank: 3\n")
    whole = jm.merge(three[:2])
    expected = jm.resize(whole, energy=0.8, max_rank=3)
    for path, lora in expected.modules.items():
        np.testing.assert_array_equal(got.modules[path].a, lora.a)
    assert all(float(got.energy[path].kept) == pytest.approx(float(x.kept)) for path, x in expected.energy.items())


def test_extras_are_named(tmp_path):
    for i, name in enumerate("ab"):
        one = jm.load(ADAPTERS / ("sms", "movie")[i])
        extras = {"classifier.weight": np.full((2, 3), i, np.float32)}
        jm.save(dataclasses.replace(one, extras=extras), tmp_path / name)
    adapters = "adapters: [{path: a, name: first}, b]\n"
    assert problems(adapters, tmp_path) == [
        "recipe.yaml: extras='same' does not settle these tensors, which are not LoRA factors and differ between the "
        "adapters: classifier.weight; use the mean of them (extras 'average') or one adapter's"
    ]
    for chosen, value in {"first": 0, "b": 1, "2": 1, "1": 0, "average": 0.5}.items():
        got = merged(tmp_path, f"{adapters}extras: {chosen}\n")
        assert np.unique(got.extras["classifier.weight"]) == [value]


# Chains.

INNER = "adapters: [{path: a, weight: 0.5}, {path: b, weight: -1}]\nmethod: ties\ndensity: 0.6\nspace: core\nrank: 3\n"


@pytest.mark.parametrize("inline", [False, True])
def test_a_chain_is_merging_twice(folder, three, tmp_path, inline):
    (folder / "inner.yaml").write_text(INNER)
    inner = "\n      ".join(["", *INNER.splitlines()]) if inline else " inner.yaml"
    text = f"adapters:\n  - recipe:{inner}\n    name: both\n    weight: 2\n  - {{path: c, weight: 1}}\n"
    once = jm.merge(three[:2], [0.5, -1], method="ties", density=0.6, space="core", rank=3)
    got = merged(folder, text)
    assert_same(got, jm.merge([once, three[2]], [2, 1]))
    # And so is merging by way of a file.
    jm.save(once, tmp_path / "once")
    assert_same(got, jm.merge([jm.load(tmp_path / "once"), three[2]], [2, 1]))
    record = json.loads(got.metadata.provenance)
    assert record["inputs"][0]["name"] == "both"
    assert record["inputs"][0]["method"] == "ties"
    assert [Path(source["path"]).name for source in record["inputs"][0]["inputs"]] == ["a", "b"]
    assert "recipe" not in record["inputs"][0]
    assert record["inputs"][0]["energy_kept"] == pytest.approx(float(jm.energy_kept(once)))


def test_the_result_of_a_recipe_inside_goes_on_in_the_dtype_of_the_outer_one(three, tmp_path):
    halves = [dataclasses.replace(one, modules={p: _half(lora) for p, lora in one.modules.items()}) for one in three]
    for name, one in zip("abc", halves, strict=True):
        jm.save(one, tmp_path / name)
    text = "adapters: [a, {recipe: {adapters: [b, c], rank: 2}}]\n"
    (tmp_path / "recipe.yaml").write_text(text + "dtype: float32\n")
    found = jm.merge_recipe(tmp_path / "recipe.yaml")
    first, *others = [jm.load(tmp_path / name) for name in "abc"]
    expected = jm.merge([first, jm.merge(others, rank=2, dtype="float32")], dtype="float32")
    assert_same(found, expected)
    (tmp_path / "recipe.yaml").write_text(text)
    assert {str(lora.a.dtype) for lora in jm.merge_recipe(tmp_path / "recipe.yaml").modules.values()} == {"float16"}


def _half(lora):
    return dataclasses.replace(lora, a=np.asarray(lora.a).astype(np.float16), b=np.asarray(lora.b).astype(np.float16))


def test_a_chain_of_chains_in_other_folders(folder, three, tmp_path):
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "one.yaml").write_text(f"adapters: [{os.path.relpath(folder / 'a', deep)}]\n")
    (deep / "two.yaml").write_text(f"adapters: [{{recipe: one.yaml}}, {folder / 'b'}]\n")
    got = merged(tmp_path, "adapters: [{recipe: deep/two.yaml}, {recipe: deep/one.yaml}]\n")
    one = jm.merge(three[:1], [1])
    assert_same(got, jm.merge([jm.merge([one, three[1]]), one]))
    jm.save(got, tmp_path / "out" / "merged")
    written = (tmp_path / "out" / "merged" / "recipe.yaml").read_text()
    assert written.count(f"path: {os.path.relpath(folder / 'a', tmp_path / 'out' / 'merged')}\n") == 2
    assert written.count(f"path: {folder / 'b'}\n") == 1
    assert_same(jm.merge_recipe(tmp_path / "out" / "merged" / "recipe.yaml"), got)


def test_problems_of_inner_recipes_have_their_own_files_and_lines(folder):
    (folder / "inner.yaml").write_text("adapters: [a, d]\nmethod: tise\n")
    text = "adapters:\n  - recipe: inner.yaml\n  - recipe:\n      adapters: [b]\n      rank: 50\n      format: peft\n"
    assert problems(text + "rank: x\n", folder) == [
        "recipe.yaml:6: format says what is written, and a recipe inside of another writes nothing",
        "recipe.yaml:7: rank should be a number, got 'x'",
        "inner.yaml:1: d: there is no such folder",
        "inner.yaml:2: unknown method tise; did you mean ties?",
    ]
    assert problems("adapters:\n  - recipe:\n      adapters: [b]\n      rank: 50\n", folder) == [
        "recipe.yaml:3: rank 50 is more than any module can hold: the largest possible is 2"
    ]
    assert problems("adapters: [{recipe: none.yaml, sha256: " + "ab" * 32 + "}]\n", folder) == [
        "recipe.yaml:1: sha256 is of files, and a recipe's result is none",
        "none.yaml: cannot be read: No such file or directory",
    ]


def test_a_recipe_that_needs_its_own_result(folder):
    (folder / "x.yaml").write_text("adapters: [a, {recipe: y.yaml}]\n")
    (folder / "y.yaml").write_text("adapters: [b, {recipe: z.yaml}]\n")
    assert problems("adapters: [c, {recipe: x.yaml}]\n", folder, "z.yaml") == [
        "y.yaml:1: the recipe needs its own result: z.yaml needs x.yaml needs y.yaml needs z.yaml"
    ]
    assert problems("adapters: [{recipe: recipe.yaml}]\n", folder) == [
        "recipe.yaml:1: the recipe needs its own result: recipe.yaml needs recipe.yaml"
    ]


def test_shapes_of_inner_results_are_known_before_they_are_made(folder, tmp_path):
    write(tmp_path / "small", 1, rank=2)
    text = f"adapters:\n  - recipe: {{adapters: [{folder / 'a'}, {folder / 'b'}]}}\n  - small\n"
    assert problems(text + "method: ties\ndensity: 0.5\nspace: factors\n", tmp_path)[0] == (
        "recipe.yaml: space factors, module model.layers.0.mlp.up_proj: the ranks differ (5, 2), and factors of "
        "different ranks cannot be summed; the exact merge takes any ranks: method linear in space full "
        "(combination_type cat, or svd with a rank)"
    )


# The files that are there.


def test_other_files_than_the_recipe_was_written_for(folder):
    own = hashlib.sha256((folder / "a" / "adapter_model.safetensors").read_bytes()).hexdigest()
    config = hashlib.sha256((folder / "a" / "adapter_config.json").read_bytes()).hexdigest()
    assert problems(f"adapters: [{{path: a, sha256: {own}, config_sha256: {config}}}, b]\n", folder) == []
    text = f"adapters:\n  - {{path: a, sha256: {own[::-1]}}}\n  - {{path: b, config_sha256: {own}}}\n"
    found = problems(text, folder)
    assert found == [
        f"recipe.yaml:2: a: is another file than the recipe says: sha256 is not {own[::-1]}, the file's is {own}",
        f"recipe.yaml:3: b: adapter_config.json: is another file than the recipe says: config_sha256 is not {own}, the "
        f"file's is {hashlib.sha256((folder / 'b' / 'adapter_config.json').read_bytes()).hexdigest()}",
    ]
    # Before anything is merged, however deep it is.
    inner = f"adapters:\n  - recipe:\n      adapters: [{{path: a, sha256: {own[::-1]}}}]\n  - b\n"
    assert problems(inner, folder)[0].startswith("recipe.yaml:3: a: is another file")


def test_the_same_adapter_under_two_paths(folder, tmp_path):
    shutil.copytree(folder / "a", tmp_path / "a")
    shutil.copytree(folder / "a", tmp_path / "b")
    assert problems("adapters: [a, b]\n", tmp_path) == [
        "recipe.yaml:1: b: is the same adapter as a; one weight for it says the same"
    ]


# The recipe beside the result.

ALL = """
adapters:
  - path: a
    name: maths
    weight: [1, 0.5, -0.25]
    density: 0.3
  - path: b
    weight: 1.5
    density: [{match: "*.self_attn.*", value: [0.2, 0.4]}, {value: 0.5}]
  - recipe:
      adapters: [{path: c, weight: 0.7}, {path: a, weight: 1}]
      method: dare_linear
      density: 0.5
      seed: 1
      rank: 2
    weight: [{match: "*.layers.0.*", value: 2}, {value: 1}]
method: ties
density: 0.25
election: weighted
energy: 0.99
stages: [calibrate, {scale: {factor: [2, 1e-2]}}]
extras: 1
"""


@pytest.mark.parametrize("text", [ALL, "adapters: [a, b]\n", INNER, "adapters: [a, b]\ncombination_type: svd\n"])
def test_the_recipe_beside_a_result_makes_it_again_byte_for_byte(folder, tmp_path, monkeypatch, text):
    monkeypatch.chdir(folder)
    jm.save(merged(folder, text), tmp_path / "first")
    first = contents(tmp_path / "first")
    assert list(first) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "jaxmerge.json",
        "recipe.yaml",
    ]
    for cwd, name in ((folder, "second"), (tmp_path, "third"), (tmp_path / "first", "fourth")):
        monkeypatch.chdir(cwd)
        jm.save(jm.merge_recipe(os.path.relpath(tmp_path / "first" / "recipe.yaml")), tmp_path / name)
        again = contents(tmp_path / name)
        assert again["recipe.yaml"] == first["recipe.yaml"]
        assert again["adapter_model.safetensors"] == first["adapter_model.safetensors"]
    assert contents(tmp_path / "second") == first


def test_the_recipe_beside_a_result_in_full(folder, tmp_path):
    jm.save(merged(folder, ALL), tmp_path / "out")
    to = os.path.relpath(folder, tmp_path / "out")

    def hashes(name, indent):
        files = {"sha256": "adapter_model.safetensors", "config_sha256": "adapter_config.json"}
        lines = [
            f"{key}: {hashlib.sha256((folder / name / file).read_bytes()).hexdigest()}" for key, file in files.items()
        ]
        return f"\n{' ' * indent}".join(lines)

    written = (tmp_path / "out" / "recipe.yaml").read_text()
    head, written = written.split("\n", 1)
    assert head.startswith("# What made this, by jaxmerge ")
    assert (
        written
        == f"""\
# Paths are relative to this file; sha256 is checked.
adapters:
  - path: {to}/a
    name: maths
    weight: [1, 0.5, -0.25]
    {hashes("a", 4)}
    density: 0.3
  - path: {to}/b
    weight: 1.5
    {hashes("b", 4)}
    density:
      - {{match: '*.self_attn.*', value: [0.2, 0.4]}}
      - {{value: 0.5}}
  - recipe:
      adapters:
        - path: {to}/c
          weight: 0.7
          {hashes("c", 10)}
        - path: {to}/a
          weight: 1
          {hashes("a", 10)}
      method: dare_linear
      space: full
      density: 0.5
      rank: 2
      seed: 1
    weight:
      - {{match: '*.layers.0.*', value: 2}}
      - {{value: 1}}
method: ties
space: full
divisor: count
election: weighted
majority_sign_method: total
density: 0.25
energy: 0.99
stages:
  - calibrate:
      floor: 0.1
  - scale:
      factor: [2, 0.01]
extras: maths
"""
    )


def test_defaults_are_written_out(folder, tmp_path):
    jm.save(merged(folder, "adapters: [a, b, {path: c}]\nmethod: karcher\nspace: core\n"), tmp_path / "out")
    recipe = jm.read_recipe(tmp_path / "out" / "recipe.yaml")
    assert [source.weight for source in recipe.adapters] == [1.0, 1.0, 1.0]
    assert recipe.hyperparameters == {"max_iter": 10, "tol": 1e-5}
    jm.save(merged(folder, "adapters: [a, b, c]\n"), tmp_path / "linear")
    recipe = jm.read_recipe(tmp_path / "linear" / "recipe.yaml")
    assert [source.weight for source in recipe.adapters] == [1 / 3] * 3
    assert (recipe.method, recipe.space) == ("linear", "full")


def test_a_merge_without_a_recipe_leaves_none(three, tmp_path):
    jm.save(jm.merge(three), tmp_path / "out")
    assert "recipe.yaml" not in contents(tmp_path / "out")


def test_the_provenance_does_not_repeat_the_recipe(folder, tmp_path):
    jm.save(merged(folder, ALL), tmp_path / "out")
    record = (tmp_path / "out" / "jaxmerge.json").read_text()
    assert '"recipe"' not in record
    assert '"recipe_folder"' not in record


def test_a_result_replaces_another_with_its_recipe(folder, three, tmp_path):
    jm.save(merged(folder, ALL), tmp_path / "out")
    jm.save(jm.merge(three), tmp_path / "out", force=True)
    assert "recipe.yaml" not in contents(tmp_path / "out")


def test_a_recipe_may_be_made_in_python(folder, three):
    recipe = Recipe(
        adapters=(
            Source(str(folder / "a"), weight=Gradient((0, 1))),
            Source(str(folder / "b"), weight=Rules((Rule("*.mlp.*", 2), Rule(None, 1)))),
        ),
        stages=(Stage("scale", {"factor": 0.5}),),
    )
    weights = [of(three[0], lambda path: layer(path) / 3), of(three[1], lambda path: 2 if ".mlp." in path else 1)]
    assert_same(jm.merge_recipe(recipe), jm.merge(three[:2], weights, stages=[("scale", {"factor": 0.5})]))
    wrong = dataclasses.replace(recipe, method="tise", rank=0)
    with pytest.raises(
        ValueError, match=r"\Aunknown method tise; did you mean ties\?\nrank should be at least 1, got 0\Z"
    ):
        jm.merge_recipe(wrong)
    with pytest.raises(ValueError, match=r"\Aan adapter has a path or a recipe\Z"):
        jm.merge_recipe(Recipe((Source(),)))


def test_memory_and_mesh_change_nothing(folder):
    (folder / "all.yaml").write_text(ALL)
    expected = jm.merge_recipe(folder / "all.yaml")
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    assert_same(jm.merge_recipe(folder / "all.yaml", memory="10MB"), expected)
    got = jm.merge_recipe(folder / "all.yaml", mesh=mesh)
    for path, (a, b) in arrays(expected).items():
        np.testing.assert_array_equal(np.asarray(got.modules[path].a), a)
        np.testing.assert_array_equal(np.asarray(got.modules[path].b), b)


def test_the_real_adapters(tmp_path):
    text = f"""
adapters:
  - {{path: {ADAPTERS}/sms, weight: [1, 0.5]}}
  - {{path: {ADAPTERS}/movie, weight: 0.5}}
  - {{path: {ADAPTERS}/names, weight: 0.5}}
method: ties
space: knots
density: [{{match: "*.attention.*", value: 0.3}}, {{value: 0.6}}]
rank: 16
"""
    sources = [jm.load(ADAPTERS / name) for name in ("sms", "movie", "names")]
    first = {path: 1 - 0.5 * int(path.split(".")[2]) / 5 for path in sources[0].modules}
    density = {path: 0.3 if ".attention." in path else 0.6 for path in sources[0].modules}
    expected = jm.merge(sources, [first, 0.5, 0.5], method="ties", space="knots", density=density, rank=16)
    assert_same(merged(tmp_path, text), expected)


# Trees of Flax.


def qwix(folder, seed):
    """A checkpoint with an alpha that it does not hold."""
    import orbax.checkpoint as ocp

    rng = np.random.default_rng(seed)
    tree = {
        "layers": {
            str(layer): {"q": {"w_lora_a": rng.normal(size=(8, 3)).astype(np.float32),
                               "w_lora_b": rng.normal(size=(3, 6)).astype(np.float32)}}
            for layer in range(2)
        }
    }  # fmt: skip
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def test_checkpoints_of_flax_have_their_recipe_beside_them_too(tmp_path):
    for i, name in enumerate("ab"):
        qwix(tmp_path / name, i)
    text = "adapters: [{path: a, alpha: 6, weight: [1, 2]}, {path: b, alpha: rank, weight: 1}]\nrank: 3\n"
    assert problems(text.replace("alpha: 6, ", ""), tmp_path) != []
    got = merged(tmp_path, text)
    sources = [jm.load(tmp_path / "a", alpha=6), jm.load(tmp_path / "b", alpha="rank")]
    assert_same(got, jm.merge(sources, [{"layers.0.q": 1, "layers.1.q": 2}, 1], rank=3))
    jm.save(got, tmp_path / "out")
    assert (tmp_path / "out" / "recipe.yaml").is_file()
    again = jm.merge_recipe(tmp_path / "out" / "recipe.yaml")
    assert_same(again, got)
    jm.save(again, tmp_path / "again")
    assert (tmp_path / "again" / "recipe.yaml").read_bytes() == (tmp_path / "out" / "recipe.yaml").read_bytes()
    # What lies beside the checkpoint is in nobody's way.
    assert len(jm.load(tmp_path / "out").modules) == 2
    jm.save(again, tmp_path / "out", force=True)
    assert_same(jm.load(tmp_path / "out"), jm.load(tmp_path / "again"))


# Paths.


def test_paths_are_told_from_where_one_is(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert located(str(tmp_path / "here"), "a/./b") == "a/b"
    assert located(str(tmp_path / "there"), "a") == "../there/a"
    assert located("../there", "../here/a") == "a"
    assert located("../there", "/x/a") == "/x/a"
    assert located("../there", "gs://x/a") == "gs://x/a"
    monkeypatch.chdir("/usr")
    assert located(str(tmp_path / "there"), "a") == str(tmp_path / "there" / "a")
    assert rebased(str(tmp_path / "there"), "a", str(tmp_path / "there" / "deep")) == "../a"
    (tmp_path / "link").symlink_to(tmp_path / "there" / "deep")
    assert Path(located(str(tmp_path / "link"), "../a")).resolve() == tmp_path / "there" / "a"
    assert rebased(str(tmp_path / "link"), "../a", str(tmp_path)) == "there/a"


def test_tables_of_layouts_move_with_the_recipe():
    recipe = {"adapters": [{"path": "a"}], "layout": "table.json"}
    assert moved(recipe, "/x/y", "/x/z")["layout"] == "../y/table.json"
    assert moved({**recipe, "layout": "llama3"}, "/x/y", "/x/z")["layout"] == "llama3"
    assert moved(recipe, "/x/y", "gs://x/z")["adapters"] == [{"path": "/x/y/a"}]


TEXTS = ["1", "1e5", "1e-5", "no", "null", "~", "", "a: b", "#x", "- a", "é\n"]


@pytest.mark.parametrize("value", [*TEXTS, 1e-5, 1 / 3, 1e300, -0.0, 3, True, [], [1, 2.5], [{"value": [1, 2]}]])
def test_what_is_written_is_what_is_read(value):
    found = []
    node = parse(dump({"x": value, "list": [value]}), "x", found)
    assert found == []
    assert node.plain() == {"x": value, "list": [value]}
    assert type(node.plain()["x"]) is type(value)
