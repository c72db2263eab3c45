"""Recipes are read, and everything that is wrong with one is told at once, with its line."""

import textwrap

import pytest
import yaml

import jaxmerge as jm
from jaxmerge.recipes import keys
from jaxmerge.recipes.model import Gradient, Rule, Rules, Source, Stage
from tests.recipes import problems, write_three

WHOLE = """\
adapters:
  - path: a
    name: maths
    weight: [1, 0.5, -0.25]
    density: 0.3
  - path: b
    weight: 1.5e0
    density:
      - {match: "*.self_attn.*", value: [0.2, 0.4]}
      - match: "*.mlp.*"
        value: 5e-1
  - path: c
    weight:
      - {match: "*.layers.0.*", value: 2}
      - {value: 1}
method: ties
space: knots
density: 0.25
majority_sign_method: frequency
election: weighted
divisor: weight
rank: [2, 4]
stages:
  - calibrate
  - scale: {factor: [{match: lm_head, value: 0}, {value: [1, 2]}]}
  - lines: {alpha: 0.5, beta: 0.5}
density_scope: module
dtype: float32
seed: 7
extras: maths
allow_different_bases: true
format: peft
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("recipes")
    write_three(made)
    return made


def test_all_that_a_recipe_can_say(folder):
    (folder / "whole.yaml").write_text(WHOLE)
    recipe = jm.read_recipe(folder / "whole.yaml")
    one, two, three = recipe.adapters
    assert one == Source("a", name="maths", weight=Gradient((1, 0.5, -0.25)), hyperparameters={"density": 0.3})
    assert two.weight == 1.5
    attention, rest = Rule("*.self_attn.*", Gradient((0.2, 0.4))), Rule("*.mlp.*", 0.5)
    assert two.hyperparameters == {"density": Rules((attention, rest))}
    assert three.weight == Rules((Rule("*.layers.0.*", 2), Rule(None, 1)))
    assert recipe.stages == (
        Stage("calibrate"),
        Stage("scale", {"factor": Rules((Rule("lm_head", 0), Rule(None, Gradient((1, 2)))))}),
        Stage("lines", {"alpha": 0.5, "beta": 0.5}),
    )
    assert recipe.hyperparameters == {
        "density": 0.25, "majority_sign_method": "frequency", "election": "weighted", "divisor": "weight",
    }  # fmt: skip
    assert recipe.rank == Gradient((2, 4))
    assert (recipe.method, recipe.space, recipe.dtype, recipe.seed) == ("ties", "knots", "float32", 7)
    assert (recipe.extras, recipe.allow_different_bases, recipe.format) == ("maths", True, "peft")
    assert recipe.folder == str(folder)


def test_only_adapters_are_needed(folder):
    (folder / "plain.yaml").write_text("adapters: [a, b]\n")
    assert jm.read_recipe(folder / "plain.yaml").adapters == (Source("a"), Source("b"))


def test_every_problem_is_told_at_once_with_its_line(folder):
    text = """\
        adapters:
          - path: aa
            wieght: 1
          - path: b
            weight: one
            density: [0.2, 1.5]
          - c
        method: ties
        densty: 0.2
        election: sideways
        rank: 0
        stages: [calibrat, {scale: {factr: 2}}, {calibrate: {floor: 0}}]
        seed: -1
        dtype: float13
        energy: 0.9
        """
    assert problems(textwrap.dedent(text), folder) == [
        "recipe.yaml:2: aa: there is no such folder; did you mean a?",
        "recipe.yaml:3: unknown key wieght; did you mean weight?",
        "recipe.yaml:5: weight should be a number, got 'one'",
        "recipe.yaml:6: density should be at most 1 and above 0, got 1.5",
        "recipe.yaml:7: c has no weight: give all adapters one, or none",
        "recipe.yaml:9: unknown key densty; did you mean density?",
        "recipe.yaml:10: unknown election sideways: there are unweighted, weighted",
        "recipe.yaml:11: rank should be at least 1, got 0",
        "recipe.yaml:12: unknown stage calibrat; did you mean calibrate?",
        "recipe.yaml:12: unknown key factr; did you mean factor?",
        "recipe.yaml:12: stage calibrate: floor should be above 0, got 0",
        "recipe.yaml:13: seed should be at least 0 and at most 4294967295, got -1",
        "recipe.yaml:14: unknown dtype float13; did you mean float32?",
        "recipe.yaml:15: ranks are found by one rule: rank and energy are given",
    ]


def keys_of(node, place=()):
    """Every key of a document, as the way to it."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*place, key)
            yield from keys_of(value, (*place, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from keys_of(value, (*place, i))


def misspelt(document, place):
    """The document with one of its keys misspelt."""
    document = yaml.safe_load(yaml.safe_dump(document))
    node = document
    for step in place[:-1]:
        node = node[step]
    *_, key = place
    wrong = key[:-2] + key[-1] + key[-2] if len(key) > 2 and key[-1] != key[-2] else key + "x"
    items = [(wrong if name == key else name, value) for name, value in node.items()]
    node.clear()
    node.update(items)
    return document, wrong


@pytest.mark.parametrize("place", list(keys_of(yaml.safe_load(WHOLE))), ids=lambda place: ".".join(map(str, place)))
def test_every_key_misspelt_is_an_error_that_names_it(folder, place):
    document, wrong = misspelt(yaml.safe_load(WHOLE), place)
    (found, *more) = problems(yaml.safe_dump(document, sort_keys=False), folder)
    kind = "stage" if place[0] == "stages" and len(place) == 3 else "key"
    assert found.startswith("recipe.yaml:")
    assert found.endswith(f": unknown {kind} {wrong}; did you mean {place[-1]}?")
    assert more == []  # What was meant counts as given.


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ["recipe.yaml: is empty"]),
        ("# nothing\n", ["recipe.yaml: is empty"]),
        ("- a\n- b\n", ["recipe.yaml:1: a recipe is a mapping, as in adapters: [...]"]),
        ("adapters: [a\nmethod: ties\n", [
            "recipe.yaml:2: is not YAML: while parsing a flow sequence; expected ',' or ']', but got ':'"
        ]),
        ("adapters: [a]\n\tmethod: ties\n", [
            "recipe.yaml:2: is not YAML: while scanning for the next token; found character '\\t' that cannot start "
            "any token"
        ]),
        ("adapters: [a]\n---\nadapters: [b]\n", [
            "recipe.yaml:2: is not YAML: expected a single document in the stream; but found another document"
        ]),
        ("adapters: [a]\nmethod: linear\nmethod: ties\n", [
            "recipe.yaml:3: key method is given twice, first in line 2"
        ]),
        ("adapters: [a]\nmethod: !python linear\n", ["recipe.yaml:2: tags are not read: !python"]),
        ("adapters: &x [a, *x]\n", [
            "recipe.yaml:1: an alias stands inside of what it stands for",
            "recipe.yaml:1: an adapter is a path, or a mapping with path or recipe, not None",
        ]),
        ("? [a, b]\n: c\nadapters: [a]\n", ["recipe.yaml:1: a key is a word, not a list or a mapping"]),
        ("adapters: [a]\nrank:\n", ["recipe.yaml:2: rank has no value"]),
        ("method: linear\n", ["recipe.yaml: a recipe needs adapters: the list of what is merged"]),
        ("adapters: []\n", ["recipe.yaml:1: there is nothing to merge: no adapters"]),
        ("adapters: a\n", ["recipe.yaml:1: adapters should be a list of paths or mappings"]),
        ("adapters: [3]\n", ["recipe.yaml:1: an adapter is a path, or a mapping with path or recipe, not 3"]),
        ("adapters: [{weight: 1}]\n", ["recipe.yaml:1: an adapter has a path or a recipe"]),
        ("adapters: [{path: a, recipe: d}]\n", [
            "recipe.yaml:1: an adapter has a path or a recipe, not both",
            "d: cannot be read: No such file or directory",
        ]),
        ("adapters: [a]\npath: b\n", [
            "recipe.yaml:2: path belongs to an adapter, as in adapters: [{path: ..., weight: 0.5}]"
        ]),
        ("adapters: [{path: a, rank: 2}]\n", ["recipe.yaml:1: rank is not an adapter's own: it belongs to the recipe"]),
        ("adapters: [a]\nmethod: tise\n", ["recipe.yaml:2: unknown method tise; did you mean ties?"]),
        ("adapters: [a]\nmethod: ties_svd\n", ["recipe.yaml:2: unknown method ties_svd: that is a combination_type"]),
        ("adapters: [a]\nmethod: [ties]\n", ["recipe.yaml:2: method should be a text, got ['ties']"]),
        ("adapters: [a]\nmethod: tsv\nspace: factors\n", [
            "recipe.yaml:3: method tsv makes no sense in space factors: it goes by singular values and directions, and "
            "those of A and of B apart are not those of the change"
        ]),
        ("adapters: [a]\nmethod: ties\ncombination_type: ties\ndensity: 0.5\n", [
            "recipe.yaml:2: combination_type names a method and a space: leave method out"
        ]),
        ("adapters: [a, b]\ndensity: 0.5\n", [
            "recipe.yaml:2: method linear takes no density: it takes no hyperparameters"
        ]),
        ("adapters: [a, b]\nmethod: ties\n", [
            "recipe.yaml:2: method ties needs density: fraction of each task's entries to keep, in (0, 1]"
        ]),
        ("adapters: [{path: a, density: 0.5}, b]\nmethod: ties\n", [
            "recipe.yaml:1: b has no density, and the recipe has none"
        ]),
        ("adapters: [a, b]\nmethod: ties\ndensity: 0.5\nepsilon: 0.1\n", [
            "recipe.yaml:4: method ties takes no epsilon: it takes density, majority_sign_method, election, divisor"
        ]),
        ("adapters: [a, b]\nmethod: ties\ndensity: 0.5\nbasis: hosvd\n", [
            "recipe.yaml:4: method ties takes no basis: it takes density, majority_sign_method, election, divisor"
        ]),
        ("adapters: [{path: a, density: 0.5}, b]\nmethod: sce\n", [
            "recipe.yaml:1: density is not an adapter's own in method sce: it belongs to the recipe"
        ]),
        ("adapters: [a, b, c]\nmethod: slerp\n", ["recipe.yaml:2: method slerp takes just 2 adapters, not 3"]),
        ("adapters: [a, b]\nmethod: dare_linear\ndensity: 0.5\n", [
            "recipe.yaml:2: method dare_linear draws random numbers: give a seed, as in seed: 0 or --seed 0"
        ]),
        ("adapters: [{path: a, weight: 1}, {path: b, weight: -1}]\nmethod: lego\nrank: 2\n", [
            "recipe.yaml:1: method lego takes weights of 0 or more, not -1: a weight scales both halves of a unit alike"
        ]),
        ("adapters: [{path: a, name: x}, {path: b, name: x}]\n", ["recipe.yaml:1: two adapters are called x"]),
        ("adapters: [{path: a, name: same}, b]\n", [
            "recipe.yaml:1: an adapter cannot be called same, which is a choice of extras"
        ]),
        ("adapters: [{path: a, name: maths}, b]\nextras: mahts\n", [
            "recipe.yaml:2: extras mahts: give same, average, one of the adapters, or its number from 1; did you mean "
            "maths?"
        ]),
        ("adapters: [a, b]\nextras: 3\n", [
            "recipe.yaml:2: extras 3: give same, average, one of the adapters, or its number from 1"
        ]),
        ("adapters: [a, b]\nmax_rank: 3\n", [
            "recipe.yaml:2: max_rank is for energy, sv_ratio, sv_fro, sv_cumulative: give rank alone, or one of these"
        ]),
        ("adapters: [a, b]\nrank: 2.5\n", ["recipe.yaml:2: rank should be a whole number, got 2.5"]),
        ("adapters: [a, b]\nrank: '2'\n", ["recipe.yaml:2: rank should be a number, got '2'"]),
        ("adapters: [a, b]\nrank: true\n", ["recipe.yaml:2: rank should be a number, got True"]),
        ("adapters: [a, b]\nrank: {all: 2}\n", ["recipe.yaml:2: rank should be a number, got {'all': 2}"]),
        ("adapters: [a, b]\nrank: []\n", ["recipe.yaml:2: rank is an empty list"]),
        ("adapters: [a, b]\nrank: [1, [2]]\n", [
            "recipe.yaml:2: rank should be a number, a list of numbers, or a list of rules"
        ]),
        ("adapters: [a, b]\nenergy: [0.5, 0.9]\n", ["recipe.yaml:2: energy should be a number, got [0.5, 0.9]"]),
        ("adapters: [{path: a, weight: .inf}, {path: b, weight: .nan}]\n", [
            "recipe.yaml:1: weight should be a finite number, got inf",
            "recipe.yaml:1: weight should be a finite number, got nan",
        ]),
        ("adapters: [a, b]\nallow_different_bases: no\n", [
            "recipe.yaml:2: allow_different_bases should be true or false, got 'no'"
        ]),
        ("adapters: [{path: a, sha256: abc}, b]\n", [
            "recipe.yaml:1: sha256 should be 64 hexadecimal digits, got 'abc'"
        ]),
        ("adapters: [{path: a, name: \"x\\u202ey\"}, b]\n\"z\\e[2J\": 1\n", [
            r"recipe.yaml:1: name should be a text without control characters, got 'x\u202ey'",
            r"recipe.yaml:2: unknown key 'z\x1b[2J': jaxmerge schema says what a recipe has",
        ]),
        ("adapters: [{path: a, scan_axis: -1}, {path: b, alpha: two, pattern: [x]}]\n", [
            "recipe.yaml:1: scan_axis should be a whole number from 0, none, or some, got -1",
            "recipe.yaml:1: alpha should be a number, or rank, got 'two'",
            "recipe.yaml:1: pattern should be two texts, for A and for B, got ['x']",
            "recipe.yaml:1: a: is no Orbax checkpoint, whose steps have numbers for names; scan_axis can be given for "
            "such alone",
            "recipe.yaml:1: b: is no Orbax checkpoint, whose steps have numbers for names; alpha, pattern can be given "
            "for such alone",
        ]),
        ("adapters: [{path: a, tree: nnx, pattern: [x, y]}, b]\n", [
            "recipe.yaml:1: pattern is in place of tree: leave one of them out",
            "recipe.yaml:1: a: is no Orbax checkpoint, whose steps have numbers for names; layout, pattern can be "
            "given for such alone",
        ]),
        ("adapters: [a, a]\n", ["recipe.yaml:1: a: is given twice; one weight for it says the same"]),
        ("adapters: [a, b]\nrank: 20\n", [
            "recipe.yaml: rank 20 is more than any module can hold: the largest possible is 5"
        ]),
        ("adapters: [a, b]\nstages: scale\n", [
            "recipe.yaml:2: stages should be a list of names, or of mappings as in {scale: {factor: 0.8}}"
        ]),
        ("adapters: [a, b]\nstages: [scale]\n", ["recipe.yaml:2: stage scale needs factor: what to multiply by"]),
        ("adapters: [a, b]\nstages: [{scale: 2}]\n", ["recipe.yaml:2: stage scale takes a mapping with factor"]),
        ("adapters: [a, b]\nstages: [{scale: {factor: 1}, lines: {}}]\n", [
            "recipe.yaml:2: a stage is a name, or a mapping as in scale: {factor: 0.8}, not "
            "{'lines': {}, 'scale': {'factor': 1}}"
        ]),
        ("adapters: [a, b]\nstages: [{lines: {alpha: [1, 2]}}]\n", [
            "recipe.yaml:2: stage lines: alpha should be a number, got [1, 2]"
        ]),
        ("adapters: [a, b]\nstages: [{norm_restore: {scope: whole}}, calibrate]\n", [
            "recipe.yaml: stage calibrate comes after norm_restore over the whole model: only lines and scale can"
        ]),
    ],
)  # fmt: skip
def test_what_is_wrong_word_for_word(folder, text, told):
    assert problems(text, folder) == told


