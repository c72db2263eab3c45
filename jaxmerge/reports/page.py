"""The report as one HTML page that needs nothing beside it: no network, no fonts, and no script to be read."""

import functools
import importlib.resources
from collections.abc import Sequence

from jaxmerge.attribution import Contributions
from jaxmerge.comparison import Comparison
from jaxmerge.markup import Markup, element, joined
from jaxmerge.reports import figures, maps
from jaxmerge.reports.colours import rules, variables
from jaxmerge.reports.heatmap import heat_map, legend, pair_matrix
from jaxmerge.reports.maps import Maps
from jaxmerge.reports.record import Report
from jaxmerge.reports.tables import Table, adapters_table, modules_table, tiles

_LIGHT = (
    "--bg:#f7f8f9;--card:#ffffff;--ink:#1a212b;--muted:#586373;--rule:#e0e4e9;--in:#1f66ad;--out:#b54f00;"
    "--a0:#0072b2;--a1:#00805e;--a2:#a8457f;--a3:#3a8fc4;--a4:#7a7a00;--a5:#5a5a5a;"
)
_DARK = (
    "--bg:#101318;--card:#181c23;--ink:#e7eaef;--muted:#9ba6b4;--rule:#2b313b;--in:#74b4f5;--out:#ffa552;"
    "--a0:#6bb8f0;--a1:#35c79a;--a2:#e48fc0;--a3:#9fd4f5;--a4:#d3cf5a;--a5:#b5b5b5;"
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(report: Report) -> str:
    """Makes the page.

    Args:
        report: What it tells.

    Returns:
        HTML, the same for the same report.
    """
    kind = "Merge" if report.contributions else "Comparison"
    sections = [section for section in _sections(report) if section is not None]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content="jaxmerge"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{kind} of {report.title}"),
        element("style", Markup(style())),
    )
    top = element(
        "header",
        element(
            "div",
            element("p", f"jaxmerge · {kind}", class_="kicker"),
            element("h1", report.name or report.title),
            element("p", " · ".join(filter(None, (report.name and report.title, report.base_model))), class_="how"),
            class_="in",
        ),
    )
    links = [element("a", title, href=f"#{name}") for name, title, _ in sections]
    body = element(
        "body",
        top,
        element("nav", element("div", *links, class_="in"), aria_label="Sections"),
        element(
            "main",
            *(element("section", inside, id=name) for name, _, inside in sections),
            element("footer", "Made by " + ", ".join(f"{name} {v}" for name, v in report.versions.items()) + "."),
        ),
        element("script", Markup(_read("page.js"))),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


@functools.cache
def style() -> str:
    """The style sheet: colours for light and dark pages, and the rest."""
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}{variables('dark')}}}}}\n"
    return f":root{{{_LIGHT}{variables('light')}}}\n{dark}{rules()}\n{_read('page.css')}"


def _read(name: str) -> str:
    return (importlib.resources.files("jaxmerge.reports") / name).read_text("utf-8")


Section = tuple[str, str, Markup]


def _sections(report: Report) -> list[Section | None]:
    made, found = report.contributions, report.comparison
    return [
        ("summary", "Summary", _summary(report)),
        None if made is None else ("content", "In the result", _content(report, made)),
        None if found is None or made is not None else _advice(report),
        _rank(report),
        None if found is None else ("interference", "Interference", _interference(report, found)),
        ("norms", "Norms", _norms(report)),
        None if found is None or made is None else _advice(report),
        ("adapters", "Adapters", _adapters(report)),
        ("modules", "Modules", _modules(report)),
        _recipe(report),
    ]


def _summary(report: Report) -> Markup:
    boxes = [
        element("div", element("span", tile.label), element("b", tile.value), element("span", tile.note), class_="tile")
        for tile in tiles(report)
    ]
    sentences = [element("li", sentence) for sentence in report.summary]
    return joined(element("div", *boxes, class_="tiles"), element("ul", *sentences, class_="summary"))


def _content(report: Report, made: Contributions) -> Markup:
    key = _key(
        ("swatch bar out", "fit: its number in the sum of the adapters that is nearest to the result"),
        ("ring", "projection: how far the result goes along it, whoever it came from"),
        *((("asked", "the weight that was asked for"),) if figures.asked(report) else ()),
    )
    names = [source.short for source in report.sources]
    return joined(
        element("h2", "What is in the result"),
        element("p", "How much of each adapter the merge really holds, over all modules and in each."),
        _cards(
            _card(key, _wide(figures.contributions(report, made), "How much of each adapter is in the result")),
            *(_maps(each, maps.blocks_of(made.modules)) for each in maps.content(made, names)),
        ),
    )


def _rank(report: Report) -> Section | None:
    drawn = figures.energy(report)
    if drawn is None:
        return None
    entries = []
    if report.comparison and report.comparison.total.sum_norm > 0:
        entries += [("line in", "the weighted sum, cut to each rank"), ("band in", "the same of single modules")]
    if report.contributions:
        entries.append(("line out", "the result as it is"))
    found = maps.energy(report.contributions) if report.contributions else []
    blocks = maps.blocks_of(report.contributions.modules) if report.contributions else ()
    inside = joined(
        element("h2", "Energy by rank"),
        element(
            "p", "How much of the squared norm is left at each rank. A merge loses nothing where its curve is at 100 %."
        ),
        _cards(_card(_key(*entries), _wide(drawn, "Energy by rank")), *(_maps(each, blocks) for each in found)),
    )
    return "rank", "Rank", inside


