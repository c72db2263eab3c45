"""Doing what a recipe says: its files are read and checked, the recipes inside of it merged first."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxmerge import io
from jaxmerge.base import Adapter, energy_kept
from jaxmerge.memory import Overflow
from jaxmerge.merging.plan import plan_merge
from jaxmerge.merging.steps import Plan
from jaxmerge.recipes.arguments import as_part, merge_arguments, reading, truncation
from jaxmerge.recipes.headers import called, inspect
from jaxmerge.recipes.model import Recipe, Source
from jaxmerge.recipes.places import Problem, raise_problems
from jaxmerge.recipes.reading import read_file
from jaxmerge.recipes.resolving import as_data, resolved
from jaxmerge.resizing import truncate

# ``(label, total) ->`` a context that gives a function by which what is done is counted.
Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]


@contextlib.contextmanager
def silent(label: str, total: int) -> Iterator[Callable[..., None]]:
    """Progress that nobody is told of."""
    del label, total
    yield lambda steps=1: None


@dataclass(frozen=True)
class Workplace:
    """What a recipe is run on. Nothing of it changes the result.

    Attributes:
        mesh: As in `jaxmerge.merge`.
        memory: As in `jaxmerge.merge`.
        spill: The folder for results that wait to be written beyond the memory; None to keep all in memory.
        progress: How progress is told.
    """

    mesh: Mesh | None = None
    memory: int | str | None = None
    spill: Path | None = None
    progress: Progress = silent


@dataclass(frozen=True)
class Loaded:
    """A recipe whose files have been read.

    Attributes:
        recipe: With its defaults written out, and the hashes of its files where it gives none.
        sources: What it merges, in order.
    """

    recipe: Recipe
    sources: Sequence["Adapter | Loaded"]


def merge_recipe(
    recipe: Recipe | str | os.PathLike[str], *, mesh: Mesh | None = None, memory: int | str | None = None
) -> Adapter:
    """Merges what a recipe names: its adapters, and the results of the recipes inside of it, which stay in memory.

    Args:
        recipe: From `read_recipe`, or the path of one.
        mesh: As in `jaxmerge.merge`.
        memory: As in `jaxmerge.merge`.

    Returns:
        The merged adapter. `jaxmerge.save` writes the recipe beside it, with its defaults and the hashes of its files;
        what format to write is for its own arguments to say.

    Raises:
        ValueError: If something is wrong with the recipe or its files, everything at once and a line each.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_file(os.fspath(recipe))
    raise_problems(inspect(recipe, mesh=mesh, memory=memory).problems)
    merged, _ = run(recipe, Workplace(mesh, memory))
    # Files may be written over from now on.
    extras = {name: np.array(x) if isinstance(x, np.ndarray) else x for name, x in merged.extras.items()}
    return dataclasses.replace(merged, extras=extras)


def run(recipe: Recipe, workplace: Workplace) -> tuple[Adapter, list[Adapter]]:
    """Merges what a recipe without problems names.

    Args:
        recipe: That `jaxmerge.recipes.headers.inspect` has found no fault with.
        workplace: What it is run on.

    Returns:
        The merged adapter, and what it was merged from.

    Raises:
        ValueError: If what the files hold is not what the recipe says, or cannot be merged.
    """
    loaded = read(recipe, workplace)
    merged, adapters = _merged(loaded, workplace)
    record = {
        **json.loads(merged.metadata.provenance),
        "recipe": as_data(loaded.recipe),
        "recipe_folder": os.path.realpath(recipe.folder),
    }
    return _with_record(merged, record), adapters


def read(recipe: Recipe, workplace: Workplace) -> Loaded:
    """Reads the files of a recipe, and of those inside of it.

    Args:
        recipe: That `jaxmerge.recipes.headers.inspect` has found no fault with.
        workplace: What it is run on.

    Returns:
        The recipe and its sources.

    Raises:
        ValueError: If what the files hold is not what the recipe says, or is there twice.
    """
    with workplace.progress("reading", _count(recipe)) as advance:
        loaded = _load(recipe, workplace, advance)
    raise_problems([*_other_files(loaded), *_twins(loaded)])
    return loaded


def _count(recipe: Recipe) -> int:
    return sum(1 if source.recipe is None else _count(source.recipe) for source in recipe.adapters)


def _load(recipe: Recipe, workplace: Workplace, advance: Callable[..., None]) -> Loaded:
    sources: list[Adapter | Loaded] = []
    for source in recipe.adapters:
        if source.recipe is not None:
            sources.append(_load(as_part(source.recipe, recipe), workplace, advance))
            continue
        path, options = reading(recipe, source)
        adapter = io.load(path, mesh=workplace.mesh, mapped=True, **options)
        sources.append(_known(adapter, json.loads(adapter.metadata.provenance), recipe, source))
        advance()
    found = [source.recipe if isinstance(source, Loaded) else source for source in sources]
    return Loaded(resolved(recipe, found), sources)