RULES = "adapters: [a, c]\nmethod: ties\ndensity:\n"


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ("  - {match: '*.self_atn.*', value: 0.5}\n  - {value: 1}\n", [
            "recipe.yaml:4: *.self_atn.* matches no module; the nearest is model.layers.0.self_attn.q_proj"
        ]),
        ("  - {match: '*.self_attn.*', value: 0.5}\n", [
            "recipe.yaml:3: no rule of density matches model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, "
            "model.layers.2.mlp.up_proj and 2 more; a last rule without match takes the rest"
        ]),
        ("  - {match: '*', value: 0.5}\n  - {match: '*.mlp.*', value: 1}\n", [
            "recipe.yaml:5: *.mlp.* comes too late: earlier rules match all of its modules"
        ]),
        ("  - {value: 0.5}\n  - {match: '*.mlp.*', value: 1}\n", [
            "recipe.yaml:4: a rule of density without match takes all modules: it comes last",
            "recipe.yaml:5: *.mlp.* comes too late: earlier rules match all of its modules",
        ]),
        ("  - {match: '*'}\n", ["recipe.yaml:4: a rule of density has no value"]),
        ("  - {match: 3, value: 0.5}\n  - {value: 1}\n", ["recipe.yaml:4: match should be a text, got 3"]),
        ("  - {mach: '*', value: 0.5}\n", ["recipe.yaml:4: unknown key mach; did you mean match?"]),
        ("  - {match: '*', value: [0.5, 2]}\n", ["recipe.yaml:4: density should be at most 1 and above 0, got 2"]),
        ("  - {match: '*', value: [{match: x, value: 1}]}\n", [
            "recipe.yaml:4: density should be a number, a list of numbers, or a list of rules"
        ]),
        ("  - 0.5\n  - {match: '*', value: 0.5}\n", [
            "recipe.yaml:5: density should be a number, a list of numbers, or a list of rules"
        ]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_rules(folder, rules, told):
    assert problems(RULES + rules, folder) == told


def test_a_rule_may_match_modules_of_another_adapter_only(folder):
    """Rules that adapters share, as by an alias, are written for all of them."""
    text = """\
        adapters:
          - path: a
            weight: &weights
              - {match: "*.v_proj", value: 2}
              - {match: lm_head, value: 3}
              - {value: 1}
          - {path: c, weight: *weights}
        """
    assert problems(textwrap.dedent(text), folder) == []


def test_anchors_and_merge_keys(folder):
    text = """\
        adapters:
          - &one {path: a, weight: 0.5, density: 0.2}
          - {<<: *one, path: b}
          - <<: [{path: c, weight: 2}, *one]
        method: ties
        """
    (folder / "anchors.yaml").write_text(textwrap.dedent(text))
    recipe = jm.read_recipe(folder / "anchors.yaml")
    assert [(source.path, source.weight) for source in recipe.adapters] == [("a", 0.5), ("b", 0.5), ("c", 2)]
    assert [source.hyperparameters for source in recipe.adapters] == [{"density": 0.2}] * 3
    wrong = "adapters:\n  - {<<: 3, path: a}\n  - b\n"
    assert problems(wrong, folder) == ["recipe.yaml:2: << takes a mapping, or a list of them"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1e-5", 1e-5), ("1.", 1.0), (".5", 0.5), ("+2", 2), ("010", 10), ("-1E+2", -100.0), ("1_000", None),
     ("0x10", None), ("1:30", None), ("'1'", None)],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(folder, written, meant):
    (folder / "number.yaml").write_text(f"adapters: [{{path: a, weight: {written}}}]\n")
    if meant is None:
        with pytest.raises(ValueError, match=r"number\.yaml:1: weight should be a number, got '"):
            jm.read_recipe(folder / "number.yaml")
    else:
        weight = jm.read_recipe(folder / "number.yaml").adapters[0].weight
        assert (weight, type(weight)) == (meant, type(meant))


def test_words_are_those_of_yaml_1_2(folder):
    (folder / "words.yaml").write_text("adapters: [{path: a, name: no}, {path: b, name: 2020-01-01}]\n")
    assert [source.name for source in jm.read_recipe(folder / "words.yaml").adapters] == ["no", "2020-01-01"]


def test_files_that_cannot_be_read(folder):
    with pytest.raises(ValueError, match=r"none\.yaml: cannot be read: No such file or directory"):
        jm.read_recipe(folder / "none.yaml")
    (folder / "latin.yaml").write_bytes("adapters: [é]".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.yaml: is not UTF-8 text"):
        jm.read_recipe(folder / "latin.yaml")
    (folder / "bell.yaml").write_text("adapters: [a\x07]")
    with pytest.raises(ValueError, match=r"bell\.yaml: is not YAML: unacceptable character"):
        jm.read_recipe(folder / "bell.yaml")
    (folder / "deep.yaml").write_text("adapters: " + "[" * 5000)
    with pytest.raises(ValueError, match=r"deep\.yaml: is not YAML: "):
        jm.read_recipe(folder / "deep.yaml")


def test_a_gradient_needs_layers_in_paths(folder):
    import numpy as np

    stacked = jm.Adapter({"layers.up": jm.LoRA(np.ones((4, 2, 5), np.float32), np.ones((4, 6, 2), np.float32))})
    from jaxmerge.recipes.model import Recipe
    from jaxmerge.recipes.modules import Modules

    modules = Modules(Recipe((Source("x"),)), [stacked])
    modules.at(Gradient((1, 2)), ("adapters", 0, "weight"))
    assert [problem.text for problem in modules.problems] == [
        "the depth of modules that hold several layers is not known: layers.up"
    ]


def test_every_argument_of_a_merge_has_a_key():
    """What is left out is of the machine, or goes by another name."""
    import inspect

    arguments = set(inspect.signature(jm.merge).parameters) | set(inspect.signature(jm.save).parameters)
    arguments |= set(inspect.signature(jm.resize).parameters)
    others = {"mesh", "memory", "donate", "path", "force", "adapter"}
    renamed = {"weights": "weight", "key": "seed", "hyperparameters": "density"}
    table = {**keys.RECIPE, **keys.ADAPTER}
    assert {renamed.get(name, name) for name in arguments - others} <= set(table)
    reading = set(inspect.signature(jm.load).parameters) - {"path", "mesh", "mapped"}
    assert {"tree" if name == "layout" else name for name in reading} == set(keys.READING)


def test_dtypes_are_those_of_a_merge(folder):
    adapters = [jm.peek(folder / "a")]
    from jaxmerge.merging.plan import plan_merge

    for dtype in keys.DTYPES:
        assert plan_merge(adapters, dtype=dtype)
    with pytest.raises(ValueError, match=f"dtype int8 is not one of {', '.join(keys.DTYPES)}"):
        plan_merge(adapters, dtype="int8")


def test_aliases_of_aliases_are_told_at_once(tmp_path):
    """A billion texts, in eight lines."""
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(9)]
    told = problems("\n".join(["adapters: [a, b]", *lines, "method: *a8"]), tmp_path)
    assert told == ["recipe.yaml: is larger than any recipe, by what its aliases stand for"]
    few = problems(
        "\n".join(["adapters: [a, b]", f"rank: &a [{', '.join('x' * 99)}]", "method: [*a, *a, *a]"]), tmp_path
    )
    assert max(map(len, few)) < 120
