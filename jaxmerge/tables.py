"""Small tables of what results hold: the same rows in terminals and in notebooks."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxmerge.markup import Markup, element, joined

# In a notebook, more rows than these tell nobody anything.
_MOST = 40


class Table(NamedTuple):
    """A table.

    Attributes:
        columns: Heading and side, ``"left"`` or ``"right"``, of each.
        rows: One cell per column.
    """

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[object]]


def columns(left: Sequence[str], right: Sequence[str]) -> list[tuple[str, str]]:
    """Columns of words, and columns of numbers after them."""
    return [*((heading, "left") for heading in left), *((heading, "right") for heading in right)]


def html(title: str, about: Sequence[str], *parts: Table | str) -> str:
    """What a notebook shows of a result, in the colours and the font that the notebook has.

    Args:
        title: What it is, or empty.
        about: A few facts, for the line of the title.
        *parts: Tables and remarks, in order; those that are empty are left out.

    Returns:
        HTML in which all names are escaped.
    """
    heading = element("div", element("b", title), " ", ", ".join(filter(None, about))) if title else None
    return element("div", heading, *(_part(part) for part in parts if (part.rows if isinstance(part, Table) else part)))


def _part(part: Table | str) -> Markup:
    if isinstance(part, str):
        return element("div", part)
    left_out = len(part.rows) - _MOST
    headings, sides = zip(*part.columns, strict=True)
    rows = [_row("td", sides, row) for row in part.rows[:_MOST]]
    table = element("table", element("thead", _row("th", sides, headings)), element("tbody", *rows))
    return joined(table, element("div", f"and {left_out} more") if left_out > 0 else None)


def _row(cell: str, sides: Sequence[str], contents: Sequence[object]) -> Markup:
    styles = [f"text-align:{side};font-variant-numeric:tabular-nums" for side in sides]
    return element("tr", *(element(cell, str(x), style=style) for x, style in zip(contents, styles, strict=True)))
