"""`verify`: whether a merged adapter is what its record says, and whether each adapter is really in it."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmerge import io
from jaxmerge.attribution import contributions
from jaxmerge.base import Adapter, LoRA, restricted
from jaxmerge.catalog import METHODS
from jaxmerge.io.peft.keys import natural_order
from jaxmerge.io.records import read_record, recipe_beside
from jaxmerge.merging.steps import Plan
from jaxmerge.recipes.arguments import truncation
from jaxmerge.recipes.headers import inspect
from jaxmerge.recipes.model import Recipe
from jaxmerge.recipes.reading import read_recipe
from jaxmerge.recipes.records import recipe_of
from jaxmerge.recipes.running import Workplace, planned, read
from jaxmerge.resizing import truncate
from jaxmerge.tables import Table, columns, html
from jaxmerge.values import described, each
from jaxmerge.words import counted

# Modules that are made again unless told otherwise.
_SAMPLE = 16
# Relative differences up to which a module counts as made again: those of rounding, on whatever machine, and of a few
# entries that a threshold takes there and not here.
_SAME = {"float64": 1e-3, "float32": 1e-3, "float16": 3e-3, "bfloat16": 2e-2}
_STATUS = {
    "same": "made again to the bit",
    "close": "made again, but for rounding",
    "different": "not what its recipe makes",
    "unknown": "could not be made again",
}
# What a record and a recipe have in common.
_SETTINGS = ("method", "space", "weights")
# A share of its weight below which an adapter is not in a result.
_ABSENT = 1e-3
# A part of a result below which nothing can be seen of an adapter in it, whatever the dtype.
_UNSEEN = 1e-7


@dataclass(frozen=True)
class Presence:
    """One adapter in a merged one.

    Attributes:
        name: Its path, or what the recipe calls it.
        weight: That the record says, in words: a number, or the span of those of its modules.
        found: The number of the adapter in the weighted sum of adapters that is nearest to the result, over the sampled
            modules: the weight itself for methods that sum. None where the adapter changes nothing there, or too
            little to be seen.
        projection: How many times its weight change lies along itself in the result, others' parts in common with it
            included; None as above.
        present: Whether it is in the result; so is what would not be seen in it.
    """

    name: str
    weight: str
    found: float | None
    projection: float | None
    present: bool


@dataclass(frozen=True, repr=False)
class Verification:
    """What was found of a merged adapter.

    Attributes:
        path: The adapter.
        status: ``"same"``, made again to the bit; ``"close"``, to rounding; ``"different"``; or ``"unknown"`` where it
            could not be made again.
        method: A name in `METHODS`.
        space: A name in `SPACES`.
        modules: How many there are.
        intact: Whether weights and configuration have the hashes that were written down with them; None where there are
            none.
        sampled: Those that were made again.
        error: The largest relative difference of a weight change, in the Frobenius norm; None where nothing was made.
        adapters: What it was merged from.
        problems: What is wrong, a line each; none of an adapter that is what it says.
    """

    path: str
    status: Literal["same", "close", "different", "unknown"]
    method: str
    space: str
    modules: int
    intact: bool | None
    sampled: tuple[str, ...]
    error: float | None
    adapters: tuple[Presence, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """All of it as plain lists, dictionaries and numbers."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    @property
    def facts(self) -> list[str]:
        """What was found, in a few words each."""
        sampled = [f"{len(self.sampled)} of {self.modules} modules"] if self.sampled else []
        error = [f"at most {_off(self.error)} off"] if self.error else []
        intact = ["all weights as they were written"] if self.intact else []
        return [_STATUS[self.status], *sampled, *error, *intact]

    def table(self) -> Table:
        """The adapters, and how much of each is in the result."""
        rows = [
            (i + 1, one.name, one.weight, _number(one.found), _number(one.projection), _in_it(one))
            for i, one in enumerate(self.adapters)
        ]
        numbers = columns(["adapter"], ["weight", "found", "projection"])
        return Table([("", "right"), *numbers, ("in it", "left")], rows)

    def __repr__(self) -> str:
        problems = [counted(len(self.problems), "problem")] if self.problems else []
        return f"Verification({', '.join([self.path, *self.facts, *problems])})"

    def _repr_html_(self) -> str:
        cell = f"method {self.method}, space {self.space}"
        return html(self.path, self.facts, cell, self.table(), *self.problems)


