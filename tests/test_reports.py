"""Reports: what they say, that every form is whole and safe, and that nothing is written that should not be."""

import dataclasses
import html.parser
import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.base import Metadata
from jaxmerge.reports import check_target, colours
from jaxmerge.reports.grid import grid, short_names
from jaxmerge.reports.maps import Scale, interference
from jaxmerge.reports.markdown import escaped

ADAPTERS = Path(__file__).parent / "adapters"
HOSTILE = "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&|`*_[a](http://b)\x00\n日本語"


def adapter(seed, paths, name="", rank=4, batch=(), strength=1.0, shared=0.0):
    """A random adapter; some of it may be shared with the others."""
    rng, common = np.random.default_rng(seed), np.random.default_rng(99)

    def normal(*shape):
        return (rng.normal(size=shape) + shared * common.normal(size=shape)).astype("f4")

    modules = {
        path: jm.LoRA(normal(*batch, rank, 30), normal(*batch, 26, rank), np.float32(0.1 * strength)) for path in paths
    }
    return jm.Adapter(modules, metadata=Metadata(name=name, base_model="base/model"))


def llama(layers):
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    return [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]


T5 = [
    *(f"encoder.block.{i}.layer.0.SelfAttention.q" for i in range(3)),
    *(f"decoder.block.{i}.layer.1.EncDecAttention.v" for i in range(2)),
    "lm_head",
]
SOURCES = {
    "plain": lambda: [adapter(i, llama(4), f"runs/{name}") for i, name in enumerate(("maths", "code"))],
    "sixteen": lambda: [adapter(i, llama(2), f"runs/{i:02d}/final", strength=1 + i) for i in range(16)],
    "encoder and decoder": lambda: [adapter(i, T5[i:], f"{name}") for i, name in enumerate(("a", "b", "c"))],
    "stacked": lambda: [adapter(i, ["layers.attn.q", "layers.mlp.up"], batch=(5, 2)) for i in range(2)],
    "nothing in common": lambda: [adapter(0, ["layers.0.q"], "a"), adapter(1, ["layers.0.v"], "b")],
    "of zeros": lambda: [adapter(0, llama(2), "a"), adapter(1, llama(2), "b", strength=0)],
    "hostile": lambda: [adapter(i, [f"layers.{j}.{HOSTILE}" for j in range(3)], f"{HOSTILE}{i}") for i in range(3)],
    "one": lambda: [adapter(0, llama(2), "alone")],
}


def made(case, **arguments):
    sources = SOURCES[case]()
    recipe = f"method: linear  # {HOSTILE}\n```\n"
    return jm.report(jm.merge(sources, **arguments), sources, name="out/merged", recipe=recipe)


