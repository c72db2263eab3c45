"""What heat maps show: values of every module, and the scale they are drawn on."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from jaxmerge.attribution import Contributions, Part
from jaxmerge.comparison import Comparison, Pair, Record
from jaxmerge.reports.grid import Block, Key, grid

T = TypeVar("T")

# Maps of one kind that are drawn; of more pairs, those that interfere most.
_MOST = 6


@dataclass(frozen=True)
class Scale:
    """How values become colours.

    Attributes:
        low: The value at the bottom of the scale.
        high: The value at its top.
        kind: ``"diverging"`` has a middle colour for the value half-way; ``"sequential"`` goes from pale to strong.
        unit: ``"%"`` for fractions that are told in percent, else empty.
        chance: What unrelated adapters would give, where that means something.
    """

    low: float
    high: float
    kind: Literal["diverging", "sequential"]
    unit: Literal["%", ""] = ""
    chance: float | None = None

    def place(self, value: float) -> float:
        """Where a value lies between the ends, in [0, 1]."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def told(self, value: float | None, digits: int = 3) -> str:
        """A value in words."""
        if value is None:
            return "not defined"
        return self._with_unit(f"{100 * value if self.unit else value:.{digits}g}")

    def brief(self, value: float | None, parts: int = 40) -> str:
        """A value to a fortieth of the scale, or to another part of it."""
        if value is None:
            return "–"
        factor = 100 if self.unit else 1
        digits = max(0, math.ceil(-math.log10((self.high - self.low) * factor / parts) - 1e-9))
        return self._with_unit(f"{value * factor:.{digits}f}")

    def _with_unit(self, text: str) -> str:
        text = text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")
        return f"{text}\u00a0%" if self.unit else text


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        title: What it is of.
        values: Module -> value; None where there is no such value.
        total: Over all modules; None where that is not known.
    """

    title: str
    values: Mapping[Key, float | None]
    total: float | None = None


@dataclass(frozen=True)
class Maps:
    """Heat maps on one scale.

    Attributes:
        name: A word for it.
        title: Its heading.
        meaning: A sentence or two on how it is read.
        scale: Of all its panels.
        panels: At least one.
        left_out: How many more there would be.
    """

    name: str
    title: str
    meaning: str
    scale: Scale
    panels: tuple[Panel, ...]
    left_out: int = 0


def blocks_of(modules: Mapping[str, Record] | Mapping[str, Part]) -> tuple[Block, ...]:
    """Where modules stand in heat maps."""
    return grid({path: len(module.layers) for path, module in modules.items()})


def interference(found: Comparison, names: Sequence[str]) -> list[Maps]:
    """How adapters meet, pair by pair.

    Args:
        found: The comparison.
        names: What the adapters are called.

    Returns:
        Cosines, opposite signs, and overlaps, as far as there are such; nothing where no two adapters share a module.
    """
    made = []
    for measure in _PAIR_MEASURES:
        values = _by_pair(found, measure)
        panels = {
            pair.adapters: Panel(" – ".join(names[i] for i in pair.adapters), values[pair.adapters], measure.of(pair))
            for pair in found.total.pairs
            if pair.adapters in values
        }
        if not panels:
            continue
        shown = list(panels.values())
        if len(shown) > _MOST:
            joined = _joined([panel.values for panel in shown], measure.summary)
            most = sorted(panels, key=lambda who, m=measure: -_mean_distance(panels[who], m.centre or 0))[: _MOST - 1]
            summary = Panel(f"{measure.summary} of all {len(shown)} pairs", joined)
            shown = [summary, *(panels[who] for who in sorted(most))]
        left = len(panels) - _MOST + 1 if len(panels) > _MOST else 0
        scale = measure.scale(_known(shown), found.total.pairs)
        made.append(Maps(measure.name, measure.title, measure.meaning, scale, tuple(shown), left))
    return made


@dataclass(frozen=True)
class _PairMeasure:
    """What is measured of two adapters.

    Attributes:
        name: The field of `Pair`.
        title: The heading of its maps.
        meaning: How they are read.
        centre: The middle of the scale; None where it begins at 0.
        unit: That of the scale.
        chance: The field of `Pair` with what chance makes of it; empty where that is the centre.
        summary: What is shown of many pairs, ``"strongest"`` or ``"mean"``.
    """

    name: str
    title: str
    meaning: str
    centre: float | None = None
    unit: Literal["%", ""] = "%"
    chance: str = ""
    summary: str = "mean"

    def of(self, pair: Pair) -> float | None:
        """Its value."""
        return getattr(pair, self.name)

    def scale(self, values: Sequence[float], pairs: Sequence[Pair]) -> Scale:
        """A scale that these values fit on."""
        if self.centre is None:
            known = [chance for pair in pairs if (chance := getattr(pair, self.chance)) is not None]
            return Scale(0, _nice(max(values), 1), "sequential", self.unit, sum(known) / len(known))
        half = _nice(max(abs(value - self.centre) for value in values), 1 - self.centre)
        return Scale(self.centre - half, self.centre + half, "diverging", self.unit, self.centre)


_PAIR_MEASURES = (
    _PairMeasure(
        "cosine",
        "Cosine",
        "How far two weight changes point the same way. Near 0 they do not meet, and a sum holds both whole; "
        "above 0 they add up, below 0 they cancel.",
        centre=0.0,
        unit="",
        summary="strongest",
    ),
    _PairMeasure(
        "sign_conflict",
        "Opposite signs",
        "The share of entries that one adapter raises and the other lowers; in modules of more than a million, of a "
        "sample that is half a percent off or so. Unrelated adapters differ in half of them.",
        centre=0.5,
    ),
    _PairMeasure(
        "left_overlap",
        "Overlap of outputs (B)",
        "How far two adapters write into the same directions.",
        chance="left_chance",
    ),
    _PairMeasure(
        "right_overlap",
        "Overlap of inputs (A)",
        "How far two adapters read from the same directions. Large where training began from one initialisation.",
        chance="right_chance",
    ),
)


def _known(panels: Iterable[Panel]) -> list[float]:
    """The values that there are."""
    return [value for panel in panels for value in panel.values.values() if value is not None]


def _mean_distance(panel: Panel, centre: float) -> float:
    known = [abs(value - centre) for value in _known([panel])]
    return sum(known) / len(known) if known else 0.0


def _by_pair(found: Comparison, measure: _PairMeasure) -> dict[tuple[int, int], dict[Key, float | None]]:
    """What is measured of every pair, by module; of those that have it in some module."""
    values: dict[tuple[int, int], dict[Key, float | None]] = {}
    for key, record in _by_key(found.modules, lambda record: record).items():
        for pair in record.pairs:
            values.setdefault(pair.adapters, {})[key] = measure.of(pair)
    return {who: own for who, own in values.items() if any(value is not None for value in own.values())}


def _joined(panels: Iterable[Mapping[Key, float | None]], summary: str) -> dict[Key, float | None]:
    """Of several panels, for each module, the value farthest from 0, or the mean."""
    known: dict[Key, list[float]] = {}
    for values in panels:
        for key, value in values.items():
            known.setdefault(key, []).extend([] if value is None else [value])
    return {
        key: None if not values else max(values, key=abs) if summary == "strongest" else sum(values) / len(values)
        for key, values in known.items()
    }


def content(found: Contributions, names: Sequence[str]) -> list[Maps]:
    """How much of each adapter is in a result, and what is of none of them.

    Args:
        found: The contributions.
        names: What the adapters are called.

    Returns:
        What there is to see.
    """
    made = []
    residual = Panel("result", _by_key(found.modules, lambda part: part.residual), found.total.residual)
    largest = max(_known([residual]), default=0.0)
    if largest > 1e-4:
        meaning = "The share of the result's energy that no sum of the adapters has: what the method or the cut made."
        scale = Scale(0, _nice(largest, 1), "sequential", "%")
        made.append(Maps("residual", "From no adapter", meaning, scale, (residual,)))
    panels = [
        Panel(name, _by_key(found.modules, lambda part, i=i: _fit(part, i)), _fit(found.total, i))
        for i, name in enumerate(names)
    ]
    shown = [panel for panel in panels if _known([panel])]
    if shown:
        half = _nice(max(map(abs, _known(shown[:_MOST]))), math.inf)
        meaning = (
            "The number of each adapter in the sum of all that is nearest to the result, module by module. It is the "
            "adapter's weight where the merge is an exact sum; a pale module holds little of the adapter."
        )
        scale, left = Scale(-half, half, "diverging"), max(0, len(shown) - _MOST)
        made.append(Maps("fit", "How much of each adapter", meaning, scale, tuple(shown[:_MOST]), left))
    return made


def energy(found: Contributions) -> list[Maps]:
    """What is kept of each module; nothing where all is, or where that is not known."""
    kept = {(path, None): part.energy_kept for path, part in found.modules.items()}
    values = {key: kept[key[0], None] for key in _by_key(found.modules, lambda part: part.norm)}
    panel = Panel("result", values, found.total.energy_kept)
    least = min(_known([panel]), default=1.0)
    if least > 1 - 1e-6:
        return []
    meaning = "The share of the merge's energy that is left in each module at its rank."
    return [Maps("energy_kept", "Energy kept", meaning, Scale(1 - _nice(1 - least, 1), 1, "sequential", "%"), (panel,))]


def norms(found: Contributions, names: Sequence[str]) -> list[Maps]:
    """Norms of the result and of the adapters, on one scale."""
    panels = [Panel("result", _by_key(found.modules, lambda part: part.norm), found.total.norm)]
    panels += [
        Panel(name, _by_key(found.modules, lambda part, i=i: _norm(part, i)), _norm(found.total, i))
        for i, name in list(enumerate(names))[: _MOST - 1]
    ]
    largest = max(_known(panels), default=0.0)
    if largest == 0:
        return []
    meaning = "The Frobenius norm of each module's weight change: how strong it is."
    scale = Scale(0, _nice(largest, math.inf), "sequential")
    return [Maps("norm", "Norms", meaning, scale, tuple(panels), max(0, len(names) - _MOST + 1))]


def _fit(part: Part, adapter: int) -> float | None:
    return next((share.fit for share in part.shares if share.adapter == adapter), None)


def _norm(part: Part, adapter: int) -> float | None:
    return next((share.norm for share in part.shares if share.adapter == adapter), None)


def _by_key(modules: Mapping[str, Any], of: Callable[[Any], T]) -> dict[Key, T]:
    """What belongs to every cell of the grid: of each module, or of each of the layers that it holds."""
    return {
        (path, index if module.layers else None): of(part)
        for path, module in modules.items()
        for index, part in enumerate(module.layers or (module,))
    }


def _nice(value: float, most: float) -> float:
    """The next round number, for the end of a scale, and no more than there can be."""
    if not value > 0:
        return min(1.0, most)
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return min(next(round(step * power, 12) for step in steps if step * power >= value * (1 - 1e-9)), most)
