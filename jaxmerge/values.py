"""Values that may differ between modules: one for all of them, or a mapping from module path to each one's own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def coverage_problems(name: str, value: Any, paths: Iterable[str], listing: Any) -> list[str]:
    """Modules that a mapping leaves out, and names in it that no module has.

    Args:
        name: What errors call the value.
        value: One for all modules, or a mapping.
        paths: The modules.
        listing: Names in a row, as text.

    Returns:
        Problems, a line each.
    """
    if not isinstance(value, Mapping):
        return []
    paths = list(paths)
    missing, unknown = [path for path in paths if path not in value], sorted(set(value) - set(paths))
    return [
        *([f"{name} says nothing of {listing(missing)}"] if missing else []),
        *([f"{name} is given for modules that there are none of: {listing(unknown)}"] if unknown else []),
    ]


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


def settings(record: Mapping[str, Any]) -> list[str]:
    """How a merge is made, in a few words each.

    Args:
        record: With the merge's ``method``, ``space``, ``hyperparameters`` and ``stages``, and the rule by which it was
            ``truncated``, if it was.
    """
    given = {"method": record["method"], "space": record["space"], **record["hyperparameters"]}
    done = [*record["stages"], *([("cut", record["truncated"])] if "truncated" in record else [])]
    stages = [[name, *(f"{key} {described(value)}" for key, value in own.items())] for name, own in done]
    return [*(f"{name} {described(value)}" for name, value in given.items()), *(f"then {' '.join(s)}" for s in stages)]
