"""Merges that give singular values other sizes: Iso-C, Subspace Boosting, STAR, CART."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.methods.tasks import Tasks, Weights
from jaxmerge.methods.weighted import Ranks, ranked_tasks, task_norms, tasks_present
from jaxmerge.spectrum import at_least, decompose, decompose_each, mean_value


def iso_c(task_tensors: Tasks, weights: Weights, *, ranks: Ranks = None) -> Array:
    """Iso-C: the sum, with all its singular values replaced by their mean (arXiv:2502.04959).

    The mean is over the rank that the sum has, and so are the directions. The reference code takes it over
    ``min(p, q)``: for LoRAs of rank R in sum that makes each value ``R / min(p, q)`` as large, and gives the same
    value to ``min(p, q) − R`` null directions, which are arbitrary. On the common core of the adapters both agree.

    Args:
        task_tensors: n arrays ``[p, q]``, or one array ``[n, p, q]``.
        weights: ``[n]``, of any sign; they scale the tasks. The paper's λ for each; 1 in the paper.
        ranks: The rank of each task, static under jit; None: ``min(p, q)`` at most.

    Returns:
        ``[p, q]``, float32 or wider. Its spectrum is flat, so a truncation to rank k keeps no more than ``k / R`` of
        its energy.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    return _iso_c(*ranked_tasks(task_tensors, weights, ranks))


@functools.partial(jax.jit, static_argnames="ranks")
def _iso_c(tasks: Array, ranks: tuple[int, ...]) -> Array:
    total = decompose(jnp.sum(tasks, axis=0), jnp.max(task_norms(tasks)), most=sum(ranks))
    return total.product(jnp.broadcast_to(mean_value(total.s), total.s.shape))


def subspace_boosting(task_tensors: Tasks, weights: Weights, *, beta: ArrayLike = 0.01, ranks: Ranks = None) -> Array:
    """Subspace Boosting: the sum, with small singular values raised to a larger one (arXiv:2506.16506).

    Raised to the first of them at which the sum of the values so far, largest first, comes to ``beta`` of all. With
    the paper's 0.01 that is the largest one for fewer than a hundred directions: all values are made equal to it.

    Null directions stay null. The reference code raises them too, which for a LoRA's merge makes up most of it.

    Args:
        task_tensors: n arrays ``[p, q]``, or one array ``[n, p, q]``.
        weights: ``[n]``, of any sign; they scale the tasks. The paper's task arithmetic has λ for each.
        beta: Of the sum of singular values, in [0, 1]; at 1 nothing is raised.
        ranks: The rank of each task, static under jit; None: ``min(p, q)`` at most.

    Returns:
        ``[p, q]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    return _subspace_boosting(*ranked_tasks(task_tensors, weights, ranks), beta)


@functools.partial(jax.jit, static_argnames="ranks")
def _subspace_boosting(tasks: Array, ranks: tuple[int, ...], beta: ArrayLike) -> Array:
    total = decompose(jnp.sum(tasks, axis=0), jnp.max(task_norms(tasks)), most=sum(ranks))
    reached = _sum_before(total.s) + total.s >= jnp.asarray(beta, tasks.dtype) * jnp.sum(total.s)
    least = jnp.max(jnp.where(reached, total.s, 0))
    return total.product(jnp.maximum(total.s, least))


def star(task_tensors: Tasks, weights: Weights, *, eta: ArrayLike = 0.4, ranks: Ranks = None) -> Array:
    """STAR: of each task the leading directions, scaled to the sum of singular values it had, then the sum.

    As few directions as hold ``eta`` of the task's nuclear norm, the sum of its singular values
    (arXiv:2502.10339). The paper averages the tasks: weights of 1/n, the default.

    Args:
        task_tensors: n arrays ``[p, q]``, or one array ``[n, p, q]``.
        weights: ``[n]``, of any sign; they scale the tasks.
        eta: Of the nuclear norm, in (0, 1]; at 1 the tasks stay as they are.
        ranks: The rank of each task, static under jit; None: ``min(p, q)`` at most.

    Returns:
        ``[p, q]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    return _star(*ranked_tasks(task_tensors, weights, ranks), eta)


@functools.partial(jax.jit, static_argnames="ranks")
def _star(tasks: Array, ranks: tuple[int, ...], eta: ArrayLike) -> Array:
    merged = jnp.zeros_like(tasks[0])
    for task in decompose_each(tasks, most=ranks):
        nuclear = jnp.sum(task.s)
        kept = task.kept(_sum_before(task.s) < jnp.asarray(eta, tasks.dtype) * nuclear)
        held = jnp.sum(kept.s)
        merged += kept.product(kept.s * (nuclear / jnp.where(held > 0, held, 1)))
    return merged


def cart(
    task_tensors: Tasks,
    weights: Weights,
    *,
    rank_share: ArrayLike = 0.08,
    strength: ArrayLike = 1.0,
    ranks: Ranks = None,
) -> Array:
    """CART: the mean, and the leading directions of what each task has beside it.

    ``mean + strength · Σ SVD_k(tᵢ − mean)`` (arXiv:2412.12153). The mean is within: weights of 1 are the paper's, with
    its λ as the strength. It finds 8 % of the rank best, which is the default.

    A task's k is the share, rounded up, of the rank that ``tᵢ − mean`` has, where the reference code has
    ``min(p, q)``: for LoRAs, that is their ranks together. Tasks of zeros, or of weight 0, count in no mean.

    Args:
        task_tensors: n arrays ``[p, q]``, or one array ``[n, p, q]``.
        weights: ``[n]``, of any sign; they scale the tasks.
        rank_share: Of the rank, in [0, 1]. At 0 the result is the mean, and so it is at 1: the deviations add up to 0.
        strength: Of the deviations.
        ranks: The rank of each task, static under jit; None: ``min(p, q)`` at most.

    Returns:
        ``[p, q]``, float32 or wider.

    Raises:
        ValueError: If shapes or counts do not match.
    """
    return _cart(*ranked_tasks(task_tensors, weights, ranks), rank_share, strength)


@functools.partial(jax.jit, static_argnames="ranks")
def _cart(tasks: Array, ranks: tuple[int, ...], rank_share: ArrayLike, strength: ArrayLike) -> Array:
    mean = jnp.sum(tasks, axis=0) / tasks_present(tasks)
    there = jnp.any(tasks != 0, axis=(1, 2), keepdims=True)
    most = (sum(ranks),) * len(ranks)
    deviations = decompose_each(jnp.where(there, tasks - mean, 0), jnp.max(task_norms(tasks)), most)
    merged = jnp.zeros_like(mean)
    for deviation in deviations:
        merged += deviation.leading(at_least(rank_share, deviation.rank)).product()
    return mean + jnp.asarray(strength, tasks.dtype) * merged


def _sum_before(s: Array) -> Array:
    """For each of ``[k]``, the sum of those before it."""
    return jnp.concatenate([jnp.zeros_like(s[:1]), jnp.cumsum(s)[:-1]])
