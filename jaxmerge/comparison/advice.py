"""What a comparison says about the choice of a method, with the evidence there is. Thresholds are rules of thumb."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxmerge.catalog import METHODS, SPACES
from jaxmerge.comparison.records import Comparison, Pair
from jaxmerge.values import each
from jaxmerge.words import percent

_ORTHOGONAL, _ALIKE, _OPPOSED, _SAME = 0.1, 0.3, -0.1, 0.9999
_CONFLICT = 0.55
_UNEVEN = 2.0
_ENOUGH = 0.95
_CROWDED = 1.5, 0.2
_SMALL = 0.7
# What six adapters of one base model keep of their accuracy, in percent, as scripts/quality measured it: their mean,
# that with norm_restore, and methods at their best scale.
MEAN, RESTORED, TIES = 84.9, 92.1, 93.3
TUNED = {"linear": 93.6, "tsv": 95.2, "iso_c": 94.6}
# The same at the adapters' own rank: compressed before they are merged, or cut to it.
COMPRESSED, CUT = 94.5, {"linear": 92.6, "iso_c": 86.4}


class Advice(NamedTuple):
    """What to do, why, and where it is from: arXiv ids, or a title where a paper has none."""

    what: str
    why: str
    source: str


def advise(found: Comparison) -> list[Advice]:
    """What to do with adapters that were compared, most important first.

    Args:
        found: The comparison.

    Returns:
        Pieces of advice; the last says how far they can be trusted.
    """
    rules: list[Callable[[Comparison], list[Advice]]] = [
        _zeros, _twins, _sum, _scale, _next, _opposition, _norms, _rank, _shared_a, _crowded_b,
    ]  # fmt: skip
    return [advice for rule in rules for advice in rule(found)] + [_TRUST]


_TRUST = Advice(
    "Then measure.",
    "These numbers say how weight changes meet, not what the merged model scores, and the evidence is divided. Of LLM "
    "checkpoints in the wild (whole ones, not LoRAs) only the plain sum gained reliably, and TIES lost 4 points; of "
    "LoRAs for image classification KnOTS-TIES beat the sum, 68.0 to 63.7. Nothing here replaces a test on your data.",
    "arXiv:2511.21437, 2410.19735",
)


def _zeros(found: Comparison) -> list[Advice]:
    names = [name for name, norm in zip(found.adapters, found.total.norms, strict=True) if norm == 0]
    what = "changes nothing" if len(names) == 1 else "change nothing"
    return [Advice(f"{', '.join(names)} {what}.", "All its weight changes are 0: leave it out.", "")] if names else []


def _twins(found: Comparison) -> list[Advice]:
    pairs = [pair for pair in found.total.pairs if pair.cosine is not None and pair.cosine > _SAME]
    if not pairs:
        return []
    why = "Their weight changes are parallel: one of them with the sum of their weights says the same."
    return [Advice(f"{_listing(pairs)}: one adapter twice?", why, "")]


def _sum(found: Comparison) -> list[Advice]:
    """Linear is the first choice whatever the numbers are; they say what its weights do."""
    pairs = [pair for pair in found.total.pairs if pair.cosine is not None]
    if not pairs:
        return []
    exact = len(found.total.energy_by_rank)
    what = f"Start with --method linear: exact at rank {exact}."
    strongest = max(pairs, key=lambda pair: abs(pair.cosine or 0))
    where = f"the cosine farthest from 0 is {strongest.cosine:.2f}, of {_names(strongest)}".replace("-0.00", "0.00")
    if abs(strongest.cosine or 0) < _ORTHOGONAL:
        share = percent(max(abs(number) for weight in found.weights for number in each(weight)))
        why = (
            f"The changes are all but orthogonal ({where}): nothing cancels, and the sum holds each of them, times its "
            f"weight: with these weights {share} at most."
        )
        return [Advice(what, why, "arXiv:2212.04089, 2508.11985")]
    alike = [pair for pair in pairs if _signed(found, pair) > _ALIKE]
    why = f"The changes are not orthogonal ({where})."
    if alike:
        why += (
            f" What {_listing(alike)} share adds up: weights of 1 each would apply it twice; let those weights sum to "
            "about 1."
        )
    return [Advice(what, why, "arXiv:2212.04089")]


def _scale(found: Comparison) -> list[Advice]:
    why = (
        "It often matters as much as the method: scales that were tuned for one benchmark differ 40-fold between "
        "methods. jaxmerge sweep merges many scales at once, and jm.sweep scores them with a function of yours."
    )
    advice = [Advice("Choose the scale with data of your own.", why, "arXiv:2604.17753")]
    norms = [norm for norm in found.total.norms if norm > 0]
    share = found.total.sum_norm * len(norms) / sum(norms) if norms else 0
    if 0 < share < _SMALL:
        why = (
            f"With these weights the sum is {share:.2g} times as large as the adapters are on average. Of the six "
            f"adapters that come with jaxmerge the mean kept {MEAN} % of their accuracy, scaled to their own size "
            f"{RESTORED} %, and at the best scale {TUNED['linear']} %; TIES as it is, at density 0.2, {TIES} %."
        )
        what = "Without data: --stage norm_restore, or --method ties --density 0.2."
        advice.append(Advice(what, why, "scripts/quality; arXiv:2604.16826, 2306.01708"))
    return advice


def _next(found: Comparison) -> list[Advice]:
    """The methods that have nothing to set but the scale, where several tasks go together."""
    if sum(norm > 0 for norm in found.total.norms) < 2:
        return []
    tried = " and ".join(f"{method} {TUNED[method]} %" for method in ("tsv", "iso_c"))
    why = (
        "They give each adapter's directions room, and have nothing to set but the scale: of the accuracy of the six "
        f"adapters that come with jaxmerge {tried} are kept, each at its best scale. Those six are small, and hardly "
        "meet."
    )
    return [Advice("Then try --method tsv and --method iso_c.", why, "scripts/quality; arXiv:2412.00081, 2502.04959")]


def _opposition(found: Comparison) -> list[Advice]:
    opposed = [pair for pair in found.total.pairs if _signed(found, pair) < _OPPOSED]
    conflicting = [
        pair
        for pair in found.total.pairs
        if pair not in opposed and _agree(found, pair) and (pair.sign_conflict or 0) > _CONFLICT
    ]
    advice = []
    if opposed:
        cancelled = found.total.sum_energy_ratio
        lost = f" and {percent(1 - cancelled)} of the energy cancels" if cancelled is not None and cancelled < 1 else ""
        why = (
            f"With these weights they pull in opposite directions{lost}. A sign consensus keeps one side per entry; "
            "the other way is to leave one adapter out, or to give it less weight."
        )
        advice.append(Advice(f"{_listing(opposed)} oppose each other: try {_sign_methods()}.", why, _SIGN_SOURCES))
    if conflicting:
        rate = max(pair.sign_conflict or 0 for pair in conflicting)
        why = (
            f"Up to {percent(rate)} of their entries have opposite signs, where unrelated changes have 50 %: many "
            "small ones cancel though the sum as a whole does not."
        )
        advice.append(Advice(f"{_listing(conflicting)} differ in sign: try {_sign_methods()}.", why, _SIGN_SOURCES))
    return advice


_SIGN_SOURCES = "arXiv:2306.01708, 2410.19735; but 2511.21437"


def _sign_methods() -> str:
    return "--method ties --density 0.5" + (" --space knots" if "knots" in SPACES else "")


def _norms(found: Comparison) -> list[Advice]:
    norms = [norm for norm in found.total.norms if norm > 0]
    if not norms or max(norms) / min(norms) < _UNEVEN:
        return []
    mean = sum(norms) / len(norms)
    pairs = zip(map(_mean, found.weights), found.total.norms, strict=True)
    even = " ".join(f"{weight * mean / norm if norm > 0 else 0:.3g}" for weight, norm in pairs)
    method = "--method norm_equalized, or " if "norm_equalized" in METHODS else ""
    what = f"Norms differ {max(norms) / min(norms):.3g}-fold: try {method}--weights {even}."
    why = (
        "The strongest change rules the sum. Whether it should is not known from norms: they grow with steps, learning "
        "rate and alpha, and with what a task needs."
    )
    return [Advice(what, why, "arXiv:2606.03723")]


def _rank(found: Comparison) -> list[Advice]:
    kept, largest = found.total.energy_by_rank, max(found.total.ranks)
    if largest >= len(kept) or kept[largest - 1] >= _ENOUGH or found.total.sum_norm == 0:
        return []
    most = next(rank for rank, share in enumerate(kept, 1) if share >= 0.99)
    what = f"Spend more than rank {largest} if you can: --rank {most} keeps 99 % of the plain sum."
    why = (
        f"Rank {largest}, that of the adapters, keeps {percent(kept[largest - 1])} of the energy of their weighted sum."
    )
    if "ctm" in SPACES:
        why += (
            f" If it must be rank {largest}, cutting the sum is the best for it; other methods may lose less with "
            "--space ctm, which compresses before they merge. With TIES at rank 16 that gave 69.8 where cutting "
            "afterwards gave 65.3, in image classification; of the six adapters that come with jaxmerge iso_c kept "
            f"{COMPRESSED} % there, and cut {CUT['iso_c']} % (linear, cut: {CUT['linear']} %)."
        )
    return [Advice(what, why, "arXiv:2606.03723; scripts/quality")]


def _shared_a(found: Comparison) -> list[Advice]:
    pairs = [pair for pair in found.total.pairs if pair.audit == "collapsed"]
    if not pairs:
        return []
    why = (
        "Training started from one initialisation, or A is shared, and A has hardly moved. Methods that solve for "
        "weights (RegMean and its kin) are then ill-conditioned, and want a ridge of about 0.01; sums, TIES, DARE and "
        "KnOTS do not care."
    )
    source = "Pathak et al. 2026, Initialisation Sets the Conditioning of LoRA Merging"
    return [Advice(f"{_listing(pairs)} have the same A: no solve-based method without a ridge.", why, source)]


def _crowded_b(found: Comparison) -> list[Advice]:
    ratio, least = _CROWDED
    pairs = [
        pair
        for pair in found.total.pairs
        if (pair.left_overlap or 0) > max(least, ratio * (pair.right_overlap or 0), ratio * (pair.left_chance or 0))
    ]
    if not pairs:
        return []
    method = "--method pico" if "pico" in METHODS else "Pico"
    why = (
        "They write into the same directions more than they read from the same, and the sum overweights those. Pico "
        "scales them down before it merges, and gained 3 to 8 points with LLMs that generate."
    )
    return [Advice(f"{_listing(pairs)} share outputs (B): {method} is made for that.", why, "arXiv:2604.16826")]


def _signed(found: Comparison, pair: Pair) -> float:
    """The cosine between two changes as the weights have them; 0 where there is none."""
    return (pair.cosine or 0.0) * (1 if _agree(found, pair) else -1)


def _agree(found: Comparison, pair: Pair) -> bool:
    i, j = pair.adapters
    return _mean(found.weights[i]) * _mean(found.weights[j]) >= 0


def _mean(weight: float | Mapping[str, float]) -> float:
    """A weight, or the mean of those of its modules."""
    numbers = list(each(weight))
    return sum(numbers) / len(numbers)


def _names(pair: Pair) -> str:
    return " and ".join(str(i + 1) for i in pair.adapters)


def _listing(pairs: list[Pair], most: int = 4) -> str:
    more = f" and {len(pairs) - most} more pairs" if len(pairs) > most else ""
    return ", ".join(_names(pair) for pair in pairs[:most]) + more
