"""Charts with axes as SVG: curves, and bars."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxmerge.markup import Markup, element, text_width
from jaxmerge.reports.grid import shortened
from jaxmerge.reports.narrative import number

_FONT = 11


@dataclass(frozen=True)
class Axis:
    """One side of a chart.

    Attributes:
        low: The value where it begins.
        high: The value where it ends.
        ticks: Value, and what is written there.
        label: What it is of.
        doubling: Whether equal lengths are equal ratios.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str
    doubling: bool = False

    def place(self, value: float) -> float:
        """In [0, 1]."""
        low, high, value = (math.log2(v) if self.doubling else v for v in (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        points: x and y.
        kind: Its class, which gives colour and dashes.
        title: What it is.
    """

    points: tuple[tuple[float, float], ...]
    kind: str
    title: str


@dataclass(frozen=True)
class Band:
    """What lies between two curves: x, the lower, the upper."""

    points: tuple[tuple[float, float, float], ...]
    kind: str
    title: str


@dataclass(frozen=True)
class Mark:
    """A vertical line with a dot on a curve, and words beside it."""

    x: float
    y: float
    text: str
    kind: str = "out"


def chart(
    x: Axis,
    y: Axis,
    parts: Sequence[Line | Band | Mark],
    label: str,
    size: tuple[int, int] = (540, 290),
) -> Markup:
    """Draws curves.

    Args:
        x: The axis below.
        y: The axis on the left.
        parts: What is drawn, the last on top.
        label: What the chart shows, in words.
        size: Pixels.
    """
    width, height = size
    left = max(text_width(text, _FONT) for _, text in y.ticks) + 10
    right, top, bottom = 18, 14, 38
    inner_w, inner_h = width - left - right, height - top - bottom

    def at(px: float, py: float) -> tuple[float, float]:
        return round(left + x.place(px) * inner_w, 1), round(top + (1 - y.place(py)) * inner_h, 1)

    drawn: list[Markup] = []
    for value, text in y.ticks:
        _, level = at(x.low, value)
        drawn.append(element("line", x1=left, x2=width - right, y1=level, y2=level, class_="rule"))
        drawn.append(element("text", text, x=left - 8, y=level, class_="row"))
    for value, text in x.ticks:
        place, _ = at(value, y.low)
        drawn.append(element("text", text, x=place, y=height - bottom + 16, class_="tick mid"))
    drawn.append(
        element("text", x.label, x=left + inner_w / 2, y=height - 6, class_="tick mid axis"),
    )
    drawn += [_draw(part, at, (top, height - bottom), width - right) for part in parts]
    return element(
        "svg", *drawn, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_label=label,
        class_="chart",
    )  # fmt: skip


def _draw(
    part: Line | Band | Mark, at: Callable[[float, float], tuple[float, float]], ends: tuple[int, int], right: int
) -> Markup:
    if isinstance(part, Line):
        points = " ".join(f"{px:g},{py:g}" for px, py in (at(*point) for point in part.points))
        if len(part.points) == 1:
            px, py = at(*part.points[0])
            return element("circle", element("title", part.title), cx=px, cy=py, r=3, class_=f"dot {part.kind}")
        return element("polyline", element("title", part.title), points=points, class_=f"line {part.kind}")
    if isinstance(part, Band):
        above = [at(px, high) for px, _, high in part.points]
        below = [at(px, low) for px, low, _ in reversed(part.points)]
        outline = " L".join(f"{px:g} {py:g}" for px, py in (*above, *below))
        return element("path", element("title", part.title), d=f"M{outline}z", class_=f"band {part.kind}")
    px, py = at(part.x, part.y)
    beside = px + text_width(part.text, _FONT + 1) + 12 < right
    anchor = "start" if beside else "end"
    return element(
        "g",
        element("line", x1=px, x2=px, y1=ends[0], y2=ends[1], class_=f"mark {part.kind}"),
        element("circle", cx=px, cy=py, r=4.5, class_=f"dot {part.kind}"),
        element("text", part.text, x=px + (9 if beside else -9), y=ends[1] - 10, class_=f"said {part.kind} {anchor}"),
    )


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart.

    Attributes:
        label: On the left.
        value: Of the bar; None draws none.
        kind: Its class.
        told: On the right.
        tick: Where a line crosses it, or None.
        dot: Where a circle lies on it, or None.
    """

    label: str
    value: float | None
    kind: str
    told: str
    tick: float | None = None
    dot: float | None = None


def bars(rows: Sequence[Bar], label: str, width: int = 520) -> Markup:
    """Draws horizontal bars from 0.

    Args:
        rows: From top to bottom.
        label: What the chart shows, in words.
        width: Pixels.
    """
    tall, thick = 26, 12
    names = [shortened(row.label, 28) for row in rows]
    left = max(text_width(name, _FONT + 1) for name in names) + 10
    right = max(text_width(row.told, _FONT) for row in rows) + 14
    numbers = [v for row in rows for v in (row.value, row.tick, row.dot) if v is not None]
    inner = width - left - right
    axis = linear(min(0.0, *numbers), max(0.0, *numbers), most=max(2, inner // 52)) if numbers else linear(0, 1)

    def at(value: float) -> float:
        return round(left + axis.place(value) * inner, 1)

    bottom = len(rows) * tall + 4
    drawn = [
        element("line", x1=at(value), x2=at(value), y1=0, y2=bottom, class_="zero" if value == 0 else "rule")
        for value, _ in axis.ticks
    ]
    drawn += [element("text", text, x=at(value), y=bottom + 14, class_="tick mid") for value, text in axis.ticks]
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        middle = i * tall + tall / 2
        full = element("title", row.label) if name != row.label else None
        drawn.append(element("text", name, full, x=left - 8, y=middle, class_="row name"))
        drawn.append(element("text", row.told, x=width - right + 10, y=middle, class_="row start"))
        if row.value is not None:
            begin, end = sorted((at(0), at(row.value)))
            title, box = element("title", f"{row.label}\n{row.told}"), {"width": max(end - begin, 1), "height": thick}
            drawn.append(element("rect", title, x=begin, y=middle - thick / 2, **box, rx=2, class_=f"bar {row.kind}"))
        if row.tick is not None:
            x = at(row.tick)
            drawn.append(element("line", x1=x, x2=x, y1=middle - 10, y2=middle + 10, class_="asked"))
        if row.dot is not None:
            drawn.append(element("circle", cx=at(row.dot), cy=middle, r=4, class_="ring"))
    height = bottom + 20
    return element(
        "svg", *drawn, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_label=label,
        class_="chart",
    )  # fmt: skip


def linear(low: float, high: float, label: str = "", most: int = 6) -> Axis:
    """An axis that holds two values, with round ticks."""
    if not high > low:
        low, high = min(low, 0.0), max(high, low + 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if (high - low) / (s * power) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple((i * step, number(i * step)) for i in range(first, last + 1))
    return Axis(first * step, last * step, ticks, label)


def doubling(high: int, label: str) -> Axis:
    """An axis of ranks from 1, with a tick at each power of 2."""
    powers = [2**i for i in range(int(math.log2(max(high, 1))) + 1)]
    return Axis(1, max(high, 2), tuple((p, str(p)) for p in powers), label, doubling=True)


def percents(label: str = "") -> Axis:
    """An axis of fractions."""
    return Axis(0, 1, tuple((i / 4, f"{25 * i} %") for i in range(5)), label)


def whole(low: int, high: int, label: str, most: int = 12) -> Axis:
    """An axis of layers."""
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, 1000) if (high - low) / s <= most)
    first = math.ceil(low / step) * step
    return Axis(low, high, tuple((i, str(i)) for i in range(first, high + 1, step)), label)
