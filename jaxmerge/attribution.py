"""How much of each adapter is in a result of merging them: projections, and the fit by all of them together.

From the factors alone, on the host, as in `jaxmerge.metrics`: inner products of weight changes are sums over products
of r×r Gram matrices.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmerge import lapack, metrics, threads
from jaxmerge.base import Adapter, Energy, LoRA
from jaxmerge.merging.checks import adapter_name, as_adapters, listing, raise_problems, shape_problems, value_problems
from jaxmerge.sharding import seen_everywhere
from jaxmerge.tables import Table, columns, html
from jaxmerge.words import percent

# Eigenvalues of the adapters' cosines below which a direction of theirs is none: they are combinations of each other.
_DEPENDENT = 1e-6


@dataclass(frozen=True)
class Share:
    """How much of one adapter is in a result, in one module or in all together. None where a weight change is 0.

    Attributes:
        adapter: Its position in the list, from 0.
        norm: Frobenius norm of its weight change Δ.
        projection: ``⟨M, Δ⟩ / ‖Δ‖²`` of the result M: how many times Δ lies along Δ in it, what other adapters have in
            common with Δ included.
        cosine: Between M and Δ, in [-1, 1].
        fit: The adapter's number in the sum ``Σ xᵢ Δᵢ`` that is nearest to M, so that what adapters have in common is
            counted once. It is the weight where M is the weighted sum. Where adapters are linearly dependent there are
            several such sums: of these, the one of least ``Σ (xᵢ ‖Δᵢ‖)²``.
    """

    adapter: int
    norm: float
    projection: float | None
    cosine: float | None
    fit: float | None


@dataclass(frozen=True)
class Part:
    """A module of a result, or all modules together.

    Attributes:
        features: ``(out, in)``; None for all modules together.
        count: How many matrices it is: 1, or the layers of a scan, or those of all modules.
        rank: Of the result's factors; over all modules, the largest.
        norm: Frobenius norm of the result M.
        energy_kept: The fraction of the merge's energy ‖·‖² that is left after it was cut to its rank; None where that
            is not known, as of an adapter that was read from a file.
        energy_by_rank: The same, had the result been cut to rank 1, 2, ... `rank`; where `energy_kept` is not known,
            fractions of the result's own energy.
        shares: Of the adapters that have the module.
        dependent: Whether these are linearly dependent.
        residual: The fraction of ‖M‖² that no sum ``Σ xᵢ Δᵢ`` has; over all modules, with one number per adapter.
            None where M is 0.
        layers: Of a module with batch axes, the same for each index of the first; else empty.
    """

    features: tuple[int, int] | None
    count: int
    rank: int
    norm: float
    energy_kept: float | None
    energy_by_rank: tuple[float, ...]
    shares: tuple[Share, ...]
    dependent: bool
    residual: float | None
    layers: tuple["Part", ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as plain lists, dictionaries and numbers; adapters count from 1 there."""
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()},
            "shares": [vars(share) | {"adapter": share.adapter + 1} for share in self.shares],
            "layers": [layer.to_json() for layer in self.layers],
        }