class Page(html.parser.HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in ("meta", "input", "br", "col"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def of(self, tag):
        return [attributes for found, attributes, _ in self.elements if found == tag]


@pytest.mark.parametrize("case", SOURCES)
@pytest.mark.parametrize("merged", [True, False])
def test_pages_are_whole_and_need_nothing_else(case, merged):
    if case == "one" and not merged:
        return
    sources = SOURCES[case]()
    report = made(case) if merged else jm.report(None, sources)
    text = report.html()
    assert text == report.html()
    page = Page(text)
    for _, attributes, _ in page.elements:
        assert not set(attributes) & {"src", "srcset", "onerror", "onclick", "onload", "style", "action"}
        assert attributes.get("href", "#").startswith("#")
    assert page.of("link") == page.of("img") == page.of("iframe") == []
    assert len(page.of("script")) == len(page.of("style")) == 1
    assert "url(" not in text
    assert "@import" not in text
    # Links within the page lead somewhere, and charts have words.
    targets = {a.get("id") for a in page.of("section")}
    assert {a["href"].removeprefix("#") for a in page.of("a")} == targets
    for attributes in page.of("svg"):
        assert (attributes.get("role") == "img" and attributes["aria-label"]) or attributes.get("aria-hidden") == "true"
    shown = " ".join("".join(page.text).split())
    assert not re.search(r"\b(nan|inf|None)\b", shown)
    for sentence in report.summary:
        assert " ".join(sentence.replace("\0", "\ufffd").split()) in shown


@pytest.mark.parametrize("case", SOURCES)
def test_markdown_is_whole(case):
    text = made(case).markdown()
    assert text == made(case).markdown()
    tables = [
        list(rows) for is_row, rows in itertools.groupby(text.splitlines(), lambda x: x.startswith("|")) if is_row
    ]
    assert len(tables) >= 2
    for table in tables:
        counts = {len(re.sub(r"\\.", "", row).split("|")) for row in table}
        assert len(counts) == 1
    if case == "hostile":
        before, _, rest = text.partition("````yaml\n")
        assert rest.count("````") == 1  # What is in the fence cannot end it.
        assert not re.search(r"(?<!\\)[<`]", before)


@pytest.mark.parametrize("case", SOURCES)
def test_json_is_plain_and_whole(case):
    report = made(case)
    plain = report.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["adapters"][0]["name"] == report.sources[0].name
    assert plain["summary"] == list(report.summary)
    assert plain["contributions"] == report.contributions.to_json()
    assert plain["comparison"] == (None if case == "one" else report.comparison.to_json())
    assert plain["settings"]["method"] == "linear"


def squares(report, maps):
    """What a heat map's squares say: panel -> module -> class and words."""
    found, where = {}, [None, None, None]

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            given = dict(attrs)
            if "data-maps" in given:
                where[0] = given["data-maps"]
            if "data-panel" in given:
                where[1] = given["data-panel"]
            where[2] = (
                given.get("class") if tag == "path" and where[0] == maps else where[2] if tag == "title" else None
            )

        def handle_data(self, data):
            if where[2] and "\n" in data:
                path, words = data.split("\n")
                found.setdefault(where[1], {})[path] = (where[2], words)

    Reader().feed(report.html())
    return found


def test_squares_say_and_show_their_values():
    sources = [adapter(i, llama(4), name, shared=1.0) for i, name in enumerate(("a", "b", "c"))]
    report = jm.report(jm.merge(sources, rank=5), sources)
    shown = squares(report, "cosine")
    assert set(shown) == {"a – b", "a – c", "b – c", "all modules together"}
    for number, pair in enumerate(("a – b", "a – c", "b – c")):
        assert set(shown[pair]) == set(report.modules)
        for path, (step, words) in shown[pair].items():
            value = report.comparison.modules[path].pairs[number].cosine
            assert float(words.replace("−", "-")) == pytest.approx(value, rel=6e-3)
            # Blue, below 10, where they oppose each other.
            assert (int(step.removeprefix("d")) > 10) == (value > 0)
    fits = squares(report, "fit")
    for i, name in enumerate("abc"):
        for path, (_, words) in fits[name].items():
            assert float(words.replace("−", "-")) == pytest.approx(
                report.contributions.modules[path].shares[i].fit, rel=6e-3
            )
    kept = squares(report, "energy_kept")["result"]
    for path, (_, words) in kept.items():
        fraction = float(words.removesuffix("\u00a0%")) / 100
        assert fraction == pytest.approx(report.contributions.modules[path].energy_kept, abs=6e-4)


def test_layers_of_a_stacked_module_are_squares_of_their_own():
    report = made("stacked", rank=3)
    shown = squares(report, "cosine")["adapter 1 – adapter 2"]
    assert set(shown) == {f"layers.{kind}, index {i}" for kind in ("attn.q", "mlp.up") for i in range(5)}
    for i, layer in enumerate(report.comparison.modules["layers.attn.q"].layers):
        told = float(shown[f"layers.attn.q, index {i}"][1].replace("−", "-"))
        assert told == pytest.approx(layer.pairs[0].cosine, rel=6e-3)


def test_of_many_pairs_those_that_meet_most_are_drawn():
    sources = [adapter(i, llama(3), f"t{i}", shared=2.0 if i in (2, 5) else 0.0) for i in range(7)]
    comparison = jm.compare(sources)
    cosine = interference(comparison, [f"t{i}" for i in range(7)])[0]
    titles = [panel.title for panel in cosine.panels]
    assert titles[0] == "strongest of all 21 pairs"
    assert "t2 – t5" in titles
    assert cosine.left_out == 21 - (len(titles) - 1)
    for path, record in comparison.modules.items():
        strongest = max((pair.cosine for pair in record.pairs), key=abs)
        assert cosine.panels[0].values[path, None] == strongest


def test_the_grid_of_an_encoder_and_a_decoder():
    blocks = grid(dict.fromkeys(T5, 0) | {"stack.a.q": 4, "stack.a.v": 4})
    assert [(b.name, b.axis, b.columns) for b in blocks] == [
        ("encoder.block", "layer", (0, 1, 2)),
        ("decoder.block", "layer", (0, 1)),
        ("stack.a, 4 stacked", "index", (0, 1, 2, 3)),
        ("", "", (0,)),
    ]
    assert [row.kind for row in blocks[0].rows] == ["layer.0.SelfAttention.q"]
    assert blocks[1].rows[0].cells[1] == ("decoder.block.1.layer.1.EncDecAttention.v", None)
    assert [row.kind for row in blocks[2].rows] == ["q", "v"]
    assert blocks[2].rows[1].cells[3] == ("stack.a.v", 3)
    assert blocks[3].rows[0].kind == "lm_head"
    # Layers of flax, and modules that are nothing but a number.
    assert grid({"decoder.layers_2.mlp": 0})[0].rows[0].cells == {2: ("decoder.layers_2.mlp", None)}
    assert grid({"blocks.0": 0, "blocks.1": 0})[0].rows[0].kind == "blocks"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (("a/x", "b/y"), ("x", "y")),
        (("a/x", "b/x"), ("a/x", "b/x")),
        (("same", "same"), ("same (1)", "same (2)")),
        (("/", "x/"), ("/", "x")),
        (("n" * 40, "m"), ("nnnnnnnn…nnnnnnnnnnnnnnn", "m")),
    ],
)
def test_short_names(names, short):
    assert short_names(names) == short


