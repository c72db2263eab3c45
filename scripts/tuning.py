"""How a merge is tuned and scored: the protocol of scripts/quality.py, one cell at a time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxmerge as jm
from jaxmerge.catalog import SPACES, Method
from scripts import minilm, scoring

DENSITIES = (0.2, 0.5, 0.8)
SEED = 0
# Scales are 2^(k/2): first these k, then further ones between the limits.
COARSE, LIMITS = (-2, 0, 2, 4), (-12, 12)

Score = Callable[[Sequence[int]], Mapping[int, float]]


@dataclass(frozen=True)
class Cell:
    """A way to merge.

    Attributes:
        method: A name in `jaxmerge.METHODS`.
        space: A name in `jaxmerge.SPACES`.
        rank: What it is cut to; None for all that it has.
        stages: What is done to it.
    """

    method: str
    space: str
    rank: int | None = None
    stages: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its results."""
        cut = "" if self.rank is None else f"@{self.rank}"
        return f"{self.method}/{self.space}{cut}" + "".join(f"+{stage}" for stage in self.stages)

    @property
    def row(self) -> Method:
        """The method's row."""
        return jm.METHODS[self.method]

    @property
    def densities(self) -> list[float]:
        """What to try; nothing for a method that takes none."""
        found = [h for h in self.row.hyperparameters if h.name == "density"]
        return sorted({*DENSITIES, *(h.default for h in found if h.default is not None)}) if found else []

    def arguments(self, largest: int) -> dict[str, Any]:
        """Of `jaxmerge.merge`; ``largest`` is the rank of any module's whole weight change."""
        form = SPACES[self.space].load(self.row)
        rank = largest if self.rank is None and form.full_rank and self.space == "full" else self.rank
        return {"method": self.method, "space": self.space, "rank": rank, "stages": self.stages, **seeded(self.row)}


class Split(NamedTuple):
    """Examples, how many of each task, and what part of them the tasks' own adapters get right."""

    examples: scoring.Examples
    sizes: Mapping[str, int]
    own: Mapping[str, float]


@dataclass(frozen=True)
class Experiment:
    """What all cells are scored with.

    Attributes:
        base: The model.
        adapters: One for each task.
        val: What settings are chosen on.
        test: What they are reported on.
    """

    base: minilm.Bert
    adapters: Sequence[jm.Adapter]
    val: Split
    test: Split

    @cached_property
    def largest(self) -> int:
        """The largest rank that a weight change can have."""
        return max(min(lora.features) for lora in self.adapters[0].modules.values())


def seeded(row: Method) -> dict[str, Any]:
    """The key of a method that draws."""
    return {"key": jax.random.key(SEED)} if row.random else {}


def is_correct(base: minilm.Bert, examples: scoring.Examples, adapter: jm.Adapter) -> Any:
    """As `scoring.is_correct`, in bfloat16, which takes half the time and changes one answer in a thousand."""
    return scoring.is_correct(base, examples, adapter, "bfloat16")


def correct(
    base: minilm.Bert,
    examples: scoring.Examples,
    adapters: Sequence[jm.Adapter],
    grid: Mapping[str, Any],
) -> np.ndarray:
    """Which examples the weighted sums of a grid get right, ``[S, N]``."""
    return np.asarray(jm.sweep(adapters, jax.tree_util.Partial(is_correct, base, examples), grid).scores)


