"""The tables and key figures of a report, the same in HTML and Markdown."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxmerge.attribution import Part
from jaxmerge.comparison import Record
from jaxmerge.reports.narrative import explained, number, share
from jaxmerge.reports.record import Report
from jaxmerge.values import described
from jaxmerge.words import pattern, percent, span

# Adapters whose numbers get columns of their own in the table of modules.
_COLUMNS = 16


class Column(NamedTuple):
    """A column: its heading, whether it is of words, and whether of paths."""

    title: str
    left: bool = False
    path: bool = False


class Cell(NamedTuple):
    """A cell: what it says, and the number it is sorted by."""

    text: str
    value: float | None = None


class Table(NamedTuple):
    """Columns, and rows of as many cells."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


class Tile(NamedTuple):
    """A key figure: what it is, the figure, and what it means."""

    label: str
    value: str
    note: str


def tiles(report: Report) -> list[Tile]:
    """The key figures."""
    return [*_of_merge(report), *_of_comparison(report)]


def _of_merge(report: Report) -> list[Tile]:
    made = report.contributions
    if made is None:
        return []
    ranks = span(part.rank for part in made.modules.values())
    kept = made.total.energy_kept
    if kept is None:
        first = Tile("Rank", ranks, "of the result")
    else:
        first = Tile("Energy kept", percent(kept), f"at rank {ranks}" + ("" if kept < 1 else ", exact"))
    rest = Tile("Explained by the adapters", explained(made.total.residual), "of the result's energy")
    return [first, rest]


def _of_comparison(report: Report) -> list[Tile]:
    found = report.comparison
    if found is None:
        return []
    kept, pairs = found.total.energy_by_rank, [pair for pair in found.total.pairs if pair.cosine is not None]
    made = []
    if report.contributions is None and found.total.sum_norm > 0:
        enough = next(rank for rank, energy in enumerate(kept, 1) if energy >= 0.99)
        made.append(Tile("Rank for 99 % of the sum", str(enough), f"exact at {len(kept)}"))
    if pairs:
        strongest = max(pairs, key=lambda pair: abs(pair.cosine or 0))
        who = " – ".join(report.sources[i].short for i in strongest.adapters)
        made.append(Tile("Largest cosine" if len(pairs) > 1 else "Cosine", number(strongest.cosine, 2), who))
    signs = [pair.sign_conflict for pair in found.total.pairs if pair.sign_conflict is not None]
    if signs:
        ends = dict.fromkeys(f"{100 * end:.1f}" for end in (min(signs), max(signs)))
        made.append(Tile("Opposite signs", f"{'–'.join(ends)} %", "of the entries; chance 50 %"))
    if report.contributions is None and found.total.norm_ratio is not None:
        made.append(Tile("Norms", f"{found.total.norm_ratio:.2g}×", "the largest over the smallest"))
    return made


def adapters_table(report: Report) -> Table:
    """What went in, and how much of it came out."""
    made, found = report.contributions, report.comparison
    shares = {} if made is None else {share.adapter: share for share in made.total.shares}
    columns = [
        Column(""),
        Column("adapter", True, True),
        Column("weight"),
        Column("modules"),
        Column("rank"),
        Column("norm"),
    ]
    columns += [Column("effective rank")] if found else []
    columns += [Column("fit"), Column("projection"), Column("cosine")] if made else []
    columns += [Column("sha256", True, True)] if any(source.sha256 for source in report.sources) else []
    rows = []
    for i, source in enumerate(report.sources):
        norm = found.total.norms[i] if found else shares[i].norm
        row = [
            str(i + 1),
            source.name,
            _weight(report.weights[i]),
            str(source.modules),
            span(source.ranks),
            number(norm, 4),
        ]
        row += [f"{found.total.effective_ranks[i]:.1f}"] if found else []
        row += [number(getattr(shares[i], name)) for name in ("fit", "projection", "cosine")] if made else []
        row += [(source.sha256 or "")[:12]] if any(source.sha256 for source in report.sources) else []
        rows.append([Cell(text) for text in row])
    return Table(columns, rows)


def _weight(weight: float | Mapping[str, float] | None) -> str:
    return described(weight) if isinstance(weight, Mapping) else number(weight, 4)


def modules_table(report: Report) -> Table:
    """Every module, with all that heat maps show of it in total."""
    made, found = report.contributions, report.comparison
    parts = made.modules if made else {}
    records = found.modules if found else {}
    names = [source.short for source in report.sources[:_COLUMNS]]
    columns = [Column("module", True, True), Column("out × in")]
    if made:
        columns += [Column("rank"), Column("energy kept"), Column("from no adapter"), Column("norm")]
        columns += [Column(f"fit {name}") for name in names]
    if found:
        columns += [Column("cosine"), Column("opposite signs"), Column("overlap B"), Column("overlap A")]
        columns += [Column(f"norm {name}") for name in names] if not made else []
    rows = []
    for path, module in report.modules.items():
        size = module.features or (0, 0)
        row = [Cell(path), Cell("{}×{}".format(*size), size[0] * size[1])]
        row += _of_part(parts[path], len(names)) if made else []
        row += _of_record(records[path], 0 if made else len(names)) if found else []
        rows.append(row)
    return Table(columns, rows)


def kinds_table(report: Report) -> Table:
    """The table of modules with those of one kind, in all layers, in one row: the least and the most of each number."""
    table = modules_table(report)
    groups: dict[str, list[Sequence[Cell]]] = defaultdict(list)
    for row in table.rows:
        groups[pattern(row[0].text)].append(row)
    first, *others = table.columns
    rows = [
        [Cell(kind), Cell(str(len(members))), *map(_ends, list(zip(*members, strict=True))[1:])]
        for kind, members in groups.items()
    ]
    return Table([first, Column("count"), *others], rows)


def _ends(cells: Sequence[Cell]) -> Cell:
    known = sorted((cell for cell in cells if cell.value is not None), key=lambda cell: cell.value or 0.0)
    return Cell(" … ".join(dict.fromkeys((known[0].text, known[-1].text)))) if known else cells[0]


def _of_part(part: Part, n: int) -> list[Cell]:
    fits = {share.adapter: share.fit for share in part.shares}
    return [
        Cell(str(part.rank), part.rank),
        Cell(share(part.energy_kept), part.energy_kept),
        Cell(share(part.residual), part.residual),
        Cell(number(part.norm), part.norm),
        *(Cell(number(fits.get(i)), fits.get(i)) for i in range(n)),
    ]


def _of_record(record: Record, n: int) -> list[Cell]:
    cosines = [pair.cosine for pair in record.pairs if pair.cosine is not None]
    strongest = max(cosines, key=abs) if cosines else None
    overlaps = [_mean([getattr(p, f"{side}_overlap") for p in record.pairs]) for side in ("left", "right")]
    signs = _mean([pair.sign_conflict for pair in record.pairs])
    norms = dict(zip(record.sources, record.norms, strict=True))
    return [
        Cell(number(strongest), strongest),
        *(Cell(share(value), value) for value in (signs, *overlaps)),
        *(Cell(number(norms.get(i)), norms.get(i)) for i in range(n)),
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