def sentences(merged, sources, **arguments):
    return " ".join(jm.report(merged, sources, **arguments).summary)


def test_what_is_said_of_an_exact_sum():
    sources = SOURCES["plain"]()
    told = sentences(jm.merge(sources, [1.0, -0.5]), sources)
    assert "2 adapters of base/model merged into one of rank 8, 12 modules: method linear, space full." in told
    assert "Nothing was lost: rank 8 holds the whole merge." in told
    assert "The result is the weighted sum 1 × maths − 0.5 × code, and nothing else." in told
    assert "The adapters hardly meet" in told


def test_what_is_said_of_a_cut_and_of_a_method():
    sources = SOURCES["plain"]()
    merged = jm.merge(sources, [1.0, 0.05], rank=4)
    told = sentences(merged, sources)
    worst = min(merged.energy, key=lambda path: float(merged.energy[path].kept))
    assert re.search(rf"Rank 4 keeps 9\d\.\d+ % of the merge's energy .*; {re.escape(worst)} keeps least", told)
    assert "Hardly in the result (cosine below 0.1): code." in told
    told = sentences(jm.merge(sources, method="ties", density=0.3), sources)
    assert "method ties, space full, density 0.3." in told
    assert re.search(r"nearest to 0\.\d+ × maths \+ 0\.\d+ × code; \d\d\.\d % of its energy is in that sum", told)


def test_what_is_said_of_numbers_for_each_module():
    sources = SOURCES["plain"]()
    weights = [{path: 1.0 if ".0." in path else 0.1 for path in sources[0].modules}, 1.0]
    report = jm.report(jm.merge(sources, weights), sources)
    assert report.weights == tuple(weights)
    assert "100 % with numbers for each module" in " ".join(report.summary)
    assert report.to_json()["weights"] == weights
    assert "0.1 … 1" in report.markdown()
    Page(report.html())


def test_what_is_said_of_adapters_that_meet():
    one, other = (adapter(i, llama(2), name) for i, name in enumerate("ab"))
    mirrored = jm.Adapter(
        {path: dataclasses.replace(lora, b=-lora.b) for path, lora in one.modules.items()},
        metadata=dataclasses.replace(one.metadata, name="c"),
    )
    told = sentences(None, [one, other, mirrored])
    assert "oppose each other: the largest cosine is −1, of a and c" in told
    assert "… 100.0 % of the entries differ in sign" in told
    twice = [one, dataclasses.replace(one, metadata=dataclasses.replace(one.metadata, name="again"))]
    assert "Some adapters are sums of the others" in sentences(jm.merge(twice), twice)
    assert "No module is in more than one adapter" in sentences(None, SOURCES["nothing in common"]())
    assert "Changes nothing, all its weights being 0: b." in sentences(None, SOURCES["of zeros"]())
    zeros = SOURCES["of zeros"]()[1:]
    assert "The result is 0 everywhere." in sentences(jm.merge(zeros), zeros)


def test_a_result_that_was_read_from_a_file(tmp_path):
    sources = [jm.load(ADAPTERS / name) for name in ("sms", "movie")]
    jm.save(jm.merge(sources, [1.0, 0.25]), tmp_path / "merged")
    report = jm.report(jm.load(tmp_path / "merged"), sources, weights=[1.0, 0.25])
    assert report.settings == {}
    assert "was read from a file" in " ".join(report.summary)
    assert "1 × sms + 0.25 × movie" in " ".join(report.summary)
    assert report.sources[0].sha256 == json.loads(sources[0].metadata.provenance)["sha256"]
    assert report.sources[0].sha256[:12] in report.html()
    assert report.comparison.weights == (1.0, 0.25)


def test_settings_are_those_that_differ_from_what_is_usual():
    sources = [adapter(i, ["layers.0.q"], rank=2) for i in range(2)]
    stages = [("scale", {"factor": 0.5})]
    merged = jm.merge(sources, method="dare_ties", density=0.5, key=jax.random.key(0), stages=stages, rank=2)
    told = sentences(merged, sources)
    assert "method dare_ties, space full, density 0.5, rank 2, then scale factor 0.5." in told


