"""The JSON schema of recipes says what the reader says."""

import copy
import random

import jsonschema
import pytest
import yaml

import jaxmerge as jm
from jaxmerge.catalog import STAGES
from jaxmerge.recipes import keys
from jaxmerge.recipes.checks import recipe_problems
from jaxmerge.recipes.nodes import parse
from jaxmerge.recipes.reading import read_file
from tests.test_recipes import WHOLE, keys_of, misspelt

WHOLE_READ = parse(WHOLE, "", []).plain()
SCHEMA = jm.recipe_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

# A valid value of every key.
VALUES = {
    "adapters": ["a"], "method": "linear", "space": "full", "combination_type": "cat", "rank": 2, "energy": 0.5,
    "sv_ratio": 2, "sv_fro": 0.5, "sv_cumulative": 0.5, "max_rank": 3, "stages": ["calibrate"], "dtype": "float32",
    "density_scope": "module", "seed": 0, "extras": "same", "allow_different_bases": True, "format": "peft",
    "layout": "llama3", "head_dim": 4, "layers": 2, "path": "a", "recipe": {"adapters": ["a"]}, "name": "x",
    "weight": 1, "sha256": "ab" * 32, "config_sha256": "ab" * 32, "alpha": "rank", "scan_axis": 1, "item": "x",
    "tree": "nnx", "pattern": ["x", "y"],
}  # fmt: skip
VALUES |= {
    name: key.choices[0] if key.choices else 2 if key.limits.kind == "count" else 0.5
    for name, key in keys.HYPERPARAMETERS.items()
}
# Of every kind, and at and beyond every bound.
ODD = [None, True, 0, 1, -1, 2, 3.0, 0.5, -0.5, 1.5, 1e9, 2**32, "", "x", "1", "rank", "same", [], [1], [0.5, 2], ["x"],
       [[1]], [True], [{"value": 1}], [{"match": "*", "value": [1, 0.5]}], [{"match": ""}], [{"value": [[1]]}],
       [{"value": "x"}], [{"valu": 1}], [{"match": 3, "value": 1}], {}, {"path": "a"}, ["a", "b"]]  # fmt: skip


def accepts(document):
    return VALIDATOR.is_valid(document)


