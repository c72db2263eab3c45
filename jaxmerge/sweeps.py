"""Many settings of one merge in one compile: weights, scales, densities and seeds, scored where they are made."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxmerge import datafree
from jaxmerge.base import Adapter, Array, LoRA, promote
from jaxmerge.catalog import METHODS, all_hyperparameters
from jaxmerge.merging.checks import checked_weights, hyperparameter_problems, method_and_space, raise_problems
from jaxmerge.merging.plan import as_keys, plan_merge
from jaxmerge.merging.staging import StageLike
from jaxmerge.merging.steps import Plan, Setting
from jaxmerge.sparsify import round_to
from jaxmerge.tables import Table, columns, html
from jaxmerge.values import described
from jaxmerge.words import short

Grid = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """What a sweep found.

    Attributes:
        settings: S settings, each the grid's names with a value.
        scores: What ``evaluate`` returned, with an axis ``[S]`` in front, in NumPy.
        adapters: The merged adapters, if they were asked for.
    """

    settings: list[dict[str, Any]]
    scores: Any
    adapters: list[Adapter] | None = None

    def to_json(self) -> dict[str, Any]:
        """Settings and scores as plain lists, dictionaries and numbers."""
        return jax.tree.map(lambda x: np.asarray(x).tolist(), {"settings": self.settings, "scores": self.scores})

    def table(self) -> Table:
        """The settings, and the scores that are a number for each."""
        names, scores = list(self.settings[0]) if self.settings else [], self._named()
        rows = [
            (*(described(setting[name]) for name in names), *(f"{values[i]:.4g}" for values in scores.values()))
            for i, setting in enumerate(self.settings)
        ]
        return Table(columns([], [*names, *(name.replace("_", " ") for name in scores)]), rows)

    def _named(self) -> dict[str, np.ndarray]:
        named = self.scores if isinstance(self.scores, Mapping) else {"score": self.scores}
        return {str(name): np.asarray(values) for name, values in named.items() if np.ndim(values) == 1}

    def __repr__(self) -> str:
        names = f" of {', '.join(self.settings[0])}" if self.settings else ""
        kept = ["with their adapters"] if self.adapters is not None else []
        return f"Sweep({', '.join([f'{len(self.settings)} settings{names}', *self._named(), *kept])})"

    def _repr_html_(self) -> str:
        return html("Sweep", [f"{len(self.settings)} settings"], self.table())


def sweep(
    adapters: Sequence[Adapter],
    evaluate: Callable[[Adapter], Any],
    grid: Grid,
    *,
    method: str | None = None,
    space: str | None = None,
    rank: int | None = None,
    combination_type: str | None = None,
    weights: Sequence[ArrayLike] | None = None,
    key: Array | None = None,
    mesh: Mesh | None = None,
    memory: int | str | None = None,
    stages: Sequence[StageLike] = (),
    traced: bool = True,
    keep: bool = False,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
    **hyperparameters: Any,
) -> Sweep:
    """Merges with every setting of a grid and scores the results.

    What settings share is done once: bases of the factors, the passes that find thresholds, and whole merges where only
    the scale differs. Nothing is compiled twice, whatever the grid holds.

    Args:
        adapters: As in `jaxmerge.merge`.
        evaluate: A merged adapter -> its score: a scalar, or a pytree of such. It is traced by JAX, unless
            ``traced`` is False: it then gets arrays and may do what it likes, one setting at a time. Arrays that it
            closes over become constants of its program; those of a `jax.tree_util.Partial` become arguments, which is
            faster to compile for a model or data.
        grid: Name -> values; every combination is a setting. ``"weights"``: one number per adapter each.
            ``"scale"``: the λ that the merge is multiplied by. ``"seed"``: of ``jax.random.key``. And the method's
            numeric hyperparameters, such as ``"density"``.
        method: As in `jaxmerge.merge`.
        space: As in `jaxmerge.merge`.
        rank: As in `jaxmerge.merge`.
        combination_type: As in `jaxmerge.merge`.
        weights: As in `jaxmerge.merge`, where they are not in the grid.
        key: As in `jaxmerge.merge`, where seeds are not in the grid.
        mesh: As in `jaxmerge.merge`.
        memory: As in `jaxmerge.merge`; merged adapters of as many settings as fit are held at once.
        stages: As in `jaxmerge.merge`, but for those of the whole model.
        traced: Whether ``evaluate`` is traced.
        keep: Whether the merged adapters are returned too.
        on_progress: Called with how many modules are merged, and of how many; each is merged anew for as many settings
            as fit.
        **hyperparameters: As in `jaxmerge.merge`, where they are not in the grid.

    Returns:
        Settings and scores; the last name of the grid changes fastest.

    Raises:
        ValueError: As `jaxmerge.merge` does; and if the grid does not fit the method.
    """
    fixed = {
        "method": method, "space": space, "rank": rank, "combination_type": combination_type, "weights": weights,
        "key": key, "mesh": mesh, "memory": memory, "stages": stages, **hyperparameters,
    }  # fmt: skip
    if evaluate is datafree.scores:
        raise ValueError("evaluate should be what jm.scores(adapters) gives, not jm.scores itself")
    if not callable(evaluate):
        raise ValueError(f"evaluate should be a function of a merged adapter, got {short(evaluate)}")
    _check_grid(grid, fixed)
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    scales = list(grid.get("scale", (1.0,)))
    merges = [dict(zip(names, values, strict=True)) for names, values in _merges(grid)]
    plan = _plan(adapters, merges, fixed)
    bytes_each = sum(
        (bucket.rank * sum(bucket.features) * math.prod(bucket.batch)) * 4 * len(paths)
        for (bucket, _), paths in plan.buckets.items()
    )
    at_once = max(1, plan.memory // (2 * bytes_each))
    scored, kept, done = [], [], itertools.count(1)
    # What a `Partial` holds is an argument of the program; in a second one it would be a constant.
    scorer = evaluate if isinstance(evaluate, jax.tree_util.Partial) else jax.tree_util.Partial(evaluate)
    total = sum(map(len, plan.buckets.values())) * math.ceil(len(merges) / at_once)
    for start in range(0, len(merges), at_once):
        part = slice(start, start + at_once)
        chunk = dataclasses.replace(
            plan, settings=plan.settings[part], keys=None if plan.keys is None else plan.keys[part]
        )
        merged = _merged(chunk, lambda: on_progress(next(done), total))
        count = len(chunk.settings)
        if traced:
            scored.append(_evaluate(scorer, merged, jnp.asarray(scales, jnp.float32)))
        else:
            each = [[evaluate(_scaled(_one(merged, i), scale)) for scale in scales] for i in range(count)]
            scored.append(_stacked([_stacked(row) for row in each]))
        if keep:
            kept += [_one(merged, i) for i in range(count)]
    scores = jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts]), *scored)
    # Where each setting lies among merges and scales.
    place = {_frozen(merge): i for i, merge in enumerate(merges)}
    at = [
        (place[_frozen({k: v for k, v in setting.items() if k != "scale"})], scales.index(setting.get("scale", 1.0)))
        for setting in settings
    ]
    rows, columns = (np.array(index) for index in zip(*at, strict=True))
    found = [_scaled(kept[i], scales[j]) for i, j in at] if keep else None
    return Sweep(settings, jax.tree.map(lambda x: x[rows, columns], scores), found)


def _merges(grid: Grid) -> list[tuple[list[str], tuple[Any, ...]]]:
    """The settings of all that is not a scale."""
    names = [name for name in grid if name != "scale"]
    return [(names, values) for values in itertools.product(*[grid[name] for name in names])]


def _frozen(setting: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((name, tuple(np.ravel(np.asarray(value)).tolist())) for name, value in setting.items())


def _check_grid(grid: Grid, fixed: Mapping[str, Any]) -> None:
    """Raises a ValueError for a grid that cannot be."""
    numeric = {h.name for h in all_hyperparameters() if h.traceable}
    known = {"weights", "scale", "seed", *numeric}
    single = [name for name, values in grid.items() if isinstance(values, str) or not hasattr(values, "__len__")]
    raise_problems([f"the grid's {name} should be a list of values, got {short(grid[name])}" for name in single])
    problems = [f"the grid has no values for {name}" for name, values in grid.items() if len(values) == 0]
    listed = ", ".join(sorted(known))
    problems += [f"unknown name {name!r} in the grid: there are {listed}" for name in grid if name not in known]
    twice = [name for name in grid if fixed.get("key" if name == "seed" else name) is not None]
    problems += [f"{name} is both in the grid and given for all settings" for name in twice]
    for scale in grid.get("scale", ()):
        if np.ndim(scale) != 0 or not np.isfinite(scale):
            problems.append(f"scale {scale!r} in the grid is not a finite number")
    raise_problems(problems)
    method, _ = method_and_space(fixed["method"], fixed["space"], fixed["combination_type"])
    if len(grid.get("seed", ())) > 1 and not METHODS[method].random:
        raise ValueError(f"method {method} draws nothing: all seeds of the grid give the same")


def _plan(adapters: Sequence[Adapter], merges: Sequence[Mapping[str, Any]], fixed: Mapping[str, Any]) -> Plan:
    """The plan of all merges; each of them is checked."""

    def arguments(merge: Mapping[str, Any]) -> dict[str, Any]:
        key = {"key": jax.random.key(merge["seed"])} if "seed" in merge else {}
        return {**fixed, **{name: value for name, value in merge.items() if name != "seed"}, **key}

    first = plan_merge(adapters, **arguments(merges[0]))
    if any(stage.whole for stage in first.staging.stages):
        raise ValueError("a sweep goes module by module: norm_restore over the whole model cannot be part of it")
    row, settings, keys = first.program.row, [], []
    problems: list[str] = []
    for merge in merges:
        given = arguments(merge)
        numbers = {name: given.get(name, value) for name, value in first.settings[0].numbers.items()}
        numbers = {name: np.asarray(x) if isinstance(x, Sequence) else x for name, x in numbers.items()}
        choices = dict(first.program.choices)
        cell = first.program.method, first.program.space
        problems += hyperparameter_problems(*cell, {**choices, **numbers}, len(adapters))
        weights = checked_weights(given["weights"], len(adapters), row.averages, problems)
        settings.append(Setting(weights, numbers))
        keys.append(given["key"])
    raise_problems(list(dict.fromkeys(problems)))
    return dataclasses.replace(
        first,
        program=dataclasses.replace(first.program, sweeps=True),
        settings=settings,
        keys=None if first.keys is None else as_keys(keys),
    )


def _merged(plan: Plan, advance: Callable[[], object]) -> Adapter:
    """The merged adapters as one, with an axis ``[S]`` in front of every array; tells of each module."""
    results = []
    for result in plan.run():
        results.append(result)
        for _ in result:
            advance()
    merged = plan.finish(results)
    # What it was made with is not one thing, and would make programs differ.
    merged = dataclasses.replace(merged, metadata=dataclasses.replace(merged.metadata, provenance="{}"))
    ones = jnp.ones(len(plan.settings), jnp.float32)
    modules = {path: dataclasses.replace(lora, scale=ones) for path, lora in merged.modules.items()}
    return dataclasses.replace(merged, modules=modules)


def _one(stacked: Adapter, i: int) -> Adapter:
    """The adapter of one setting; extras hang on none."""
    modules, energy = jax.tree.map(lambda x: x[i], (stacked.modules, stacked.energy))
    return dataclasses.replace(stacked, modules=modules, energy=energy)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def _scaled(adapter: Adapter, scale: ArrayLike) -> Adapter:
    """An adapter of scale 1 times a number."""

    def times(lora: LoRA) -> LoRA:
        b = jnp.asarray(lora.b, promote(lora.b.dtype, jnp.float32))
        b = round_to(b * jnp.asarray(scale, b.dtype), lora.b.dtype)
        return dataclasses.replace(lora, b=b, scale=1.0)

    energy = jax.tree.map(lambda x: x * jnp.asarray(scale, x.dtype) ** 2, adapter.energy)
    return dataclasses.replace(
        adapter, modules={path: times(lora) for path, lora in adapter.modules.items()}, energy=energy
    )


@jax.jit
def _evaluate(evaluate: Callable[[Adapter], Any], stacked: Adapter, scales: Array) -> Any:
    """Scores ``[S, scales]``."""
    each = (stacked.modules, stacked.energy)

    def score(one: Any) -> Any:
        adapter = dataclasses.replace(stacked, modules=one[0], energy=one[1])
        return jax.lax.map(lambda scale: evaluate(_scaled(adapter, scale)), scales)

    return jax.lax.map(score, each)
