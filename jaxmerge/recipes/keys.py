"""The keys of a recipe: what each takes. The reader, the checks and the JSON schema go by these tables."""

import numbers
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxmerge.catalog import (
    COMBINATION_TYPES,
    DTYPES,
    FORMATS,
    METHODS,
    SPACES,
    STAGES,
    TREES,
    Hyperparameter,
    all_hyperparameters,
)
from jaxmerge.recipes.places import unknown
from jaxmerge.words import short

# Of what is written. A recipe inside of another writes nothing.
WRITING = ("format", "layout", "head_dim", "layers")

# What finds ranks in place of `rank`.
RULES = ("energy", "sv_ratio", "sv_fro", "sv_cumulative")

Kind = Literal["text", "choice", "flag", "number", "extras", "alpha", "scan_axis", "pattern", "hash", "nested"]


@dataclass(frozen=True)
class Key:
    """A key of a recipe, or of one of its adapters.

    Attributes:
        name: As it is written.
        help: One line.
        kind: ``"number"`` goes by `limits`; ``"nested"`` is read by a function of its own.
        choices: For ``"choice"``.
        limits: Which numbers it may be.
        varies: Whether it may be another number for each module: a list, or rules.
    """

    name: str
    help: str
    kind: Kind
    choices: tuple[str, ...] = ()
    limits: Hyperparameter | None = None
    varies: bool = False

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole."""
        if self.limits is None:
            return self.kind in ("extras", "scan_axis")
        return self.limits.kind == "count" or self.limits.whole


def _number(name: str, help: str, kind: Any = "number", varies: bool = False, **bounds: Any) -> Key:
    return Key(name, help, "number", limits=Hyperparameter(name, help, kind, **bounds), varies=varies)


def of_hyperparameter(hyperparameter: Hyperparameter) -> Key:
    """The key of a method's, a space's or a stage's hyperparameter."""
    name, help = hyperparameter.name, hyperparameter.help
    if hyperparameter.kind == "choice":
        return Key(name, help, "choice", choices=hyperparameter.choices)
    return Key(name, help, "number", limits=hyperparameter.as_number, varies=hyperparameter.traceable)


def of_stage(name: str) -> dict[str, Key]:
    """The keys of a stage's hyperparameters. Those of lines say how depth makes a difference, and so make none."""
    own = _table(*map(of_hyperparameter, STAGES[name].hyperparameters))
    return {key: replace(row, varies=row.varies and name != "lines") for key, row in own.items()}


def _table(*keys: Key) -> dict[str, Key]:
    return {key.name: key for key in keys}


# Of methods and spaces, by name.
HYPERPARAMETERS = _table(*map(of_hyperparameter, all_hyperparameters()))

# Those that an adapter may have of its own.
PER_ADAPTER = tuple(name for name in HYPERPARAMETERS if any(name in row.per_adapter for row in METHODS.values()))

READING = _table(
    Key("alpha", "alpha of a format that does not store it, or rank where it is each module's rank", "alpha"),
    Key("scan_axis", "where the layers of a scan lie in the factors: a number, none or some", "scan_axis"),
    Key("item", "which item of a step that has several", "text"),
    Key("tree", "how factors are called, where it could be several", "choice", choices=TREES),
    Key("pattern", "regular expressions of the paths of all A and of all B, for any other tree", "pattern"),
)

ADAPTER = _table(
    Key("path", "where the adapter lies, relative to the recipe", "text"),
    Key("recipe", "in place of path: the recipe that makes it, or the path of one", "nested"),
    Key("name", "what reports and messages call it", "text"),
    _number("weight", "what its weight change is multiplied by, of any sign", varies=True),
    Key("sha256", "of its weights: another file is refused", "hash"),
    Key("config_sha256", "of its adapter_config.json: another one is refused", "hash"),
    *READING.values(),
    *(HYPERPARAMETERS[name] for name in PER_ADAPTER),
)

