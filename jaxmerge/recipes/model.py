"""What a recipe says, as data. It is checked by `jaxmerge.recipes.checks`, and not before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmerge.recipes.places import Places, Problem


@dataclass(frozen=True)
class Gradient:
    """Numbers over the depth of a model, evenly spaced from its first layer to its last, with lines between them.

    Attributes:
        points: At least one.
    """

    points: tuple[Any, ...]


@dataclass(frozen=True)
class Rule:
    """A value for the modules whose path matches a pattern.

    Attributes:
        match: A pattern with ``*``, ``?`` and ``[...]`` for the whole of a module path; None for all that are left.
        value: A number, or a `Gradient` over the depth of the whole model.
    """

    match: str | None
    value: Any


@dataclass(frozen=True)
class Rules:
    """A value for each module: that of the first rule that matches it.

    Attributes:
        rules: At least one.
    """

    rules: tuple[Rule, ...]


# Stands where a value could not be read, which has been told.
UNREAD = Gradient(())

# A number, the same for all modules; or one that varies. Anything else is found by the checks.
Value = Any


@dataclass(frozen=True)
class Stage:
    """Something that is done to a merge once it is made.

    Attributes:
        name: In `STAGES`; empty for one that could not be read.
        values: Its hyperparameters.
    """

    name: str
    values: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """One of the adapters that a recipe merges: a file, or the result of another recipe.

    Attributes:
        path: Where it lies; relative to the recipe's folder. None for a recipe, and for what could not be read.
        recipe: The recipe that makes it; None for a file.
        name: What reports and messages call it.
        weight: What its weight change is multiplied by.
        sha256: That its weights must have.
        config_sha256: That its adapter_config.json must have, which holds its scales.
        reading: How it is read, where that needs saying: ``alpha``, ``scan_axis``, ``item``, ``tree``, ``pattern``.
        hyperparameters: Of the method, for this adapter alone.
    """

    path: str | None = None
    recipe: "Recipe | None" = None
    name: str | None = None
    weight: Value | None = None
    sha256: str | None = None
    config_sha256: str | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A merge, written down: the arguments of `jaxmerge.merge` and of `jaxmerge.save`.

    Attributes:
        adapters: What is merged, in order.
        method: A name in `METHODS`; None for linear.
        space: A name in `SPACES`; None for the method's own.
        combination_type: One of PEFT's, in place of method and space.
        hyperparameters: Of the method and the space, for all adapters that have none of their own.
        rank: Of the result.
        max_rank: The most that one of the following rules may find.
        energy: Cuts each module to the smallest rank that keeps this fraction of its energy.
        sv_ratio: As in `jaxmerge.resize`.
        sv_fro: As in `jaxmerge.resize`.
        sv_cumulative: As in `jaxmerge.resize`.
        stages: What is done to the merge once it is made.
        density_scope: ``"module"`` or ``"model"``.
        dtype: Of the result; None for the sources'.
        seed: Of `jax.random.key`, for methods that draw.
        extras: ``"same"``, ``"average"``, or the name, the path or the number from 1 of an adapter.
        allow_different_bases: Whether adapters of different base models may be merged.
        format: Of what is written; None for the first adapter's.
        layout: As in `jaxmerge.save`.
        head_dim: As in `jaxmerge.save`.
        layers: As in `jaxmerge.save`.
        folder: What relative paths are relative to.
        notes: What the translation of a recipe of mergekit's could not keep.
        places: Where all of it stands in its file.
        faults: What could not be read of it.
    """

    adapters: Sequence[Source] = ()
    method: str | None = None
    space: str | None = None
    combination_type: str | None = None
    hyperparameters: Mapping[str, Value] = field(default_factory=dict)
    rank: Value | None = None
    max_rank: int | None = None
    energy: float | None = None
    sv_ratio: float | None = None
    sv_fro: float | None = None
    sv_cumulative: float | None = None
    stages: Sequence[Stage] = ()
    density_scope: str = "module"
    dtype: str | None = None
    seed: int | None = None
    extras: str | int = "same"
    allow_different_bases: bool = False
    format: str | None = None
    layout: str | None = None
    head_dim: int | None = None
    layers: int | None = None
    folder: str = ""
    notes: Sequence[str] = ()
    places: Places = field(default_factory=Places, repr=False, compare=False)
    faults: Sequence[Problem] = field(default=(), repr=False, compare=False)
