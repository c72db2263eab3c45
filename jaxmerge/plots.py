"""Figures for papers, drawn by Matplotlib (``pip install 'jaxmerge[plots]'``) from the records of a report or a sweep.

Each function returns a `matplotlib.figure.Figure`: a notebook shows it, ``figure.savefig("cosine.pdf")`` saves it. The
state of pyplot is left alone.
"""

import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import numpy as np

from jaxmerge.reports import Report, maps
from jaxmerge.reports.colours import colours
from jaxmerge.reports.grid import Block
from jaxmerge.reports.maps import Maps, Panel, Scale
from jaxmerge.values import described
from jaxmerge.words import span

try:
    import matplotlib
    from matplotlib import figure as figures
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import FuncFormatter, PercentFormatter
except ImportError as error:
    raise ImportError("jaxmerge.plots needs matplotlib: pip install 'jaxmerge[plots]'") from error

P = ParamSpec("P")

# A page's width in inches, and what papers ask for: small type that stays type in a PDF, and no frames.
_WIDTH = 6.75
_STYLE: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.4,
    "axes.axisbelow": True, "pdf.fonttype": 42, "ps.fonttype": 42,
}  # fmt: skip
_BEFORE, _AFTER, _SUM = "#1f66ad", "#b54f00", "#6b7480"


