"""Merges of the tasks' singular directions, made orthogonal to each other: TSV-M and Iso-CTS."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.methods.tasks import Tasks, Weights
from jaxmerge.methods.weighted import Ranks, ranked_tasks, task_norms, tasks_present
from jaxmerge.spectrum import Spectrum, at_most, decompose, decompose_each, mean_value, polar
from jaxmerge.svd import matmul


def tsv(task_tensors: Tasks, weights: Weights, *, ranks: Ranks = None) -> Array:
    """TSV-Merge: the tasks' singular vectors side by side, made orthonormal, with the tasks' singular values.

    ``polar([U₁ … Uₙ]) · diag(S₁ … Sₙ) · polar([V₁ … Vₙ])ᵀ`` (TSV-M, arXiv:2412.00081).

    Each task brings as many directions as it has. The reference code takes ``min(p, q) / n`` of each: of a LoRA's
    weight change, most of those are null directions, which are arbitrary and yet push the others aside. For
    n adapters of one rank on their common core that is the same number, and so is the result. Directions that
    several tasks share are split between them and not doubled: two equal tasks give one of them.

    Args:
        task_tensors: n arrays ``[p, q]``, or one array ``[n, p, q]``.
        weights: ``[n]``, of any sign; they scale the tasks. The paper's λ for each; 1 in the paper.
        ranks: The rank of each task, static under jit; None: ``min(p, q)`` at most.

    Returns:
        ``[p, q]``, float32 or wider, of rank Σ ranks at most.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    return _tsv(*ranked_tasks(task_tensors, weights, ranks))


@functools.partial(jax.jit, static_argnames="ranks")
def _tsv(tasks: Array, ranks: tuple[int, ...]) -> Array:
    return _orthogonal(_side_by_side(decompose_each(tasks, most=ranks))).product()


def iso_cts(task_tensors: Tasks, weights: Weights, *, common_share: ArrayLike = 0.8, ranks: Ranks = None) -> Array:
    """Iso-CTS: leading directions of the sum and of what each task has beside them, orthonormal, of one size.

    With the sum of rank R (arXiv:2502.04959): the leading ``share · R`` directions of the sum, and an equal part
    of the rest for each task, the leading directions of ``t − U Uᵀ t``, where U holds the common ones on the left; both
    sides orthonormalised by their polar factors; all singular values replaced by their mean.

    R is the rank that the sum has. The reference code has ``min(p, q)``, which fills a LoRA's merge up with arbitrary
    null directions. As there, the common directions are so many that the rest divides evenly between the tasks.

    Args:
        task_tensors: n arrays ``[p, q]``, or one array ``[n, p, q]``.
        weights: ``[n]``, of any sign; they scale the tasks. The paper's λ for each; 1 in the paper.
        common_share: Of the rank, for the sum's directions, in [0, 1].
        ranks: The rank of each task, static under jit; None: ``min(p, q)`` at most.

    Returns:
        ``[p, q]``, float32 or wider, of rank Σ ranks at most.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    return _iso_cts(*ranked_tasks(task_tensors, weights, ranks), common_share)


@functools.partial(jax.jit, static_argnames="ranks")
def _iso_cts(tasks: Array, ranks: tuple[int, ...], common_share: ArrayLike) -> Array:
    scale, present = jnp.max(task_norms(tasks)), tasks_present(tasks)
    total = decompose(jnp.sum(tasks, axis=0), scale, most=sum(ranks))
    beside = total.rank - at_most(common_share, total.rank)
    each = jnp.round(beside / present)
    common = total.leading(total.rank - present * each)
    rest = tasks - matmul(common.u, matmul(common.u.T, tasks))
    own = [found.leading(each) for found in decompose_each(rest, scale, ranks)]
    together = _orthogonal(_side_by_side([common, *own]))
    return together.product(jnp.broadcast_to(mean_value(together.s), together.s.shape))


def _side_by_side(spectra: Sequence[Spectrum]) -> Spectrum:
    """Directions of several matrices as if they were of one; those of different ones are not orthogonal."""
    u, s, vt = zip(*spectra, strict=True)
    return Spectrum(jnp.concatenate(u, axis=1), jnp.concatenate(s), jnp.concatenate(vt))


def _orthogonal(found: Spectrum) -> Spectrum:
    return found._replace(u=polar(found.u), vt=polar(found.vt))
