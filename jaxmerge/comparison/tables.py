"""Comparisons as tables, for terminals and notebooks."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from jaxmerge.comparison.records import Comparison, Pair, Record
from jaxmerge.tables import Table, columns
from jaxmerge.values import described
from jaxmerge.words import pattern, percent


def adapters(found: Comparison) -> Table:
    """The adapters, and their weighted sum."""
    total = found.total
    count = [sum(i in record.sources for record in found.modules.values()) for i in range(len(found.adapters))]
    rows: list[tuple[object, ...]] = [
        (i + 1, name, _weight(weight), modules, rank, f"{norm:.4g}", f"{effective:.1f}")
        for i, (name, weight, modules, rank, norm, effective) in enumerate(
            zip(found.adapters, found.weights, count, total.ranks, total.norms, total.effective_ranks, strict=True)
        )
    ]
    last = len(found.modules), len(total.energy_by_rank), f"{total.sum_norm:.4g}", f"{total.sum_effective_rank:.1f}"
    rows.append(("", "weighted sum", "", *last))
    headings = columns(["adapter"], ["weight", "modules", "rank", "norm", "effective rank"])
    return Table([("", "right"), *headings], rows)


def pairs(found: Comparison) -> Table:
    """How every two adapters meet, over all modules; last what chance gives."""
    total = found.total
    rows: list[tuple[object, ...]] = [
        (
            _names(pair),
            _number(pair.cosine),
            _share(pair.left_overlap),
            _share(pair.right_overlap),
            _rate(pair.sign_conflict, pair.sign_error),
            "-" if pair.shared_a is None else f"{pair.audit} ({pair.shared_a:.2f})",
        )
        for pair in total.pairs
    ]
    chance = [_mean(getattr(pair, name) for pair in total.pairs) for name in ("left_chance", "right_chance")]
    rows.append(("by chance", "0.000", *map(_share, chance), _share(0.5), ""))
    return Table(columns(["pair"], ["cosine", "B overlap", "A overlap", "signs differ", "spaces of A"]), rows)


def legend(found: Comparison) -> str:
    """What the columns mean, and the rate of different signs over all adapters."""
    told = (
        "Effective rank: how many directions carry a change, (Σσ²)² / Σσ⁴ of a module's singular values σ, the mean "
        "over modules. Overlap: how far two adapters write into (B) or read from (A) the same directions. Spaces of A: "
        "collapsed where training began from one initialisation, the median principal cosine above 0.9; separate below "
        "0.5."
    )
    if error := max(
        (pair.sign_error or 0.0 for record in found.modules.values() for pair in record.pairs), default=0.0
    ):
        told += (
            " Signs: of a sample of each module's entries; ± is one standard error, and that of a single module is "
            f"{percent(error)} at most."
        )
    total, n = found.total, len(found.adapters)
    if n == 2 or total.sign_conflict is None:
        return told
    rate, chance = _rate(total.sign_conflict, total.sign_error), percent(1 - 2 ** (1 - n))
    return f"{told}\nOf all entries {rate} differ in sign between some two of the {n}; by chance {chance}."


def kinds(found: Comparison) -> Table | str:
    """Kinds of modules, those first in which two adapters' changes are least orthogonal."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for path, record in found.modules.items():
        if record.pairs and record.features is not None:
            groups[pattern(path), "{}×{}".format(*record.features), record.sources].append(record)
    if not groups:
        return "No module is in more than one adapter: nothing interferes."
    everywhere = all(len(sources) == len(found.adapters) for _, _, sources in groups)
    rows = []
    for (path, _, sources), records in groups.items():
        pairs = [pair for record in records for pair in record.pairs]
        strongest = _strongest(pairs)
        who = "all" if len(sources) == len(found.adapters) else ", ".join(str(i + 1) for i in sources)
        shares = [
            _share(_mean(getattr(pair, name) for pair in pairs))
            for name in ("left_overlap", "right_overlap", "sign_conflict")
        ]
        rows.append((abs(strongest), (path, *([] if everywhere else [who]), _number(strongest), *shares)))
    rows.sort(key=lambda row: -row[0])
    left = ["module"] if everywhere else ["module", "from"]
    right = ["largest\ncosine", "B\noverlap", "A\noverlap", "signs\ndiffer"]
    return Table(columns(left, right), [row for _, row in rows])


def _strongest(pairs: Iterable[Pair]) -> float:
    """The cosine farthest from 0."""
    return max((pair.cosine or 0.0 for pair in pairs), key=abs)


def energy(found: Comparison) -> Table | str:
    """What ranks of the weighted sum keep."""
    total = found.total
    if total.sum_norm == 0:
        return "the weighted sum is 0 everywhere"
    kept, largest, exact = total.energy_by_rank, max(total.ranks), len(total.energy_by_rank)
    notes = {exact: "exact"}
    for fraction in (0.99, 0.9):
        notes.setdefault(next(rank for rank, share in enumerate(kept, 1) if share >= fraction), "")
    for rank in (largest // 4, largest // 2, 2 * largest, 4 * largest):
        if 0 < rank < exact:
            notes.setdefault(rank, "")
    if largest < exact:
        notes[largest] = "the largest rank of an adapter"
    rows = [(rank, percent(kept[rank - 1]), notes[rank]) for rank in sorted(notes)]
    return Table([("rank of the sum", "right"), ("energy kept", "right"), ("", "left")], rows)


def _weight(weight: Any) -> str:
    return f"{weight:.4g}" if isinstance(weight, float) else described(weight)


def _names(pair: Pair) -> str:
    return ", ".join(str(i + 1) for i in pair.adapters)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".replace("-0.000", "0.000")


def _share(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def _rate(rate: float | None, error: float | None) -> str:
    if rate is None or error is None:
        return "-"
    return _share(rate) if error == 0 else f"{100 * rate:.1f} ±{100 * error:.1f} %"


def _mean(values: Iterable[float | None]) -> float | None:
    known: Sequence[float] = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
