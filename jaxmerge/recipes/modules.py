"""Values that vary, at the modules that there are."""

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge.base import Adapter
from jaxmerge.merging.checks import all_paths, listing
from jaxmerge.recipes.model import Gradient, Recipe, Rules, Value
from jaxmerge.recipes.places import Place, Problem
from jaxmerge.stages import lines_factors


class Modules:
    """The modules of what a recipe merges.

    Attributes:
        paths: In the order of the adapters.
        problems: What is wrong with the values that were asked for.
    """

    def __init__(self, recipe: Recipe, adapters: Sequence[Adapter]):
        """Takes a recipe, and its adapters or their shapes."""
        self.paths = all_paths(adapters)
        self.problems: list[Problem] = []
        self._places = recipe.places
        self._depth = lines_factors(self.paths, alpha=0.0, beta=1.0)
        self._stacked = [path for path in self.paths if any(_has_layers(adapter, path) for adapter in adapters)]

    def at(self, value: Value, place: Place, paths: Sequence[str] | None = None) -> Any:
        """A value at modules; what is wrong with it is added to the problems.

        Args:
            value: As the recipe has it.
            place: Where that is.
            paths: The modules that must have it; all, if None.

        Returns:
            A number for all modules, or a mapping from module path to number.
        """
        paths = self.paths if paths is None else paths
        if isinstance(value, Gradient):
            return self._over_depth(value, place, paths)
        if not isinstance(value, Rules):
            return value
        found: dict[str, Any] = {}
        for i, own in enumerate(self._matched(value, place, set(paths))):
            number = self.at(value.rules[i].value, (*place, i, "value"), own)
            found |= number if isinstance(number, Mapping) else dict.fromkeys(own, number)
        return {path: found[path] for path in paths if path in found}

    def _over_depth(self, gradient: Gradient, place: Place, paths: Sequence[str]) -> dict[str, float]:
        if self._stacked:
            self._tell(place, f"the depth of modules that hold several layers is not known: {listing(self._stacked)}")
        if not gradient.points or not all(isinstance(point, int | float) for point in gradient.points):
            return {}  # Told already.
        marks = np.linspace(0, 1, len(gradient.points))
        return {path: float(np.interp(self._depth[path], marks, gradient.points)) for path in paths}

    def _matched(self, value: Rules, place: Place, wanted: set[str]) -> list[list[str]]:
        """For each rule, those of the wanted modules that it is the first to match."""
        left, matched = self.paths, []
        for i, rule in enumerate(value.rules):
            if not isinstance(rule.match, str | None):
                return [[] for _ in value.rules]  # Told already.
            own = {path for path in left if rule.match is None or fnmatch.fnmatchcase(path, rule.match)}
            if not own and rule.match is not None:
                self._tell((*place, i, "match"), self._useless(rule.match))
            matched.append([path for path in left if path in own and path in wanted])
            left = [path for path in left if path not in own]
        if missing := [path for path in left if path in wanted]:
            name = next(part for part in reversed(place) if isinstance(part, str))
            self._tell(
                place, f"no rule of {name} matches {listing(missing, 3)}; a last rule without match takes the rest"
            )
        return matched

    def _useless(self, match: str) -> str:
        if any(fnmatch.fnmatchcase(path, match) for path in self.paths):
            return f"{match} comes too late: earlier rules match all of its modules"
        near = max(self.paths, key=lambda path: difflib.SequenceMatcher(None, path, match).ratio())
        return f"{match} matches no module; the nearest is {near}"

    def _tell(self, place: Place, text: str) -> None:
        self.problems.append(self._places.problem(place, text))


def _has_layers(adapter: Adapter, path: str) -> bool:
    return path in adapter.modules and bool(adapter.modules[path].batch)
