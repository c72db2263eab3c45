"""Comparing: how adapters interfere, and what that says about merging them."""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.padding import Padding

from jaxmerge.cli.actions.sources import load_all, peek_all
from jaxmerge.cli.console import out, print_json, report_error, report_problems, table
from jaxmerge.comparison import Comparison, Pair, Record, compare, comparison_problems
from jaxmerge.merging.checks import checked_weights
from jaxmerge.reports.advice import advise
from jaxmerge.words import pattern, percent


def run(options: argparse.Namespace) -> int:
    """Compares; returns 1 if something is wrong with the inputs."""
    try:
        if problems := header_problems(options):
            return report_problems(problems, options.json)
        found = compare(load_all(options), options.weights, allow_different_bases=options.allow_different_bases)
    except (ValueError, OSError, MemoryError) as error:
        return report_error(error, options.json)
    advice = advise(found)
    if options.json:
        print_json({"ok": True, **found.to_json(), "advice": [item._asdict() for item in advice]})
        return 0
    for part in (_adapters(found), _pairs(found), _legend(found.total), _groups(found), _energy(found.total)):
        out.print(part, soft_wrap=False)
        out.print()
    for item in advice:
        out.print(f"[bold]{escape(item.what)}[/bold]", soft_wrap=False)
        why = f"{item.why} [{item.source}]" if item.source else item.why
        out.print(Padding(escape(why), (0, 0, 0, 2), expand=False), soft_wrap=False)
    return 0


def header_problems(options: argparse.Namespace) -> list[str]:
    """Everything that can be known to be wrong before a weight is read."""
    peeked, problems = peek_all(options)
    checked_weights(options.weights, len(options.adapters), False, problems)
    if peeked:
        problems += comparison_problems(peeked, options.allow_different_bases)
    return list(dict.fromkeys(problems))


def _adapters(found: Comparison) -> Any:
    total = found.total
    count = [sum(i in record.sources for record in found.modules.values()) for i in range(len(found.adapters))]
    rows: list[tuple[object, ...]] = [
        (i + 1, name, f"{weight:.4g}", modules, rank, f"{norm:.4g}", f"{effective:.1f}")
        for i, (name, weight, modules, rank, norm, effective) in enumerate(
            zip(found.adapters, found.weights, count, total.ranks, total.norms, total.effective_ranks, strict=True)
        )
    ]
    last = len(found.modules), len(total.energy_by_rank), f"{total.sum_norm:.4g}", f"{total.sum_effective_rank:.1f}"
    rows.append(("", "weighted sum", "", *last))
    headings = ("weight", "modules", "rank", "norm", "effective rank")
    return table([("", "right"), ("adapter", "left"), *((heading, "right") for heading in headings)], rows)


def _pairs(found: Comparison) -> Any:
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
    headings = ("cosine", "B overlap", "A overlap", "signs differ", "spaces of A")
    return table([("pair", "left"), *((heading, "right") for heading in headings)], rows)


def _legend(total: Record) -> str:
    """What the columns mean, and the rate of different signs over all adapters."""
    legend = (
        "Effective rank: how many directions carry a change. Overlap: how far two adapters write into (B) or read from "
        "(A) the same directions. Spaces of A: collapsed where training began from one initialisation, the median "
        "principal cosine above 0.9; separate below 0.5."
    )
    n = len(total.sources)
    if n == 2 or total.sign_conflict is None:
        return legend
    rate, chance = _rate(total.sign_conflict, total.sign_error), percent(1 - 2 ** (1 - n))
    return f"{legend}\nOf all entries {rate} differ in sign between some two of the {n}; by chance {chance}."


def _groups(found: Comparison) -> Any:
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
    return table(
        [*((heading, "left") for heading in left), *((heading, "right") for heading in right)],
        [row for _, row in rows],
    )


def _strongest(pairs: Iterable[Pair]) -> float:
    """The cosine farthest from 0."""
    return max((pair.cosine or 0.0 for pair in pairs), key=abs)


def _energy(total: Record) -> Any:
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
    return table([("rank of the sum", "right"), ("energy kept", "right"), ("", "left")], rows)


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