def test_errors_are_those_of_the_parts():
    sources = SOURCES["plain"]()
    with pytest.raises(ValueError, match="at least two adapters are compared"):
        jm.report(None, sources[:1])
    with pytest.raises(ValueError, match="none of them has"):
        jm.report(adapter(0, ["other"]), sources)
    moved = dataclasses.replace(sources[1], metadata=dataclasses.replace(sources[1].metadata, base_model="other"))
    with pytest.raises(ValueError, match="different base models"):
        jm.report(None, [sources[0], moved])


@pytest.mark.parametrize("suffix", [".html", ".md", ".json", ".HTML"])
def test_saving(tmp_path, suffix):
    report = made("plain")
    path = tmp_path / f"report{suffix}"
    report.save(path)
    forms = {".html": report.html(), ".md": report.markdown()}
    if suffix == ".json":
        assert json.loads(path.read_text("utf-8")) == report.to_json()
    else:
        assert path.read_text("utf-8") == forms[suffix.lower()]
    with pytest.raises(ValueError, match="already exists"):
        report.save(path)
    path.write_text("old")
    report.save(str(path), force=True)
    assert path.read_text("utf-8") != "old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_may_not_be_written_is_refused(tmp_path):
    (tmp_path / "folder.html").mkdir()
    for path, told in (
        ("report.pdf", "ends in .html, .md or .json"),
        ("report", "ends in .html, .md or .json"),
        ("missing/report.html", "there is no folder"),
        ("folder.html", "is a folder"),
    ):
        for refuse in (check_target, made("one").save):
            with pytest.raises(ValueError, match=re.escape(told)):
                refuse(tmp_path / path, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.html"]


def test_an_error_while_it_is_made_leaves_what_was_there(tmp_path, monkeypatch):
    report = made("plain")
    monkeypatch.setattr(jm.Report, "html", lambda self: 1 / 0)
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(ZeroDivisionError):
        report.save(tmp_path / "report.html", force=True)
    assert (tmp_path / "report.html").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_in_a_notebook_the_page_is_in_a_frame():
    frame = made("hostile")._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert "<script" not in frame


def luminance(colour):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def rgb(colour):
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def contrast(one, other):
    low, high = sorted((luminance(rgb(one)), luminance(rgb(other))))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_told_apart_by_lightness(scheme):
    found = [luminance(rgb(c)) for c in colours.colours("sequential", scheme)]
    assert len(found) == 21
    assert (np.diff(found) * (-1 if scheme == "light" else 1) > 0).all()
    sides = [luminance(rgb(c)) for c in colours.colours("diverging", scheme)]
    for side in (sides[10::-1], sides[10:]):
        assert (np.diff(side) * (-1 if scheme == "light" else 1) > 0).all()
    # Blue and orange are told apart with any kind of dichromacy: by how much more blue than red there is.
    ends = colours.colours("diverging", scheme)
    assert all(rgb(c)[2] - rgb(c)[0] > 0.15 for c in ends[:8])
    assert all(rgb(c)[0] - rgb(c)[2] > 0.15 for c in ends[13:])


def test_text_stands_out():
    style = made("one").html().split("<style>")[1].split("</style>")[0]
    schemes = style.split("}", 1)[0], style.split("@media screen", 1)[1].split("}}")[0]
    light, dark = (dict(re.findall(r"--([a-z0-9]+):(#[0-9a-f]{6})", scheme)) for scheme in schemes)
    assert set(light) == set(dark)
    for scheme in (light, dark):
        for ground in ("bg", "card"):
            assert contrast(scheme["ink"], scheme[ground]) > 12
            for words in ("muted", "in", "out"):
                assert contrast(scheme[words], scheme[ground]) > 4.5
            for line in (f"a{i}" for i in range(6)):
                assert contrast(scheme[line], scheme[ground]) > 3
        for name in (f"{kind}{i}" for kind in "ds" for i in range(21)):
            assert contrast(scheme[name], scheme[f"t{name}"]) > 4.5


def test_steps_of_a_scale():
    scale = Scale(-0.5, 0.5, "diverging")
    assert [colours.css_class(scale, v) for v in (-9, -0.5, 0, 0.024, 0.026, 0.5, 9, None)] == [
        "d0", "d0", "d10", "d10", "d11", "d20", "d20", "none",
    ]  # fmt: skip
    assert Scale(0, 0.3, "sequential", "%").told(0.12345) == "12.3\u00a0%"
    assert Scale(0, 0.3, "sequential", "%").brief(0.12345) == "12.3\u00a0%"
    assert scale.told(-0.0) == "0"
    assert scale.told(-0.25) == "−0.25"
    assert scale.told(None) == "not defined"


def test_markdown_of_names():
    assert escaped("a|b`c`\n<d> *e* _f_ [g](h)") == r"a\|b\`c\` \<d\> \*e\* \_f\_ \[g\](h)"
