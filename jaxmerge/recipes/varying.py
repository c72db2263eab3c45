"""Arithmetic of values that vary."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxmerge.recipes.model import Gradient, Rule, Rules, Value
from jaxmerge.recipes.places import Place


def leaves(value: Any) -> Iterator[tuple[Place, Any]]:
    """The numbers of a value, and where in it they stand."""
    if isinstance(value, Gradient):
        yield from (((i,), point) for i, point in enumerate(value.points))
    elif isinstance(value, Rules):
        for i, rule in enumerate(value.rules):
            yield from (((i, "value", *place), number) for place, number in leaves(rule.value))
    elif value is not None:
        yield (), value


def changed(value: Value, change: Callable[[float], float]) -> Value:
    """A value with each of its numbers changed: along a gradient that is right where the change is linear."""
    if isinstance(value, Gradient):
        return Gradient(tuple(changed(point, change) for point in value.points))
    if isinstance(value, Rules):
        return Rules(tuple(Rule(rule.match, changed(rule.value, change)) for rule in value.rules))
    return change(value)


def shares(values: Sequence[Value], zero_divides: bool = False) -> list[Value] | None:
    """Values divided by their sum, where the result is again of numbers, gradients and rules.

    Args:
        values: One per adapter.
        zero_divides: Whether a sum of 0 is an error rather than left alone, as 1 is.

    Returns:
        The quotients; None where sums are not known to be the same all along a gradient, or rules are not the same.
    """
    kinds = [value for value in values if isinstance(value, Rules)]
    if kinds:
        matches = {tuple(rule.match for rule in value.rules) for value in kinds}
        if len(matches) > 1:
            return None
        ((*each,),) = matches
        rows = [
            shares([v.rules[i].value if isinstance(v, Rules) else v for v in values], zero_divides)
            for i in range(len(each))
        ]
        if any(row is None for row in rows):
            return None
        return [
            Rules(tuple(Rule(match, row[j]) for match, row in zip(each, rows, strict=True)))  # type: ignore[index]
            for j in range(len(values))
        ]
    lengths = {len(value.points) for value in values if isinstance(value, Gradient)}
    if len(lengths) > 1 or 0 in lengths:
        return None
    count = next(iter(lengths), 1)
    columns = [[v.points[i] if isinstance(v, Gradient) else v for v in values] for i in range(count)]
    if not all(isinstance(number, int | float) for column in columns for number in column):
        return None
    sums = [math.fsum(column) for column in columns]
    if not all(math.isclose(total, sums[0], rel_tol=1e-9, abs_tol=1e-12) for total in sums):
        return None
    if abs(sums[0]) < 1e-8:  # As mergekit has it.
        return None if zero_divides else list(values)
    return [changed(value, lambda number: number / sums[0]) if sums[0] != 1 else value for value in values]
