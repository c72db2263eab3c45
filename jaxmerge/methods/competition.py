"""Means weighted by how entries compete within and across tasks: PCB-Merging (arXiv:2410.02396)."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.consensus import sum_tasks
from jaxmerge.methods.tasks import Tasks, Weights, weigh, with_count
from jaxmerge.selection import cut_largest, flat_index
from jaxmerge.sparsify import Density, times

# Of what is kept at all, the least that it counts for.
_LEAST_SHARE = 2.0**-23


def pcb(task_tensors: Tasks, weights: Weights, density: ArrayLike | Density = 0.2) -> Array:
    """PCB: score each entry of each task, drop the low scores, average the rest by them (arXiv:2410.02396).

    An entry's score is ``exp(n · norm(|t|)²) · tanh(t · Σt)``: how large it is among the entries of its task (norm maps
    them to [0, 1]), and how far it goes with the sum of all tasks. The ``int(density * N)`` best of each task are kept;
    their scores, mapped to [0, 1], are the coefficients βᵢ of the mean ``Σ βᵢ wᵢ tᵢ / Σ βᵢ``. The weights wᵢ are the
    paper's λᵢ: they neither score nor divide.

    This is the authors' code, whose score is not that of the formulas in the paper, without its clipping of magnitudes
    at the 0.01 % quantiles. The lowest score that is kept, which becomes 0 there, counts for a rounding error here:
    what only one task keeps is that task's.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Fraction of each task's entries to keep, with the paper's default. It keeps 0.05 to 0.2 of fully
            fine-tuned weights; more has been kept of LoRA deltas (0.6, in the code of arXiv:2606.03723).

    Returns:
        ``[...]``, float32 or wider; 0 where no task keeps the entry.

    Raises:
        ValueError: If shapes or counts do not match, or the density is negative.
    """
    return _pcb(*with_count(task_tensors, weights, density))


@jax.jit
def _pcb(tasks: Array, weights: Array, count: Array) -> Array:
    n, axes = tasks.shape[0], tuple(range(1, tasks.ndim))
    one = jnp.ones((), tasks.dtype)

    def stretched(x: Array, low: Array) -> Array:
        """From [low, the largest of each task] to [0, 1]; 0 where the two are equal."""
        width = jnp.max(x, axes, keepdims=True) - low
        return (x - low) / jnp.where(width > 0, width, one)

    magnitudes = jnp.abs(tasks)
    within = stretched(magnitudes, jnp.min(magnitudes, axes, keepdims=True))
    within = times(within, within)
    # All scores of a task are lower by e^(n/2), which goes as they are stretched: float32 holds those of 170 tasks.
    scores = jnp.exp(n * (within - one / 2)) * jnp.tanh(tasks * sum_tasks(tasks))
    ranked = _ranked(scores)
    kept = cut_largest(ranked, count, batch=1).keeps(ranked, flat_index(tasks.shape[1:]))
    lowest = jnp.min(jnp.where(kept, scores, jnp.max(scores, axes, keepdims=True)), axes, keepdims=True)
    shares = jnp.where(kept, jnp.maximum(stretched(scores, lowest), _LEAST_SHARE), jnp.zeros_like(scores))
    divisor = sum_tasks(shares)
    return sum_tasks(times(shares, weigh(tasks, weights))) / jnp.where(divisor > 0, divisor, one)


def _ranked(scores: Array) -> Array:
    """Positive numbers in the order of the scores. To add a number to these would make the small ones equal."""
    unsigned = jnp.dtype(f"uint{8 * scores.dtype.itemsize}")
    magnitude = lax.bitcast_convert_type(jnp.abs(scores), unsigned) >> 1
    middle = jnp.asarray(1 << (8 * unsigned.itemsize - 2), unsigned)
    ordered = jnp.where(scores < 0, middle - magnitude, middle + magnitude)
    return lax.bitcast_convert_type(ordered, scores.dtype)
