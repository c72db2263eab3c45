"""The report as Markdown, for a model card or a pull request."""

import re
from collections.abc import Sequence

from jaxmerge.reports.maps import interference
from jaxmerge.reports.narrative import share
from jaxmerge.reports.record import Report
from jaxmerge.reports.tables import Table, adapters_table, kinds_table


def markdown(report: Report) -> str:
    """Makes it.

    Args:
        report: What it tells.

    Returns:
        Markdown of GitHub's kind, the same for the same report; names are escaped.
    """
    kind = "Merge of" if report.contributions else "Comparison of"
    parts = [
        f"## {kind} {escaped(report.title)}",
        "\n".join(f"- {escaped(sentence)}" for sentence in report.summary),
        "### Adapters",
        _table(adapters_table(report)),
        *_pairs(report),
        *_energy(report),
        "### Modules",
        "Modules of one kind together, from the smallest number to the largest.",
        _table(kinds_table(report)),
        *_advice(report),
        *_recipe(report),
        "Made by " + ", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A text as Markdown shows it, on one line, whatever characters are in it."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", line)


def _table(table: Table) -> str:
    titles = [column.title for column in table.columns]
    rules = [":--" if column.left else "--:" for column in table.columns]
    return _rows([titles, *([cell.text for cell in row] for row in table.rows)], rules)


def _rows(rows: Sequence[Sequence[str]], rules: Sequence[str]) -> str:
    lines = [f"| {' | '.join(map(escaped, row))} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join(rules)} |", *lines[1:]])


def _pairs(report: Report) -> list[str]:
    found = report.comparison
    shown = interference(found, [source.short for source in report.sources]) if found else []
    if not found or not shown:
        return []
    rows = [["pair", *(each.title for each in shown)]]
    for pair in found.total.pairs:
        who = " – ".join(report.sources[i].short for i in pair.adapters)
        rows.append([who, *(each.scale.told(getattr(pair, each.name)) for each in shown)])
    chance = [each.scale.told(each.scale.chance, 2) for each in shown]
    rows.append(["by chance", *chance])
    return ["### How the adapters meet", _rows(rows, [":--", *("--:" for _ in shown)])]


def _energy(report: Report) -> list[str]:
    """What the weighted sum, and the result, keep at ranks that double."""
    sums = report.comparison.total.energy_by_rank if report.comparison and report.comparison.total.sum_norm else ()
    own = report.contributions.total.energy_by_rank if report.contributions else ()
    longest = max(len(sums), len(own))
    ranks = sorted({2**i for i in range(longest.bit_length())} | {len(sums), len(own)} - {0})
    rows = [["rank", *(["weighted sum"] if sums else []), *(["result"] if own else [])]]
    rows += [
        [str(rank), *(share(one[rank - 1]) if rank <= len(one) else "–" for one in (sums, own) if one)]
        for rank in ranks
        if rank <= longest
    ]
    return ["### Energy by rank", _rows(rows, ["--:"] * len(rows[0]))] if longest else []


def _advice(report: Report) -> list[str]:
    if not report.advice:
        return []
    lines = [
        f"- **{escaped(item.what)}** {escaped(item.why)}" + (f" ({escaped(item.source)})" if item.source else "")
        for item in report.advice
    ]
    return ["### What the comparison suggests", "\n".join(lines)]


def _recipe(report: Report) -> list[str]:
    if not report.recipe:
        return []
    longest = max((len(run) for run in re.findall("`+", report.recipe)), default=0)
    fence = "`" * max(3, longest + 1)
    return ["### Recipe", f"{fence}yaml\n{report.recipe.rstrip()}\n{fence}"]