class Figure(figures.Figure):
    """A figure that notebooks show as it is."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def heatmap(report: Report, quantity: str = "cosine", panels: Sequence[str] | None = None) -> Figure:
    """One quantity of every module, by layer and kind of module.

    Args:
        report: From `jaxmerge.report`.
        quantity: ``"cosine"``, ``"sign_conflict"``, ``"left_overlap"`` or ``"right_overlap"`` of pairs of adapters;
            ``"fit"``, ``"norm"``, ``"residual"`` or ``"energy_kept"`` of a merge.
        panels: The titles of those that are drawn: an adapter's or the two adapters' names, as in the report. None: all
            that the report draws.

    Returns:
        A figure with a map for each panel, all on one scale.

    Raises:
        ValueError: If the report has no such quantity, or no such panel.
    """
    found = _maps(report)
    if quantity not in found:
        raise ValueError(f"there is no {quantity!r} in this report: there are {', '.join(found)}")
    shown = found[quantity]
    unknown = set(panels or ()) - {panel.title for panel in shown.panels}
    if unknown:
        known = ", ".join(panel.title for panel in shown.panels)
        raise ValueError(f"there is no panel {', '.join(sorted(unknown))}: there are {known}")
    drawn = [panel for panel in shown.panels if panels is None or panel.title in panels]
    blocks = maps.blocks_of(report.modules)
    across = 1 if len(drawn) == 1 or max(len(block.columns) for block in blocks) > 24 else 2
    down = -(-len(drawn) // across)
    ratios = [max(len(block.rows), 1.5) for block in blocks] * down
    figure = Figure(figsize=(_WIDTH, 0.5 + 0.13 * sum(ratios) + 0.4 * len(ratios)), layout="constrained")
    axes = figure.subplots(len(ratios), across, squeeze=False, gridspec_kw={"height_ratios": ratios})
    for i, panel in enumerate(drawn):
        for j, block in enumerate(blocks):
            at = axes[i // across * len(blocks) + j, i % across]
            _draw_block(at, panel, block, shown.scale, 12 // across)
            at.set_title(panel.title if j == 0 else "", loc="left", fontweight="bold")
    for rest in axes[(down - 1) * len(blocks) :, 1:].ravel() if len(drawn) % across else ():
        rest.set_axis_off()
    colouring = ScalarMappable(_normalize(shown.scale), _colormap(shown.scale))
    bar = figure.colorbar(colouring, ax=axes.ravel().tolist(), label=shown.title, shrink=0.9, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[operator]
    if shown.scale.unit:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    if shown.scale.chance is not None:
        bar.ax.axhline(shown.scale.chance, color="black", linewidth=1)
    return figure


def _maps(report: Report) -> dict[str, Maps]:
    names = [source.short for source in report.sources]
    found = maps.interference(report.comparison, names) if report.comparison else []
    if made := report.contributions:
        found = [*found, *maps.content(made, names), *maps.energy(made), *maps.norms(made, names)]
    return {each.name: each for each in found}


def _draw_block(axes: Axes, panel: Panel, block: Block, scale: Scale, ticks: int) -> None:
    values = np.full((len(block.rows), len(block.columns)), np.nan)
    for i, row in enumerate(block.rows):
        for j, column in enumerate(block.columns):
            value = panel.values.get(row.cells[column]) if column in row.cells else None
            values[i, j] = np.nan if value is None else value
    image = axes.imshow(np.ma.masked_invalid(values), cmap=_colormap(scale), norm=_normalize(scale), aspect="auto")
    image.set_interpolation("nearest")
    axes.set_yticks(range(len(block.rows)), [row.kind for row in block.rows])
    every = max(1, -(-len(block.columns) // ticks))
    shown = range(0, len(block.columns), every) if block.axis else ()
    axes.set_xticks(list(shown), [str(block.columns[j]) for j in shown])
    axes.set_xlabel(" of ".join(filter(None, (block.axis, block.name))))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _colormap(scale: Scale) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list(f"jaxmerge {scale.kind}", colours(scale.kind, "light"))


def _normalize(scale: Scale) -> Normalize:
    return Normalize(scale.low, scale.high)


@_styled
def energy_curves(report: Report) -> Figure:
    """What each rank keeps of the weighted sum and of the result, with the spread over modules and the chosen rank.

    Args:
        report: From `jaxmerge.report`.

    Returns:
        A figure of one pair of axes.
    """
    figure = Figure(figsize=(_WIDTH / 2, 2.4), layout="constrained")
    axes = figure.subplots()
    longest = 1
    if (found := report.comparison) and found.total.sum_norm > 0:
        longest = len(found.total.energy_by_rank)
        curves = [record.energy_by_rank for record in found.modules.values() if record.sum_norm > 0]
        each = np.stack([np.pad(curve, (0, longest - len(curve)), constant_values=1) for curve in curves])
        ranks = np.arange(1, longest + 1)
        axes.fill_between(ranks, each.min(axis=0), each.max(axis=0), color=_BEFORE, alpha=0.15, linewidth=0)
        axes.plot(ranks, found.total.energy_by_rank, color=_BEFORE, label="weighted sum")
    if (made := report.contributions) and made.total.norm > 0:
        kept = made.total.energy_by_rank
        longest = max(longest, len(kept))
        axes.plot(range(1, len(kept) + 1), kept, color=_AFTER, label="result")
        chosen = span(part.rank for part in made.modules.values())
        axes.axvline(len(kept), color=_AFTER, linewidth=0.8, linestyle=(0, (3, 2)), label=f"rank {chosen}")
        axes.plot(len(kept), kept[-1], "o", color=_AFTER, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, max(longest, 2))
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("rank")
    axes.set_ylabel("energy kept")
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    axes.legend(loc="best")
    return figure


@_styled
def contributions(report: Report) -> Figure:
    """How much of each adapter is in a result: its number in the nearest sum, its projection, and the weight.

    Args:
        report: From `jaxmerge.report`, of a merge.

    Returns:
        A figure of one pair of axes.

    Raises:
        ValueError: If nothing was merged.
    """
    if report.contributions is None:
        raise ValueError("the report is of a comparison: nothing was merged")
    shares = report.contributions.total.shares
    figure = Figure(figsize=(_WIDTH / 2, 0.9 + 0.22 * len(shares)), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(shares))
    axes.barh(at, [share.fit or 0.0 for share in shares], height=0.5, color=_AFTER, label="fit")
    there = [(i, share.projection) for i, share in enumerate(shares) if share.projection is not None]
    axes.plot([x for _, x in there], [i for i, _ in there], "o", color="white", markeredgecolor="black", markersize=4,
              linestyle="none", label="projection")  # fmt: skip
    asked = [(i, weight) for i, weight in enumerate(report.weights) if isinstance(weight, float)]
    if asked:
        axes.plot([x for _, x in asked], [i for i, _ in asked], "|", color="black", markersize=11, markeredgewidth=1.5,
                  linestyle="none", label="weight")  # fmt: skip
    _name_rows(axes, [source.short for source in report.sources])
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_xlabel("times in the result")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


@_styled
def norms(report: Report) -> Figure:
    """Frobenius norms of the adapters, of their weighted sum and of the result.

    Args:
        report: From `jaxmerge.report`.

    Returns:
        A figure of one pair of axes.
    """
    found, made = report.comparison, report.contributions
    before = found.total.norms if found else [share.norm for share in made.total.shares] if made else ()
    rows = [(source.short, norm, _BEFORE) for source, norm in zip(report.sources, before, strict=True)]
    rows += [("weighted sum", found.total.sum_norm, _SUM)] if found else []
    rows += [("result", made.total.norm, _AFTER)] if made else []
    figure = Figure(figsize=(_WIDTH / 2, 0.6 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names, values, colour = zip(*rows, strict=True)
    axes.barh(np.arange(len(rows)), values, height=0.6, color=colour)
    _name_rows(axes, names)
    axes.set_xlabel("Frobenius norm")
    return figure


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)


@_styled
def sweep(settings: Sequence[Mapping[str, Any]], scores: Any) -> Figure:
    """Scores of a sweep: a panel for each, a line for every value of all but the longest axis of the grid.

    Args:
        settings: S settings, as `jaxmerge.Sweep` has them.
        scores: Name -> ``[S]``; or ``[S]``.

    Returns:
        The figure.
    """
    named = scores if isinstance(scores, Mapping) else {"score": scores}
    names = list(settings[0])
    count = {name: len({json.dumps(_plain(setting[name])) for setting in settings}) for name in names}
    along = max([name for name in names if name != "weights"] or names, key=lambda name: count[name])
    lines: dict[str, list[int]] = {}
    for i, setting in enumerate(settings):
        label = ", ".join(f"{name} {described(_plain(setting[name]))}" for name in names if name != along)
        lines.setdefault(label, []).append(i)
    figure = Figure(figsize=(max(_WIDTH / 3 * len(named), 3.4), 2.4), layout="constrained")
    panels = figure.subplots(1, len(named), squeeze=False)[0]
    for panel, (score, values) in zip(panels, named.items(), strict=True):
        for label, own in lines.items():
            at = [_plain(settings[i][along]) for i in own]
            at = at if all(isinstance(x, int | float) for x in at) else [described(x) for x in at]
            panel.plot(at, [float(values[i]) for i in own], marker="o", markersize=3, label=label)
        panel.set_xlabel(along.replace("_", " "))
        panel.set_title(score.replace("_", " "))
        panel.grid(alpha=0.25, linewidth=0.5)
    if 1 < len(lines) <= 12:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _plain(value: Any) -> Any:
    """A setting's value as JSON holds it."""
    if isinstance(value, Mapping):
        return {path: _plain(own) for path, own in value.items()}
    return np.asarray(value).tolist()
