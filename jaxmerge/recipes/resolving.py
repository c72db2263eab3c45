"""A recipe with all that it leaves open filled in, and as the JSON that its file is made of."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from jaxmerge.base import Adapter
from jaxmerge.catalog import METHODS, STAGES
from jaxmerge.io.recipe_file import rebased
from jaxmerge.merging.checks import hyperparameters_of
from jaxmerge.recipes import keys
from jaxmerge.recipes.checks import cell_of, extras_position, is_alone
from jaxmerge.recipes.model import Gradient, Recipe, Rules, Source, Stage


def resolved(recipe: Recipe, sources: Sequence[Recipe | Adapter]) -> Recipe:
    """A checked recipe with its defaults written out, and the hashes of its files.

    Args:
        recipe: Without problems.
        sources: What it merges, in order: adapters as they were read, and resolved recipes.

    Returns:
        The recipe; run again, it gives the same bytes.
    """
    method, space = cell_of(recipe) or ("linear", "full")
    row = METHODS[method]
    filled: dict[str, Any] = {}
    if recipe.combination_type is None:
        filled |= {"method": method, "space": space}
    hyperparameters = dict(recipe.hyperparameters)
    if not is_alone(recipe):
        defaults = {h.name: h.default for h in hyperparameters_of(method, space) if h.default is not None}
        hyperparameters = {**defaults, **hyperparameters}
    equal = 1.0 if row.averages else 1.0 / len(recipe.adapters)
    position = extras_position(recipe)
    if not row.random:
        filled["seed"] = None
    if isinstance(position, int):
        filled["extras"] = recipe.adapters[position].name or position + 1
    return dataclasses.replace(
        recipe,
        **filled,
        hyperparameters=hyperparameters,
        stages=tuple(_stage(stage) for stage in recipe.stages),
        adapters=tuple(_source(source, found, equal) for source, found in zip(recipe.adapters, sources, strict=True)),
    )


def _stage(stage: Stage) -> Stage:
    return Stage(stage.name, STAGES[stage.name].taken(stage.values))


def _source(source: Source, found: Recipe | Adapter, equal: float) -> Source:
    weight = equal if source.weight is None else source.weight
    if isinstance(found, Recipe):
        return dataclasses.replace(source, recipe=found, weight=weight)
    record = json.loads(found.metadata.provenance)
    hashes = {name: record[name] for name in ("sha256", "config_sha256") if name in record}
    given = {name: own for name in hashes if (own := getattr(source, name)) is not None}
    return dataclasses.replace(source, weight=weight, **{**hashes, **given})


def as_data(recipe: Recipe, inner: bool = False) -> dict[str, Any]:
    """A recipe as JSON has it, its paths relative to its folder.

    Args:
        recipe: Read or made.
        inner: Whether it stands inside of another, where it writes nothing.

    Returns:
        What its file says, in the order of `jaxmerge.recipes.keys.RECIPE`.
    """
    defaults, data = Recipe(), {}
    for name, key in keys.RECIPE.items():
        if name in keys.HYPERPARAMETERS:
            if name in recipe.hyperparameters:
                data[name] = _plain(recipe.hyperparameters[name])
        elif name == "adapters":
            data[name] = [_source_data(source, recipe.folder) for source in recipe.adapters]
        elif name == "stages":
            if recipe.stages:
                data[name] = [_stage_data(stage) for stage in recipe.stages]
        elif not (inner and name in keys.WRITING) and getattr(recipe, name) != getattr(defaults, name):
            data[name] = _plain(getattr(recipe, name)) if key.varies else getattr(recipe, name)
    return data


def _source_data(source: Source, folder: str) -> dict[str, Any]:
    if source.recipe is not None:
        made = {"recipe": as_data(_moved(source.recipe, folder), inner=True)}
    else:
        made = {"path": source.path}
    own = {name: getattr(source, name) for name in ("name", "weight", "sha256", "config_sha256")}
    own |= {**source.reading, **source.hyperparameters}
    plain = {name: list(value) if isinstance(value, tuple) else _plain(value) for name, value in own.items()}
    made |= {name: value for name, value in plain.items() if value is not None}
    return {name: made[name] for name in keys.ADAPTER if name in made}


def _moved(recipe: Recipe, folder: str) -> Recipe:
    """A recipe whose paths are relative to another folder; those inside of it go by their own."""
    adapters = tuple(
        source if source.path is None else dataclasses.replace(source, path=rebased(recipe.folder, source.path, folder))
        for source in recipe.adapters
    )
    inner = tuple(
        source if source.recipe is None else dataclasses.replace(source, recipe=_moved(source.recipe, folder))
        for source in adapters
    )
    return dataclasses.replace(recipe, adapters=inner, folder=folder)


def _stage_data(stage: Stage) -> Any:
    return {stage.name: {name: _plain(value) for name, value in stage.values.items()}} if stage.values else stage.name


def _plain(value: Any) -> Any:
    if isinstance(value, Gradient):
        return list(value.points)
    if isinstance(value, Rules):
        return [
            {**({} if rule.match is None else {"match": rule.match}), "value": _plain(rule.value)}
            for rule in value.rules
        ]
    return value