def _in_it(one: Presence) -> str:
    return ("too small to be seen" if one.found is None else "yes") if one.present else "no"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _off(error: float) -> str:
    """A relative difference, in words."""
    return f"{100 * error:.2g} %" if error < 0.995 else f"{error:.3g} times its size"


def verify(path: str | os.PathLike[str], *, modules: int | None = _SAMPLE) -> Verification:
    """Makes a sample of a merged adapter again, from the files that its record names, and compares.

    The hashes of those files are checked, and that of the adapter's own weights: so what is not in the sample is what
    was written with the rest. The result has to be there with its record, ``jaxmerge.json`` or what stands for it in
    other formats, and with the recipe that it was made with, if there was one.

    Args:
        path: Of an adapter that jaxmerge wrote.
        modules: How many modules to make again, spread over the model; None for all.

    Returns:
        What was found; `Verification.ok` says whether all is well.

    Raises:
        ValueError: If there is no such adapter, or no record of a merge beside it.
    """
    place = Path(path)
    found = io.load(place, mapped=True)
    record = read_record(place)
    if record is None or "method" not in record:
        raise ValueError(f"{place}: has no record of a merge, so that there is nothing to verify it by")
    own = json.loads(found.metadata.provenance)
    changed = [
        f"{place}: {what} not what was written there"
        for what, name, hashed in (
            ("its weights are", "weights_sha256", "sha256"),
            ("its adapter_config.json is", "config_sha256", "config_sha256"),
        )
        if name in record and record[name] != own.get(hashed)
    ]
    intact = not changed if "weights_sha256" in record else None
    unknown = Verification(
        str(place), "unknown", str(record["method"]), str(record.get("space")), len(found.modules), intact, (), None,
        (), (),
    )  # fmt: skip

    def told(*problems: Any, **found: Any) -> Verification:
        return dataclasses.replace(unknown, problems=(*changed, *map(str, problems)), **found)

    try:
        recipe = _recipe(place, record)
        if problems := inspect(recipe).problems:
            return told(*problems)
        plan = planned(read(recipe, Workplace()), Workplace())
    except ValueError as error:
        return told(*str(error).splitlines())
    made = json.loads(plan.rest.metadata.provenance)
    unknown = dataclasses.replace(unknown, method=made["method"], space=made["space"])
    differing = [name for name in _SETTINGS if record.get(name) != made[name]]
    changed += [f"{place}: its record has other {', '.join(differing)} than its recipe"] if differing else []
    strange = _strange(found, plan)
    if strange:
        return told(*strange, status="different")
    paths = _sample(list(found.modules), modules)
    some = plan.only(paths)
    again = some.finish(list(some.run()))
    again = truncate(again, rule) if (rule := truncation(recipe)) else again
    status, error, wrong = _compared(found, again, paths)
    adapters = _presence(found, paths, plan, made)
    lost = [f"{place}: {one.name} is not in it" for one in adapters if not one.present]
    return told(*wrong, *lost, status=status, sampled=tuple(paths), error=error, adapters=tuple(adapters))


def _recipe(place: Path, record: Mapping[str, Any]) -> Recipe:
    beside = recipe_beside(place)
    if beside is not None:
        return read_recipe(beside)
    try:
        return recipe_of(record)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: its record is damaged: {type(error).__name__} {error}") from None


def _strange(found: Adapter, plan: Plan) -> list[str]:
    """Modules that the adapter has and the merge has not, or the other way round."""
    made = {path for paths in plan.buckets.values() for path in paths}
    missing, more = sorted(made - set(found.modules)), sorted(set(found.modules) - made)
    name = found.metadata.name
    return [
        *([f"{name}: lacks {len(missing)} modules of its adapters, {missing[0]} among them"] if missing else []),
        *([f"{name}: has {len(more)} modules that none of its adapters has, {more[0]} among them"] if more else []),
    ]


