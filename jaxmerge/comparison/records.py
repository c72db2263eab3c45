"""What a comparison finds, module by module and in total."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxmerge.tables import html
from jaxmerge.words import span

if TYPE_CHECKING:
    from jaxmerge.comparison.advice import Advice


@dataclass(frozen=True)
class Pair:
    """Two adapters, in one module or over all that both have. None stands for what is not defined.

    Attributes:
        adapters: Their positions in the list, from 0.
        cosine: Between the weight changes, in [-1, 1]; None where one is 0. In total, over all modules together, those
            that only one of them has included.
        left_overlap: Of the column spaces of B, in [0, 1]: the mean squared principal cosine, over as many directions
            as the smaller space has; None where one is 0. In total, the mean over the matrices.
        right_overlap: The same of the row spaces of A.
        left_chance: What `left_overlap` would be for random spaces of these dimensions.
        right_chance: What `right_overlap` would be.
        shared_a: The median principal cosine between the row spaces of A: near 1 where training started from one
            initialisation, or A is shared. In total, the median over all matrices' cosines.
        audit: What that says: ``"collapsed"`` above 0.9, ``"separate"`` below 0.5, else ``"between"``. Means little
            where the ranks are not small beside the features.
        sign_conflict: The fraction of entries in which the weight changes have opposite signs; 0.5 for unrelated ones.
        sign_error: The standard error of `sign_conflict`, which is an estimate (see `metrics.sign_conflicts`).
    """

    adapters: tuple[int, int]
    cosine: float | None
    left_overlap: float | None
    right_overlap: float | None
    left_chance: float | None
    right_chance: float | None
    shared_a: float | None
    audit: Literal["collapsed", "between", "separate"] | None
    sign_conflict: float | None
    sign_error: float | None


@dataclass(frozen=True)
class Record:
    """A module, or all modules together.

    Attributes:
        features: ``(out, in)``; None for all modules together.
        count: How many matrices it is: 1, or the layers of a scan, or those of all modules.
        sources: The positions of the adapters that have it, from 0.
        ranks: Theirs; over all modules, the largest.
        norms: Frobenius norms of their weight changes.
        norm_ratio: The largest over the smallest of these; None where the smallest is 0.
        effective_ranks: Participation ratios ``(Σσ²)² / Σσ⁴`` of their singular values σ, the mean over the matrices
            that are not 0; 0 where all are.
        pairs: Every two of the sources.
        sign_conflict: The fraction of entries in which any two of the sources have opposite signs; None where no matrix
            has two sources. Of k unrelated ones, 1 - 2^(1 - k).
        sign_error: The standard error of `sign_conflict`.
        sum_norm: Frobenius norm of the weighted sum.
        sum_effective_rank: Of the weighted sum, as in `effective_ranks`.
        sum_energy_ratio: ‖Σ wᵢΔᵢ‖² / Σ‖wᵢΔᵢ‖²: 1 where the changes are orthogonal, less where they cancel, more where
            they add up; None where the denominator is 0.
        energy_by_rank: The fraction of the weighted sum's energy that its best approximation of rank 1, 2, ... keeps,
            up to the exact rank.
        layers: Of a module with batch axes, the same for each index of the first; else empty.
    """

    features: tuple[int, int] | None
    count: int
    sources: tuple[int, ...]
    ranks: tuple[int, ...]
    norms: tuple[float, ...]
    norm_ratio: float | None
    effective_ranks: tuple[float, ...]
    pairs: tuple[Pair, ...]
    sign_conflict: float | None
    sign_error: float | None
    sum_norm: float
    sum_effective_rank: float
    sum_energy_ratio: float | None
    energy_by_rank: tuple[float, ...]
    layers: tuple["Record", ...] = ()


@dataclass(frozen=True, repr=False)
class Comparison:
    """How adapters interfere.

    Attributes:
        adapters: What messages call them.
        weights: Of the weighted sum; one per adapter, a number or a mapping from module path to number.
        total: All modules together.
        modules: Module path -> the module.
    """

    adapters: tuple[str, ...]
    weights: tuple[float | Mapping[str, float], ...]
    total: Record
    modules: Mapping[str, Record]

    @property
    def advice(self) -> list["Advice"]:
        """What the numbers say about merging the adapters, most important first."""
        from jaxmerge.comparison.advice import advise

        return advise(self)

    def to_json(self) -> dict[str, Any]:
        """The records as plain lists, dictionaries and numbers; adapters count from 1 there, as in reports."""
        return {
            "adapters": list(self.adapters),
            "weights": [dict(weight) if isinstance(weight, Mapping) else weight for weight in self.weights],
            "total": _plain(self.total),
            "modules": {path: _plain(record) for path, record in self.modules.items()},
        }

    def __repr__(self) -> str:
        cosines = [pair.cosine for pair in self.total.pairs if pair.cosine is not None]
        told = [f"cosines {span(cosines, digits=2)}"] if cosines else []
        parts = [f"{len(self.adapters)} adapters", f"{len(self.modules)} modules", *told]
        return f"Comparison({', '.join(parts)})"

    def _repr_html_(self) -> str:
        from jaxmerge.comparison import tables

        about = [f"{len(self.adapters)} adapters", f"{len(self.modules)} modules"]
        advice = [f"{one.what} {one.why}" for one in self.advice]
        return html("Comparison", about, tables.adapters(self), tables.pairs(self), tables.kinds(self), *advice)


def _plain(record: Record) -> dict[str, Any]:
    """A record as JSON holds it, its adapters counted from 1."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(record).items()}
    return plain | {
        "sources": [i + 1 for i in record.sources],
        "pairs": [dataclasses.asdict(pair) | {"adapters": [i + 1 for i in pair.adapters]} for pair in record.pairs],
        "layers": [_plain(layer) for layer in record.layers],
    }
