"""What adapters look like, from their factors alone. NumPy on the host: nothing to compile for a report."""

from collections.abc import Mapping

import numpy as np

from jaxmerge import lapack
from jaxmerge.base import Adapter, LoRA, is_finite


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
    values, vectors = np.linalg.eigh(gram_a)
    root = vectors * np.sqrt(np.maximum(values, 0))[..., None, :]
    squares = np.linalg.eigvalsh(root.swapaxes(-1, -2) @ gram_b @ root)
    return float(np.asarray(lora.scale)) ** 2 * np.maximum(squares[..., ::-1], 0)


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