def _sample(paths: Sequence[str], count: int | None) -> list[str]:
    """Some paths, evenly spread in natural order."""
    ordered = sorted(paths, key=natural_order)
    if count is None or count >= len(ordered):
        return ordered
    places = np.linspace(0, len(ordered) - 1, max(1, count)).round().astype(int)
    return [ordered[i] for i in dict.fromkeys(places.tolist())]


def _compared(
    found: Adapter, again: Adapter, paths: Sequence[str]
) -> tuple[Literal["same", "close", "different"], float, list[str]]:
    """How far the sampled modules are from those that were made again: in a word, by number, and what is wrong."""
    # A format may hold the same change in other factors: bits are compared where it does not.
    if all(_same_bits(again.modules[path], found.modules[path]) for path in paths):
        return "same", 0.0, []
    errors = {path: _difference(again.modules[path], found.modules[path]) for path in paths}
    worst = max(errors, key=lambda path: errors[path])
    if errors[worst] <= _SAME[str(found.modules[worst].a.dtype)]:
        return "close", errors[worst], []
    problem = f"{found.metadata.name}: {worst} differs by {_off(errors[worst])} from what its recipe makes"
    return "different", errors[worst], [problem]


def _presence(found: Adapter, paths: Sequence[str], plan: Plan, record: Mapping[str, Any]) -> list[Presence]:
    """How much of each adapter the sampled modules hold."""
    kept, sums, made = set(paths), METHODS[record["method"]].linear, []
    sources = [restricted(adapter, kept) for adapter in plan.adapters]
    has = [i for i, source in enumerate(sources) if source.modules]
    measured = contributions(restricted(found, kept), [sources[i] for i in has])
    shares = {has[share.adapter]: share for share in measured.total.shares}
    for i, (adapter, weight) in enumerate(zip(plan.adapters, record["weights"], strict=True)):
        share = shares.get(i)
        fit, projection = (None, None) if share is None else (share.fit, share.projection)
        if share is not None and _largest(weight) * share.norm < _UNSEEN * measured.total.norm:
            fit, projection = None, None  # Noise, divided by next to nothing.
        wanted = _smallest(weight) if sums else _ABSENT
        # Of a sum the fit is the weight; a projection also has what the others have in common with the adapter.
        sizes = [fit] if sums else [fit, projection]
        absent = all(size is not None and abs(size) < _ABSENT * wanted for size in sizes)
        made.append(
            Presence(adapter.metadata.name or f"adapter {i + 1}", described(weight), fit, projection, not absent)
        )
    return made


def _smallest(weight: Any) -> float:
    return min(map(abs, each(weight)))


def _largest(weight: Any) -> float:
    return max(map(abs, each(weight)))


def _difference(made: LoRA, found: LoRA) -> float:
    """How far two weight changes are apart, by the norm of the first; inf where that is 0 and the second is not."""

    def flat(leaf: Any) -> np.ndarray:
        return np.asarray(leaf).astype(np.float64).reshape(-1, *leaf.shape[-2:])

    a, b = flat(made.a), flat(made.b) * float(np.asarray(made.scale))
    other_a, other_b = flat(found.a), flat(found.b) * float(np.asarray(found.scale))
    apart = _norm(np.concatenate([a, other_a], axis=1), np.concatenate([b, -other_b], axis=2))
    own = _norm(a, b)
    return apart / own if own > 0 else 0.0 if apart == 0 else float("inf")


def _norm(a: np.ndarray, b: np.ndarray) -> float:
    """Of all ``b @ a`` together, by QRs, which do not square what cancels."""
    squares = [np.sum((np.linalg.qr(y)[1] @ np.linalg.qr(x.T)[1].T) ** 2) for x, y in zip(a, b, strict=True)]
    return float(np.sqrt(sum(squares)))


def _same_bits(made: LoRA, found: LoRA) -> bool:
    pairs = [(made.a, found.a), (made.b, found.b)]
    return all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in pairs)
