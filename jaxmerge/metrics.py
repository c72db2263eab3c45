"""What adapters look like, from their factors alone. NumPy on the host: nothing to compile for a report.

Several adapters of one module are looked at through the Gram matrices of their stacked factors, R×R in float64:
products of two float32 numbers are exact there, so that they hold singular values down to about 1e-8 of the largest,
which is what a QR in float32 holds, for a tenth of its time.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from jaxmerge import lapack
from jaxmerge.base import Adapter, LoRA, is_finite
from jaxmerge.memory import release
from jaxmerge.sharding import seen_everywhere

T = TypeVar("T")

# Entries of a matrix whose signs are looked at: all up to a million, which is as many as a product makes in some
# hundredths of a second; of a larger one a sample, with a standard error of at most 0.6 %.
EXACT, SAMPLE = 2**20, 2**13
# Singular values of a factor with columns of unit length, below which it has no direction: the Gram matrix holds the
# others to 1e-6.
_NO_DIRECTION = 1e-5


def spectra(adapter: Adapter) -> dict[str, np.ndarray]:
    """The squared singular values of every module's weight change, largest first.

    Args:
        adapter: Of concrete arrays.

    Returns:
        Module path -> ``[*batch, r]``.
    """
    with lapack.single_threaded():
        return {path: _squared_singular_values(lora) for path, lora in adapter.modules.items()}


def _squared_singular_values(lora: LoRA) -> np.ndarray:
    """``[*batch, r]``, of factors ``[*batch, r, in]`` and ``[*batch, out, r]``.

    From the Gram matrices of the factors, in float64: good to about 1e-8 of the largest, which is enough to
    say how much of the energy a rank keeps, and costs two thin products.
    """
    a, b = (np.asarray(factor).astype(np.float32) for factor in (lora.a, lora.b))
    if not (is_finite(a) and is_finite(b)):
        return np.full((*lora.batch, lora.rank), np.nan)
    # In float64 where the squares of large numbers would leave float32.
    if max(np.abs(a).max(initial=0), np.abs(b).max(initial=0)) > 1e15:
        a, b = a.astype(np.float64), b.astype(np.float64)
    gram_a = (a @ a.swapaxes(-1, -2)).astype(np.float64)
    gram_b = (b.swapaxes(-1, -2) @ b).astype(np.float64)
    return float(np.asarray(lora.scale)) ** 2 * squared_singular_values(gram_a, gram_b)


def squared_singular_values(gram_a: np.ndarray, gram_b: np.ndarray) -> np.ndarray:
    """Those of ``b @ a``, largest first, from the Gram matrices of the factors.

    Args:
        gram_a: ``a @ a.T``, ``[*batch, r, r]``, float64.
        gram_b: ``b.T @ b``, ``[*batch, r, r]``, float64.

    Returns:
        ``[*batch, r]``.
    """
    # Rows of a of unit length, so that it does not matter which of the two factors is large.
    lengths = np.sqrt(np.diagonal(gram_a, axis1=-2, axis2=-1))
    lengths = np.where(lengths > 0, lengths, 1)
    both = lengths[..., :, None] * lengths[..., None, :]
    values, vectors = np.linalg.eigh(gram_a / both)
    root = vectors * np.sqrt(np.maximum(values, 0))[..., None, :]
    squares = np.linalg.eigvalsh(root.swapaxes(-1, -2) @ (gram_b * both) @ root)
    return np.maximum(squares[..., ::-1], 0)


def energy_at_rank(squared: Mapping[str, np.ndarray], rank: int) -> float:
    """The fraction of the energy that the best approximation of a rank keeps, over all modules.

    Args:
        squared: Module path -> squared singular values ``[*batch, r]``, largest first.
        rank: Of every module.

    Returns:
        A number in [0, 1]; 1 where there is no energy at all.
    """
    total = sum(squares.sum() for squares in squared.values())
    kept = sum(squares[..., :rank].sum() for squares in squared.values())
    return float(kept / total) if total > 0 else 1.0


def norms(adapter: Adapter) -> dict[str, float]:
    """The Frobenius norm of every module's weight change."""
    return {path: float(np.sqrt(squares.sum())) for path, squares in spectra(adapter).items()}


