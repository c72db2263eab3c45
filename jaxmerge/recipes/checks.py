"""What can be known to be wrong with a recipe before any of its files is opened."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxmerge.catalog import METHODS, SPACES, STAGES
from jaxmerge.merging.checks import (
    count_problems,
    hyperparameter_problem,
    hyperparameters_of,
    method_and_space,
    of_stage,
    one_of_problems,
    sign_problems,
)
from jaxmerge.recipes import keys
from jaxmerge.recipes.keys import Key, value_problems
from jaxmerge.recipes.model import Gradient, Recipe, Rules, Source
from jaxmerge.recipes.places import Place, Problem
from jaxmerge.recipes.varying import leaves
from jaxmerge.words import nearest, short


def recipe_problems(recipe: Recipe) -> list[Problem]:
    """Everything that is wrong with what a recipe says, and with what those inside of it say.

    Args:
        recipe: Read from a file, or made.

    Returns:
        The problems; none of what its files hold.
    """
    inner = [source.recipe for source in recipe.adapters if source.recipe is not None]
    return own_problems(recipe) + [problem for one in inner for problem in recipe_problems(one)]


def notes_of(recipe: Recipe) -> list[str]:
    """What a recipe without problems says that is not as it may seem, a line each."""
    cell = cell_of(recipe)
    if recipe.seed is None or cell is None or METHODS[cell[0]].random:
        return list(recipe.notes)
    return [*recipe.notes, f"method {cell[0]} draws nothing: the seed is not used"]


def own_problems(recipe: Recipe) -> list[Problem]:
    """`recipe_problems` without those of the recipes inside of it."""
    if recipe.faults and not recipe.adapters and not recipe.places.lines:
        return list(recipe.faults)  # Nothing of it could be read.
    cell = cell_of(recipe)
    found = [
        *_values(recipe),
        *_cell(recipe),
        *_adapters(recipe),
        *_names(recipe),
        *_rank(recipe),
        *_stages(recipe),
        *([] if cell is None else _of_cell(recipe, *cell)),
    ]
    return [*recipe.faults, *(recipe.places.problem(place, text) for place, text in found)]


# Place, and what is wrong there.
_Found = Iterator[tuple[Place, str]]


def cell_of(recipe: Recipe) -> tuple[str, str] | None:
    """The method and the space of a recipe; None if they are not known."""
    names = ("method", "space", "combination_type")
    if any(recipe.places.has(name) and getattr(recipe, name) is None for name in names):
        return None  # Given, and not understood.
    try:
        return method_and_space(recipe.method, recipe.space, recipe.combination_type)
    except (ValueError, TypeError):
        return None


def is_alone(recipe: Recipe) -> bool:
    """Whether PEFT takes the one adapter there is as it is, whatever the combination type."""
    return recipe.combination_type is not None and len(recipe.adapters) == 1


def value_of(recipe: Recipe, source: Source | None, name: str) -> Any:
    """A hyperparameter as it is given: by an adapter itself, or by the recipe; None if by neither."""
    own = None if source is None else source.hyperparameters.get(name)
    return recipe.hyperparameters.get(name) if own is None else own


def _values(recipe: Recipe) -> _Found:
    """Values that are none of those that their key takes."""
    defaults = Recipe()
    for name, key in keys.RECIPE.items():
        if name in keys.HYPERPARAMETERS or key.kind == "nested":
            continue
        value, default = getattr(recipe, name), getattr(defaults, name)
        if type(value) is not type(default) or value != default:
            yield from _value(recipe, key, value, (name,))
    for name, value in recipe.hyperparameters.items():
        yield from _value(recipe, keys.HYPERPARAMETERS[name], value, (name,))
    for i, source in enumerate(recipe.adapters):
        given = {name: getattr(source, name) for name in ("path", "name", "weight", "sha256", "config_sha256")}
        for name, value in {**given, **source.reading, **source.hyperparameters}.items():
            if value is not None:
                yield from _value(recipe, keys.ADAPTER[name], value, ("adapters", i, name))
        if source.reading.get("tree") is not None and source.reading.get("pattern") is not None:
            yield ("adapters", i, "pattern"), "pattern is in place of tree: leave one of them out"
        if source.path is None and source.recipe is None and not recipe.faults:
            yield ("adapters", i), "an adapter has a path or a recipe"
    for i, stage in enumerate(recipe.stages):
        known = keys.of_stage(stage.name) if stage.name else {}
        for name, value in stage.values.items():
            at = ("stages", i, stage.name, name)
            yield from ((place, of_stage(stage.name, text)) for place, text in _value(recipe, known[name], value, at))


def _value(recipe: Recipe, key: Key, value: Any, place: Place) -> _Found:
    if not isinstance(value, Gradient | Rules):
        yield from ((place, text) for text in value_problems(key, value))
        return
    if isinstance(value, Gradient):
        for i, point in enumerate(value.points):
            yield from (((*place, i), text) for text in value_problems(key, point))
        return
    for i, rule in enumerate(value.rules):
        if rule.match is None and i < len(value.rules) - 1:
            yield (*place, i), f"a rule of {key.name} without match takes all modules: it comes last"
        if rule.match is not None and not (isinstance(rule.match, str) and rule.match):
            yield (*place, i, "match"), f"match should be a text, got {short(rule.match)}"
        yield from _value(recipe, key, rule.value, (*place, i, "value"))


def _cell(recipe: Recipe) -> _Found:
    """Methods and spaces that do not go together."""
    given = [name for name in ("method", "space") if getattr(recipe, name) is not None or recipe.places.has(name)]
    if recipe.combination_type is not None and given:
        yield (given[0],), f"combination_type names a method and a space: leave {' and '.join(given)} out"
        return
    method = recipe.method
    known = not recipe.places.has("method") if method is None else isinstance(method, str) and method in METHODS
    if known and recipe.space in list(SPACES) and recipe.combination_type is None and cell_of(recipe) is None:
        method = method or "linear"
        yield ("space",), f"method {method} makes no sense in space {recipe.space}: {METHODS[method].elsewhere}"


def _adapters(recipe: Recipe) -> _Found:
    """Adapters that are missing, or that only in part have what all of them need."""
    if not recipe.adapters and not recipe.places.has("adapters"):
        yield (), "a recipe needs adapters: the list of what is merged"
    elif not recipe.adapters and not recipe.faults:
        yield ("adapters",), "there is nothing to merge: no adapters"
    without = [
        i
        for i, source in enumerate(recipe.adapters)
        if source.weight is None and not recipe.places.has("adapters", i, "weight")
    ]
    if without and len(without) < len(recipe.adapters):
        for i in without:
            yield (
                ("adapters", i),
                f"{_called(recipe, i)} has no weight: give all adapters one, or none",
            )


def _names(recipe: Recipe) -> _Found:
    """Names that stand for two adapters, or for none."""
    first: dict[str, int] = {}
    for i, source in enumerate(recipe.adapters):
        if source.name in ("same", "average"):
            yield ("adapters", i, "name"), f"an adapter cannot be called {source.name}, which is a choice of extras"
        elif isinstance(source.name, str) and first.setdefault(source.name, i) != i:
            yield ("adapters", i, "name"), f"two adapters are called {source.name}"
    if extras_position(recipe) is None and isinstance(recipe.extras, str | int) and not recipe.faults:
        names = [_called(recipe, i) for i in range(len(recipe.adapters))]
        meant = nearest(str(recipe.extras), names)
        more = f"; did you mean {meant}?" if meant else ""
        yield (
            ("extras",),
            f"extras {recipe.extras}: give same, average, one of the adapters, or its number from 1{more}",
        )


def extras_position(recipe: Recipe) -> str | int | None:
    """The choice of extras as `jaxmerge.merge` takes it; None if it names no adapter."""
    chosen = recipe.extras
    if chosen in ("same", "average"):
        return chosen
    for i, source in enumerate(recipe.adapters):
        if chosen in (source.name, source.path, i + 1, str(i + 1)) and not isinstance(chosen, bool):
            return i
    return None


def _called(recipe: Recipe, i: int) -> str:
    source = recipe.adapters[i]
    return str(source.name or source.path or f"adapter {i + 1}")


def _rank(recipe: Recipe) -> _Found:
    """Rules for ranks that exclude each other."""
    given = [name for name in ("rank", *keys.RULES) if getattr(recipe, name) is not None]
    if len(given) > 1:
        yield (given[1],), f"ranks are found by one rule: {' and '.join(given)} are given"
    elif recipe.max_rank is not None and given[:1] not in [[rule] for rule in keys.RULES]:
        yield ("max_rank",), f"max_rank is for {', '.join(keys.RULES)}: give rank alone, or one of these"


def _stages(recipe: Recipe) -> _Found:
    for i, stage in enumerate(recipe.stages):
        known = [h for h in STAGES[stage.name].hyperparameters if h.default is None] if stage.name else []
        # What is there and could not be read is told elsewhere.
        there = [h.name for h in known if h.name in stage.values or recipe.places.has("stages", i, stage.name, h.name)]
        if stage.name and STAGES[stage.name].one_of:
            yield from ((("stages", i), problem) for problem in one_of_problems(stage.name, there))
            continue
        for h in known:
            if h.name not in there:
                yield ("stages", i), hyperparameter_problem(f"stage {stage.name}", h, None)[0]


def _of_cell(recipe: Recipe, method: str, space: str) -> _Found:
    """What the method and the space do not take, or miss."""
    known = {h.name: h for h in hyperparameters_of(method, space)}
    takes = f"it takes {', '.join(known)}" if known else "it takes no hyperparameters"
    at = next((place for name in ("method", "combination_type") if recipe.places.has(*(place := (name,)))), ())
    cell = f"method {method}" + (f" in space {space}" if SPACES[space].hyperparameters else "")
    for place, given in [((), recipe.hyperparameters), *_own(recipe)]:
        for name in given:
            if name not in known:
                yield (*place, name), f"{cell} takes no {name}: {takes}"
            elif place and name not in METHODS[method].per_adapter:
                yield (*place, name), f"{name} is not an adapter's own in method {method}: it belongs to the recipe"
    if not is_alone(recipe):
        yield from _missing(recipe, method, known, at)
    if recipe.adapters:
        yield from ((at, text) for text in count_problems(method, len(recipe.adapters)))
    for i, source in enumerate(recipe.adapters):
        for place, number in leaves(source.weight):
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield from (
                    (("adapters", i, "weight", *place), text) for text in sign_problems(method, [float(number)])
                )
    if METHODS[method].random and not is_alone(recipe) and recipe.seed is None and not recipe.places.has("seed"):
        yield at, f"method {method} draws random numbers: give a seed, as in seed: 0 or --seed 0"


def _missing(recipe: Recipe, method: str, known: Mapping[str, Any], at: Place) -> _Found:
    for name, h in known.items():
        if h.default is not None or recipe.places.has(name) or recipe.hyperparameters.get(name) is not None:
            continue
        have = [i for i, source in enumerate(recipe.adapters) if name in source.hyperparameters]
        lack = [i for i in range(len(recipe.adapters)) if i not in have and not recipe.places.has("adapters", i, name)]
        if have:
            yield from ((("adapters", i), f"{_called(recipe, i)} has no {name}, and the recipe has none") for i in lack)
        else:
            yield at, hyperparameter_problem(f"method {method}", h, None)[0]


def _own(recipe: Recipe) -> list[tuple[Place, Mapping[str, Any]]]:
    return [(("adapters", i), source.hyperparameters) for i, source in enumerate(recipe.adapters)]