@dataclass(frozen=True, repr=False)
class Contributions:
    """How much of each adapter is in a result.

    Attributes:
        adapters: What messages call them.
        total: All modules together.
        modules: Module path -> the module.
        modulewise_residual: The residual of all modules together, with a number per adapter in each module of its own.
            None where the result is 0.
    """

    adapters: tuple[str, ...]
    total: Part
    modules: Mapping[str, Part]
    modulewise_residual: float | None

    def to_json(self) -> dict[str, Any]:
        """The records as plain lists, dictionaries and numbers; adapters count from 1 there."""
        return {
            "adapters": list(self.adapters),
            "total": self.total.to_json(),
            "modules": {path: part.to_json() for path, part in self.modules.items()},
            "modulewise_residual": self.modulewise_residual,
        }

    def table(self) -> Table:
        """How much of each adapter is in all modules together."""
        rows = [
            (s.adapter + 1, self.adapters[s.adapter], *map(_number, (s.fit, s.projection, s.cosine, s.norm)))
            for s in self.total.shares
        ]
        return Table([("", "right"), *columns(["adapter"], ["fit", "projection", "cosine", "norm"])], rows)

    def __repr__(self) -> str:
        fits = " ".join(_number(share.fit) for share in self.total.shares[:8])
        return f"Contributions({len(self.adapters)} adapters, {len(self.modules)} modules, fit {fits})"

    def _repr_html_(self) -> str:
        residual = self.total.residual
        about = [f"{len(self.modules)} modules", "" if residual is None else f"{percent(residual)} of no adapter"]
        return html("Contributions", about, self.table())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def contributions(
    merged: Adapter,
    adapters: Sequence[Adapter],
    *,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Contributions:
    """Measures how much of each adapter is in a result, from the factors: no weight change is formed.

    Args:
        merged: Of concrete arrays, with the modules of the adapters; from `jaxmerge.merge`, or read from a file.
        adapters: What it was merged from, at least one.
        on_progress: Called with how many modules are done, and of how many.

    Returns:
        The shares of the adapters, per module and in total.

    Raises:
        ValueError: If the result is not of these adapters, by its modules or their shapes, or something holds NaN; it
            names every culprit.
    """
    adapters = as_adapters(adapters)
    raise_problems(["there are no adapters that the result could be of"] if not adapters else [])
    raise_problems(shape_problems([*adapters, merged]) + _module_problems(merged, adapters))
    raise_problems(value_problems([*adapters, merged]))
    # JAX is called here, not in the threads.
    energy = jax.tree.map(seen_everywhere, dict(merged.energy))
    modules = {
        path: (
            metrics.as_numpy(lora),
            {
                i: metrics.as_numpy(adapter.modules[path])
                for i, adapter in enumerate(adapters)
                if path in adapter.modules
            },
        )
        for path, lora in merged.modules.items()
    }
    done = itertools.count(1)
    with lapack.single_threaded():
        measured = threads.each(
            lambda item: _measure(*item), modules.values(), lambda: on_progress(next(done), len(modules))
        )
    parts = {
        path: _module_part(lora, tuple(sources), matrices, energy.get(path))
        for (path, (lora, sources)), matrices in zip(modules.items(), measured, strict=True)
    }
    total = _part(
        [matrix for matrices in measured for matrix in matrices],
        tuple(range(len(adapters))),
        max(part.rank for part in parts.values()),
        None,
        _summed([energy.get(path) for path in modules]),
    )
    left = sum((part.residual or 0) * part.norm**2 for part in parts.values())
    names = tuple(adapter_name(adapters, i) for i in range(len(adapters)))
    return Contributions(names, total, parts, left / total.norm**2 if total.norm > 0 else None)


def _module_problems(merged: Adapter, adapters: Sequence[Adapter]) -> list[str]:
    known = {path for adapter in adapters for path in adapter.modules}
    strange = [path for path in merged.modules if path not in known]
    missing = sorted(known - set(merged.modules))
    return [
        f"the result is not of these adapters: {text} {listing(paths)}"
        for text, paths in (("none of them has", strange), ("it has no", missing))
        if paths
    ]


class _Matrix(NamedTuple):
    """What is measured of one matrix: a module, or one layer of a scan.

    Attributes:
        sources: The positions of the adapters that have it.
        gram: Their inner products.
        along: Theirs with the result.
        spectrum: Squared singular values of the result.
    """

    sources: tuple[int, ...]
    gram: np.ndarray
    along: np.ndarray
    spectrum: np.ndarray


def _measure(merged: LoRA, sources: Mapping[int, LoRA]) -> list[_Matrix]:
    matrices = [
        _measure_matrix(metrics.stack_at([merged], index), metrics.stack_at(sources.values(), index), tuple(sources))
        for index in np.ndindex(merged.batch)
    ]
    metrics.give_back([merged, *sources.values()])
    return matrices


def _measure_matrix(merged: metrics.Stack, stacked: metrics.Stack, sources: tuple[int, ...]) -> _Matrix:
    inner = (stacked.a @ stacked.a.T) * (stacked.b @ stacked.b.T)
    along = (stacked.a @ merged.a.T) * (stacked.b @ merged.b.T)
    return _Matrix(
        sources,
        stacked.block_sums(inner),
        np.add.reduceat(along.sum(axis=1), stacked.starts),
        metrics.squared_singular_values(merged.a @ merged.a.T, merged.b @ merged.b.T),
    )


def _module_part(lora: LoRA, sources: tuple[int, ...], matrices: Sequence[_Matrix], energy: Energy | None) -> Part:
    layers = metrics.by_layer(matrices, lora.batch)
    return dataclasses.replace(
        _part(matrices, sources, lora.rank, lora.features, energy),
        layers=tuple(_part(layer, sources, lora.rank, lora.features, None) for layer in layers),
    )


def _part(
    matrices: Sequence[_Matrix],
    sources: tuple[int, ...],
    rank: int,
    features: tuple[int, int] | None,
    energy: Energy | None,
) -> Part:
    """Sums up matrices: those of a module, or all."""
    place = {source: i for i, source in enumerate(sources)}
    gram, along = np.zeros((len(sources), len(sources))), np.zeros(len(sources))
    spectrum = np.zeros(rank)
    for matrix in matrices:
        at = [place[source] for source in matrix.sources]
        gram[np.ix_(at, at)] += matrix.gram
        along[at] += matrix.along
        spectrum[: len(matrix.spectrum)] += matrix.spectrum
    own = float(spectrum.sum())
    norms, length = np.sqrt(np.maximum(gram.diagonal(), 0)), np.sqrt(own)
    fit, dependent = _fit(gram, along)
    kept = None if energy is None else float(energy.kept)
    known = float(np.asarray(energy.total)) if energy is not None else own
    return Part(
        features=features,
        count=len(matrices),
        rank=rank,
        norm=float(length),
        energy_kept=kept,
        energy_by_rank=tuple(np.minimum(np.cumsum(spectrum) / known, 1).tolist()) if known > 0 else (1.0,) * rank,
        shares=tuple(
            Share(
                adapter=source,
                norm=float(norms[i]),
                projection=float(along[i] / gram[i, i]) if gram[i, i] > 0 else None,
                cosine=_cosine(float(along[i]), float(norms[i] * length)),
                fit=float(fit[i]) if gram[i, i] > 0 else None,
            )
            for i, source in enumerate(sources)
        ),
        dependent=dependent,
        residual=float(np.clip(1 - fit @ along / own, 0, 1)) if own > 0 else None,
    )


def _fit(gram: np.ndarray, along: np.ndarray) -> tuple[np.ndarray, bool]:
    """The numbers of the nearest sum of the adapters, and whether these are linearly dependent.

    Args:
        gram: Inner products of n adapters, ``[n, n]``.
        along: Theirs with what is fitted, ``[n]``.

    Returns:
        ``[n]``, 0 for an adapter that is 0.
    """
    lengths = np.sqrt(np.maximum(gram.diagonal(), 0))
    unit = 1 / np.where(lengths > 0, lengths, 1)
    values, vectors = np.linalg.eigh(gram * unit * unit[:, None])
    there = values > _DEPENDENT
    solved = vectors[:, there] @ ((vectors[:, there].T @ (along * unit)) / values[there])
    return solved * unit, int(there.sum()) < int((lengths > 0).sum())


def _cosine(product: float, lengths: float) -> float | None:
    return float(np.clip(product / lengths, -1, 1)) if lengths > 0 else None


def _summed(energies: Sequence[Energy | None]) -> Energy | None:
    """What was lost over all modules; None where it is not known of some."""
    known = [energy for energy in energies if energy is not None]
    if len(known) < len(energies):
        return None
    return Energy(*(sum(float(np.asarray(getattr(e, name))) for e in known) for name in ("total", "lost", "missed")))
