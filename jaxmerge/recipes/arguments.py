"""A recipe as arguments of `jaxmerge.merge` and `jaxmerge.save`, once it is known what modules there are."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxmerge.base import Adapter
from jaxmerge.catalog import STAGES
from jaxmerge.io.recipe_file import located
from jaxmerge.layouts import LAYOUTS
from jaxmerge.merging.checks import hyperparameters_of
from jaxmerge.recipes import keys
from jaxmerge.recipes.checks import cell_of, extras_position
from jaxmerge.recipes.model import Recipe, Source, Stage
from jaxmerge.recipes.modules import Modules
from jaxmerge.recipes.places import Problem
from jaxmerge.resizing import Rule, rule_of


def merge_arguments(recipe: Recipe, adapters: Sequence[Adapter]) -> tuple[Any, dict[str, Any], list[Problem]]:
    """A checked recipe's weights and other arguments of `jaxmerge.merge`, values that vary as mappings.

    Args:
        recipe: Without problems of its own.
        adapters: What it merges, or their shapes.

    Returns:
        The weights, the other arguments, and what is wrong with values at the modules that there are.
    """
    weights, varying, problems = at_modules(recipe, adapters)
    arguments = {
        "method": recipe.method,
        "space": recipe.space,
        "combination_type": recipe.combination_type,
        "dtype": recipe.dtype,
        "key": None if recipe.seed is None else jax.random.key(recipe.seed),
        "extras": extras_position(recipe),
        "density_scope": recipe.density_scope,
        "allow_different_bases": recipe.allow_different_bases,
    }
    return weights, arguments | varying, problems


def at_modules(recipe: Recipe, adapters: Sequence[Adapter]) -> tuple[Any, dict[str, Any], list[Problem]]:
    """Of the arguments of `merge_arguments`, those that may vary between modules; right or wrong, as far as they go."""
    modules = Modules(recipe, adapters)
    weights = None
    if any(source.weight is not None for source in recipe.adapters):
        weights = [
            modules.at(source.weight, ("adapters", i, "weight"), list(adapter.modules))
            for i, (source, adapter) in enumerate(zip(recipe.adapters, adapters, strict=True))
        ]
    stages = [
        (stage.name, _of_stage(stage, ("stages", i, stage.name), modules))
        for i, stage in enumerate(recipe.stages)
        if stage.name
    ]
    rank = _whole(modules.at(recipe.rank, ("rank",)))
    varying = {"rank": rank, "stages": stages, **_hyperparameters(recipe, adapters, modules)}
    return weights, varying, modules.problems


def _of_stage(stage: Stage, place: tuple[Any, ...], modules: Modules) -> dict[str, Any]:
    whole = {h.name for h in STAGES[stage.name].hyperparameters if h.whole}
    found = {name: modules.at(value, (*place, name)) for name, value in stage.values.items()}
    return {name: _whole(value) if name in whole else value for name, value in found.items()}


def _hyperparameters(recipe: Recipe, adapters: Sequence[Adapter], modules: Modules) -> dict[str, Any]:
    found = {}
    for h in hyperparameters_of(*(cell_of(recipe) or ("linear", "full"))):
        if any(h.name in source.hyperparameters for source in recipe.adapters):
            otherwise = recipe.hyperparameters.get(h.name, h.default)
            found[h.name] = _of_each(h.name, otherwise, recipe.adapters, adapters, modules)
        elif h.name in recipe.hyperparameters:
            found[h.name] = modules.at(recipe.hyperparameters[h.name], (h.name,))
    return found


def _of_each(
    name: str, otherwise: Any, sources: Sequence[Source], adapters: Sequence[Adapter], modules: Modules
) -> Any:
    """One number per adapter, or a mapping from module path to such."""
    each = []
    for i, (source, adapter) in enumerate(zip(sources, adapters, strict=True)):
        own = name in source.hyperparameters
        place = ("adapters", i, name) if own else (name,)
        each.append(modules.at(source.hyperparameters.get(name, otherwise), place, list(adapter.modules)))
    if not any(isinstance(value, Mapping) for value in each):
        return each

    def at(path: str) -> list[Any]:
        found = [value.get(path) if isinstance(value, Mapping) else value for value in each]
        # An adapter without the module does not use its number.
        return [next((x for x in found if x is not None), None) if one is None else one for one in found]

    return {path: at(path) for path in modules.paths}


def _whole(rank: Any) -> Any:
    """Ranks on a gradient as whole numbers."""
    if not isinstance(rank, Mapping):
        return rank
    return {path: round(x) if isinstance(x, float) and math.isfinite(x) else x for path, x in rank.items()}


def as_part(inner: Recipe, outer: Recipe) -> Recipe:
    """A recipe as it is run inside of another, whose dtype it has where that is the finer: its result goes on."""
    if inner.dtype is not None or outer.dtype not in ("float32", "float64"):
        return inner
    return dataclasses.replace(inner, dtype=outer.dtype)


def truncation(recipe: Recipe) -> Rule | None:
    """How modules are cut at the end; None where they are not."""
    given = {name: getattr(recipe, name) for name in keys.RULES}
    return rule_of(**given, max_rank=recipe.max_rank) if any(x is not None for x in given.values()) else None


def conversion(recipe: Recipe) -> dict[str, Any]:
    """What the output's format is, as arguments of `jaxmerge.save`."""
    asked = {name: getattr(recipe, name) for name in keys.WRITING}
    if recipe.layout is not None and recipe.layout not in LAYOUTS:
        asked["layout"] = located(recipe.folder, recipe.layout)
    return asked


def files(recipe: Recipe) -> list[str]:
    """The paths of all files that a recipe reads, and those inside of it."""
    found = []
    for source in recipe.adapters:
        if source.recipe is not None:
            found += files(source.recipe)
        elif isinstance(source.path, str):
            found.append(reading(recipe, source)[0])
    return found


def reading(recipe: Recipe, source: Source) -> tuple[str, dict[str, Any]]:
    """The path of an adapter in a file, and the other arguments of `jaxmerge.load`."""
    options = {"layout" if name == "tree" else name: value for name, value in source.reading.items()}
    if options.get("pattern") is not None:
        options["pattern"] = tuple(options["pattern"])
    return located(recipe.folder, str(source.path)), options