def effective_rank(squared: np.ndarray) -> float:
    """The participation ratio of the energies, ``(Σσ²)² / Σσ⁴``: r where r singular values are equal, 1 for one alone.

    Args:
        squared: Squared singular values, ``[r]``.

    Returns:
        A number in [1, r]; 0 where all are 0.
    """
    largest = squared.max(initial=0)
    if largest == 0:
        return 0.0
    shares = squared / largest
    return float(shares.sum() ** 2 / (shares**2).sum())


class Stack(NamedTuple):
    """The factors of n adapters for one matrix, one below the other, in float64.

    Attributes:
        a: ``[R, in]``.
        b: ``[R, out]``, transposed, times the adapters' scales.
        starts: Where each adapter's rows begin, ``[n]``.
    """

    a: np.ndarray
    b: np.ndarray
    starts: np.ndarray

    def block_sums(self, products: np.ndarray) -> np.ndarray:
        """The sums ``[n, n]`` of ``[R, R]`` numbers over the rows and columns of every two adapters."""
        return np.add.reduceat(np.add.reduceat(products, self.starts, axis=0), self.starts, axis=1)

    @property
    def blocks(self) -> list[slice]:
        """Each adapter's rows."""
        return [slice(start, end) for start, end in zip(self.starts, [*self.starts[1:], len(self.a)], strict=True)]


def stack(a: Sequence[np.ndarray], b: Sequence[np.ndarray], scales: Sequence[float]) -> Stack:
    """Puts the factors of n adapters together.

    Args:
        a: n of ``[r, in]``, of any ranks and float types.
        b: n of ``[out, r]``.
        scales: n numbers.

    Returns:
        The stack.
    """
    ends = np.cumsum([factor.shape[0] for factor in a])
    starts = np.concatenate([[0], ends[:-1]])
    below_b = np.empty((ends[-1], b[0].shape[0]))
    for start, end, factor, scale in zip(starts, ends, b, scales, strict=True):
        below_b[start:end] = factor.T
        below_b[start:end] *= scale
    return Stack(np.concatenate([factor.astype(np.float64) for factor in a]), below_b, starts)


def stack_at(loras: Iterable[LoRA], index: tuple[int, ...]) -> Stack:
    """The stack of one matrix of a module, by its index along the batch axes, in n adapters; arrays are NumPy's."""
    loras = list(loras)
    return stack(
        [np.asarray(lora.a)[index] for lora in loras],
        [np.asarray(lora.b)[index] for lora in loras],
        [float(lora.scale) for lora in loras],
    )


def as_numpy(lora: LoRA) -> LoRA:
    """A module's factors as NumPy has them, also of arrays that are spread over processes. Calls JAX."""
    a, b, scale = (np.asarray(seen_everywhere(leaf)) for leaf in (lora.a, lora.b, lora.scale))
    return LoRA(a, b, scale)


def give_back(loras: Iterable[LoRA]) -> None:
    """Gives back the memory of mapped factors that have been looked at."""
    for lora in loras:
        release(lora.a)
        release(lora.b)


def by_layer(matrices: Sequence[T], batch: tuple[int, ...]) -> list[Sequence[T]]:
    """What was found of each matrix of a module, by the index on its first batch axis; empty where it has none."""
    each = len(matrices) // batch[0] if batch else 0
    return [matrices[i : i + each] for i in range(0, len(matrices), each)] if batch else []


