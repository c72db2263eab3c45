"""Figures: what is drawn is what the records say."""

import io
import subprocess
import sys

import matplotlib
import numpy as np
import PIL.Image
import pytest

import jaxmerge as jm
from jaxmerge import plots
from jaxmerge.base import Metadata

PATHS = [*(f"layers.{i}.{kind}" for i in range(5) for kind in ("q", "v")), "head"]


def adapter(seed, paths=PATHS):
    rng = np.random.default_rng(seed)
    modules = {
        path: jm.LoRA(rng.normal(size=(3, 20)).astype("f4"), rng.normal(size=(16, 3)).astype("f4"), np.float32(1))
        for path in paths
    }
    return jm.Adapter(modules, metadata=Metadata(name="abc"[seed]))


@pytest.fixture(scope="module")
def report():
    sources = [adapter(0), adapter(1, PATHS[:-1]), adapter(2)]
    return jm.report(jm.merge(sources, [1.0, 0.5, -0.25], rank=2), sources)


def drawn(figure):
    """Draws it, as PNG and PDF; the picture's pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pdf = io.BytesIO()
    figure.savefig(pdf, format="pdf")
    assert pdf.getvalue().startswith(b"%PDF")
    pixels = np.asarray(PIL.Image.open(buffer).convert("RGB"))
    assert pixels.std() > 5
    return pixels


def test_a_notebook_shows_it(report):
    shown = PIL.Image.open(io.BytesIO(plots.energy_curves(report)._repr_png_()))
    assert shown.width > 300
    assert np.asarray(shown.convert("RGB")).std() > 5


def images(figure):
    return [axes.images[0] for axes in figure.axes if axes.images]


def test_a_map_of_each_pair(report):
    figure = plots.heatmap(report)
    drawn(figure)
    found = images(figure)
    assert len(found) == 6  # Three pairs, layers and head.
    pairs = [(0, 1), (0, 2), (1, 2)]
    for number, (one, other) in enumerate(pairs):
        # Two beside each other, each with its layers above its head.
        layers = figure.axes[number // 2 * 4 + number % 2].images[0].get_array()
        head = figure.axes[number // 2 * 4 + 2 + number % 2].images[0].get_array()
        assert layers.shape == (2, 5)
        for i, kind in enumerate("qv"):
            for layer in range(5):
                record = report.comparison.modules[f"layers.{layer}.{kind}"]
                (pair,) = [p for p in record.pairs if p.adapters == (one, other)]
                assert layers[i, layer] == pair.cosine
        assert bool(head.mask.all()) == (1 in (one, other))
    low, high = found[0].get_clim()
    assert low == -high
    assert all(image.get_clim() == (low, high) for image in found)


@pytest.mark.parametrize(
    "quantity", ["sign_conflict", "left_overlap", "right_overlap", "fit", "norm", "residual", "energy_kept"]
)
def test_every_quantity(report, quantity):
    figure = plots.heatmap(report, quantity)
    drawn(figure)
    titles = {axes.get_title(loc="left") for axes in figure.axes} - {""}
    wanted = {
        "fit": {"a", "b", "c"}, "norm": {"result", "a", "b", "c"}, "residual": {"result"}, "energy_kept": {"result"},
    }.get(quantity, {"a – b", "a – c", "b – c"})  # fmt: skip
    assert titles == wanted
    if quantity == "energy_kept":
        values = figure.axes[0].images[0].get_array()
        assert values[1, 3] == report.contributions.modules["layers.3.v"].energy_kept


def test_chosen_panels(report):
    figure = plots.heatmap(report, "fit", ["b"])
    assert figure.axes[0].get_title(loc="left") == "b"
    assert images(figure)[0].get_array()[0, 2] == report.contributions.modules["layers.2.q"].shares[1].fit
    with pytest.raises(ValueError, match="no panel d: there are a, b, c"):
        plots.heatmap(report, "fit", ["d"])
    with pytest.raises(ValueError, match="no 'rank' in this report: there are cosine, sign_conflict"):
        plots.heatmap(report, "rank")


def test_energy_curves(report):
    figure = plots.energy_curves(report)
    drawn(figure)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["weighted sum"].get_ydata()) == list(report.comparison.total.energy_by_rank)
    assert list(lines["weighted sum"].get_xdata()) == list(range(1, 10))
    assert list(lines["result"].get_ydata()) == list(report.contributions.total.energy_by_rank)
    assert set(lines["rank 2"].get_xdata()) == {2}
    outline = axes.collections[0].get_paths()[0].vertices
    first = [record.energy_by_rank[0] for record in report.comparison.modules.values()]
    at_one = outline[np.isclose(outline[:, 0], 1)][:, 1]
    assert (at_one.min(), at_one.max()) == pytest.approx((min(first), max(first)))


def test_contributions(report):
    figure = plots.contributions(report)
    drawn(figure)
    (axes,) = figure.axes
    shares = report.contributions.total.shares
    assert [bar.get_width() for bar in axes.patches] == [share.fit for share in shares]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["projection"].get_xdata()) == [share.projection for share in shares]
    assert list(lines["weight"].get_xdata()) == [1.0, 0.5, -0.25]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="nothing was merged"):
        plots.contributions(jm.report(None, [adapter(0), adapter(1)]))


def test_norms(report):
    figure = plots.norms(report)
    drawn(figure)
    (axes,) = figure.axes
    total = report.comparison.total
    assert [bar.get_width() for bar in axes.patches] == [*total.norms, total.sum_norm, report.contributions.total.norm]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c", "weighted sum", "result"]


def test_a_comparison_and_a_single_adapter():
    comparison = jm.report(None, [adapter(0), adapter(1)])
    assert len(plots.norms(comparison).axes[0].patches) == 3
    assert "result" not in {line.get_label() for line in plots.energy_curves(comparison).axes[0].lines}
    alone = jm.report(jm.merge([adapter(0)], rank=1), [adapter(0)])
    assert len(plots.norms(alone).axes[0].patches) == 2
    assert "weighted sum" not in {line.get_label() for line in plots.energy_curves(alone).axes[0].lines}


def test_sweeps():
    grid = {"scale": [0.5, 1.0, 2.0], "weights": [[1.0, 1.0], [1.0, 0.5]]}
    found = jm.sweep([adapter(0), adapter(2)], lambda merged: (merged.modules["head"].a ** 2).sum(), grid)
    figure = plots.sweep(found.settings, found.scores)
    drawn(figure)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "scale"
    assert axes.get_title() == "score"
    assert [line.get_label() for line in axes.lines] == ["weights 1, 1", "weights 1, 0.5"]
    for line, weights in zip(axes.lines, grid["weights"], strict=True):
        own = [i for i, setting in enumerate(found.settings) if setting["weights"] == weights]
        assert list(line.get_xdata()) == grid["scale"]
        assert list(line.get_ydata()) == [float(found.scores[i]) for i in own]
    named = plots.sweep([{"weights": [1.0, 1.0]}, {"weights": [1.0, 0.5]}], {"first_score": [1, 2], "other": [3, 4]})
    assert [axes.get_title() for axes in named.axes] == ["first score", "other"]
    assert list(named.axes[1].lines[0].get_ydata()) == [3, 4]


def test_settings_of_matplotlib_stay(report):
    before = dict(matplotlib.rcParams)
    plots.norms(report)
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_it_says_what_to_install():
    code = "import sys; sys.modules['matplotlib'] = None; import jaxmerge.plots"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: jaxmerge.plots needs matplotlib: pip install 'jaxmerge[plots]'" in done.stderr
