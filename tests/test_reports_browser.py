"""Reports as a person sees them: what a real browser draws, at the places where it should be."""

import json
import re

import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.base import Metadata
from tests import browser

LAYERS, KINDS = 6, ("attn.q", "attn.v", "mlp.up")
WIDE, NARROW = 1280, 400
# The ends and the middle of the scales, and a step a quarter of the way up, as the style sheet is meant to have them.
PALETTES = {
    ("cosine", "light"): {0: "0b3f7a", 10: "f1efec", 20: "8a3d00"},
    ("cosine", "dark"): {0: "a9d5ff", 10: "262a31", 20: "ffd09e"},
    ("right_overlap", "light"): {0: "f4f6e4", 10: "41a3b8", 20: "1d2a5e"},
    ("right_overlap", "dark"): {0: "232838", 10: "2d95a8", 20: "f4f3b6"},
}
MARKS = """
(() => {
  const box = (e) => { const b = e.getBoundingClientRect(); return [b.x, b.y + scrollY, b.width, b.height]; };
  const cells = [...document.querySelectorAll("[data-maps] [data-panel] svg path")].map((e) => ({
    maps: e.closest("[data-maps]").dataset.maps, panel: e.closest("[data-panel]").dataset.panel,
    tip: e.dataset.tip, box: box(e),
  }));
  const lines = [...document.querySelectorAll("#rank svg polyline")].map((e) => ({
    kind: e.getAttribute("class"),
    points: [...e.points].map((p) => { const q = p.matrixTransform(e.getScreenCTM()); return [q.x, q.y + scrollY]; }),
  }));
  const bars = [...document.querySelectorAll("#content svg rect.bar")].filter((e) => e.dataset.tip).map((e) => ({
    tip: e.dataset.tip, box: box(e),
  }));
  const cards = [...document.querySelectorAll(".card, .tile, h1, nav")].map(box);
  return { cells, lines, bars, cards, height: Math.ceil(document.documentElement.scrollHeight),
           width: document.documentElement.scrollWidth };
})()
"""


def adapters():
    """Two adapters whose cosine goes from −1 in the first layer to 1 in the last."""
    made = []
    for which in range(2):
        modules = {}
        for layer in range(LAYERS):
            for number, kind in enumerate(KINDS):
                rng = np.random.default_rng([layer, number])
                a, b, other = rng.normal(size=(4, 40)), rng.normal(size=(50, 4)), rng.normal(size=(4, 40))
                angle = np.pi * (1 - layer / (LAYERS - 1))
                if which:
                    a = np.cos(angle) * a + np.sin(angle) * other
                modules[f"layers.{layer}.{kind}"] = jm.LoRA(a.astype("f4"), b.astype("f4"), np.float32(0.1))
        made.append(jm.Adapter(modules, metadata=Metadata(name=f"runs/{'ab'[which]}")))
    return made


@pytest.fixture(scope="module")
def report():
    sources = adapters()
    return jm.report(jm.merge(sources, [1.0, 0.5], rank=3), sources, recipe="method: linear\n")


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.save(path)
    return path


@pytest.fixture(scope="module")
def marks(page):
    return browser.measured(page, MARKS, (WIDE, 1000))


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(request, page, marks):
    return request.param, browser.picture(page, (WIDE, marks["height"]), dark=request.param == "dark")


def colour(text):
    return np.array([int(text[i : i + 2], 16) for i in (0, 2, 4)])


def at(pixels, x, y):
    return pixels[round(y), round(x)].astype(int)


def distance(one, other):
    return np.abs(np.asarray(one) - np.asarray(other)).max()


def cells(marks, maps, panel=None):
    """Module -> the middle of its square."""
    found = {}
    for cell in marks["cells"]:
        if cell["maps"] == maps and panel in (None, cell["panel"]):
            x, y, width, height = cell["box"]
            found[cell["tip"].splitlines()[0]] = (x + width / 2, y + height / 2)
    return found


def test_the_page_is_light_or_dark_as_the_reader_likes(seen):
    scheme, pixels = seen
    brightness = np.median(pixels.reshape(-1, 3).mean(axis=1))
    assert brightness > 220 if scheme == "light" else brightness < 40
    # Text stands out from it.
    header = pixels[40:140, 60:700].astype(int).mean(axis=2)
    assert abs(header.max() - header.min()) > 150


@pytest.mark.parametrize("maps", ["cosine", "right_overlap"])
def test_squares_have_the_colours_of_their_values(seen, marks, report, maps):
    scheme, pixels = seen
    found = cells(marks, maps)
    assert set(found) == set(report.comparison.modules)
    values = {path: getattr(record.pairs[0], maps) for path, record in report.comparison.modules.items()}
    low = -1.0 if maps == "cosine" else 0.0
    assert min(values.values()) < 0.2 * low + 0.5
    assert max(values.values()) > 0.99
    for path, place in found.items():
        step = round((values[path] - low) / (1 - low) * 20)
        if step in PALETTES[maps, scheme]:
            assert distance(at(pixels, *place), colour(PALETTES[maps, scheme][step])) <= 3, (path, values[path])
    # Every value between lies between: lightness goes one way from the middle, or from the bottom.
    paths = sorted(values, key=values.get)
    seen_colours = [at(pixels, *found[path]) for path in paths]
    assert len({tuple(x) for x in seen_colours}) >= 4
    if maps == "right_overlap":
        light = [x @ [0.2126, 0.7152, 0.0722] for x in seen_colours]
        assert (np.diff(light) * (-1 if scheme == "light" else 1)).min() >= -0.5