def _known(adapter: Adapter, record: dict[str, Any], recipe: Recipe, source: Source) -> Adapter:
    """An adapter that bears the name that the recipe gives it."""
    record = {**({} if source.name is None else {"name": source.name}), **record}
    metadata = dataclasses.replace(adapter.metadata, name=called(recipe, source))
    return _with_record(dataclasses.replace(adapter, metadata=metadata), record)


def _with_record(adapter: Adapter, record: dict[str, Any]) -> Adapter:
    return dataclasses.replace(adapter, metadata=dataclasses.replace(adapter.metadata, provenance=json.dumps(record)))


def _other_files(loaded: Loaded) -> list[Problem]:
    """Files that are not those that the recipe was written for."""
    problems = []
    for i, (source, found) in enumerate(zip(loaded.recipe.adapters, loaded.sources, strict=True)):
        if isinstance(found, Loaded):
            problems += _other_files(found)
            continue
        record = json.loads(found.metadata.provenance)
        for name, what in {"sha256": "", "config_sha256": "adapter_config.json: "}.items():
            wanted, own = getattr(source, name), record.get(name)
            if wanted is not None and wanted != own:
                has = "it has none" if own is None else f"the file's is {own}"
                text = f"{record['path']}: {what}is another file than the recipe says: {name} is not {wanted}, {has}"
                problems.append(loaded.recipe.places.problem(("adapters", i, name), text))
    return problems


def _twins(loaded: Loaded) -> list[Problem]:
    """Adapters with the same tensors and scales under two paths."""
    seen: dict[tuple[Any, ...], str] = {}
    problems = []
    for i, found in enumerate(loaded.sources):
        if isinstance(found, Loaded):
            problems += _twins(found)
            continue
        record = json.loads(found.metadata.provenance)
        scales = tuple((path, lora.scale) for path, lora in found.modules.items())
        first = seen.setdefault((record["sha256"], scales), record["path"])
        if first != record["path"]:
            text = f"{record['path']}: is the same adapter as {first}; one weight for it says the same"
            problems.append(loaded.recipe.places.problem(("adapters", i), text))
    return problems


def planned(loaded: Loaded, workplace: Workplace) -> Plan:
    """The merge of a recipe whose files have been read; the recipes inside of it have been merged then.

    Args:
        loaded: From `read`.
        workplace: What it is run on.

    Returns:
        The plan, with what is merged in it.

    Raises:
        ValueError: If it cannot be merged.
    """
    recipe, adapters = loaded.recipe, []
    for source, found in zip(loaded.recipe.adapters, loaded.sources, strict=True):
        adapters.append(found if isinstance(found, Adapter) else _inner(found, workplace, recipe, source))
    weights, arguments, problems = merge_arguments(recipe, adapters)
    raise_problems(problems)
    try:
        return plan_merge(adapters, weights, **arguments, mesh=workplace.mesh, memory=workplace.memory)
    except ValueError as error:
        raise_problems([recipe.places.problem((), line) for line in str(error).splitlines()])
        raise


def _merged(loaded: Loaded, workplace: Workplace) -> tuple[Adapter, list[Adapter]]:
    recipe, plan = loaded.recipe, planned(loaded, workplace)
    results, spill = [], workplace.spill
    count = sum(map(len, plan.buckets.values()))
    with contextlib.ExitStack() as stack:
        overflow = None if spill is None else stack.enter_context(Overflow(spill, plan.memory))
        advance = stack.enter_context(workplace.progress("merging", count))
        for result in plan.run():
            results.append(result if overflow is None else overflow.keep(result))
            advance(len(result))
    merged = plan.finish(results)
    if plan.program.row.random and recipe.seed is not None:
        merged = _with_record(merged, {**json.loads(merged.metadata.provenance), "seed": recipe.seed})
    rule = truncation(recipe)
    return truncate(merged, rule) if rule else merged, list(plan.adapters)


def _inner(loaded: Loaded, workplace: Workplace, recipe: Recipe, source: Source) -> Adapter:
    """The result of a recipe, as an adapter of another one."""
    merged, _ = _merged(loaded, workplace)
    record = {**json.loads(merged.metadata.provenance), "energy_kept": float(energy_kept(merged))}
    return _known(dataclasses.replace(merged, energy={}), record, recipe, source)
