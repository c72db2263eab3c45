"""Whatever stands in a recipe, only problems come of it: each in a line, and a plan only where there are none."""

import copy
import random

import pytest
import yaml

from jaxmerge.recipes.headers import inspect
from jaxmerge.recipes.reading import read_file
from tests.recipes import write_three
from tests.test_recipes_schema import ODD, VALUES, WHOLE_READ, places

CHAIN = """
adapters:
  - {recipe: inner.yaml, weight: 1}
  - {recipe: {adapters: [{path: a, weight: 1}, {path: b, weight: 2}], rank: 2}, weight: [1, 2], name: x}
  - {path: c, weight: 1}
rank: [{match: lm_head, value: 1}, {value: [1, 2]}]
stages: [{truncate: {energy: 0.5}}, norm_restore]
"""
TIES = """
merge_method: ties
base_model: x
models:
  - {model: x, parameters: {weight: 1}}
  - {model: x+a, parameters: {weight: [0, 1], density: [{filter: mlp, value: [0.5, 1]}, {value: 0.3}]}}
  - {model: x+b, parameters: {weight: [{filter: self_attn, value: 1}, {value: 2}]}}
parameters: {normalize: true, lambda: 0.5, density: 0.7, int8_mask: true, rescale: false}
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
"""
SLERP = """
merge_method: slerp
base_model: x+a
models: [{model: x+a}, {model: x+b}]
parameters: {t: [{filter: self_attn, value: [0, 0.5]}, {value: 0.3}]}
"""
LINEAR = """
merge_method: linear
models: [{model: x+a, parameters: {weight: [0, 1]}}, {model: x+b, parameters: {weight: [1, 0]}}]
parameters: {normalize: true}
"""
DOCUMENTS = [WHOLE_READ, *map(yaml.safe_load, (CHAIN, TIES, SLERP, LINEAR))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("recipes")
    write_three(made)
    (made / "inner.yaml").write_text("adapters: [a]\n")
    return made


def changed(document, draw):
    """The document with one of its parts gone, misspelt, or another."""
    place = draw.choice([place for place in places(document) if place])
    node = document
    for step in place[:-1]:
        node = node[step]
    way = draw.random()
    if way < 0.25:
        del node[place[-1]]
    elif way < 0.35 and isinstance(node, dict):
        node[place[-1] + "x"] = node.pop(place[-1])
    else:
        node[place[-1]] = copy.deepcopy(draw.choice([*ODD, *VALUES.values(), "x+a", "x+b@r", float("nan")]))


def test_the_documents_themselves_are_sound(folder):
    for document in DOCUMENTS:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
        assert inspect(read_file(str(folder / "recipe.yaml"))).problems == []


@pytest.mark.parametrize("seed", range(40))
def test_only_problems_come_of_it(folder, seed):
    draw = random.Random(seed)
    for _ in range(15):
        document = copy.deepcopy(draw.choice(DOCUMENTS))
        for _ in range(draw.choice([1, 1, 2])):
            if document:
                changed(document, draw)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
        found = inspect(read_file(str(folder / "recipe.yaml")))
        assert (found.plan is None) == bool(found.problems)
        assert all("\n" not in str(problem) and problem.file for problem in found.problems)