def _interference(report: Report, found: Comparison) -> Markup:
    names = [source.short for source in report.sources]
    shown = maps.interference(found, names)
    text = (
        "How the adapters meet before they are merged, layer by layer." if shown else "No two adapters share a module."
    )
    matrices = {each.name: _matrix(found, names, each) for each in shown} if len(names) > 2 else {}
    return joined(
        element("h2", "How the adapters meet"),
        element("p", text),
        _cards(*(_maps(each, maps.blocks_of(found.modules), matrices.get(each.name)) for each in shown)),
    )


def _matrix(found: Comparison, names: Sequence[str], shown: Maps) -> Markup:
    values = {pair.adapters: getattr(pair, shown.name) for pair in found.total.pairs}
    drawn = pair_matrix(values, names, shown.scale, shown.title)
    return _figure("all modules together", "", drawn)


def _norms(report: Report) -> Markup:
    names = [source.short for source in report.sources]
    found = maps.norms(report.contributions, names) if report.contributions else []
    return joined(
        element("h2", "Norms, before and after"),
        element("p", "How strong each weight change is, and how strong the result."),
        _cards(
            _card(element("h3", "In total"), _wide(figures.norms(report), "Norms of the adapters and of the result")),
            *(
                _card(element("h3", chart.title), _key(*chart.key), _wide(chart.drawn, f"Norms {chart.title}"))
                for chart in figures.norms_by_layer(report)
            ),
            *(_maps(each, maps.blocks_of(report.modules)) for each in found),
        ),
    )


def _adapters(report: Report) -> Markup:
    return joined(element("h2", "Adapters"), _card(_wide(_table(adapters_table(report)), "Adapters")))


def _modules(report: Report) -> Markup:
    table = modules_table(report)
    title = f"Every module ({len(table.rows)})"
    return element("details", element("summary", title), _wide(_table(table, sorts=True), title), class_="card")


def _advice(report: Report) -> Section | None:
    if not report.advice:
        return None
    entries = [
        joined(element("dt", item.what), element("dd", f"{item.why} [{item.source}]" if item.source else item.why))
        for item in report.advice
    ]
    title = "What the comparison suggests"
    return "advice", "Advice", joined(element("h2", title), _card(element("dl", *entries, class_="advice")))


def _recipe(report: Report) -> Section | None:
    if not report.recipe:
        return None
    text = "Running this again gives the same result."
    inside = joined(element("h2", "Recipe"), element("p", text), element("pre", element("code", report.recipe)))
    return "recipe", "Recipe", inside


def _maps(shown: Maps, blocks: Sequence, first: Markup | None = None) -> Markup:
    """A card of heat maps with one legend."""
    drawn = [
        _figure(panel.title, _told(shown, panel.total), heat_map(blocks, panel, shown.scale, shown.title))
        for panel in shown.panels
    ]
    text = f"Not drawn: {shown.left_out} more, which the JSON form has."
    note = element("p", text, class_="note") if shown.left_out else None
    return element(
        "div",
        element(
            "div",
            element("div", element("h3", shown.title), element("p", shown.meaning)),
            legend(shown.scale),
            class_="head",
        ),
        element("div", first, *drawn, class_="multiples"),
        note,
        class_="card",
        data_maps=shown.name,
    )


def _told(shown: Maps, total: float | None) -> str:
    return "" if total is None else f"in total {shown.scale.brief(total, 40 if shown.scale.unit else 400)}"


def _figure(title: str, note: str, drawn: Markup) -> Markup:
    caption = element("figcaption", title, element("span", f" · {note}") if note else None)
    return element("figure", caption, _wide(drawn, title), data_panel=title)


def _card(*inside: Markup | None) -> Markup:
    return element("div", *inside, class_="card")


def _cards(*cards: Markup) -> Markup:
    """Side by side where there is room."""
    return element("div", *cards, class_="cards")


def _wide(inside: Markup, label: str) -> Markup:
    """What may be wider than the page scrolls by itself, with the keyboard too."""
    return element("div", inside, class_="wide", tabindex=0, role="group", aria_label=label)


def _key(*entries: tuple[str, str]) -> Markup:
    return element("ul", *(element("li", _swatch(kind), text) for kind, text in entries), class_="key")


def _swatch(kind: str) -> Markup:
    name, _, rest = kind.partition(" ")
    shape = {
        "line": lambda: element("line", x1=1, x2=25, y1=6, y2=6, class_=kind),
        "band": lambda: element("rect", x=1, y=1, width=24, height=10, class_=kind),
        "swatch": lambda: element("rect", x=1, y=1, width=24, height=10, rx=2, class_=rest),
        "ring": lambda: element("circle", cx=13, cy=6, r=4, class_=kind),
        "asked": lambda: element("line", x1=13, x2=13, y1=0, y2=12, class_=kind),
    }[name]
    return element("svg", shape(), viewBox="0 0 26 12", width=26, height=12, aria_hidden="true")


def _table(table: Table, sorts: bool = False) -> Markup:
    head = element("tr", *(element("th", c.title, class_="l" if c.left else None, scope="col") for c in table.columns))
    rows = [
        element(
            "tr",
            *(
                element(
                    "td",
                    cell.text,
                    class_=("l path" if c.path else "l") if c.left else None,
                    data_value=repr(cell.value) if sorts and cell.value is not None else None,
                )
                for c, cell in zip(table.columns, row, strict=True)
            ),
        )
        for row in table.rows
    ]
    return element("table", element("thead", head), element("tbody", *rows), class_="sorts" if sorts else None)
