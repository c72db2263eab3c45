"""The recipe of a merge that was made without one, from the record that lies beside it."""

import glob
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmerge.recipes.model import Recipe, Rule, Rules, Source, Stage

_READING = ("alpha", "item")


def recipe_of(record: Mapping[str, Any]) -> Recipe:
    """The merge that a record tells of, as a recipe.

    Args:
        record: Of a merge, as `jaxmerge.save` writes it. Paths in it are relative to the working directory of then.

    Returns:
        The recipe, its paths relative to the working directory.

    Raises:
        ValueError: If the record leaves out what the merge was made of: adapters that were in memory, numbers that were
            traced, or a key that no seed makes.
    """
    weights, n = record["weights"], len(record["inputs"])
    hyperparameters = {name: value for name, value in record["hyperparameters"].items() if not _per_adapter(value)}
    own = {name: value for name, value in record["hyperparameters"].items() if _per_adapter(value)}
    sources = [
        _source(record["inputs"][i], _value(weights[i]), {name: _value(_of(value, i)) for name, value in own.items()})
        for i in range(n)
    ]
    named = record["combination_type"] is None
    return Recipe(
        adapters=tuple(sources),
        method=record["method"] if named else None,
        space=record["space"] if named else None,
        combination_type=record["combination_type"],
        hyperparameters={name: _value(value) for name, value in hyperparameters.items()},
        rank=_value(record["rank"]) if record["rank"] is not None else None,
        **record.get("truncated", {}),
        stages=tuple(
            Stage(name, {key: _value(value) for key, value in values.items()}) for name, values in record["stages"]
        ),
        density_scope=record["density_scope"],
        dtype=record["dtype"],
        seed=_seed(record),
        extras=record["extras"] + 1 if isinstance(record["extras"], int) else record["extras"],
        allow_different_bases=record["allow_different_bases"],
    )


def _source(record: Mapping[str, Any], weight: Any, hyperparameters: Mapping[str, Any]) -> Source:
    if "inputs" in record:
        return Source(recipe=recipe_of(record), weight=weight, hyperparameters=hyperparameters)
    if "path" not in record:
        raise ValueError("an adapter that was merged was in memory, and is in no file that can be read again")
    return Source(
        path=record["path"],
        name=record.get("name"),
        weight=weight,
        sha256=record.get("sha256"),
        config_sha256=record.get("config_sha256"),
        reading={name: record[name] for name in _READING if record.get(name) is not None},
        hyperparameters=hyperparameters,
    )


def _per_adapter(value: Any) -> bool:
    """Whether it is one number for each adapter, in all modules or in each."""
    one = next(iter(value.values()), None) if isinstance(value, Mapping) else value
    return isinstance(one, Sequence) and not isinstance(one, str)


def _of(value: Any, i: int) -> Any:
    return {path: own[i] for path, own in value.items()} if isinstance(value, Mapping) else value[i]


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Rules(tuple(Rule(glob.escape(path), _value(own)) for path, own in value.items()))
    if value is None:
        raise ValueError("a number of the merge was traced, and is not known")
    return value


def _seed(record: Mapping[str, Any]) -> int | None:
    if record.get("seed") is not None or record["key"] is None:
        return record.get("seed")
    high, low = record["key"] if len(record["key"]) == 2 else (1, 0)
    if high:
        raise ValueError("the merge was made with a key that no seed makes")
    return low