def alone(
    base: minilm.Bert, adapters: Sequence[jm.Adapter], examples: scoring.Examples, sizes: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """The accuracies of each adapter on its own task, and of the base model; adapters in the order of tasks."""
    n = len(adapters)
    grid = {"weights": [*np.eye(n).tolist(), [0.0] * n]}
    accuracies = scoring.by_task(correct(base, examples, adapters, grid), sizes)
    return {
        "own": {task: float(accuracies[task][i]) for i, task in enumerate(sizes)},
        "base": {task: float(accuracies[task][-1]) for task in sizes},
    }


def mean_scores(split: Split, right: np.ndarray) -> list[float]:
    """Which examples are right ``[S, N]`` -> S mean normalised accuracies, in percent."""
    return (100 * scoring.normalised(scoring.by_task(right, split.sizes), split.own).mean(axis=0)).tolist()


def best_of(scores: Mapping[Any, float]) -> Any:
    """The name of the best score; the first of several."""
    return max(scores, key=lambda name: scores[name])


def next_steps(known: Mapping[int, float]) -> list[int]:
    """Which scales to try next, as their k, given the scores of those tried; none if the best lies between others."""
    best = best_of(known)
    if best == min(known) and best > LIMITS[0]:
        return [best - 2]
    if best == max(known) and best < LIMITS[1]:
        return [best + 2]
    return [k for k in (best - 1, best + 1) if k not in known and LIMITS[0] <= k <= LIMITS[1]]


def climb(known: Mapping[int, float], score: Score) -> dict[int, float]:
    """Scores of scales, with those of the next ones until there are none."""
    known = dict(known)
    while steps := next_steps(known):
        known |= score(steps)
    return known


def tuned(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """The record of a cell: its best density and scale, and its scores there."""
    start = time.perf_counter()
    merges = merged_at(experiment.adapters, cell.densities, **cell.arguments(experiment.largest))
    return {
        "method": cell.method,
        "space": cell.space,
        "rank": max(lora.rank for lora in next(iter(merges.values())).modules.values()),
        "stages": list(cell.stages),
        # What a scale of 1 gives each adapter.
        "weight": 1.0 if cell.row.averages else 1 / len(experiment.adapters),
        **best_merge(experiment, merges),
        "seconds": time.perf_counter() - start,
    }


def merged_at(
    adapters: Sequence[jm.Adapter], densities: Sequence[float], **arguments: Any
) -> dict[float | None, jm.Adapter]:
    """Density -> merge; None for the only one of a method that takes no density."""
    if not densities:
        return {None: jm.merge(adapters, **arguments)}
    found = jm.sweep(adapters, _unscored, {"density": densities}, keep=True, **arguments)
    assert found.adapters is not None
    return dict(zip(densities, found.adapters, strict=True))


def _unscored(merged: jm.Adapter) -> float:
    del merged
    return 0.0


def best_merge(experiment: Experiment, merges: Mapping[float | None, jm.Adapter]) -> dict[str, Any]:
    """The best of several merges at its best scale, both chosen on the validation examples; scores on the test's."""

    def score(merged: jm.Adapter, steps: Sequence[int]) -> dict[int, float]:
        scales = {"scale": [2 ** (k / 2) for k in steps]}
        right = correct(experiment.base, experiment.val.examples, [merged], scales)
        return dict(zip(steps, mean_scores(experiment.val, right), strict=True))

    tried = {density: score(merged, COARSE) for density, merged in merges.items()}
    best = best_of({density: max(scores.values()) for density, scores in tried.items()})
    tried[best] = climb(tried[best], lambda steps: score(merges[best], steps))
    step = best_of(tried[best])
    return {
        "density": best,
        "scale": 2 ** (step / 2),
        "val": tried[best][step],
        "tried": {str(density): {2 ** (k / 2): scores[k] for k in sorted(scores)} for density, scores in tried.items()},
        **at_test(experiment, merges[best], 2 ** (step / 2)),
    }


def at_test(experiment: Experiment, merged: jm.Adapter, scale: float = 1.0) -> dict[str, Any]:
    """Test scores of a merge, in percent: of each task, their mean and worst, and which examples were right."""
    test = experiment.test
    right = correct(experiment.base, test.examples, [merged], {"scale": [scale]})[0]
    accuracies = {task: float(part) for task, part in scoring.by_task(right, test.sizes).items()}
    each = 100 * scoring.normalised(accuracies, test.own)
    return {
        "accuracy": {task: 100 * accuracy for task, accuracy in accuracies.items()},
        "mean": float(each.mean()),
        "worst": float(each.min()),
        "error": 100 * scoring.standard_error(accuracies, test.own, test.sizes),
        "right": np.packbits(right).tobytes().hex(),
    }


def untuned(
    experiment: Experiment, method: str, density: float | None = None, stages: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What a method does where nothing is set, but for a density that it asks for; and stages, as they are."""
    given: dict[str, Any] = {
        **({} if density is None else {"density": density}),
        **({"stages": stages} if stages else {}),
    }
    merged = jm.merge(experiment.adapters, method=method, **seeded(jm.METHODS[method]), **given)
    return {"method": method, **given, **at_test(experiment, merged)}


def peers(experiment: Experiment, merges: Mapping[float | None, jm.Adapter]) -> dict[str, Any]:
    """The record of merges that were made elsewhere, by density; and of the best of them as it was."""
    start = time.perf_counter()
    found = best_merge(experiment, merges)
    plain = at_test(experiment, merges[found["density"]])
    return {**found, "untuned": plain, "seconds": time.perf_counter() - start}