class Subspaces(NamedTuple):
    """What the spaces of one factor of n adapters have in common, pair by pair in the order of `pairs`.

    Attributes:
        cosines: Principal cosines of every pair, largest first: as many as the smaller space has dimensions.
        chance: What the mean of their squares would be for random subspaces of these dimensions.
    """

    cosines: tuple[np.ndarray, ...]
    chance: tuple[float, ...]


def pairs(n: int) -> list[tuple[int, int]]:
    """All pairs of n adapters, in order."""
    return list(itertools.combinations(range(n), 2))


def subspaces(gram: np.ndarray, blocks: Sequence[slice], features: int) -> Subspaces:
    """The principal cosines between the spaces that the adapters' rows of a stacked factor span.

    They are the singular values of ``V_iᵀ V_j``, where the columns of V are orthonormal and span such a space. What
    counts is the space: ``(B, A)`` and ``(B G, G⁻¹ A)`` give the same.

    Args:
        gram: The Gram matrix of the stacked rows, ``[R, R]``, float64.
        blocks: Each adapter's rows, n of them.
        features: The dimension of the space around them.

    Returns:
        The cosines; none where one of the two spaces is {0}.
    """
    bases = [_orthonormal(gram[block, block]) for block in blocks]
    cosines, chance = [], []
    for i, j in pairs(len(blocks)):
        between = bases[i].T @ gram[blocks[i], blocks[j]] @ bases[j]
        found = np.linalg.svd(between, compute_uv=False) if between.size else np.zeros(0)
        cosines.append(np.clip(found, 0, 1))
        chance.append(max(between.shape) / features)
    return Subspaces(tuple(cosines), tuple(chance))


def _orthonormal(gram: np.ndarray) -> np.ndarray:
    """``[r, k]``, what makes k orthonormal vectors of r vectors with a Gram matrix ``[r, r]``."""
    lengths = np.sqrt(gram.diagonal())
    unit = 1 / np.where(lengths > 0, lengths, 1)
    values, vectors = np.linalg.eigh(gram * unit * unit[:, None])
    keep = values > _NO_DIRECTION**2
    return unit[:, None] * vectors[:, keep] / np.sqrt(values[keep])


class Signs(NamedTuple):
    """How often weight changes differ in sign.

    Attributes:
        pairs: The fraction of entries in which the two of a pair do, in the order of `pairs`.
        overall: The fraction of entries in which any two do.
        drawn: How many entries were looked at; 0 for all of them, so that there is no error.
    """

    pairs: tuple[float, ...]
    overall: float
    drawn: int


def sign_conflicts(stacked: Stack, seed: int) -> Signs:
    """How often the weight changes of n adapters have opposite signs; an entry that is 0 agrees with any.

    An unbiased estimate from `SAMPLE` entries, whose rows and columns are drawn independently and with replacement,
    so that a rate p has the standard error √(p(1 - p) / `SAMPLE`). All entries are looked at where there are no more
    than `EXACT`. Unrelated changes differ in half of the entries: n of them, in ``1 - 2^(1 - n)``.

    Args:
        stacked: Of the adapters.
        seed: Of the draw.

    Returns:
        The rates.
    """
    a, b = stacked.a, stacked.b
    entries = a.shape[1] * b.shape[1]
    if entries <= EXACT:
        values = np.stack([(b[block].T @ a[block]).ravel() for block in stacked.blocks])
    else:
        rng = np.random.default_rng(seed)
        rows, columns = (rng.integers(factor.shape[1], size=SAMPLE) for factor in (b, a))
        values = np.stack([np.einsum("rk,rk->k", b[block][:, rows], a[block][:, columns]) for block in stacked.blocks])
    positive, negative = values > 0, values < 0
    rates = [np.mean((positive[i] & negative[j]) | (negative[i] & positive[j])) for i, j in pairs(len(values))]
    overall = np.mean(positive.any(axis=0) & negative.any(axis=0))
    return Signs(tuple(map(float, rates)), float(overall), 0 if entries <= EXACT else SAMPLE)
