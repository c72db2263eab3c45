"""What adapters look like, from their factors alone. NumPy on the host: nothing to compile for a report."""

from collections.abc import Mapping

import numpy as np

from jaxmerge.base import Adapter, LoRA


def squared_singular_values(lora: LoRA) -> np.ndarray:
    """The squared singular values of a module's weight change, largest first.

    From the Gram matrices of the factors, in float64: good to about 1e-8 of the largest, which is enough to
    say how much of the energy a rank keeps, and costs two thin products.

    Args:
        lora: Factors ``[*batch, r, in]`` and ``[*batch, out, r]``.

    Returns:
        ``[*batch, r]``.
    """
    a, b = (np.asarray(factor).astype(np.float32) for factor in (lora.a, lora.b))
    gram_a = (a @ a.swapaxes(-1, -2)).astype(np.float64)
    gram_b = (b.swapaxes(-1, -2) @ b).astype(np.float64)
    values, vectors = np.linalg.eigh(gram_a)
    root = vectors * np.sqrt(np.maximum(values, 0))[..., None, :]
    squares = np.linalg.eigvalsh(root.swapaxes(-1, -2) @ gram_b @ root)
    return float(np.asarray(lora.scale)) ** 2 * np.maximum(squares[..., ::-1], 0)


def energy_at_rank(spectra: Mapping[str, np.ndarray], rank: int) -> float:
    """The fraction of the energy that the best approximation of a rank keeps, over all modules.

    Args:
        spectra: Module path -> squared singular values ``[*batch, r]``, largest first.
        rank: Of every module.

    Returns:
        A number in [0, 1]; 1 where there is no energy at all.
    """
    total = sum(squares.sum() for squares in spectra.values())
    kept = sum(squares[..., :rank].sum() for squares in spectra.values())
    return float(kept / total) if total > 0 else 1.0


def norms(adapter: Adapter) -> dict[str, float]:
    """The Frobenius norm of every module's weight change."""
    return {path: float(np.sqrt(squared_singular_values(lora).sum())) for path, lora in adapter.modules.items()}
