"""Values that may differ between modules: one for all of them, or a mapping from module path to each one's own."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


def at(value: Any, path: str) -> Any:
    """What a value is at a module.

    Args:
        value: One for all modules, or a mapping.
        path: The module's.

    Returns:
        The module's own.
    """
    return value[path] if isinstance(value, Mapping) else value


def each(value: Any) -> Iterator[Any]:
    """All that a value is at some module."""
    if isinstance(value, Mapping):
        yield from value.values()
    else:
        yield value


def described(value: Any) -> str:
    """A value in a few characters: a number, numbers per adapter, or the span of those of all modules.

    Args:
        value: As JSON holds it.

    Returns:
        For example ``0.5``, ``0.2, 0.5`` or ``0.1 … 0.9``.
    """
    if isinstance(value, Mapping):
        shown = [described(one) for one in sorted(value.values(), key=lambda one: np.ravel(one).tolist())]
        return " … ".join(dict.fromkeys((shown[0], shown[-1]))) if shown else "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(described(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings(record: Mapping[str, Any], full: bool = False) -> list[str]:
    """How a merge is made, in a few words each.

    Args:
        record: With the merge's ``method``, ``space``, ``hyperparameters`` and what `stages` takes.
        full: Whether its ``combination_type`` and its ``seed`` are told too, where it has one.
    """
    given = {"method": record["method"], "space": record["space"], **record["hyperparameters"]}
    if full and record.get("combination_type"):
        given = {"combination_type": record["combination_type"], **given}
    if full and record.get("seed") is not None:
        given["seed"] = record["seed"]
    return [*(f"{name} {described(value)}" for name, value in given.items()), *stages(record)]


def stages(record: Mapping[str, Any]) -> list[str]:
    """What is done to a merge once it is made, in a few words each.

    Args:
        record: With the merge's ``stages``, and the rule by which it was ``truncated``, if it was.
    """
    done = [*record.get("stages", []), *([("cut", record["truncated"])] if "truncated" in record else [])]
    words = [[name, *(f"{key} {described(value)}" for key, value in own.items())] for name, own in done]
    return [f"then {' '.join(stage)}" for stage in words]
