"""Stages on top of a merge: reading what is asked for, and applying it module by module."""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxmerge import stages
from jaxmerge.base import Adapter, Array, Energy, LoRA, has_values, on_host, precision, promote
from jaxmerge.catalog import STAGES
from jaxmerge.io.peft.keys import outer_module
from jaxmerge.lowrank import squared_norm, truncate
from jaxmerge.memory import release
from jaxmerge.merging.checks import (
    all_paths,
    coverage_problems,
    hyperparameter_problem,
    listing,
    of_stage,
    one_of_problems,
)
from jaxmerge.sharding import laid_out, placement, seen_everywhere
from jaxmerge.spaces import Factors, Lifted
from jaxmerge.spaces.pipe import nothing_lost
from jaxmerge.sparsify import round_to
from jaxmerge.values import at
from jaxmerge.words import short

# A name in `STAGES`, alone or with its hyperparameters.
StageLike = str | tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A stage of a program; static under jit.

    Attributes:
        name: In `STAGES`.
        choices: The hyperparameters that are not numbers.
    """

    name: str
    choices: tuple[tuple[str, Any], ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it waits for all modules."""
        return dict(self.choices).get("scope") == "whole"

    @property
    def cuts(self) -> bool:
        """Whether it takes directions out of the merge, so that what it loses is told."""
        return self.name == "truncate"


@dataclass(frozen=True)
class Staging:
    """What is done to a merge once it is made, in order.

    Attributes:
        stages: What every module goes through, and what waits for all of them.
        numbers: Of each stage, name -> a number, or one for each module by its path.
    """

    stages: tuple[Stage, ...] = ()
    numbers: tuple[Mapping[str, Any], ...] = ()

    @property
    def of_modules(self) -> tuple[Stage, ...]:
        """The stages up to the first that waits for all modules."""
        waits = [i for i, stage in enumerate(self.stages) if stage.whole]
        return self.stages[: waits[0]] if waits else self.stages

    def of(self, paths: Sequence[str], dtype: str) -> tuple[dict[str, Array], ...]:
        """The numbers of the stages of modules, ``[L]`` each."""

        def along(value: Any) -> Any:
            values = [at(value, path) for path in paths]
            if any(isinstance(one, jax.Array) for one in values):
                return jnp.stack([jnp.asarray(one, dtype) for one in values])
            return np.asarray(values, dtype)

        count = len(self.of_modules)
        return tuple({name: along(value) for name, value in numbers.items()} for numbers in self.numbers[:count])


