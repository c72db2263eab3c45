"""Select, calculate, erase: the merge of FuseChat (arXiv:2408.07990)."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxmerge.base import Array
from jaxmerge.consensus import SignMethod, sum_tasks
from jaxmerge.methods.sign_consensus import Election, checked_choices, elect
from jaxmerge.methods.tasks import Tasks, Weights, sum_entries, weigh, with_count
from jaxmerge.selection import cut_largest, flat_index
from jaxmerge.sparsify import Density, times


def sce(
    task_tensors: Tasks,
    weights: Weights,
    density: ArrayLike | Density = 0.1,
    majority_sign_method: SignMethod = "total",
    *,
    election: Election = "unweighted",
) -> Array:
    """SCE: keep the entries that vary most across tasks, weigh tasks by their energy, erase minority signs.

    From FuseChat (arXiv:2408.07990). (1) The ``int(density * N)`` entries of largest variance over the tasks are
    selected; of a single task, which has none, its largest. (2) A task's coefficient ωᵢ is the mean square of its
    selected entries. (3) At each entry the sign of the tasks' sum is elected, and the result is
    ``Σ ωᵢ wᵢ tᵢ / Σ ωᵢ`` over the tasks that carry it. The paper has no weights wᵢ; here they scale what a task
    brings and neither vote, unless that is chosen, nor divide, as in `jaxmerge.ties`.

    mergekit makes all ωᵢ equal where the mean squares add up to less than 1e-6, which those of most LoRA deltas do.

    Args:
        task_tensors: n arrays of one shape, or one array ``[n, ...]``.
        weights: ``[n]``, of any sign.
        density: Fraction of the entries to select, with the paper's default.
        majority_sign_method: ``"total"`` or ``"frequency"``; see `jaxmerge.calculate_majority_sign_mask`.
        election: Of what the sign is elected; see `jaxmerge.methods.sign_consensus.agree`.

    Returns:
        ``[...]``, float32 or wider; 0 where nothing is selected or carries the sign.

    Raises:
        ValueError: If shapes or counts do not match, the density is negative, or a choice unknown.
    """
    checked_choices(majority_sign_method, election)
    return _sce(*with_count(task_tensors, weights, density), majority_sign_method, election)


@functools.partial(jax.jit, static_argnames=("method", "election"))
def _sce(tasks: Array, weights: Array, count: Array, method: SignMethod, election: Election) -> Array:
    n, shape = tasks.shape[0], tasks.shape[1:]
    deviations = tasks - sum_tasks(tasks) / n if n > 1 else tasks
    ranked = sum_tasks(times(deviations, deviations))
    selected = cut_largest(ranked, count).keeps(ranked, flat_index(shape))
    tasks = jnp.where(selected, tasks, jnp.zeros_like(tasks))
    # Only their ratios matter: those of means are those of sums.
    energy = sum_entries(times(tasks, tasks))
    total = jnp.sum(energy)
    coefficients = energy / jnp.where(total > 0, total, jnp.ones_like(total))
    weighed = weigh(tasks, weights)
    mask = elect(tasks, weighed, method, election)
    each = jnp.where(mask, coefficients.reshape(n, *(1,) * len(shape)), jnp.zeros_like(tasks))
    divisor = sum_tasks(each)
    terms = jnp.where(mask, weigh(weighed, coefficients), jnp.zeros_like(tasks))
    return sum_tasks(terms) / jnp.where(divisor > 0, divisor, jnp.ones_like(divisor))
