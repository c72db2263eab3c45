"""What can be known to be wrong with a recipe from the headers of its files, before a weight is read."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxmerge import io
from jaxmerge.base import Adapter
from jaxmerge.merging.plan import plan_merge
from jaxmerge.merging.steps import Plan
from jaxmerge.recipes.arguments import as_part, at_modules, merge_arguments, reading
from jaxmerge.recipes.checks import own_problems
from jaxmerge.recipes.model import Recipe, Source
from jaxmerge.recipes.places import Problem


@dataclass(frozen=True)
class Inspection:
    """A recipe and the headers of its files.

    Attributes:
        adapters: As shapes; those that can be read.
        plan: Of the merge, of shapes; None where there is a problem.
        problems: Of the recipe and those inside of it.
    """

    adapters: list[Adapter]
    plan: Plan | None
    problems: list[Problem]


def inspect(recipe: Recipe, *, mesh: Mesh | None = None, memory: int | str | None = None) -> Inspection:
    """Looks for everything that is wrong with a recipe, without reading a weight.

    Args:
        recipe: Read or made.
        mesh: As in `jaxmerge.merge`.
        memory: As in `jaxmerge.merge`.

    Returns:
        What was found.
    """
    return _inspected(recipe, {"mesh": mesh, "memory": memory})


def called(recipe: Recipe, source: Source) -> str:
    """What messages call an adapter; empty where its place in the list has to do."""
    if source.name is not None or source.recipe is None:
        return str(source.name or reading(recipe, source)[0])
    own_file = source.recipe.places.file
    return own_file if own_file != recipe.places.file else ""


def _inspected(recipe: Recipe, placing: Mapping[str, Any]) -> Inspection:
    own = own_problems(recipe)
    found = [_shapes(recipe, i, placing) for i in range(len(recipe.adapters))]
    adapters = [shapes for shapes, _ in found if shapes is not None]
    inner = [problem for _, problems in found for problem in problems]
    own += _paths(recipe)
    if not adapters:
        return Inspection([], None, own + inner)
    if len(adapters) < len(found):  # The rest can still be compared with each other.
        return Inspection(adapters, None, own + inner + _together(recipe, adapters))
    if problems := own + at_modules(recipe, adapters)[2]:
        return Inspection(adapters, None, problems + inner + _together(recipe, adapters))
    weights, arguments, _ = merge_arguments(recipe, adapters)
    try:
        plan = plan_merge(adapters, weights, **arguments, **placing)
    except ValueError as error:
        return Inspection(adapters, None, inner + [recipe.places.problem((), line) for line in _lines(error)])
    # Of what could not be read inside, all has been told.
    return Inspection(adapters, None if inner else plan, inner)


def _shapes(recipe: Recipe, i: int, placing: Mapping[str, Any]) -> tuple[Adapter | None, list[Problem]]:
    """An adapter as shapes, or None; and what is wrong with it."""
    source = recipe.adapters[i]
    if source.recipe is not None:
        found = _inspected(as_part(source.recipe, recipe), placing)
        return None if found.plan is None else _named(found.plan.outline(), recipe, source), found.problems
    if not isinstance(source.path, str) or source.path == "":
        return None, []  # Told already.
    path, options = reading(recipe, source)
    place = ("adapters", i, "path") if recipe.places.has("adapters", i, "path") else ("adapters", i)
    try:
        return _named(io.peek(path, **options), recipe, source), []
    except ValueError as error:
        return None, [recipe.places.problem(place, line + _hint(line, path)) for line in _lines(error)]


def _named(adapter: Adapter, recipe: Recipe, source: Source) -> Adapter:
    return replace(adapter, metadata=replace(adapter.metadata, name=called(recipe, source)))


def _hint(problem: str, path: str) -> str:
    """What may have been meant by a path that is not there."""
    folder, name = Path(path).parent, Path(path).name
    if "there is no such" not in problem or "://" in path or not folder.is_dir():
        return ""
    others = [entry.name for entry in folder.iterdir() if entry.name != name]
    near = difflib.get_close_matches(name, others, n=1)
    return "".join(f"; did you mean {folder / one}?" for one in near)


def _paths(recipe: Recipe) -> list[Problem]:
    """Paths that are given twice, or that cannot be written down."""
    problems, seen = [], {}
    for i, source in enumerate(recipe.adapters):
        if source.recipe is not None or not isinstance(source.path, str):
            continue
        path = reading(recipe, source)[0]
        if not path.isprintable():
            text = f"{path!r}: has characters in its name that cannot be written down"
            problems.append(recipe.places.problem(("adapters", i), text))
        # Another item or another reading of one file is another adapter.
        own = os.path.realpath(path), tuple(sorted((name, str(value)) for name, value in source.reading.items()))
        if seen.setdefault(own, i) != i:
            text = f"{path}: is given twice; one weight for it says the same"
            problems.append(recipe.places.problem(("adapters", i), text))
    return problems


def _together(recipe: Recipe, adapters: list[Adapter]) -> list[Problem]:
    """What is wrong with some of the adapters beside each other, however they are merged."""
    try:
        plan_merge(adapters, extras="average", allow_different_bases=recipe.allow_different_bases is True)
    except ValueError as error:
        return [recipe.places.problem((), line) for line in _lines(error)]
    return []


def _lines(error: ValueError) -> list[str]:
    return str(error).splitlines()
