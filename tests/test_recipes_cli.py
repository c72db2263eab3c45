"""Recipes from the command line, and options as recipes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.cli import build_parser, main
from jaxmerge.cli.actions.asked import recipe_of
from jaxmerge.io.recipe_file import located
from jaxmerge.recipes import keys
from jaxmerge.recipes.model import Gradient, Recipe, Source, Stage
from tests.recipes import ADAPTERS, assert_same, contents, write_three

SMS, MOVIE, NAMES = (str(ADAPTERS / name) for name in ("sms", "movie", "names"))
RECIPE = """\
adapters:
  - {path: a, name: maths, weight: [1, 0.5]}
  - {path: b, weight: 0.7, density: 0.4}
method: ties
density: 0.6
stages: [calibrate]
rank: 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("recipes")
    write_three(made)
    (made / "recipe.yaml").write_text(RECIPE)
    return made


def run(*arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code


def told(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return [line.removeprefix("jaxmerge: ") for line in err.splitlines()]


def test_a_recipe_is_merged(folder, tmp_path, capsys):
    run("merge", folder / "recipe.yaml", "-o", tmp_path / "out")
    assert_same(jm.load(tmp_path / "out"), jm.merge_recipe(folder / "recipe.yaml"))
    summary = capsys.readouterr().out
    assert (
        "method ties, space full, majority_sign_method total, election unweighted, divisor count, density 0.6, 0.4, "
        in summary
    )
    assert "then calibrate floor 0.1" in summary
    assert f"maths ({located(str(folder), 'a')})" in summary
    assert "0.5 … 1" in summary


def test_again_byte_for_byte(folder, tmp_path):
    """In processes of their own, and wherever the working directory is."""
    for source, out, cwd in (
        (folder / "recipe.yaml", tmp_path / "first", folder),
        (tmp_path / "first" / "recipe.yaml", tmp_path / "second", tmp_path),
        (tmp_path / "second" / "recipe.yaml", tmp_path / "third", folder),
    ):
        command = [
            sys.executable,
            "-m",
            "jaxmerge",
            "merge",
            os.path.relpath(source, cwd),
            "-o",
            os.path.relpath(out, cwd),
        ]
        subprocess.run(command, check=True, cwd=cwd, capture_output=True)
    first, second, third = (contents(tmp_path / name) for name in ("first", "second", "third"))
    assert third == first
    assert {name: second[name] for name in ("recipe.yaml", "adapter_model.safetensors", "adapter_config.json")} == {
        name: first[name] for name in ("recipe.yaml", "adapter_model.safetensors", "adapter_config.json")
    }


FLAGS = [
    ["--weights", "1", "-0.5"],
    ["--method", "dare_ties", "--density", "0.6", "--seed", "3", "--space", "knots", "--election", "weighted"],
    ["--combination-type", "ties_svd", "--density", "0.5", "--rank", "2"],
    ["--energy", "0.9", "--max-rank", "3", "--dtype", "bfloat16"],
    ["--method", "ties", "--density", "0.3", "--density-scope", "model"],
    ["--stage", "calibrate", "--stage", "scale:0.5", "--extras", "2", "--allow-different-bases"],
]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_what_flags_say_lies_beside_the_result_as_a_recipe(folder, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(folder)
    run("merge", "a", "./b", "-o", tmp_path / "first", *flags)
    run("merge", tmp_path / "first" / "recipe.yaml", "-o", tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_flags_become_the_keys_of_the_same_names():
    parser = build_parser()
    text = (
        "merge a b -o out --weights 1 2 --method ties --density 0.5 --stage scale:factor=2 --rank 3 --extras average "
        "--allow-different-bases --alpha rank 4 --item x --scan-axis 1 --tree qwix --format tunix --layout llama3 "
        "--head-dim 8 --layers 4 --dtype float32 --seed 5 --density-scope model --majority-sign-method frequency"
    )
    shared = {"item": "x", "scan_axis": 1, "tree": "qwix"}
    assert recipe_of(parser.parse_args(text.split())) == Recipe(
        adapters=(
            Source("a", weight=1.0, reading={"alpha": "rank", **shared}),
            Source("b", weight=2.0, reading={"alpha": 4.0, **shared}),
        ),
        method="ties",
        hyperparameters={"density": 0.5, "majority_sign_method": "frequency"},
        rank=3,
        stages=(Stage("scale", {"factor": 2}),),
        density_scope="model",
        dtype="float32",
        seed=5,
        extras="average",
        allow_different_bases=True,
        format="tunix",
        layout="llama3",
        head_dim=8,
        layers=4,
    )


# A value for each option that says how to merge.
VALUES = {
    "method": ["ties"], "space": ["full"], "combination_type": ["svd"], "rank": ["2"], "stage": ["calibrate"],
    "weights": ["1", "2"], "seed": ["0"], "energy": ["0.5"], "sv_ratio": ["2"], "sv_fro": ["0.5"],
    "sv_cumulative": ["0.5"], "max_rank": ["2"],
    "density_scope": ["module"], "dtype": ["float32"], "format": ["peft"], "layout": ["llama3"],
    "head_dim": ["4"], "layers": ["2"], "extras": ["same"], "allow_different_bases": [], "alpha": ["1"], "item": ["x"],
    "scan_axis": ["none"], "tree": ["nnx"], "pattern": ["x", "y"],
}  # fmt: skip
VALUES |= {
    name: [key.choices[0] if key.choices else "2" if key.whole else "0.5"] for name, key in keys.HYPERPARAMETERS.items()
}


def test_every_option_that_a_recipe_has_a_key_for():
    renamed = {"stage": "stages", "weights": "weight"}
    table = {**keys.RECIPE, **keys.ADAPTER}
    assert {renamed.get(name, name) for name in VALUES} == set(table) - {
        "adapters", "path", "recipe", "name", "sha256", "config_sha256",
    }  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_options_about_how_to_merge_are_refused_beside_a_recipe(folder, tmp_path, capsys, name):
    flag = f"--{name.replace('_', '-')}"
    run("merge", folder / "recipe.yaml", "-o", tmp_path / "out", flag, *VALUES[name], code=2)
    assert told(capsys) == [f"{flag}: {folder}/recipe.yaml says how to merge; write it there"]
    assert not (tmp_path / "out").exists()


def test_all_such_options_are_named(folder, tmp_path, capsys):
    arguments = ["-o", tmp_path / "out", "--stage", "calibrate", "--rank", "2", "--seed", "0", "--quiet"]
    run("merge", folder / "recipe.yaml", *arguments, code=2)
    assert told(capsys) == [f"--seed, --stage, --rank: {folder}/recipe.yaml says how to merge; write it there"]


def test_options_of_the_machine_go_with_a_recipe(folder, tmp_path):
    arguments = ["--memory", "100MB", "--devices", "1", "--no-compilation-cache", "--quiet", "--force"]
    run("merge", folder / "recipe.yaml", "-o", tmp_path / "out", *arguments)
    got = jm.load(tmp_path / "out")
    for path, lora in jm.merge_recipe(folder / "recipe.yaml").modules.items():
        np.testing.assert_array_equal(got.modules[path].a, lora.a)


def test_a_recipe_is_given_alone(folder, tmp_path, capsys):
    run("merge", folder / "a", folder / "recipe.yaml", "-o", tmp_path / "out", code=2)
    assert told(capsys) == [
        f"{folder}/recipe.yaml: a recipe is merged alone: it names its adapters, which may be results of recipes"
    ]


def test_problems_of_recipes_files_and_outputs_together(folder, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text(f"adapters: [{folder}/a, {folder}/x]\nmethod: tise\n")
    (tmp_path / "out").mkdir()
    run("merge", tmp_path / "wrong.yaml", "-o", tmp_path / "out", code=1)
    assert told(capsys) == [
        f"{tmp_path}/wrong.yaml:1: {folder}/x: there is no such folder",
        f"{tmp_path}/wrong.yaml:2: unknown method tise; did you mean ties?",
        f"{tmp_path}/out: already exists (--force replaces an adapter)",
    ]
    run("merge", tmp_path / "none.yaml", "-o", tmp_path / "new", code=1)
    assert told(capsys) == [f"{tmp_path}/none.yaml: cannot be read: No such file or directory"]
    run("merge", tmp_path / "wrong.yaml", "-o", tmp_path / "out", "--json", code=1)
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 3


def test_inputs_of_inner_recipes_are_not_overwritten(folder, tmp_path, capsys):
    (tmp_path / "chain.yaml").write_text(f"adapters: [{{recipe: {folder}/recipe.yaml}}]\n")
    before = contents(folder / "a")
    run("merge", tmp_path / "chain.yaml", "-o", folder / "a", "--force", code=1)
    assert told(capsys) == [f"{folder}/a: is read, and would be overwritten"]
    assert contents(folder / "a") == before


def test_a_recipe_of_ones_own_is_not_overwritten(folder, tmp_path, capsys):
    run("merge", folder / "recipe.yaml", "-o", tmp_path / "out", "--quiet")
    # The one that was left there may be run again in its place.
    run("merge", tmp_path / "out" / "recipe.yaml", "-o", tmp_path / "out", "--force", "--quiet")
    own = tmp_path / "out" / "recipe.yaml"
    own.write_text("# Mine.\n" + own.read_text())
    run("merge", own, "-o", tmp_path / "out", "--force", code=1)
    assert told(capsys) == [f"{own}: lies where the recipe of the result goes, and would be overwritten"]
    assert own.read_text().startswith("# Mine.\n")


def test_a_chain_as_json(folder, tmp_path, capsys):
    (tmp_path / "chain.yaml").write_text(
        f"adapters:\n  - recipe: {folder}/recipe.yaml\n    name: both\n  - {folder}/c\nrank: 3\n"
    )
    run("merge", tmp_path / "chain.yaml", "-o", tmp_path / "out", "--json")
    summary = json.loads(capsys.readouterr().out)
    assert summary["ok"] is True
    both, other = summary["inputs"]
    assert (both["name"], both["method"], both["weight"], both["ranks"]) == ("both", "ties", 0.5, [4])
    assert (other["path"], other["weight"]) == (f"{folder}/c", 0.5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| `both (ties of maths ({located(str(folder), 'a')}), {located(str(folder), 'b')})` | 0.5 |  |" in card
    assert summary["remarks"]


def test_weights_and_hyperparameters_that_vary_are_told_in_short(folder, tmp_path, capsys):
    run("merge", folder / "recipe.yaml", "-o", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| `maths ({located(str(folder), 'a')})` | 0.5 … 1 | `" in card
    assert "density 0.6, 0.4" in card


def test_notes_of_what_differs_from_mergekit_are_told(folder, tmp_path, capsys):
    text = "merge_method: slerp\nbase_model: x+a\nmodels: [{model: x+b}]\nparameters: {t: 0.3}\n"
    (folder / "mergekit.yml").write_text(text)
    run("merge", folder / "mergekit.yml", "-o", tmp_path / "out", "--json")
    summary = json.loads(capsys.readouterr().out)
    assert summary["remarks"][0] == (
        "there the sphere is that of whole weights, here that of the changes to the base model"
    )


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    run("merge", folder / "recipe.yaml", "-o", tmp_path / "out", "--dry-run")
    assert "nothing is written" in capsys.readouterr().out
    run("merge", SMS, MOVIE, "-o", tmp_path / "out", "--dry-run", "--json", "--energy", "0.9")
    assert json.loads(capsys.readouterr().out)["adapters"] == [SMS, MOVIE]
    assert not (tmp_path / "out").exists()


def test_the_schema_is_printed_without_jax():
    code = "import sys; from jaxmerge.cli import main; main(['schema']); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == jm.recipe_schema()


def test_a_recipe_of_the_readme(tmp_path, monkeypatch):
    """The one complete example there."""
    root = ADAPTERS.parents[1]
    text = (root / "README.md").read_text().split("## Recipes\n")[1].split("```yaml\n")[1].split("```")[0]
    monkeypatch.chdir(root)
    (tmp_path / "recipe.yaml").write_text(text.replace("tests/adapters", str(ADAPTERS)))
    recipe = jm.read_recipe(tmp_path / "recipe.yaml")
    assert any(isinstance(source.weight, Gradient) for source in recipe.adapters)
    run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--quiet")
    assert len(jm.load(tmp_path / "out").modules) == 36
