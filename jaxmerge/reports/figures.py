"""The charts of a report, from its records."""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

from jaxmerge.attribution import Contributions, Part
from jaxmerge.markup import Markup
from jaxmerge.reports import charts
from jaxmerge.reports.charts import Band, Bar, Line, Mark
from jaxmerge.reports.grid import Block
from jaxmerge.reports.maps import blocks_of
from jaxmerge.reports.narrative import number
from jaxmerge.reports.record import Report
from jaxmerge.words import percent, span

# Adapters that get a line of their own; of more, there is a band.
LINES = 6


def asked(report: Report) -> bool:
    """Whether the weights are plain numbers, which can be marked."""
    return any(isinstance(weight, float) for weight in report.weights)


def contributions(report: Report, made: Contributions) -> Markup:
    """How much of each adapter is in the result."""
    rows = []
    for share in made.total.shares:
        weight = report.weights[share.adapter]
        told = f"{number(share.fit)}, cosine {number(share.cosine, 2)}"
        tick = weight if isinstance(weight, float) else None
        rows.append(Bar(report.sources[share.adapter].short, share.fit, "out", told, tick, share.projection))
    words = ", ".join(f"{row.label} {row.told}" for row in rows)
    return charts.bars(rows, f"How much of each adapter is in the result: {words}")


def energy(report: Report) -> Markup | None:
    """What each rank keeps of the weighted sum, and what the result does; None where there is no energy at all."""
    found, made = report.comparison, report.contributions
    parts: list[Line | Band | Mark] = []
    longest = 1
    if found and found.total.sum_norm > 0:
        kept = found.total.energy_by_rank
        longest = len(kept)
        each = [record.energy_by_rank for record in found.modules.values() if record.sum_norm > 0]
        spread = tuple(
            (rank + 1, min(_at(one, rank) for one in each), max(_at(one, rank) for one in each))
            for rank in range(longest)
        )
        parts += [
            Band(spread, "in", "single modules"),
            Line(_by_rank(kept), "in", "the weighted sum, cut to each rank"),
        ]
        if made is None:
            largest = min(max(found.total.ranks), longest)
            parts.append(Mark(largest, kept[largest - 1], f"rank {largest}: {percent(kept[largest - 1])}", "in"))
    if made and made.total.norm > 0:
        kept = made.total.energy_by_rank
        longest = max(longest, len(kept))
        ranks = [part.rank for part in made.modules.values()]
        parts.append(Line(_by_rank(kept), "out", "the result as it is"))
        parts.append(Mark(max(ranks), kept[-1], f"rank {span(ranks)}: {percent(kept[-1])}"))
    if not parts:
        return None
    marked = [part.text for part in parts if isinstance(part, Mark)]
    label = f"Energy by rank from 1 to {longest}" + "".join(f"; {text} of the merge" for text in marked)
    return charts.chart(charts.doubling(longest, "rank"), charts.percents(), parts, label)


def norms(report: Report) -> Markup:
    """Norms of the adapters, of their weighted sum, and of the result."""
    found, made = report.comparison, report.contributions
    before = found.total.norms if found else [share.norm for share in made.total.shares] if made else []
    rows = [Bar(source.short, norm, "in", number(norm)) for source, norm in zip(report.sources, before, strict=True)]
    if found:
        rows.append(Bar("weighted sum", found.total.sum_norm, "sum", number(found.total.sum_norm)))
    if made:
        rows.append(Bar("result", made.total.norm, "out", number(made.total.norm)))
    return charts.bars(rows, "Frobenius norms: " + ", ".join(f"{row.label} {row.told}" for row in rows))


class LayerChart(NamedTuple):
    """Norms along the layers of a stack.

    Attributes:
        title: The heading.
        key: Class and words of each line.
        drawn: The chart.
    """

    title: str
    key: Sequence[tuple[str, str]]
    drawn: Markup


def norms_by_layer(report: Report) -> list[LayerChart]:
    """A chart for each stack of at least two layers."""
    blocks = [block for block in blocks_of(report.modules) if len(block.columns) > 1]
    return [_norms_of(report, block, f"By layer, {block.name}" if len(blocks) > 1 else "By layer") for block in blocks]


def _norms_of(report: Report, block: Block, title: str) -> LayerChart:
    before, after = _norms_by_column(report, block)
    parts: list[Line | Band] = []
    if len(before) <= LINES:
        parts += [Line(_curve(own, block), f"a{i}", report.sources[i].short) for i, own in enumerate(before)]
    else:
        each = [sorted(norms) for norms in zip(*before, strict=True)]
        ends = tuple((column, own[0], own[-1]) for column, own in zip(block.columns, each, strict=True))
        parts.append(Band(ends, "in", f"the {len(before)} adapters"))
        parts.append(Line(_curve([own[len(own) // 2] for own in each], block), "in", "the one in the middle"))
    if after:
        parts.append(Line(_curve(after, block), "out", "the result"))
    highest = max(norm for own in (*before, after) for norm in own)
    x = charts.whole(block.columns[0], block.columns[-1], block.axis)
    label = f"Norms by layer of {block.name}, up to {number(highest)}"
    key = [(f"{'band' if isinstance(part, Band) else 'line'} {part.kind}", part.title) for part in parts]
    return LayerChart(title, key, charts.chart(x, charts.linear(0, highest), parts, label, (520, 190)))


def _norms_by_column(report: Report, block: Block) -> tuple[list[list[float]], list[float]]:
    """The norms of each adapter, and those of the result, if there is one, in each column of a stack."""
    before: list[list[float]] = [[] for _ in report.sources]
    after = []
    for column in block.columns:
        squares, merged = [0.0] * len(before), 0.0
        for path, index in (row.cells[column] for row in block.rows if column in row.cells):
            module = report.modules[path]
            module = module if index is None else module.layers[index]
            if isinstance(module, Part):
                merged += module.norm**2
                norms = [(share.adapter, share.norm) for share in module.shares]
            else:
                norms = list(zip(module.sources, module.norms, strict=True))
            for i, norm in norms:
                squares[i] += norm**2
        for own, square in zip(before, squares, strict=True):
            own.append(sqrt(square))
        after += [sqrt(merged)] if report.contributions else []
    return before, after


def _curve(values: Sequence[float], block: Block) -> tuple[tuple[float, float], ...]:
    return tuple(zip(block.columns, values, strict=True))


def _by_rank(kept: Sequence[float]) -> tuple[tuple[float, float], ...]:
    return tuple(enumerate(kept, 1))


def _at(kept: Sequence[float], index: int) -> float:
    """What is kept at a rank; all of it from the last one on."""
    return kept[index] if index < len(kept) else 1.0
