"""Colours of values, in steps, for light and dark pages. Lightness tells strong from weak, whatever eyes see of hue."""

from collections.abc import Sequence
from typing import Literal

from jaxmerge.reports.maps import Scale

STEPS = 21
# From the bottom of a scale to its top: blue over a neutral to orange; pale yellow-green over teal to deep blue. On a
# dark page strong is bright, and the neutral is dark.
_STOPS = {
    ("diverging", "light"): ("#0b3f7a", "#2f77b8", "#92bfe0", "#f1efec", "#f3b57d", "#d2721f", "#8a3d00"),
    ("diverging", "dark"): ("#a9d5ff", "#5fa8e8", "#2d5f8f", "#262a31", "#8a5524", "#e8913f", "#ffd09e"),
    ("sequential", "light"): ("#f4f6e4", "#c8e5c4", "#86cbbd", "#41a3b8", "#2673a8", "#264a8c", "#1d2a5e"),
    ("sequential", "dark"): ("#232838", "#26426f", "#26699b", "#2d95a8", "#66bfa5", "#b3dfa3", "#f4f3b6"),
}  # fmt: skip
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


def step(scale: Scale, value: float) -> int:
    """Which of the `STEPS` colours a value has."""
    return round(scale.place(value) * (STEPS - 1))


def css_class(scale: Scale, value: float | None) -> str:
    """The class of what is coloured by a value."""
    return "none" if value is None else f"{scale.kind[0]}{step(scale, value)}"


def colours(kind: Literal["diverging", "sequential"], scheme: Literal["light", "dark"]) -> list[str]:
    """The colours of a scale, from its bottom to its top, as ``#rrggbb``."""
    stops = [_numbers(stop) for stop in _STOPS[kind, scheme]]
    found = []
    for i in range(STEPS):
        at = i / (STEPS - 1) * (len(stops) - 1)
        low = min(int(at), len(stops) - 2)
        found.append(
            "#"
            + "".join(f"{round(x + (at - low) * (y - x)):02x}" for x, y in zip(stops[low], stops[low + 1], strict=True))
        )
    return found


def variables(scheme: Literal["light", "dark"]) -> str:
    """Custom properties with the colours, and with that of text on each."""
    return "".join(
        f"--{kind[0]}{i}:{colour};--t{kind[0]}{i}:{_text_on(colour)};"
        for kind in ("diverging", "sequential")
        for i, colour in enumerate(colours(kind, scheme))
    )


def rules() -> str:
    """The classes of `css_class`, and ``t`` with them for text."""
    names = [f"{kind}{i}" for kind in "ds" for i in range(STEPS)]
    return "".join(f".{name}{{fill:var(--{name})}}.t.{name}{{fill:var(--t{name})}}" for name in names)


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """The contrast ratio of two colours, as WCAG 2 has it."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _numbers(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _text_on(colour: str) -> str:
    better = max(_BLACK, _WHITE, key=lambda ink: contrast(ink, _numbers(colour)))
    return "#" + "".join(f"{x:02x}" for x in better)


def _luminance(colour: Sequence[int]) -> float:
    linear = [x / 12.92 if (x := c / 255) <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