def as_stages(asked: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Names and hyperparameters of stages, each given as a name, as a pair, or as in recipes, ``{name: {...}}``.

    Raises:
        ValueError: If one is given otherwise.
    """
    given = [asked] if isinstance(asked, str | Mapping) or not isinstance(asked, Iterable) else list(asked)
    found: list[tuple[str, Mapping[str, Any]]] = []
    for one in given:
        pair = (one, {}) if isinstance(one, str) else one
        pair = next(iter(pair.items())) if isinstance(pair, Mapping) and len(pair) == 1 else pair
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not is_pair or not isinstance(pair[0], str) or not isinstance(pair[1], Mapping):
            raise ValueError(f"a stage is a name, or a pair of a name and its hyperparameters, not {short(one)}")
        found.append((pair[0], pair[1]))
    return found


def checked_stages(
    asked: Sequence[tuple[str, Mapping[str, Any]]], adapters: Sequence[Adapter], problems: list[str]
) -> Staging:
    """The stages that are asked for; what is wrong with them is added to the problems."""
    read, numbers = [], []
    for name, values in asked:
        if name not in STAGES:
            problems.append(f"unknown stage {name!r}: there are {', '.join(STAGES)}")
            continue
        known = {h.name: h for h in STAGES[name].hyperparameters}
        takes = f"it takes {', '.join(known)}" if known else "it takes nothing"
        problems += [f"stage {name} has no {other}: {takes}" for other in values if other not in known]
        own = STAGES[name].taken(values)
        found = [
            of_stage(name, problem) for other, value in own.items()
            for problem in hyperparameter_problem(f"stage {name}", known[other], value)
        ]  # fmt: skip
        found += one_of_problems(name, own)
        problems += found
        if found:
            continue
        problems += [
            problem
            for other, value in own.items()
            for problem in coverage_problems(f"{other} of stage {name}", value, all_paths(adapters))
        ]
        if name == "lines":
            if varying := [other for other, value in own.items() if isinstance(value, Mapping)]:
                problems.append(f"{varying[0]} of stage lines is one number: it is depth that makes it differ")
                continue
            read.append(Stage("scale"))
            numbers.append({"factor": _by_depth(adapters, own, problems)})
            continue
        read.append(Stage(name, tuple((other, own[other]) for other in own if not known[other].traceable)))
        numbers.append({other: own[other] for other in own if known[other].traceable})
    whole = [i for i, stage in enumerate(read) if stage.whole]
    if whole and (late := [stage.name for stage in read[whole[0] + 1 :] if stage.name != "scale"]):
        problems.append(
            f"stage {late[0]} comes after {read[whole[0]].name} over the whole model: only lines and scale can"
        )
    return Staging(tuple(read), tuple(numbers))


def _by_depth(adapters: Sequence[Adapter], own: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    paths = all_paths(adapters)
    stacked = [path for path in paths if any(a.modules[path].batch for a in adapters if path in a.modules)]
    if stacked:
        problems.append(f"stage lines cannot tell the depth of modules that hold several layers: {listing(stacked)}")
    return stages.lines_factors(paths, **own)


def apply(
    program: Sequence[Stage],
    numbers: Sequence[Mapping[str, Array]],
    lifted: Lifted,
    sources: Factors,
    weights: Array,
    rank: int,
) -> Lifted:
    """Takes one module through its stages, and cuts it to its rank.

    Args:
        program: The stages of modules.
        numbers: Of each stage, name -> scalar.
        lifted: The merge, of that rank or a greater one.
        sources: The module in n adapters.
        weights: ``[n]``.
        rank: Of the result.

    Returns:
        The result. Where the merge had been cut before the stages, or was by one of them, the same share of the energy
        counts as lost. Directions that a stage has taken out are zeros, behind all others.
    """
    if not program:
        return lifted
    pair, at_hand = (lifted.a, lifted.b), {"sources": sources, "weights": weights}
    left = jnp.ones_like(lifted.energy.total)
    for stage, own in zip(program, numbers, strict=True):
        function = STAGES[stage.name].load()
        wanted = inspect.signature(function).parameters
        arguments = {name: value for name, value in at_hand.items() if name in wanted}
        earlier, pair = pair, function(pair, **arguments, **own)
        left *= _share(earlier, pair) if stage.cuts else 1
    a, b = pair
    cut = (a, b, nothing_lost(squared_norm(a, b))) if rank >= a.shape[0] else truncate(a, b, rank)
    if any(stage.cuts for stage in program):
        # To the decomposition, null directions are rounding errors of some size.
        there = jnp.arange(cut[0].shape[0]) < jnp.sum(jnp.any(a != 0, axis=1))
        cut = (jnp.where(there[:, None], cut[0], 0), jnp.where(there, cut[1], 0), cut[2])
    energy, before = cut[2], lifted.energy
    # What share of the merge was there, and how much more of it could have been.
    whole = jnp.where(before.total > 0, before.total, 1)
    kept = left * jnp.where(before.total > 0, 1 - before.lost / whole, 1)
    total = energy.total / jnp.where(kept > 0, kept, 1)
    return Lifted(
        cut[0],
        cut[1],
        Energy(total, total - energy.total + energy.lost, energy.missed + before.missed / whole * total),
    )


def _share(merged: stages.Pair, cut: stages.Pair) -> Array:
    """How much of its energy a merge has kept; 1 where it has none."""
    before, after = (jnp.square(stages.frobenius_norm(pair)) for pair in (merged, cut))
    return jnp.where(before > 0, jnp.minimum(after / jnp.where(before > 0, before, 1), 1), 1)


def narrowed(loras: Mapping[str, LoRA]) -> dict[str, LoRA]:
    """Merged modules without the directions behind all others that are zeros, as far as values are known.

    Args:
        loras: Module path -> factors; layers and experts that lie in one module share its rank.

    Returns:
        The same, each of rank 1 or more. Modules to which a format gives one rank still share it.
    """
    if not all(has_values(lora.a) for lora in loras.values()):
        return dict(loras)
    ranks: dict[str, int] = {}
    for path, lora in loras.items():
        held = np.any(np.asarray(seen_everywhere(lora.a)) != 0, axis=-1).reshape(-1, lora.rank).any(axis=0)
        release(lora.a)
        own = int(np.flatnonzero(held)[-1]) + 1 if held.any() else 1
        ranks[outer_module(path)] = max(ranks.get(outer_module(path), 1), own)
    return {
        path: dataclasses.replace(lora, a=_leading(lora.a, rank, -2), b=_leading(lora.b, rank, -1))
        for path, lora in loras.items()
        for rank in [ranks[outer_module(path)]]
    }


def _leading(leaf: Any, rank: int, axis: int) -> Any:
    """The leading rows or columns of a factor, where it lies. What lies on the host is cut there: no compile."""
    if rank >= leaf.shape[axis]:
        return leaf
    index = (..., slice(rank), *[slice(None)] * (-1 - axis))
    if isinstance(leaf, np.ndarray):
        return leaf[index]
    with precision(leaf.dtype):
        if on_host(leaf) and len(leaf.devices()) == 1:
            return jax.device_put(np.asarray(leaf)[index].copy())
        found = placement(leaf)
        if found is not None:  # What is spread along the rank is put together first.
            spec = [*found.spec, *[None] * (leaf.ndim - len(found.spec))]
            spec[axis] = None
            leaf = laid_out(leaf, NamedSharding(found.mesh, PartitionSpec(*spec)))
        return laid_out(jax.lax.slice_in_dim(leaf, 0, rank, axis=axis), found)


def scaled(lora: LoRA, factor: ArrayLike) -> LoRA:
    """A merged module times a number, in its own dtype."""
    wide = promote(lora.a.dtype, jnp.float32)
    with precision(wide):
        a, b = stages.scale((jnp.asarray(lora.a, wide), jnp.asarray(lora.b, wide)), jnp.asarray(factor, wide))
        return dataclasses.replace(lora, a=round_to(a, lora.a.dtype), b=round_to(b, lora.b.dtype))


def squared_norms(merged: LoRA, loras: Sequence[LoRA]) -> tuple[Array, Array]:
    """The squared norms of a merged module, scalar, and of its n sources, ``[n]``; layers of one module add up."""
    wide = promote(*[leaf.dtype for lora in loras for leaf in (lora.a, lora.b)], jnp.float32)

    def flat(leaf: Any) -> Array:
        return jnp.asarray(leaf, wide).reshape(-1, *leaf.shape[-2:])

    with precision(wide):
        pairs = [(flat(lora.a), flat(lora.b)) for lora in (merged, *loras)]
        scales = jnp.stack([jnp.asarray(lora.scale, wide) for lora in loras])
        return _squared_norms(pairs, scales)


@jax.jit
def _squared_norms(pairs: Sequence[tuple[Array, Array]], scales: Array) -> tuple[Array, Array]:
    def of_layer(layer: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
        merged, *sources = layer
        return stages.squared_norms(merged, Factors([a for a, _ in sources], [b for _, b in sources], scales))

    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(of_layer, pairs))