RECIPE = _table(
    Key("adapters", "what is merged, in order: paths, or mappings", "nested"),
    Key("method", "how they are merged (linear)", "choice", choices=tuple(METHODS)),
    Key("space", "in what form their weight changes are laid before the method (its own)", "choice", tuple(SPACES)),
    Key("combination_type", "one of PEFT's, in place of method and space", "choice", choices=tuple(COMBINATION_TYPES)),
    *HYPERPARAMETERS.values(),
    _number("rank", "of the result (exact where there is such a rank)", "count", varies=True, least=1),
    _number("energy", "in place of rank: the smallest that keeps this fraction of Σσ²", above=0, most=1),
    _number("sv_ratio", "in place of rank: keeps the σ of at least the largest / sv_ratio", least=1),
    _number("sv_fro", "in place of rank: the smallest that keeps this fraction of √Σσ²", above=0, most=1),
    _number("sv_cumulative", "in place of rank: the smallest that keeps this fraction of Σσ", above=0, most=1),
    _number("max_rank", "the most that energy or one of the sv rules may find", "count", least=1),
    Key("stages", "what is done to the merge once it is made, in this order", "nested"),
    Key("density_scope", "what a density is a fraction of (module)", "choice", choices=("module", "model")),
    Key("dtype", "of the result (the adapters')", "choice", choices=DTYPES),
    _number("seed", "of jax.random.key, for methods that draw", "count", least=0, most=2**32 - 1),
    Key(
        "extras", "tensors that are not factors, where adapters differ: same refuses, average, or an adapter", "extras"
    ),
    Key("allow_different_bases", "whether adapters of different base models may be merged (false)", "flag"),
    Key("format", "of what is written (the first adapter's)", "choice", choices=FORMATS),
    Key("layout", "what modules are called in the other format: a model, or a table of your own", "text"),
    _number("head_dim", "size of one attention head, to cut heads apart", "count", least=1),
    _number("layers", "of the model, for formats that stack them", "count", least=1),
)

RULE = _table(
    Key("match", "pattern of module paths, with *, ? and [...]; left out in a last rule, which takes the rest", "text"),
    Key("value", "a number, or a list of numbers over the depth of the model", "nested"),
)


def value_problems(key: Key, value: Any, user: str = "") -> list[str]:
    """What is wrong with one value: of one that varies, with one of its numbers."""
    name = key.name
    if value is None:
        return [f"{name} has no value"]
    if key.limits is not None:
        from jaxmerge.merging.checks import hyperparameter_problem

        if not isinstance(value, numbers.Real):  # A number in quotes is none.
            return [f"{name} should be a number, got {short(value)}"]
        return hyperparameter_problem(user, key.limits, value)
    if key.kind == "choice" and value not in key.choices:
        return [_unknown_choice(key, value)]
    if key.kind == "flag" and not isinstance(value, bool):
        return [f"{name} should be true or false, got {short(value)}"]
    wanted = _WANTED.get(key.kind)
    return [f"{name} should be {wanted[0]}, got {short(value)}"] if wanted and not wanted[1](value) else []


def _unknown_choice(key: Key, value: Any) -> str:
    if key.name in ("method", "combination_type"):
        other = {"method": ("combination_type", COMBINATION_TYPES), "combination_type": ("method", METHODS)}[key.name]
        if isinstance(value, str) and value in other[1]:
            return f"unknown {key.name} {value}: that is a {other[0]}"
    if not isinstance(value, str):
        return f"{key.name} should be a text, got {short(value)}"
    return unknown(key.name, value, key.choices)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _is_pattern(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)


HASH = "^[0-9a-f]{64}$"

_WANTED = {
    "text": (
        "a text without control characters",
        lambda value: isinstance(value, str) and value != "" and value.isprintable(),
    ),
    "extras": ("same, average, or an adapter", lambda value: isinstance(value, str) or _is_count(value, 1)),
    "alpha": ("a number, or rank", lambda value: value == "rank" or _is_number(value)),
    "scan_axis": (
        "a whole number from 0, none, or some",
        lambda value: value in ("none", "some") or _is_count(value, 0),
    ),
    "pattern": ("two texts, for A and for B", _is_pattern),
    "hash": ("64 hexadecimal digits", lambda value: isinstance(value, str) and re.fullmatch(HASH, value) is not None),
}
