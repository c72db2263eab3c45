"""What a report says in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jaxmerge.attribution import Contributions
from jaxmerge.catalog import all_hyperparameters
from jaxmerge.comparison import Comparison, Pair
from jaxmerge.values import described, stages
from jaxmerge.words import percent, span

if TYPE_CHECKING:
    from jaxmerge.reports.record import Report

_MANY = 4


def summary_of(report: Report) -> tuple[str, ...]:
    """What there is to know, most important first.

    Args:
        report: The report.

    Returns:
        Sentences.
    """
    sentences = [_subject(report)]
    if report.contributions:
        sentences += [_kept(report.contributions), *_content(report, report.contributions)]
    if report.comparison:
        sentences += [_interference(report, report.comparison), *_norms(report), *_ranks(report, report.comparison)]
    return tuple(sentences)


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """How a merge was made, in a few words: all that is not as it is by default."""
    defaults = {h.name: h.default for h in all_hyperparameters()}
    parts = [f"{name} {settings[name]}" for name in ("method", "space") if name in settings]
    parts += [
        f"{name} {described(value)}"
        for name, value in settings.get("hyperparameters", {}).items()
        if value != defaults.get(name)
    ]
    if "rank" in settings:
        parts.append(f"rank {described(settings['rank'])}")
    parts += stages(settings)
    if "seed" in settings:
        parts.append(f"seed {settings['seed']}")
    return ", ".join(parts)


def number(value: float | None, digits: int = 3) -> str:
    """A number in a few digits; a dash for none."""
    text = "–" if value is None else f"{value:.{digits}g}"
    return "0" if text == "-0" else text.replace("-", "−")


def explained(residual: float | None) -> str:
    """How much of a result is a sum of its adapters; what is no more than rounding is not missed."""
    return "–" if residual is None else percent(1 - residual if residual > 1e-6 else 1.0)


def share(fraction: float | None) -> str:
    """A fraction in percent, in three digits; a dash for none."""
    if fraction is None:
        return "–"
    return percent(fraction) if fraction > 0.999 else f"{0 if fraction < 1e-6 else 100 * fraction:.3g} %"


def _subject(report: Report) -> str:
    n = len(report.sources)
    of = f" of {report.base_model}" if report.base_model else ""
    what = f"{n} adapters{of}" if n > 1 else f"One adapter{of}"
    modules = len(report.modules)
    size = f"{modules} modules" + (f" ({report.matrices} matrices)" if report.matrices > modules else "")
    if report.contributions is None:
        ranks = span(rank for source in report.sources for rank in source.ranks)
        return f"{what}, {size}, rank {ranks}."
    how = settings_in_words(report.settings)
    ranks = span(part.rank for part in report.contributions.modules.values())
    return f"{what} merged into one of rank {ranks}, {size}" + (f": {how}." if how else ".")


def _kept(found: Contributions) -> str:
    kept = found.total.energy_kept
    if kept is None:
        return "What the merge lost when it was cut to its rank is not known: it was read from a file."
    if kept >= 1:
        return f"Nothing was lost: rank {span(part.rank for part in found.modules.values())} holds the whole merge."
    known = {path: part.energy_kept for path, part in found.modules.items() if part.energy_kept is not None}
    worst = min(known, key=lambda path: known[path])
    least = f"; {worst} keeps least, {percent(known[worst])}" if len(known) > 1 else ""
    ranks = span(part.rank for part in found.modules.values())
    return f"Rank {ranks} keeps {percent(kept)} of the merge's energy (squared Frobenius norm){least}."


def _content(report: Report, found: Contributions) -> list[str]:
    total = found.total
    if total.residual is None:
        return ["The result is 0 everywhere."]
    shares = [share for share in total.shares if share.fit is not None]
    parts = [f"{number(share.fit)} × {report.sources[share.adapter].short}" for share in shares[:_MANY]]
    more = f" + {len(shares) - _MANY} more" if len(shares) > _MANY else ""
    formula = f"{' + '.join(parts)}{more}".replace("+ −", "− ")
    asked = [weight for weight in report.weights if isinstance(weight, float)]
    as_asked = len(asked) == len(shares) and all(
        abs((share.fit or 0) - weight) <= 0.01 * max(map(abs, asked))
        for share, weight in zip(shares, asked, strict=True)
    )
    if total.residual < 1e-4:
        sentences = [f"The result is {'the weighted sum' if as_asked else 'the sum'} {formula}, and nothing else."]
    else:
        rest = f"{explained(total.residual)} of its energy is in that sum"
        if found.modulewise_residual is not None and total.residual - found.modulewise_residual > 0.01:
            rest += f", and {explained(found.modulewise_residual)} with numbers for each module"
        sentences = [f"The result is nearest to {formula}; {rest}."]
    if total.dependent:
        sentences.append(
            "Some adapters are sums of the others, so that how much of each is in the result is a convention: "
            "the numbers are as small as they can be."
        )
    weakest = [share for share in shares if share.cosine is not None and abs(share.cosine) < 0.1]
    if weakest:
        names = _names(report.sources[share.adapter].short for share in weakest)
        sentences.append(f"Hardly in the result (cosine below 0.1): {names}.")
    return sentences


def _interference(report: Report, found: Comparison) -> str:
    pairs = [pair for pair in found.total.pairs if pair.cosine is not None and pair.sign_conflict is not None]
    if not pairs:
        return "No module is in more than one adapter: nothing interferes."
    strongest = max(pairs, key=lambda pair: abs(pair.cosine or 0))
    cosine = strongest.cosine or 0.0
    words = (
        "hardly meet" if abs(cosine) < 0.1
        else "oppose each other" if cosine < -0.1
        else "have a little in common" if cosine < 0.3
        else "have much in common"
    )  # fmt: skip
    who = "The adapters" if len(pairs) == 1 or abs(cosine) < 0.1 else "Some adapters"
    which = "the cosine" if len(pairs) == 1 else "the largest cosine"
    where = "" if len(pairs) == 1 else f", of {_pair(report, strongest)}"
    signs = [pair.sign_conflict for pair in pairs if pair.sign_conflict is not None]
    spread = " … ".join(dict.fromkeys((f"{100 * min(signs):.1f}", f"{100 * max(signs):.1f}")))
    differ = f"{spread} % of the entries differ in sign, and chance makes 50 %"
    return f"{who} {words}: {which} is {number(cosine)}{where}. {differ}."


def _norms(report: Report) -> list[str]:
    if report.comparison is None:
        return []
    norms = report.comparison.total.norms
    if min(norms) == 0:
        names = _names(s.short for s, norm in zip(report.sources, norms, strict=True) if norm == 0)
        return [f"Changes nothing, all its weights being 0: {names}."]
    result = f", and the result {number(report.contributions.total.norm)}" if report.contributions else ""
    ratio = max(norms) / min(norms)
    even = f", {ratio:.3g}-fold" if ratio >= 2 else ""
    return [f"The adapters have norms of {span(norms, 3)}{even}{result}."]


def _ranks(report: Report, found: Comparison) -> list[str]:
    kept, largest = found.total.energy_by_rank, max(found.total.ranks)
    if report.contributions or found.total.sum_norm == 0:
        return []
    enough = next(rank for rank, energy in enumerate(kept, 1) if energy >= 0.99)
    exact = f"Their weighted sum is exact at rank {len(kept)}"
    if largest >= len(kept):
        return [f"{exact}."]
    keeps = f"rank {largest}, the largest of an adapter, keeps {percent(kept[largest - 1])}"
    return [f"{exact}; {keeps}, and rank {enough} keeps 99 %."]


def _pair(report: Report, pair: Pair) -> str:
    return " and ".join(report.sources[i].short for i in pair.adapters)


def _names(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return ", ".join(names[:_MANY]) + more
