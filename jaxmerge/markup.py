"""HTML and SVG elements that escape what they hold."""

import html
import re
import unicodedata

# Elements that have no end tag, and those of SVG that need none when they are empty.
_VOID = {"meta", "input", "br", "col"}
_EMPTY = {"path", "rect", "line", "circle", "polyline"}
# A page may not hold these; a name might.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element.

    Args:
        name: Of the tag.
        *children: Text, which is escaped; `Markup`, which is not; None, which is left out.
        **attributes: ``class_`` is class and ``aria_label`` is aria-label; None is left out, True has no value.

    Returns:
        The element.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    inside = joined(*children)
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    if name in _EMPTY and not inside:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{inside}</{name}>")


def text_width(text: str, size: float) -> int:
    """Pixels that a text takes, a little more rather than less, whatever sans serif it is set in.

    Args:
        text: One line.
        size: Of the font, in pixels.
    """
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return round((0.62 * (len(text) - wide) + 1.05 * wide) * size)


def joined(*children: object) -> Markup:
    """Children one after another; all but `Markup` escaped."""
    return Markup("".join(c if isinstance(c, Markup) else _escaped(c) for c in children if c is not None))


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{_escaped(value)}"'


def _escaped(value: object) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return html.escape(_CONTROLS.sub("\ufffd", text))
