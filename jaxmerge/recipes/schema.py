"""The JSON schema of recipes, from the tables that the reader and the checks go by. Imports no JAX."""

from collections.abc import Mapping
from typing import Any

from jaxmerge.catalog import COMBINATION_TYPES, METHODS, SPACES, STAGES, Method
from jaxmerge.recipes import keys
from jaxmerge.recipes.keys import Key

Schema = dict[str, Any]

# What editors show beside a choice.
_SUMMARIES = {
    "method": {name: row.summary for name, row in METHODS.items()},
    "space": {name: row.summary for name, row in SPACES.items()},
    "combination_type": {name: f"{row.method} in space {row.space}" for name, row in COMBINATION_TYPES.items()},
}


def recipe_schema() -> Schema:
    """The JSON schema of recipes, for editors and other tools.

    What it accepts has the right keys, values of the right kinds and ranges, and goes together as methods, spaces and
    ranks do. That files are there and rules match modules is for `jaxmerge.read_recipe` and `jaxmerge.merge_recipe` to
    find out.

    Returns:
        The schema, of draft 2020-12.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "jaxmerge recipe",
        "description": "A merge of LoRA adapters, for jaxmerge merge.",
        **_recipe(keys.RECIPE),
        "$defs": {
            "inner": _recipe({name: key for name, key in keys.RECIPE.items() if name not in keys.WRITING}),
            "adapter": _adapter(),
            "together": {"allOf": [_weights(), *_ranks(), *_cells()]},
        },
    }


def _recipe(table: Mapping[str, Key]) -> Schema:
    properties = {name: _key(key) for name, key in table.items() if key.kind != "nested"}
    nested = {
        "adapters": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/adapter"}},
        "stages": {"type": "array", "items": {"anyOf": [_bare_stages(), *map(_stage, STAGES)]}},
    }
    nested = {name: {"description": table[name].help, **schema} for name, schema in nested.items()}
    return {
        "type": "object",
        "properties": {name: (nested | properties)[name] for name in table},
        "additionalProperties": False,
        "required": ["adapters"],
        "allOf": [{"$ref": "#/$defs/together"}],
    }


def _adapter() -> Schema:
    properties = {name: _key(key) for name, key in keys.ADAPTER.items() if key.kind != "nested"}
    inner = {"anyOf": [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/inner"}]}
    properties["recipe"] = {"description": keys.ADAPTER["recipe"].help, **inner}
    of_files = ("path", *keys.READING, "sha256", "config_sha256")
    return {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {
                "type": "object",
                "properties": {name: properties[name] for name in keys.ADAPTER},
                "additionalProperties": False,
                "oneOf": [
                    {"required": ["path"], "properties": {"recipe": False}},
                    {"required": ["recipe"], "properties": dict.fromkeys(of_files, False)},
                ],
                "not": {"required": ["tree", "pattern"]},
            },
        ]
    }


def _key(key: Key) -> Schema:
    """What a key takes."""
    return {"description": key.help, **_value(key)}


def _value(key: Key) -> Schema:
    if key.limits is not None:
        number = _number(key)
        return _varying(number) if key.varies else number
    if key.kind == "choice":
        summaries = _SUMMARIES.get(key.name)
        told = {"enumDescriptions": [summaries[name] for name in key.choices]} if summaries else {}
        return {"enum": list(key.choices), **told}
    return {
        "text": {"type": "string", "minLength": 1},
        "flag": {"type": "boolean"},
        "extras": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}]},
        "alpha": {"anyOf": [{"const": "rank"}, {"type": "number"}]},
        "scan_axis": {"anyOf": [{"enum": ["none", "some"]}, {"type": "integer", "minimum": 0}]},
        "pattern": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2},
        "hash": {"type": "string", "pattern": keys.HASH},
    }[key.kind]


def _number(key: Key) -> Schema:
    limits: Any = key.limits
    bounds = {"minimum": limits.least, "maximum": limits.most}
    bounds |= {"exclusiveMinimum": limits.above, "exclusiveMaximum": limits.below}
    return {
        "type": "integer" if key.whole else "number",
        **{word: bound for word, bound in bounds.items() if bound is not None},
    }


def _varying(number: Schema) -> Schema:
    gradient = {"description": "over the depth of the model", "type": "array", "items": number, "minItems": 1}
    rule = {
        "type": "object",
        "properties": {
            "match": _key(keys.RULE["match"]),
            "value": {"description": keys.RULE["value"].help, "anyOf": [number, gradient]},
        },
        "additionalProperties": False,
        "required": ["value"],
    }
    rules = {"description": "by patterns of module paths", "type": "array", "items": rule, "minItems": 1}
    return {"anyOf": [number, gradient, rules]}


def _bare_stages() -> Schema:
    return {"enum": [name for name, row in STAGES.items() if all(h.default is not None for h in row.hyperparameters)]}


def _stage(name: str) -> Schema:
    row = STAGES[name]
    own = {
        "type": "object",
        "properties": {key: _key(found) for key, found in keys.of_stage(name).items()},
        "additionalProperties": False,
    }
    needed = [h.name for h in row.hyperparameters if h.default is None]
    own |= {"oneOf": [{"required": [key]} for key in needed]} if row.one_of else {"required": needed}
    return {
        "description": row.summary,
        "type": "object",
        "properties": {name: own},
        "additionalProperties": False,
        "required": [name],
    }


def _weights() -> Schema:
    """All adapters have a weight, or none has."""
    weighed = {"type": "object", "required": ["weight"]}
    return {"anyOf": [_of_adapters(weighed), _of_adapters({"not": weighed})]}


def _of_adapters(items: Schema) -> Schema:
    return {"properties": {"adapters": {"items": items}}}


def _ranks() -> list[Schema]:
    """Ranks are found by one rule."""
    rules = ("rank", *keys.RULES)
    pairs = [[one, other] for i, one in enumerate(rules) for other in rules[:i]]
    return [
        {"not": {"anyOf": [{"required": pair} for pair in pairs]}},
        {"dependentSchemas": {"max_rank": {"anyOf": [{"required": [rule]} for rule in keys.RULES]}}},
    ]


def _cells() -> list[Schema]:
    """What each method and combination type takes and needs."""
    without = {"not": {"anyOf": [{"required": ["method"]}, {"required": ["combination_type"]}]}}
    return [
        {"not": {"anyOf": [{"required": ["combination_type", name]} for name in ("method", "space")]}},
        {"if": without, "then": _of_method(METHODS["linear"])},
        *({"if": _is("method", name), "then": _of_method(row)} for name, row in METHODS.items()),
        *(
            {"if": _is("combination_type", name), "then": _of_method(METHODS[row.method], row.space)}
            for name, row in COMBINATION_TYPES.items()
        ),
    ]


def _is(key: str, value: str) -> Schema:
    return {"properties": {key: {"const": value}}, "required": [key]}


def _of_method(row: Method, space: str | None = None) -> Schema:
    """What a method takes and needs, in one space if that is known."""
    own = {h.name for h in row.hyperparameters}
    of_spaces = {h.name: name for name in SPACES for h in SPACES[name].taken(row) if space in (None, name)}
    foreign = [name for name in keys.HYPERPARAMETERS if name not in own and name not in of_spaces]
    each = [name for name in keys.PER_ADAPTER if name not in row.per_adapter]
    needed = [{"required": ["seed"]}] if row.random else []
    needed += [
        {"anyOf": [{"required": [h.name]}, _of_adapters({"type": "object", "required": [h.name]})]}
        for h in row.hyperparameters
        if h.default is None
    ]
    if space is not None:  # PEFT takes one adapter as it is, whatever the type.
        alone = {"properties": {"adapters": {"maxItems": 1}}}
        needed = [{"anyOf": [alone, need]} for need in needed]
    elsewhere = [
        {"anyOf": [_is("space", name), {"not": {"required": [h]}}]} for h, name in of_spaces.items() if space is None
    ]
    adapters: Schema = {"minItems": row.least, "items": {"properties": dict.fromkeys(each, False)}}
    if row.most is not None:
        adapters["maxItems"] = row.most
    properties = {**dict.fromkeys(foreign, False), "space": {"enum": list(row.spaces)}, "adapters": adapters}
    return (
        {"properties": properties, "allOf": [*needed, *elsewhere]} if needed + elsewhere else {"properties": properties}
    )