def test_squares_lie_by_layer_and_kind(marks):
    found = cells(marks, "cosine")
    for kind in KINDS:
        row = [found[f"layers.{layer}.{kind}"] for layer in range(LAYERS)]
        assert len({y for _, y in row}) == 1
        steps = np.diff([x for x, _ in row])
        assert steps.min() > 5
        assert steps == pytest.approx(np.full(LAYERS - 1, steps[0]))
    for layer in range(LAYERS):
        column = [found[f"layers.{layer}.{kind}"] for kind in KINDS]
        assert len({x for x, _ in column}) == 1
        assert np.diff([y for _, y in column]).min() > 5


def test_there_is_a_map_of_each_adapter_in_the_result(marks, report):
    for short in ("a", "b"):
        assert set(cells(marks, "fit", short)) == set(report.contributions.modules)


def test_curves_are_drawn_where_they_should_be(seen, marks, report):
    scheme, pixels = seen
    blue, orange = ("1f66ad", "b54f00") if scheme == "light" else ("74b4f5", "ffa552")
    lines = {line["kind"]: line["points"] for line in marks["lines"]}
    assert len(lines["line in"]) == len(report.comparison.total.energy_by_rank) == 8
    assert len(lines["line out"]) == 3
    # Heights are energies: 1 at the last rank, and so much less at each before.
    heights = np.array([y for _, y in lines["line in"]])
    kept = np.array(report.comparison.total.energy_by_rank)
    per_unit = (heights[0] - heights[-1]) / (kept[-1] - kept[0])
    assert heights == pytest.approx(heights[-1] + per_unit * (1 - kept), abs=0.6)
    # Ranks lie by their logarithms.
    across = np.array([x for x, _ in lines["line in"]])
    share = (across - across[0]) / (across[-1] - across[0])
    assert share == pytest.approx(np.log2(np.arange(1, 9)) / 3, abs=0.01)
    for kind, wanted, points in (("line in", blue, lines["line in"][4:]), ("line out", orange, lines["line out"][:2])):
        for x, y in points:
            near = pixels[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3].reshape(-1, 3).astype(int)
            assert min(distance(pixel, colour(wanted)) for pixel in near) < 40, (kind, x, y)
    # The chosen rank is marked: a dashed line through its point, from top to bottom.
    x, _ = lines["line out"][-1]
    column = pixels[round(heights.min()) : round(heights.max()), round(x) - 1 : round(x) + 2].astype(int)
    dashes = (np.abs(column - colour(orange)).max(axis=2) < 90).any(axis=1)
    assert 0.25 < dashes.mean() < 0.8


def test_bars_are_as_long_as_their_numbers(seen, marks, report):
    scheme, pixels = seen
    orange = colour("b54f00" if scheme == "light" else "ffa552")
    shares = report.contributions.total.shares
    bars = [bar["box"] for bar in marks["bars"]]
    assert len(bars) == 2
    assert bars[0][2] / bars[1][2] == pytest.approx(shares[0].fit / shares[1].fit, rel=0.02)
    for x, y, _, height in bars:
        assert distance(at(pixels, x + 3, y + height / 2), orange) < 12


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_sticks_out(page, width):
    found = browser.measured(page, MARKS, (width, 900))
    # Chromium's window is never narrower than 500 or so: what counts is the page's own width.
    page_width = found["width"]
    for x, _, box_width, _ in found["cards"]:
        assert x >= 0
        assert x + box_width <= page_width + 1
    assert page_width <= max(width, 500)


def test_without_scripts_the_page_is_the_same(page, marks):
    plain = page.with_name("plain.html")
    text, count = re.subn(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL)
    assert count == 1
    plain.write_text(text)
    with_script, without = (browser.picture(path, (WIDE, marks["height"])) for path in (page, plain))
    assert (with_script != without).any(axis=2).mean() < 1e-3


def test_hostile_names_run_nothing(tmp_path):
    hostile = "</script><script>document.body.dataset.owned=1</script><img src=x onerror=document.body.dataset.owned=1>"
    sources = [
        jm.Adapter({f"layers.{i}.{hostile}": lora for i, lora in enumerate(a.modules.values())},
                   metadata=Metadata(name=f"{hostile}{number}"))
        for number, a in enumerate(adapters())
    ]  # fmt: skip
    path = tmp_path / "hostile.html"
    jm.report(jm.merge(sources), sources, name=hostile, recipe=f"name: {json.dumps(hostile)}").save(path)
    probe = "[document.body.dataset.owned ?? 0, document.images.length, document.title]"
    found = browser.measured(path, probe, (900, 900))
    assert found[:2] == [0, 0]
    assert found[2].startswith("Merge of")