def reads(folder, document):
    """Whether the reader finds nothing wrong, without opening a file."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return not recipe_problems(read_file(str(folder / "recipe.yaml")))


def assert_agree(folder, document):
    assert accepts(document) == reads(folder, document), document


def recipe(**more):
    return {"adapters": ["a", "b"], **more}


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_every_key_is_described():
    adapter = SCHEMA["$defs"]["adapter"]["anyOf"][1]
    assert list(SCHEMA["properties"]) == list(keys.RECIPE)
    assert list(adapter["properties"]) == list(keys.ADAPTER)
    for properties in (SCHEMA["properties"], adapter["properties"]):
        for name, schema in properties.items():
            assert schema["description"], name
    assert len(SCHEMA["properties"]["method"]["enumDescriptions"]) == len(jm.METHODS)
    assert set(VALUES) == set(keys.RECIPE) | set(keys.ADAPTER)


def test_valid_recipes(tmp_path):
    for document in (WHOLE_READ, {"adapters": ["a"]}, {"adapters": [{"recipe": {"adapters": ["a"]}}]}):
        assert accepts(document)
        assert reads(tmp_path, document)


@pytest.mark.parametrize("place", list(keys_of(WHOLE_READ)), ids=lambda place: ".".join(map(str, place)))
def test_every_key_misspelt(place):
    document, _ = misspelt(WHOLE_READ, place)
    assert not accepts(document)


@pytest.mark.parametrize("name", [name for name in keys.RECIPE if name != "adapters"])
def test_every_key_with_every_kind_of_value(tmp_path, name):
    """In a recipe that takes the key, whatever else it needs."""
    users = [method for method, row in jm.METHODS.items() if name in [h.name for h in row.hyperparameters]]
    document = recipe()
    if users:
        row = jm.METHODS[users[0]]
        document |= {"method": users[0], "space": row.space, **({"seed": 0} if row.random else {})}
        document |= {h.name: VALUES[h.name] for h in row.hyperparameters if h.default is None}
    spaces = [space for space, row in jm.SPACES.items() if name in [h.name for h in row.hyperparameters]]
    document |= {"method": "ties", "density": 0.5, "space": spaces[0]} if spaces else {}
    document |= {"energy": 0.5} if name == "max_rank" else {}
    for value in [VALUES[name], *ODD]:
        if name == "extras" and value in ("x", "1", "rank", 2**32, 2, 1e9, 3.0):
            continue  # Whether there is such an adapter is not for a schema to say.
        assert_agree(tmp_path, {**document, name: value})
    assert accepts({**document, name: VALUES[name]})


@pytest.mark.parametrize("name", list(keys.ADAPTER))
def test_every_key_of_an_adapter_with_every_kind_of_value(tmp_path, name):
    users = [method for method, row in jm.METHODS.items() if name in row.per_adapter]
    document = {"adapters": [{"path": "a"}]}
    if users:
        row = jm.METHODS[users[0]]
        document |= {"method": users[0], "density": 0.5, **({"seed": 0} if row.random else {})}
    for value in [VALUES[name], *ODD]:
        if name == "recipe" and isinstance(value, str):
            continue  # Whether there is such a file is not for a schema to say.
        if name == "name" and value == "same":
            continue
        adapter = {name: value} if name == "recipe" else {"path": "a", name: value}
        assert_agree(tmp_path, {**document, "adapters": [adapter]})
    adapter = {name: VALUES[name]} if name == "recipe" else {"path": "a", name: VALUES[name]}
    assert accepts({**document, "adapters": [adapter]})


LISTS = [
    [{"path": "a", "recipe": {"adapters": ["a"]}}],
    [{"weight": 1}],
    ["a", {"path": "b"}],
    [{"path": "a", "weight": 1}, "b"],
    [{"recipe": {"adapters": []}}],
    [{"recipe": {"adapters": ["a"], "format": "peft"}}],
    [{"recipe": {"adapters": ["a"]}, "sha256": "ab" * 32}],
    [{"recipe": {"adapters": ["a"]}, "item": "x"}],
    [{"path": "a", "tree": "nnx", "pattern": ["x", "y"]}],
]


@pytest.mark.parametrize("value", [*ODD, *LISTS])
def test_what_adapters_are(tmp_path, value):
    assert_agree(tmp_path, {"adapters": value})


@pytest.mark.parametrize("name", list(STAGES))
def test_stages(tmp_path, name):
    row = STAGES[name]
    taken = {h.name: h.choices[0] if h.choices else 2 if h.whole else 0.5 for h in row.hyperparameters}
    assert_agree(tmp_path, recipe(stages=[name]))
    assert_agree(tmp_path, recipe(stages=[{name: taken}]))
    for key in taken:
        assert_agree(tmp_path, recipe(stages=[{name: {key: taken[key]}}]))
        for value in ODD:
            assert_agree(tmp_path, recipe(stages=[{name: {key: value}}]))
    for value in ODD:
        assert_agree(tmp_path, recipe(stages=[{name: value}]))


@pytest.mark.parametrize("stages", [["x"], ["calibrate", "calibrate"], [{}], [{"calibrate": {}, "lines": {}}], [3]])
def test_lists_of_stages(tmp_path, stages):
    assert_agree(tmp_path, recipe(stages=stages))


@pytest.mark.parametrize("method", jm.METHODS)
def test_what_each_method_takes(tmp_path, method):
    row = jm.METHODS[method]
    needed = {h.name: VALUES[h.name] for h in row.hyperparameters if h.default is None}
    needed |= {"seed": 0} if row.random else {}
    for space in [None, *jm.SPACES]:
        document = recipe(method=method, **({} if space is None else {"space": space}), **needed)
        assert_agree(tmp_path, document)
        for name in keys.HYPERPARAMETERS:
            assert_agree(tmp_path, {**document, name: VALUES[name]})
    document = recipe(method=method, **needed)
    assert accepts(document)
    for name in needed:
        without = {key: value for key, value in document.items() if key != name}
        assert_agree(tmp_path, without)
        assert not accepts(without)
        if name != "seed":
            each = [{"path": path, name: VALUES[name]} for path in "ab"]
            assert_agree(tmp_path, {**without, "adapters": each})
            assert_agree(tmp_path, {**without, "adapters": [each[0], "b"]})
    for name in keys.PER_ADAPTER:
        assert_agree(tmp_path, {**document, "adapters": [{"path": "a", name: 0.5}, "b"]})
    for count in (1, 2, 3):
        assert_agree(tmp_path, {**document, "adapters": list("abc"[:count])})


@pytest.mark.parametrize("kind", jm.COMBINATION_TYPES)
def test_what_each_combination_type_takes(tmp_path, kind):
    row = jm.METHODS[jm.COMBINATION_TYPES[kind].method]
    needed = {h.name: VALUES[h.name] for h in row.hyperparameters if h.default is None}
    needed |= {"seed": 0} if row.random else {}
    document = recipe(combination_type=kind, **needed)
    assert accepts(document)
    assert_agree(tmp_path, recipe(combination_type=kind))
    assert_agree(tmp_path, {"adapters": ["a"], "combination_type": kind})
    for more in ({"method": "linear"}, {"space": "full"}, {"basis": "hosvd"}, {"epsilon": 0.1}):
        assert_agree(tmp_path, {**document, **more})


def test_pairs_of_keys(tmp_path):
    """Of all keys that are not hyperparameters, two at a time."""
    names = [name for name in keys.RECIPE if name not in (*keys.HYPERPARAMETERS, "adapters")]
    for i, one in enumerate(names):
        for other in names[:i]:
            assert_agree(tmp_path, recipe(**{one: VALUES[one], other: VALUES[other]}))


def places(node, place=()):
    yield place
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*place, key))


@pytest.mark.parametrize("seed", range(300))
def test_whatever_is_changed_in_a_recipe(tmp_path, seed):
    draw = random.Random(seed)
    document = copy.deepcopy(WHOLE_READ)
    place = draw.choice([place for place in places(document) if place])
    node = document
    for step in place[:-1]:
        node = node[step]
    if draw.random() < 0.3:
        del node[place[-1]]
    else:
        node[place[-1]] = copy.deepcopy(draw.choice([*ODD, *VALUES.values()]))
    if "extras" in place or "name" in place:
        return  # Names of adapters are not for a schema to know.
    if place[0] == "adapters":
        document.pop("extras")
    rules = [value for value in _lists(document) if any(isinstance(rule, dict) and "value" in rule for rule in value)]
    if any("match" not in rule for value in rules for rule in value[:-1] if isinstance(rule, dict)):
        return  # Nor is the order of rules.
    assert_agree(tmp_path, document)


def _lists(node):
    if isinstance(node, list):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _lists(child)
