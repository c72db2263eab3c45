"""What is asked for on the command line, as a recipe: the one that is named, or one made of the options."""

import argparse
from pathlib import Path
from typing import Any

from jaxmerge.catalog import all_hyperparameters
from jaxmerge.cli.groups import conversion, reading, rules
from jaxmerge.io.peft.folder import CONFIG
from jaxmerge.recipes import keys
from jaxmerge.recipes.model import Recipe, Source, Stage
from jaxmerge.recipes.places import Problem
from jaxmerge.recipes.reading import read_file

# Options that say how to merge, beside those that are told by name below.
_OTHERS = ("density_scope", "dtype", "extras", "allow_different_bases")


def is_recipe(path: str) -> bool:
    """Whether a path on the command line is that of a recipe."""
    return Path(path).suffix in (".yaml", ".yml", ".json") and Path(path).name != CONFIG and not Path(path).is_dir()


def conflicts(options: argparse.Namespace) -> list[str]:
    """Options that say what a recipe says, given beside one."""
    recipes = [path for path in options.adapters if is_recipe(path)]
    if not recipes:
        return []
    if len(options.adapters) > 1:
        return [f"{recipes[0]}: a recipe is merged alone: it names its adapters, which may be results of recipes"]
    given = [name for name, value in _how(options).items() if not (value is None or value is False or value == [])]
    flags = [f"--{'stage' if name == 'stages' else name.replace('_', '-')}" for name in given]
    return [f"{', '.join(flags)}: {recipes[0]} says how to merge; write it there"] if flags else []


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that is named, or what the options say as one."""
    if is_recipe(options.adapters[0]):
        return read_file(options.adapters[0])
    n, faults = len(options.adapters), []
    weights = options.weights
    if weights is not None and len(weights) != n:
        faults.append(Problem("", 0, f"{len(weights)} weights for {n} adapters: give one weight per adapter"))
        weights = None
    sources = []
    for i, path in enumerate(options.adapters):
        weight = None if weights is None else weights[i]
        sources.append(Source(path, weight=weight, reading=_reading(options, i, n, faults)))
    names = ("method", "space", "combination_type", "seed")
    given = {name: getattr(options, name) for name in (*names, *_OTHERS)} | rules(options) | conversion(options)
    return Recipe(
        adapters=tuple(sources),
        hyperparameters=_hyperparameters(options),
        stages=tuple(Stage(name, values) for name, values in options.stages),
        faults=tuple(dict.fromkeys(faults)),
        **{name: value for name, value in given.items() if value is not None},
    )


def _how(options: argparse.Namespace) -> dict[str, Any]:
    """Every option that a recipe has a key for."""
    names = ("method", "space", "combination_type", "weights", "seed", "stages", *_OTHERS, *keys.READING)
    given = {name: getattr(options, name) for name in names}
    return given | rules(options) | conversion(options) | _hyperparameters(options)


def _hyperparameters(options: argparse.Namespace) -> dict[str, Any]:
    names = [h.name for h in all_hyperparameters()]
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _reading(options: argparse.Namespace, i: int, n: int, faults: list[Problem]) -> dict[str, Any]:
    try:
        found = reading(options, i, n)
    except ValueError as error:
        faults.append(Problem("", 0, str(error)))
        return {}
    found["tree"] = found.pop("layout")
    return {name: found[name] for name in keys.READING if found[name] is not None}
