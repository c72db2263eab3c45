"""Heat maps as SVG: a square for each module, its layer across and its kind down."""

from collections.abc import Sequence

from jaxmerge.markup import Markup, element, text_width
from jaxmerge.reports.colours import STEPS, css_class
from jaxmerge.reports.grid import Block, Key, shortened
from jaxmerge.reports.maps import Panel, Scale

# Pixels: of a letter, between squares, and below a stack; and the characters of a label.
_FONT, _GAP, _BELOW = 11, 1, 12
_LABEL = 30


def heat_map(blocks: Sequence[Block], panel: Panel, scale: Scale, of: str) -> Markup:
    """Draws one.

    Args:
        blocks: Where modules stand.
        panel: Their values.
        scale: How these become colours.
        of: What is shown, in words.

    Returns:
        An ``svg`` element whose squares have a title each.
    """
    labels = [shortened(row.kind, _LABEL) for block in blocks for row in block.rows]
    left = max(text_width(label, _FONT) for label in labels) + 8
    across = max(len(block.columns) for block in blocks)
    side = next((side for most, side in ((16, 20), (34, 12), (64, 10)) if across <= most), 9)
    tall = max(side, 13)
    named = len(blocks) > 1
    parts, y = [], 0
    for block in blocks:
        if named and block.name:
            y += 14
            parts.append(element("text", shortened(block.name, 60), x=0, y=y - 2, class_="stack"))
        for row in block.rows:
            parts.append(_label(row.kind, left, y + tall / 2))
            parts += [
                _cell(left + i * side, y, side, tall, key, panel, scale, block.axis)
                for i, column in enumerate(block.columns)
                if (key := row.cells.get(column)) is not None
            ]
            y += tall
        if block.axis:
            parts += _columns(block, left, y, side)
            y += 14
        y += _BELOW if block is not blocks[-1] else 0
    width = left + across * side + 6
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {width} {y + 2}",
        width=width,
        height=y + 2,
        role="img",
        aria_label=_described(panel, scale, of),
        class_="map",
    )


def _label(kind: str, left: int, y: float) -> Markup:
    short = shortened(kind, _LABEL)
    full = element("title", kind) if short != kind else None
    return element("text", short, full, x=left - 6, y=y, class_="row")


def _cell(x: int, y: int, side: int, tall: int, key: Key, panel: Panel, scale: Scale, axis: str) -> Markup:
    path, index = key
    value = panel.values.get(key)
    where = path if index is None else f"{path}, {axis} {index}"
    title = element("title", f"{where}\n{scale.told(value)}")
    w, h = side - _GAP, tall - _GAP
    return element("path", title, class_=css_class(scale, value), d=f"M{x} {y}h{w}v{h}h-{w}z")


def _columns(block: Block, left: int, y: int, side: int) -> list[Markup]:
    """Numbers below the first, the last, and some columns between."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * side >= 17)
    last = len(block.columns) - 1
    shown = {0, last, *range(every, last - every + 1, every)}
    numbers = [
        element("text", block.columns[i], x=left + (i + 0.5) * side - 0.5, y=y + 11, class_="tick mid")
        for i in sorted(shown)
    ]
    return [element("text", block.axis, x=left - 6, y=y + 11, class_="tick end"), *numbers]


def _described(panel: Panel, scale: Scale, of: str) -> str:
    known = [value for value in panel.values.values() if value is not None]
    if not known:
        return f"Heat map, {of}, {panel.title}: no values"
    ends = f"{scale.told(min(known))} to {scale.told(max(known))}"
    return f"Heat map, {of}, {panel.title}: {len(known)} values from {ends}"


def legend(scale: Scale) -> Markup:
    """The colours of a scale with its numbers, and a mark where chance is."""
    wide, tall, side = 10, 10, 36
    width = STEPS * wide
    parts = [
        element("rect", x=side + i * wide, y=2, width=wide + 0.5, height=tall, class_=f"{scale.kind[0]}{i}")
        for i in range(STEPS)
    ]
    words = [(0.0, scale.told(scale.low), 0), (1.0, scale.told(scale.high), 0)]
    if scale.kind == "diverging":
        middle = (scale.low + scale.high) / 2
        words.append((0.5, f"{'chance ' if scale.chance else ''}{scale.told(middle)}", 0))
    elif scale.chance is not None and scale.low < scale.chance < scale.high:
        at = scale.place(scale.chance)
        parts.append(element("path", class_="chance", d=f"M{side + at * width:.1f} 0v{tall + 4}"))
        words.append((at, f"chance {scale.brief(scale.chance)}", 0 if 0.3 < at < 0.7 else 13))
    parts += [
        element("text", text, x=side + at * width, y=tall + 14 + down, class_="tick mid") for at, text, down in words
    ]
    label = f"Colours from {scale.told(scale.low)} to {scale.told(scale.high)}"
    return element(
        "svg", *parts, viewBox=f"0 0 {width + 2 * side} 42", width=width + 2 * side, height=42, role="img",
        aria_label=label, class_="legend",
    )  # fmt: skip


def pair_matrix(values: dict[tuple[int, int], float | None], names: Sequence[str], scale: Scale, of: str) -> Markup:
    """All pairs of adapters in a triangle, with their numbers where there is room.

    Args:
        values: ``(i, j)``, i < j -> value.
        names: What the adapters are called.
        scale: How values become colours.
        of: What is shown, in words.
    """
    n = len(names)
    labels = [f"{i + 1} {name}" for i, name in enumerate(names)]
    left = max(text_width(label, _FONT) for label in labels[1:]) + 8
    side, tall = (48, 26) if n <= 8 else (24, 24)
    parts = []
    for row in range(1, n):
        y = (row - 1) * tall
        parts.append(element("text", labels[row], x=left - 6, y=y + tall / 2, class_="row"))
        for column in range(row):
            value = values.get((column, row))
            x, kind = left + column * side, css_class(scale, value)
            title = element("title", f"{names[column]} – {names[row]}\n{scale.told(value)}")
            parts.append(element("path", title, class_=kind, d=f"M{x} {y}h{side - 1}v{tall - 1}h-{side - 1}z"))
            if n <= 8 and value is not None:
                told = scale.brief(value).removesuffix("\u00a0%")
                parts.append(element("text", told, x=x + side / 2, y=y + tall / 2, class_=f"t {kind}"))
    for column in range(n - 1):
        parts.append(
            element("text", column + 1, x=left + (column + 0.5) * side, y=(n - 1) * tall + 11, class_="tick mid")
        )
    width, height = left + (n - 1) * side + 6, (n - 1) * tall + 16
    known = [value for value in values.values() if value is not None]
    label = (
        f"All pairs, {of}: from {scale.told(min(known))} to {scale.told(max(known))}" if known else f"All pairs, {of}"
    )
    return element(
        "svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_label=label,
        class_="map",
    )  # fmt: skip
