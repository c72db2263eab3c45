"""`compare`: how adapters interfere, module by module and in total, before anything is merged."""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import lapack, metrics, threads
from jaxmerge.base import Adapter, LoRA
from jaxmerge.comparison.records import Comparison, Pair, Record
from jaxmerge.io import combine_metadata
from jaxmerge.merging.checks import (
    Weights,
    adapter_name,
    all_paths,
    as_adapters,
    base_problems,
    checked_weights,
    module_problems,
    raise_problems,
    shape_problems,
    value_problems,
)
from jaxmerge.values import at

__all__ = ["Comparison", "Pair", "Record", "compare", "comparison_problems"]


def compare(
    adapters: Sequence[Adapter],
    weights: Weights = None,
    *,
    allow_different_bases: bool = False,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Comparison:
    """Measures how adapters interfere, from their factors: no weight change is formed.

    Everything but the weighted sum is independent of the weights, and all of it of how a change is split between its
    factors: ``(B, A)`` and ``(B G, G⁻¹ A)`` give the same numbers.

    Args:
        adapters: At least two, of concrete arrays. A module that only some of them have is compared between those.
        weights: One per adapter, for the weighted sum: a number of any sign, or a mapping from each of the adapter's
            module paths to one. None: 1/n each.
        allow_different_bases: Compares even if the adapters name different base models.
        on_progress: Called with how many modules are done, and of how many.

    Returns:
        The comparison.

    Raises:
        ValueError: If there are fewer than two adapters, or they do not fit each other; it names every culprit.
    """
    adapters = as_adapters(adapters)
    if len(adapters) < 2:
        raise ValueError(f"at least two adapters are compared, got {len(adapters)}")
    problems = comparison_problems(adapters, allow_different_bases)
    numbers = checked_weights(weights, len(adapters), False, problems)
    raise_problems(problems)
    raise_problems(module_problems(adapters, numbers, {}) + value_problems(adapters))
    numbers = tuple(map(_as_numbers, numbers))
    # JAX is called here, not in the threads.
    modules = {
        path: {
            i: metrics.as_numpy(adapter.modules[path]) for i, adapter in enumerate(adapters) if path in adapter.modules
        }
        for path in all_paths(adapters)
    }
    done = itertools.count(1)
    with lapack.single_threaded():
        measured = threads.each(
            lambda item: _measure(*item, numbers),
            modules.items(),
            lambda: on_progress(next(done), len(modules)),
        )
    records = {
        path: _module_record(loras, matrices) for (path, loras), matrices in zip(modules.items(), measured, strict=True)
    }
    ranks = {i: max(lora.rank for lora in adapter.modules.values()) for i, adapter in enumerate(adapters)}
    total = _record([matrix for matrices in measured for matrix in matrices], ranks, None)
    return Comparison(tuple(adapter_name(adapters, i) for i in range(len(adapters))), numbers, total, records)


def comparison_problems(adapters: Sequence[Adapter], allow_different_bases: bool = False) -> list[str]:
    """Why adapters cannot be compared, as far as shapes and metadata tell, a line each."""
    problems = shape_problems(adapters) + base_problems(adapters, allow_different_bases)
    # Each format has names of its own for the same modules.
    if len({adapter.metadata.format for adapter in adapters}) > 1:
        problems += combine_metadata(adapters)[1]
    return problems


class _Between(NamedTuple):
    """What is measured of two adapters in one matrix: principal cosines, what chance makes of them, opposite signs."""

    left: np.ndarray
    left_chance: float
    right: np.ndarray
    right_chance: float
    conflict: float


class _Matrix(NamedTuple):
    """What is measured of one matrix: a module, or one layer of a scan."""

    sources: tuple[int, ...]
    weights: tuple[float, ...]
    entries: int
    gram: np.ndarray
    spectra: Mapping[int, np.ndarray]
    sum_spectrum: np.ndarray
    pairs: Mapping[tuple[int, int], _Between]
    signs: metrics.Signs


def _as_numbers(weight: Any) -> float | dict[str, float]:
    if isinstance(weight, Mapping):
        return {path: float(np.asarray(number)) for path, number in weight.items()}
    return float(np.asarray(weight))


def _measure(path: str, loras: Mapping[int, LoRA], weights: Sequence[Any]) -> list[_Matrix]:
    first, own = next(iter(loras.values())), tuple(at(weights[i], path) for i in loras)
    matrices = []
    for number, index in enumerate(np.ndindex(first.batch)):
        stacked = metrics.stack_at(loras.values(), index)
        # A seed for every matrix, so that errors are independent and the order of modules does not matter.
        seed = zlib.crc32(f"{path} {number}".encode())
        matrices.append(_measure_matrix(stacked, tuple(loras), own, seed))
    metrics.give_back(loras.values())
    return matrices


def _measure_matrix(stacked: metrics.Stack, sources: tuple[int, ...], weights: tuple[float, ...], seed: int) -> _Matrix:
    a, b = stacked.a, stacked.b
    gram_a, gram_b = a @ a.T, b @ b.T
    left, right = (metrics.subspaces(gram, stacked.blocks, x.shape[1]) for gram, x in ((gram_b, b), (gram_a, a)))
    signs = metrics.sign_conflicts(stacked, seed)
    betweens = map(_Between, left.cosines, left.chance, right.cosines, right.chance, signs.pairs)
    pairs = [(sources[i], sources[j]) for i, j in metrics.pairs(len(sources))]
    blocks = dict(zip(sources, stacked.blocks, strict=True))
    return _Matrix(
        sources,
        weights,
        a.shape[1] * b.shape[1],
        stacked.block_sums(gram_a * gram_b),
        {i: metrics.squared_singular_values(gram_a[at, at], gram_b[at, at]) for i, at in blocks.items()},
        _sum_spectrum(stacked, gram_a, gram_b, weights),
        dict(zip(pairs, betweens, strict=True)),
        signs,
    )


def _sum_spectrum(
    stacked: metrics.Stack, gram_a: np.ndarray, gram_b: np.ndarray, weights: Sequence[float]
) -> np.ndarray:
    """The squared singular values of the weighted sum, up to its exact rank."""
    weight = np.repeat(weights, [block.stop - block.start for block in stacked.blocks])
    gram_b = weight[:, None] * gram_b * weight
    spectrum = metrics.squared_singular_values(gram_a, gram_b)
    # What rounding leaves of changes that cancel is no energy.
    rounding = 1e-14 * float(gram_a.diagonal() @ gram_b.diagonal())
    exact = min(len(gram_a), stacked.a.shape[1], stacked.b.shape[1])
    return np.where(spectrum > rounding, spectrum, 0)[:exact]


def _module_record(loras: Mapping[int, LoRA], matrices: Sequence[_Matrix]) -> Record:
    ranks, first = {i: lora.rank for i, lora in loras.items()}, next(iter(loras.values()))
    layers = metrics.by_layer(matrices, first.batch)
    return dataclasses.replace(
        _record(matrices, ranks, first.features),
        layers=tuple(_record(layer, ranks, first.features) for layer in layers),
    )


def _record(matrices: Sequence[_Matrix], ranks: Mapping[int, int], features: tuple[int, int] | None) -> Record:
    """Sums up matrices: those of a module, or all."""
    sources, n = tuple(ranks), 1 + max(ranks)
    gram, apart = np.zeros((n, n)), 0.0
    summed = np.zeros(max(len(matrix.sum_spectrum) for matrix in matrices))
    for matrix in matrices:
        gram[np.ix_(matrix.sources, matrix.sources)] += matrix.gram
        apart += float(np.square(matrix.weights) @ matrix.gram.diagonal())
        summed[: len(matrix.sum_spectrum)] += matrix.sum_spectrum
    norms = np.sqrt(np.maximum(gram.diagonal(), 0))
    together = float(summed.sum())
    conflict, error = _rate([(m.entries, m.signs.overall, m.signs.drawn) for m in matrices if len(m.sources) > 1])
    smallest, largest = min(norms[i] for i in sources), max(norms[i] for i in sources)
    return Record(
        features=features,
        count=len(matrices),
        sources=sources,
        ranks=tuple(ranks.values()),
        norms=tuple(float(norms[i]) for i in sources),
        norm_ratio=float(largest / smallest) if smallest > 0 else None,
        effective_ranks=tuple(
            _mean_effective_rank([m.spectra[i] for m in matrices if i in m.spectra]) for i in sources
        ),
        pairs=tuple(_pair(matrices, gram, (sources[i], sources[j])) for i, j in metrics.pairs(len(sources))),
        sign_conflict=conflict,
        sign_error=error,
        sum_norm=float(np.sqrt(together)),
        sum_effective_rank=_mean_effective_rank([matrix.sum_spectrum for matrix in matrices]),
        sum_energy_ratio=together / apart if apart > 0 else None,
        energy_by_rank=tuple(metrics.energy_at_rank({"": summed}, rank) for rank in range(1, len(summed) + 1)),
    )


def _pair(matrices: Sequence[_Matrix], gram: np.ndarray, pair: tuple[int, int]) -> Pair:
    both = [(matrix, matrix.pairs[pair]) for matrix in matrices if pair in matrix.pairs]
    left = [between for _, between in both if between.left.size]
    right = [between for _, between in both if between.right.size]
    conflict, error = _rate([(matrix.entries, between.conflict, matrix.signs.drawn) for matrix, between in both])
    shared = float(np.median(np.concatenate([between.right for between in right]))) if right else None
    i, j = pair
    length = np.sqrt(np.maximum(gram[i, i], 0)) * np.sqrt(np.maximum(gram[j, j], 0))
    return Pair(
        adapters=pair,
        cosine=float(np.clip(gram[i, j] / length, -1, 1)) if length > 0 else None,
        left_overlap=_mean([float(np.mean(between.left**2)) for between in left]),
        right_overlap=_mean([float(np.mean(between.right**2)) for between in right]),
        left_chance=_mean([between.left_chance for between in left]),
        right_chance=_mean([between.right_chance for between in right]),
        shared_a=shared,
        audit=None if shared is None else "collapsed" if shared > 0.9 else "separate" if shared < 0.5 else "between",
        sign_conflict=conflict,
        sign_error=error,
    )


def _rate(rates: Sequence[tuple[int, float, int]]) -> tuple[float, float] | tuple[None, None]:
    """A rate over all entries of several matrices and its standard error.

    Args:
        rates: The entries of a matrix, its rate, and how many entries were drawn, 0 for all.
    """
    entries = sum(size for size, _, _ in rates)
    if not entries:
        return None, None
    rate = sum(size * rate for size, rate, _ in rates) / entries
    variance = sum((size / entries) ** 2 * rate * (1 - rate) / drawn for size, rate, drawn in rates if drawn)
    return rate, float(np.sqrt(variance))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _mean_effective_rank(spectra: Sequence[np.ndarray]) -> float:
    """Over the matrices that are not 0."""
    return _mean([rank for spectrum in spectra if (rank := metrics.effective_rank(spectrum)) > 0]) or 0.0
